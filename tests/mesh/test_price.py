"""The price: closed forms against the sums they stand for."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmesh.price import Stretch, crossover_tokens, fetch_s, prefill_s, worth

MIB = 1 << 20
RATES = st.floats(1e5, 1e12)


def test_a_fetch_is_a_round_trip_and_its_bytes() -> None:
    assert fetch_s(100 * MIB, MIB, 0.5) == 100.5
    assert fetch_s(100 * MIB, None, 0.5) == 0.5
    assert prefill_s(8192, 4096) == 2.0


@pytest.mark.parametrize(
    ("bytes_per_s", "rtt_s", "prefill", "expected"),
    [
        (1e9, 0.0, 8000, 256),  # any length wins
        (1e9, 0.1, 8000, 4096),  # each chunk wins 6.4 ms of the 100 that the round trip costs
        (8e8, 0.1, 8000, None),  # a token takes as long to fetch as to compute
        (1e8, 0.0, 8000, None),
    ],
)
def test_the_crossover(bytes_per_s: float, rtt_s: float, prefill: float, expected: int | None) -> None:
    assert crossover_tokens(1e5, bytes_per_s, rtt_s, prefill, 256) == expected


@settings(max_examples=50)
@given(st.floats(1e3, 1e6), RATES, st.floats(0, 1), st.floats(10, 1e6), st.sampled_from([16, 256]))
def test_from_the_crossover_on_fetching_is_faster_and_before_it_is_not(
    kv_bytes: float, bytes_per_s: float, rtt_s: float, prefill: float, chunk_tokens: int
) -> None:
    found = crossover_tokens(kv_bytes, bytes_per_s, rtt_s, prefill, chunk_tokens)

    def wins(tokens: int) -> bool:
        return fetch_s(tokens * kv_bytes, bytes_per_s, rtt_s) < prefill_s(tokens, prefill) * (1 - 1e-9)

    if found is None:
        assert not any(wins(chunk_tokens << k) for k in range(20))
    else:
        assert found % chunk_tokens == 0
        assert fetch_s(2 * found * kv_bytes, bytes_per_s, rtt_s) < prefill_s(2 * found, prefill) * (1 + 1e-9)
        assert found == chunk_tokens or not wins(found - chunk_tokens)


def ask(
    *stretches: Stretch, rtt_s: float = 0.0, prefill: float | None = 8192.0, left_s: float = 10.0, size: int = MIB
) -> int:
    return worth(
        stretches,
        chunk_bytes=size,
        chunk_tokens=256,
        rtt_s=rtt_s,
        prefill_tokens_per_s=prefill,
        left_s=left_s,
    )


@pytest.mark.parametrize("chunks", [1, 100])
def test_what_is_not_known_speaks_for_the_fetch(chunks: int) -> None:
    assert ask(Stretch(chunks, None)) == chunks
    assert ask(Stretch(chunks, 1e9), prefill=None) == chunks
    assert ask(Stretch(chunks, None), prefill=None) == chunks


def test_computing_wins_over_a_slow_link() -> None:
    """A chunk takes 31 ms to compute, and 105 ms to fetch at 10 MB/s."""
    assert ask(Stretch(50, 1e7)) == 0
    assert ask(Stretch(50, 1e8)) == 50
    assert ask() == 0


def test_a_fetch_must_win_by_a_margin() -> None:
    """At 34.9 MB/s a chunk takes 30 ms of the 31.25 that computing takes."""
    assert ask(Stretch(50, MIB / 0.030)) == 0
    assert ask(Stretch(50, MIB / 0.024)) == 50


def test_a_short_prefix_is_not_worth_a_long_round_trip() -> None:
    assert ask(Stretch(3, 1e9), rtt_s=0.1) == 0
    assert ask(Stretch(20, 1e9), rtt_s=0.1) == 20


def test_only_the_stretches_that_pay_are_fetched() -> None:
    assert ask(Stretch(10, 1e9), Stretch(10, 1e7)) == 10
    assert ask(Stretch(10, 1e9), Stretch(10, 4e7), Stretch(80, 1e9)) == 100, "the slow middle is paid by what follows"


def test_what_would_come_after_the_deadline_does_not_count() -> None:
    """105 ms a chunk, or half of that with luck: 9 in half a second."""
    assert ask(Stretch(50, 1e7), prefill=None, left_s=0.5) == 9
    assert ask(Stretch(50, 1e6), prefill=None, left_s=0.5) == 0
    assert ask(Stretch(50, None), prefill=None, rtt_s=0.6, left_s=0.5) == 0
    assert ask(Stretch(20, 1e9), prefill=800.0, rtt_s=0.4, left_s=0.4) == 0


@settings(max_examples=50)
@given(
    st.lists(st.tuples(st.integers(1, 50), st.none() | RATES), max_size=6),
    st.floats(0, 1),
    st.none() | st.floats(1, 1e6),
    st.floats(0, 10),
)
def test_the_answer_lies_within_the_chain(
    stretches: list[tuple[int, float | None]], rtt_s: float, prefill: float | None, left_s: float
) -> None:
    found = ask(*[Stretch(*s) for s in stretches], rtt_s=rtt_s, prefill=prefill, left_s=left_s)
    assert 0 <= found <= sum(count for count, _ in stretches)
