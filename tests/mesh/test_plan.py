"""The read plan, case by case: who is asked for what, and what happens when they do not deliver."""

from __future__ import annotations

import itertools

import pytest

from kvmesh.plan import ReadPlan
from kvmesh.steps import (
    Begin,
    Cancel,
    Commit,
    Ended,
    Fate,
    Finish,
    Held,
    Holder,
    Landed,
    Lose,
    Missed,
    NoRoom,
    Start,
    Tick,
    Wake,
)
from kvmesh.transport.limits import PLAN_LATE_S_MIN
from tests.mesh.plan_world import MIB, SimHolder, World

G = 1e9


def started(world: World, holder: int) -> list[int]:
    """The chunks that a holder was asked for."""
    return [chunk for _, start in world.starts if start.holder == holder for chunk in start.chunks]


def test_one_holder_gets_everything_in_few_reads_each_begun_before_the_last_is_done() -> None:
    for told in (None, 2e9, 5e8):
        world = World(1500, [SimHolder(G, told=told)]).run()
        sizes = [len(start.chunks) for _, start in world.starts]
        assert sizes == [128, 512, 512, 348]
        assert started(world, 0) == list(range(1500))
        asked = itertools.accumulate(sizes)
        for (at, _), before in zip(world.starts[1:], asked, strict=False):
            landed = sum(when <= at for when in world.commits.values())
            assert 0 < before - landed < 512, "some of a read is still to come"
        assert sorted(world.commits) == list(range(1500))
        assert world.cancels == []


def test_a_lone_survivor_is_asked_for_the_front_at_once() -> None:
    """Also while it still owes most of its own share."""
    plan = ReadPlan(600, MIB, [Holder((range(600),), 1e9, 0.0)] * 2, 60.0)
    starts = [action for action in plan.handle(Begin(), 0.0) if isinstance(action, Start)]
    (dead,) = [start.read for start in starts if 0 in start.chunks]
    assert len(starts) == 2
    assert [0 in action.chunks for action in plan.handle(Ended(dead), 0.001) if isinstance(action, Start)] == [True]


def test_a_landing_is_committed_and_the_last_one_ends_the_plan() -> None:
    plan = ReadPlan(2, MIB, [Holder((range(2),), None, 0.0)], 5.0)
    assert plan.handle(Begin(), 0.0) == [Start(0, 0, (0, 1)), Wake(5.0)]
    assert plan.handle(Landed(0, [1]), 0.1) == [Commit(0, [1])]
    assert plan.handle(Landed(0, [1]), 0.1) == [], "twice"
    assert plan.handle(Landed(7, [0]), 0.1) == [], "a read that is not known"
    assert plan.handle(Landed(0, [0]), 0.2) == [Commit(0, [0]), Finish()]
    assert plan.handle(Tick(), 9.0) == []


def test_what_is_in_the_store_already_is_done_without_a_commit() -> None:
    plan = ReadPlan(2, MIB, [Holder((range(2),), None, 0.0)], 5.0)
    plan.handle(Begin(), 0.0)
    assert plan.handle(Held(0, 0), 0.0) == [Wake(5.0)]
    assert plan.handle(Held(0, 0), 0.0) == [Wake(5.0)]
    assert plan.handle(Landed(0, [1]), 0.1) == [Commit(0, [1]), Finish()]


def test_two_equal_holders_share_the_front_from_the_start() -> None:
    world = World(64, [SimHolder(G, told=G), SimHolder(G, told=G)]).run()
    assert world.finished_at < 64 * MIB / G / 2 / 0.9
    first, second = (start.chunks for _, start in world.starts[:2])
    assert sorted(first[:4] + second[:4]) == list(range(8))
    assert world.front[31] < 32 * MIB / G / 2 / 0.8, "the front grows at the rate of both"
    assert len(world.starts) <= 12


