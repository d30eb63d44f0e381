"""Rates: what reads tell of a path, and what they do not."""

from __future__ import annotations

import pytest

from kvmesh.rates import Path, Rates
from kvmesh.transport.limits import RATE_PATHS_MAX, RATE_STALE_S

MIB = 1 << 20
A = Path("a", "zmq")


def read(rates: Rates, bytes_per_s: float, *, start: float, chunks: int = 16, path: Path = A) -> float:
    """A read of so many MiB at a constant rate; when it ends."""
    rates.began(path, start)
    for chunk in range(1, chunks + 1):
        rates.answered(path, MIB, start + chunk * MIB / bytes_per_s)
    end = start + chunks * MIB / bytes_per_s
    rates.ended(path, end)
    return end


def test_nothing_is_known_at_first() -> None:
    rates = Rates()
    assert rates.bytes_per_s(A, 1.0) is None
    assert rates.one_more(A, 1.0) is None
    assert rates.rtt_s(A, None) == 0.0
    assert rates.rtt_s(A, 0.25) == 0.25
    assert rates.document(1.0) == []


def test_a_constant_rate_is_found() -> None:
    rates = Rates()
    end = read(rates, 1e8, start=1.0)
    assert rates.bytes_per_s(A, end) == pytest.approx(1e8)
    assert rates.bytes_per_s(Path("a", "shm"), end) is None, "another path"


def test_reads_at_the_same_time_add_up() -> None:
    """Two reads that get 50 MB/s each: the path gives 100 MB/s, and a third read may expect a third of it."""
    rates = Rates()
    rates.began(A, 1.0)
    rates.began(A, 1.0)
    for chunk in range(1, 17):
        rates.answered(A, MIB, 1.0 + chunk * MIB / 5e7)
        rates.answered(A, MIB, 1.0 + chunk * MIB / 5e7)
    rate = rates.bytes_per_s(A, 1.4)
    assert rate == pytest.approx(1e8, rel=0.01)
    assert rates.one_more(A, 1.4) == pytest.approx(rate / 3)
    rates.ended(A, 1.4)
    rates.ended(A, 1.4)
    assert rates.one_more(A, 1.4) == rate


def test_time_between_reads_does_not_count() -> None:
    rates = Rates()
    for start in (1.0, 5.0, 9.0):
        end = read(rates, 1e8, start=start)
    assert rates.bytes_per_s(A, end) == pytest.approx(1e8, rel=0.01)


def test_a_read_that_is_too_short_tells_nothing() -> None:
    rates = Rates()
    rates.began(A, 1.0)
    rates.answered(A, 1000, 1.01)
    rates.ended(A, 1.02)
    assert rates.bytes_per_s(A, 1.02) is None
    rates.began(A, 2.0)
    rates.answered(A, 64 * MIB, 2.0001)
    rates.ended(A, 2.0001)
    assert rates.bytes_per_s(A, 2.1) is None


def test_few_bytes_in_a_long_time_tell_as_well() -> None:
    rates = Rates()
    rates.began(A, 1.0)
    rates.answered(A, 1000, 2.0)
    assert rates.bytes_per_s(A, 2.0) == pytest.approx(1000)


def test_a_peer_that_does_not_deliver_counts_as_slow() -> None:
    """Half a second for nothing: less than a chunk in that time."""
    rates = Rates()
    rates.began(A, 1.0)
    rates.ended(A, 1.5, late_bytes=MIB)
    assert rates.bytes_per_s(A, 1.5) == pytest.approx(2 * MIB)


def test_one_late_read_outweighs_many_fast_ones() -> None:
    rates = Rates()
    end = read(rates, 1e9, start=1.0, chunks=100)
    rates.began(A, end)
    rates.ended(A, end + 1.0, late_bytes=MIB)
    rate = rates.bytes_per_s(A, end + 1.0)
    assert rate is not None
    assert rate < 4 * MIB


