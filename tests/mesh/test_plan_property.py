"""The read plan against holders that are slow, unsteady, dying, silent or without what they are said to have."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmesh.transport.limits import FETCH_FAILED_HOLDERS_MAX, PLAN_HEDGE_BYTES_MAX
from tests.mesh.plan_world import SimHolder, World

RATES = st.floats(1e6, 4e9)
NEVER = float("inf")
SIZES = st.sampled_from([4096, 65536, 1 << 20])


@st.composite
def unreliable(draw: st.DrawFn) -> SimHolder:
    """A holder of which anything may be wrong."""
    when = st.just(NEVER) | st.floats(0, 0.3)
    starts = draw(st.lists(st.integers(0, 60), max_size=3, unique=True).map(sorted))
    spans = None if not starts else tuple(range(a, b) for a, b in zip(starts, [*starts[1:], 80], strict=True))
    return SimHolder(
        draw(RATES),
        draw(st.floats(0, 0.1)),
        told=draw(st.none() | RATES),
        spans=spans,
        not_held=draw(st.just(frozenset[int]()) | st.frozensets(st.integers(0, 79), max_size=10)),
        dies_at=draw(when),
        stalls_at=draw(when),
        jitter=draw(st.lists(st.floats(0.1, 20), min_size=1, max_size=5)),
    )


def clipped(holder: SimHolder, chunks: int) -> SimHolder:
    if holder.spans is not None:
        holder.spans = tuple(range(s.start, min(s.stop, chunks)) for s in holder.spans if s.start < chunks)
    return holder


@pytest.mark.slow  # a hundred plans and more
@settings(max_examples=150, deadline=None)
@given(st.integers(1, 80), st.lists(unreliable(), min_size=1, max_size=5), st.floats(0.01, 2.0), SIZES)
def test_whatever_holders_do(chunks: int, holders: list[SimHolder], deadline: float, size: int) -> None:
    world = World(chunks, [clipped(h, chunks) for h in holders], deadline=deadline, size=size).run()
    assert world.finished_at <= deadline
    assert world.commits.keys() | world.lost.keys() == set(range(chunks))
    assert not world.commits.keys() & world.lost.keys()
    asked = Counter(chunk for _, start in world.starts for chunk in start.chunks)
    hedged = {chunk for _, start in world.starts if start.hedge for chunk in start.chunks}
    assert sum(start.hedge for _, start in world.starts) <= 1
    assert len(hedged) <= max(1, PLAN_HEDGE_BYTES_MAX // size)
    for chunk, times in asked.items():
        assert times <= 1 + (chunk in hedged) + world.failures[chunk]
        assert times <= 1 + (chunk in hedged) + FETCH_FAILED_HOLDERS_MAX
    for _, start in world.starts:
        spans = holders[start.holder].spans
        assert spans is None or all(any(chunk in span for span in spans) for chunk in start.chunks)
    # Beyond the chunks themselves, bytes are spent on the hedge, and on what a holder was at when it was left: what is
    # on its way meanwhile, for half a round trip in each direction and one chunk.
    again = sum(holder.served for holder in holders) - len(world.commits)
    under_way = sum(
        2 + holders[start.holder].rtt_s * holders[start.holder].bytes_per_s / size / min(holders[start.holder].jitter)
        for _, start in world.starts
        if any(cancel.read == start.read for _, cancel in world.cancels)
    )
    assert again <= len(hedged) + under_way + sum(1 for h in holders if h.dies_at < NEVER or h.stalls_at < NEVER) * (
        2 + max(h.rtt_s * h.bytes_per_s / size / min(h.jitter) for h in holders)
    )


@pytest.mark.slow  # a hundred plans and more
@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 400),
    st.lists(st.tuples(st.floats(1e7, 4e9), st.floats(0, 0.02)), min_size=1, max_size=6),
    SIZES,
)
def test_with_honest_constant_rates_a_plan_is_near_the_optimum(
    chunks: int, honest: list[tuple[float, float]], size: int
) -> None:
    world = World(chunks, [SimHolder(rate, rtt, told=rate) for rate, rtt in honest], size=size).run()
    assert len(world.commits) == chunks
    assert not world.cancels
    optimum = chunks * size / sum(rate for rate, _ in honest)
    # One chunk cannot be divided, and no read is shorter than its round trip and the shortest share.
    least = max(rtt for _, rtt in honest) + 0.004 + size / max(rate for rate, _ in honest)
    assert world.finished_at <= 1.3 * optimum + 2 * least


@pytest.mark.slow  # a hundred plans and more
@settings(max_examples=60, deadline=None)
@given(st.integers(64, 512), st.floats(1e7, 4e9), st.floats(0, 0.005), st.booleans())
def test_two_equal_holders_give_nearly_twice_the_rate(chunks: int, rate: float, rtt_s: float, known: bool) -> None:
    told = rate if known else None
    size = 1 << 20
    one = World(chunks, [SimHolder(rate, rtt_s, told=told)], size=size).run().finished_at
    two = World(chunks, [SimHolder(rate, rtt_s, told=told) for _ in range(2)], size=size).run().finished_at
    if chunks * size / rate > 60 * max(rtt_s, 0.002):  # else the round trips are a part of it that no holder shares
        assert one / two >= 0.9 * 2


@pytest.mark.slow  # a hundred plans and more
@settings(max_examples=100, deadline=None)
@given(st.integers(1, 100), st.lists(unreliable(), min_size=1, max_size=3), st.integers(0, 3))
def test_beside_one_that_is_sound_no_more_than_two_may_spoil_a_chunk(
    chunks: int, others: list[SimHolder], place: int
) -> None:
    sound = SimHolder(1e9, 0.001, told=1e9)
    holders = [clipped(h, chunks) for h in others]
    holders.insert(min(place, len(holders)), sound)
    world = World(chunks, holders, deadline=30.0).run()
    spoilt = [chunk for chunk in range(chunks) if world.failures[chunk] >= FETCH_FAILED_HOLDERS_MAX]
    assert len(world.commits) == chunks or spoilt
    if not spoilt:
        assert not world.lost