def test_shares_are_sized_by_rate() -> None:
    world = World(200, [SimHolder(G, told=G), SimHolder(G / 4, told=G / 4)]).run()
    assert len(started(world, 0)) == pytest.approx(160, abs=5)
    assert world.finished_at < 1.05 * 200 * MIB / (1.25 * G) + 0.001


def test_rates_that_are_wrong_correct_themselves() -> None:
    world = World(200, [SimHolder(G, told=G / 4), SimHolder(G / 4, told=G)]).run()
    assert world.finished_at < 1.3 * 200 * MIB / (1.25 * G)


def test_holders_of_unknown_rate_begin_with_small_shares() -> None:
    world = World(200, [SimHolder(G), SimHolder(G / 4)]).run()
    assert [len(start.chunks) for _, start in world.starts[:2]] == [4, 4]
    assert world.finished_at < 1.2 * 200 * MIB / (1.25 * G)


def test_a_very_slow_holder_gets_nothing() -> None:
    world = World(50, [SimHolder(1e6, told=1e6), SimHolder(G, told=G)]).run()
    assert started(world, 0) == []


def test_an_unknown_holder_beside_a_known_one_is_tried_at_the_far_end() -> None:
    world = World(50, [SimHolder(G, told=G), SimHolder(1e6)]).run()
    assert started(world, 1) == [46, 47, 48, 49]
    assert world.finished_at < 0.1, "whoever does not deliver there is hedged or left"


@pytest.mark.parametrize("chunks", [1, 2, 3, 8])
def test_a_holder_that_cannot_be_in_time_does_not_hide_one_of_unknown_rate(chunks: int) -> None:
    world = World(chunks, [SimHolder(1e6, told=1e6), SimHolder(G)], deadline=0.2).run()
    assert sorted(world.commits) == list(range(chunks))
    assert started(world, 0) == []


def test_what_is_too_little_to_share_goes_to_one_holder_the_preferred_of_equals() -> None:
    for told in (None, G):
        assert {s.holder for _, s in World(1, [SimHolder(G, told=told)] * 2).run().starts} == {0}
    world = World(1, [SimHolder(G, told=G), SimHolder(1.1 * G, told=1.1 * G)]).run()
    assert {s.holder for _, s in world.starts} == {0}
    world = World(1, [SimHolder(G, told=G), SimHolder(4 * G, told=4 * G)]).run()
    assert {s.holder for _, s in world.starts} == {1}


def test_the_front_comes_from_who_has_it_and_the_rest_from_the_other() -> None:
    spans = ((range(4),), (range(3, 10),))
    world = World(10, [SimHolder(G, spans=spans[0]), SimHolder(G, spans=spans[1])]).run()
    assert set(started(world, 0)) <= set(range(4))
    assert set(started(world, 1)) <= set(range(3, 10))
    assert len(world.commits) == 10


def test_a_chunk_that_nobody_has_ends_what_lies_behind_it() -> None:
    world = World(10, [SimHolder(G, spans=(range(4), range(5, 10)))]).run()
    assert set(world.commits) == set(range(4))
    assert world.lost == dict.fromkeys(range(4, 10), Fate.MISS)


def test_a_dead_holders_share_goes_to_the_other() -> None:
    world = World(64, [SimHolder(G, told=G, dies_at=0.01), SimHolder(G, told=G)]).run()
    assert len(world.commits) == 64
    assert world.plan.reassigned > 0
    assert all(start.holder == 1 for at, start in world.starts if at > 0.02)


def test_when_all_holders_are_dead_the_rest_is_a_miss() -> None:
    world = World(64, [SimHolder(G, dies_at=0.01), SimHolder(G, dies_at=0.012)]).run()
    assert 0 < len(world.commits) < 64
    assert set(world.lost.values()) == {Fate.MISS}
    assert world.finished_at < 0.02


def test_a_chunk_is_asked_of_two_failing_holders_and_no_more() -> None:
    liars = [SimHolder(G, not_held=frozenset([1])) for _ in range(5)]
    world = World(3, liars).run()
    assert world.lost[1] is Fate.MISS
    assert world.failures[1] == 2
    assert 0 in world.commits