def test_a_read_that_failed_is_not_slow() -> None:
    rates = Rates()
    end = read(rates, 1e9, start=1.0)
    rates.began(A, end)
    rates.ended(A, end + 5.0)
    assert rates.bytes_per_s(A, end + 5.0) == pytest.approx(1e9)


def test_an_old_estimate_is_none_and_the_next_sample_counts_alone() -> None:
    rates = Rates()
    rates.began(A, 1.0)
    rates.ended(A, 2.0, late_bytes=MIB)
    old = 2.0 + RATE_STALE_S
    assert rates.bytes_per_s(A, old) is not None
    assert rates.bytes_per_s(A, old + 1) is None
    rates.began(A, old + 1)
    rates.answered(A, 10 * MIB, old + 1.01)
    rates.ended(A, old + 1.01)
    assert rates.bytes_per_s(A, old + 1.01) == pytest.approx(1000 * MIB, rel=0.01)


def test_the_round_trip_is_that_of_the_first_answer_and_no_longer_than_membership_says() -> None:
    rates = Rates()
    rates.began(A, 1.0)
    rates.answered(A, 0, 1.02)
    rates.answered(A, 0, 1.5)
    rates.ended(A, 1.5)
    assert rates.rtt_s(A, None) == pytest.approx(0.02)
    assert rates.rtt_s(A, 0.001) == 0.001
    rates.began(A, 2.0)
    rates.answered(A, 0, 2.01)
    assert rates.rtt_s(A, None) == pytest.approx(0.01)
    rates.began(A, 3.0)
    rates.answered(A, 0, 3.9)
    assert rates.rtt_s(A, None) == pytest.approx(0.01), "it was not alone: the answer may have waited for the other"


def test_a_bandwidth_is_measured_without_the_round_trip() -> None:
    rates = Rates()
    rates.began(A, 1.0)
    rates.answered(A, 0, 1.1)
    rates.ended(A, 1.1)
    rates.began(A, 2.0)
    rates.answered(A, 10 * MIB, 2.2)
    assert rates.bytes_per_s(A, 2.2) == pytest.approx(100 * MIB)


def test_paths_are_bounded_and_the_one_used_longest_ago_goes() -> None:
    rates = Rates()
    end = read(rates, 1e9, start=1.0)
    for number in range(RATE_PATHS_MAX - 1):
        rates.began(Path(str(number), "zmq"), 2.0)
        if number == 5:
            rates.began(A, 2.0)
    assert len(rates.document(2.0)) == RATE_PATHS_MAX
    rates.began(Path("one more", "zmq"), 2.0)
    assert len(rates.document(2.0)) == RATE_PATHS_MAX
    assert rates.bytes_per_s(A, end) is not None
    gone = Path("0", "zmq")
    assert gone.peer not in {row["peer"] for row in rates.document(2.0)}
    rates.answered(gone, MIB, 3.0)
    rates.ended(gone, 3.0)


def test_the_document_says_what_is_known() -> None:
    rates = Rates()
    end = read(rates, 1e8, start=1.0)
    rates.began(Path("b", "shm"), end)
    rows = rates.document(end + 2)
    assert [(row["peer"], row["backend"], row["reads"]) for row in rows] == [("a", "zmq", 0), ("b", "shm", 1)]
    assert rows[0]["bytes_per_s"] == pytest.approx(1e8)
    assert rows[0]["bytes"] == 16 * MIB
    assert rows[0]["age_s"] == pytest.approx(2.0)
    assert (rows[1]["bytes_per_s"], rows[1]["age_s"], rows[1]["rtt_s"]) == (None, None, None)


def test_reads_that_are_given_up_together_say_once_how_slow_the_path_was() -> None:
    """A plan gives up all its reads in one go, microseconds apart: the second one saw no time of its own."""
    rates = Rates()
    for _ in range(2):
        rates.began(A, 1.0)
    rates.ended(A, 2.0, late_bytes=MIB)
    rates.ended(A, 2.000005, late_bytes=MIB)
    assert rates.bytes_per_s(A, 2.1) == pytest.approx(MIB)