def test_not_held_costs_a_round_trip() -> None:
    world = World(1, [SimHolder(G, 0.01, not_held=frozenset([0])), SimHolder(G, 0.01)]).run()
    assert world.commits[0] == pytest.approx(0.02 + MIB / G)


@pytest.mark.parametrize("stale", [1, 2, 3])
@pytest.mark.parametrize("told", [None, G])
def test_holders_that_gave_everything_up_do_not_hide_the_one_that_has_it(stale: int, told: float | None) -> None:
    """The map is late about several nodes that evicted the chain; one node, no faster than they, still has it."""
    count = 64
    gone = [SimHolder(G, told=told, not_held=frozenset(range(count))) for _ in range(stale)]
    world = World(count, [*gone[:1], SimHolder(G, told=told), *gone[1:]]).run()
    assert list(world.lost) == []
    assert sorted(world.commits) == list(range(count))
    assert max(world.failures.values(), default=0) <= 1, "no chunk is asked of a second one that lacks it"


def test_a_silent_front_is_hedged_once() -> None:
    world = World(40, [SimHolder(G, told=G, stalls_at=0.005), SimHolder(G, told=G)]).run()
    hedges = [(at, start) for at, start in world.starts if start.hedge]
    assert len(hedges) == 1
    at, hedge = hedges[0]
    assert hedge.holder == 1
    assert 1 <= len(hedge.chunks) <= 4
    assert PLAN_LATE_S_MIN < at < 3 * PLAN_LATE_S_MIN + 0.1
    assert len(world.commits) == 40
    assert world.finished_at < 0.5
    assert [cancel.late for _, cancel in world.cancels] == [True]


def test_a_hedge_that_loses_is_cancelled_and_what_lands_twice_counts_once() -> None:
    """A holder that makes a pause: its chunks and those of the hedge both land."""
    world = World(8, [SimHolder(1e8, told=1e8, jitter=(1, 12, 1, 1, 1, 1)), SimHolder(1e8, told=1e8)])
    world.run()
    assert len(world.commits) == 8
    assert world.plan.hedges <= 1
    assert world.lost == {}


def test_who_delivers_a_hundredth_of_what_was_said_is_left() -> None:
    world = World(64, [SimHolder(1e7, told=G), SimHolder(G, told=G)]).run()
    assert len(world.commits) == 64
    assert world.finished_at < 0.2, "it would take 3.3 s for its half"
    assert any(cancel.late for _, cancel in world.cancels)


def test_a_single_slow_holder_is_neither_hedged_nor_left() -> None:
    world = World(20, [SimHolder(1e7, told=G)]).run()
    assert len(world.commits) == 20
    assert len(world.starts) == 1


def test_at_the_deadline_everything_ends() -> None:
    world = World(100, [SimHolder(1e8)], deadline=0.5).run()
    assert world.finished_at == 0.5
    assert 40 < len(world.commits) < 50
    assert set(world.lost.values()) == {Fate.DEADLINE}
    assert [cancel.late for _, cancel in world.cancels] == [True]


def test_a_plan_ends_before_its_deadline_when_the_front_cannot_make_it() -> None:
    """105 ms a chunk, 420 ms for four; half a chunk's time would be the least for the fifth."""
    world = World(100, [SimHolder(1e7, told=1e7)], deadline=0.46).run()
    assert len(world.commits) == 4
    assert world.finished_at == pytest.approx(0.4204, abs=0.001)
    assert set(world.lost.values()) == {Fate.PRICE}


def test_nobody_is_asked_for_what_is_surely_too_late() -> None:
    for chunks, holders in ((1, 1), (1, 2), (10, 1), (10, 2)):
        world = World(chunks, [SimHolder(1e6, told=1e6) for _ in range(holders)], deadline=0.4).run()
        assert world.finished_at < 0.01
        assert set(world.lost.values()) == {Fate.PRICE}
        assert world.starts == []


def test_a_deadline_that_is_over_asks_nobody() -> None:
    plan = ReadPlan(2, MIB, [Holder((range(2),), None, 0.0)], 5.0)
    actions = plan.handle(Begin(), 5.0)
    assert actions[-2:] == [Lose((0, 1), Fate.DEADLINE), Finish()]


def test_a_read_that_the_transport_ends_at_the_deadline_is_no_dead_holder() -> None:
    plan = ReadPlan(2, MIB, [Holder((range(2),), None, 0.0)] * 2, 5.0)
    plan.handle(Begin(), 0.0)
    actions = plan.handle(Ended(0), 5.0)
    assert Lose((0, 1), Fate.DEADLINE) in actions
    assert actions[-1] == Finish()


def test_without_room_the_front_that_fits_is_read() -> None:
    plan = ReadPlan(5, MIB, [Holder((range(5),), None, 0.0)], 5.0)
    plan.handle(Begin(), 0.0)
    assert plan.handle(NoRoom(0, (3, 4)), 0.0) == [Lose((3, 4), Fate.FULL), Wake(5.0)]
    assert [a for c in range(3) for a in plan.handle(Landed(0, [c]), 0.1)][-1] == Finish()


def test_without_any_room_the_plan_is_over() -> None:
    plan = ReadPlan(2, MIB, [Holder((range(2),), None, 0.0)], 5.0)
    plan.handle(Begin(), 0.0)
    assert plan.handle(NoRoom(0, (0, 1)), 0.0) == [Lose((0, 1), Fate.FULL), Finish()]


def test_a_hedge_without_room_changes_nothing() -> None:
    world = World(1, [SimHolder(G, told=G), SimHolder(G, told=G)])
    plan = world.plan
    plan.handle(Begin(), 0.0)
    actions = plan.handle(Tick(), 0.1)
    hedge = next(a for a in actions if isinstance(a, Start))
    assert hedge.hedge
    assert plan.handle(NoRoom(hedge.read, hedge.chunks), 0.1) == [Wake(0.1 + PLAN_LATE_S_MIN)]
    assert plan.handle(Landed(0, [0]), 0.2) == [Commit(0, [0]), Finish()]


def test_both_reads_of_a_hedge_may_fail() -> None:
    plan = World(1, [SimHolder(G, told=G), SimHolder(G, told=G)]).plan
    plan.handle(Begin(), 0.0)
    plan.handle(Tick(), 0.1)
    assert not any(isinstance(a, Lose) for a in plan.handle(Missed(1, 0), 0.11))
    assert plan.handle(Ended(0), 0.12) == [Lose((0,), Fate.MISS), Finish()]


def test_the_winner_of_a_hedge_ends_the_other_read() -> None:
    plan = World(1, [SimHolder(G, told=G), SimHolder(G, told=G)]).plan
    plan.handle(Begin(), 0.0)
    plan.handle(Tick(), 0.1)
    assert plan.handle(Landed(1, [0]), 0.11) == [Commit(1, [0]), Cancel(0, late=True), Finish()]


def test_jitter_alone_makes_no_hedge() -> None:
    holders = [SimHolder(G, told=G, jitter=(0.5, 2.0, 0.8, 1.1)), SimHolder(G, told=G, jitter=(1.5, 0.6))]
    world = World(300, holders).run()
    assert world.plan.hedges == 0
    assert world.cancels == []
    assert world.finished_at < 1.3 * 300 * MIB / (2 * G)


def test_eight_holders_with_round_trips_that_differ() -> None:
    holders = [SimHolder(G * k / 8, 0.001 * k, told=G * k / 8) for k in range(1, 9)]
    world = World(1024, holders).run()
    assert world.finished_at < 1.15 * 1024 * MIB / sum(h.bytes_per_s for h in holders)
    assert len(world.starts) < 100
