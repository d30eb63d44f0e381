"""Push/pull: to join, to repair, to reconnect; and what is remembered for the next start."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from kvmesh.discovery.swim.events import (
    AnswerPull,
    Exchange,
    RefusePull,
    Remember,
    Resolve,
    Resolved,
    SendPacket,
    StreamFailed,
)
from kvmesh.discovery.swim.exchanging import JoinFailed
from kvmesh.discovery.swim.profile import KVMESH_LAN, LAN
from kvmesh.discovery.wire.messages import Ping, PushedState
from kvmesh.transport.limits import JOIN_DIALS_MAX, JOIN_RETRY_S_MAX, MEMBERS_REMEMBERED_MAX, SEED_RETRY_S
from tests.discovery.swim.support import (
    ME,
    WRONG_VERSIONS,
    Lone,
    alive,
    at,
    death,
    departure,
    notices,
    of,
    only,
    pushed,
)

SUSPECT, DEAD = PushedState.SUSPECT, PushedState.DEAD


def exchanges(lone: Lone) -> list[Exchange]:
    return of([action for _, action in lone.done], Exchange)


# --- joining ---------------------------------------------------------------------------------------------------------


def test_every_seed_is_looked_up_and_its_addresses_are_asked():
    lone = Lone(seeds=["a:1", "b:2"])
    assert of([action for _, action in lone.done], Resolve) == [Resolve("a:1"), Resolve("b:2")]
    found = of(lone.feed(Resolved("a:1", (at(2), ME))), Exchange)
    assert [exchange.target for exchange in found] == [at(2)], "and not this node itself"
    exchange = only(found)
    assert exchange.state.join
    assert [node.name for node in exchange.state.nodes] == ["n1"]
    assert exchange.timeout_s == LAN.stream_timeout_s
    lone.exchanged(exchange, pushed("n2"), pushed("n3"), state=b"heads")
    assert (lone.view("n2"), lone.view("n3")) == ((1, "ALIVE"), (1, "ALIVE"))
    assert lone.app.states == [b"heads"]
    assert lone.swim.counters.exchanges == 1


def test_of_a_seed_with_many_addresses_some_are_asked():
    lone = Lone(seeds=["service:1"])
    lone.feed(Resolved("service:1", tuple(at(number) for number in range(2, 300))))
    targets = [exchange.target for exchange in exchanges(lone)]
    assert len(set(targets)) == len(targets) == JOIN_DIALS_MAX


def test_of_a_seed_with_a_member_among_its_addresses_none_is_asked():
    lone = Lone(seeds=["service:1"], others=2)
    lone.done.clear()
    lone.feed(Resolved("service:1", (at(3), at(50))))
    assert exchanges(lone) == []
    lone.hear(death("n3"))
    lone.feed(Resolved("service:1", (at(3), at(50))))
    assert {exchange.target for exchange in exchanges(lone)} == {at(3), at(50)}


def test_while_nobody_answers_seeds_are_looked_up_again_and_again_more_slowly():
    lone = Lone(seeds=["a:1"])
    times = []
    for _ in range(12):
        lone.feed(Resolved("a:1", (), "no such name"))
        lone.ring_until(lambda: bool(of([action for _, action in lone.done if action], Resolve)[len(times) + 1 :]))
        times.append(lone.now)
    waits = [later - earlier for earlier, later in zip([100.0, *times], times, strict=False)]
    for number, wait_s in enumerate(waits):
        expected_s = min(2.0**number, JOIN_RETRY_S_MAX)
        assert 0.75 * expected_s <= wait_s <= 1.25 * expected_s
    told = [event for event in notices([action for _, action in lone.done]) if isinstance(event, JoinFailed)]
    assert len(told) == lone.swim.counters.joins_failed == 12
    assert told[0] == JoinFailed(("a:1: no such name",), 2.0)
    assert told[-1] == JoinFailed(("a:1: no such name",), JOIN_RETRY_S_MAX)


def test_a_failed_join_says_all_that_was_tried():
    lone = Lone(seeds=["a:1", "b:2", "c:3"], known=[at(9)])
    lone.feed(StreamFailed(only(exchanges(lone)).number, "10.0.0.9:7946: no route"))
    lone.feed(Resolved("a:1", (), "no such name"))
    lone.feed(Resolved("b:2", (at(2),)))
    lone.feed(StreamFailed(exchanges(lone)[-1].number, "10.0.0.2:7946: refused"))
    lone.feed(Resolved("c:3", (at(3),)))
    lone.exchanged(exchanges(lone)[-1], pushed("n3", versions=WRONG_VERSIONS))
    failed = only(notices(lone.run(1.3)))
    assert isinstance(failed, JoinFailed)
    assert failed.reasons[:3] == ("10.0.0.9:7946: no route", "a:1: no such name", "b:2: 10.0.0.2:7946: refused")
    assert "n3 speaks the protocol versions 01 05 05 02 04 04" in failed.reasons[3]
    assert lone.swim.counters.exchanges_failed == 2
    assert lone.swim.counters.incompatible == 1


def test_what_went_wrong_is_told_of_the_last_round_only():
    lone = Lone(seeds=["a:1"])
    for reason in ("no such name", "the name service is away"):
        lone.feed(Resolved("a:1", (), reason))
        failed = [event for event in notices(lone.run(1.3)) if isinstance(event, JoinFailed)]
        lone.run(1.3)
        lone.feed(StreamFailed(1, "of something else"))
        if failed:
            assert only(failed).reasons == (f"a:1: {reason}",)


def test_reasons_are_bounded():
    lone = Lone(seeds=[f"seed{number}:1" for number in range(200)])
    for number in range(200):
        lone.feed(Resolved(f"seed{number}:1", (), "no such name"))
    failed = only(notices(lone.run(1.3)))
    assert isinstance(failed, JoinFailed)
    assert len(failed.reasons) == 4 * JOIN_DIALS_MAX


def test_a_seed_that_is_being_looked_up_is_not_looked_up_twice():
    lone = Lone(seeds=["a:1"])
    lone.run(20.0)
    assert len(of([action for _, action in lone.done], Resolve)) == 1


def test_members_of_the_last_run_are_asked_while_this_node_is_alone():
    lone = Lone(known=[at(2), ME, at(3)])
    first = exchanges(lone)
    assert {exchange.target for exchange in first} == {at(2), at(3)}
    for exchange in first:
        lone.feed(StreamFailed(exchange.number, "refused"))
    lone.run(2.0)
    again = exchanges(lone)[2:]
    assert {exchange.target for exchange in again} == {at(2), at(3)}
    lone.exchanged(again[0], pushed("n2"), pushed("n3"))
    lone.feed(StreamFailed(again[1].number, "refused"))
    lone.done.clear()
    lone.run(3 * SEED_RETRY_S, silent=())
    assert not any(exchange.state.join for exchange in exchanges(lone))


def test_without_seeds_nobody_is_asked():
    lone = Lone()
    lone.run(100.0)
    assert (exchanges(lone), notices([action for _, action in lone.done])) == ([], [])


def test_later_the_seeds_that_are_no_members_are_tried_from_time_to_time():
    """Two meshes that were begun apart become one."""
    lone = Lone(seeds=["a:1", "b:2"])
    lone.feed(Resolved("a:1", (at(2),)))
    lone.exchanged(exchanges(lone)[-1], pushed("n2"))
    lone.feed(Resolved("b:2", (), "no such name"))
    lone.run(2.0, silent=())  # the round that finds that this node is not alone
    for seed, endpoints in (("a:1", (at(2),)), ("b:2", ())):
        lone.feed(Resolved(seed, endpoints))
    lone.done.clear()
    lone.run(SEED_RETRY_S - 2, silent=())
    assert not of([action for _, action in lone.done], Resolve)
    lone.run(3.0, silent=())
    assert of([action for _, action in lone.done], Resolve) == [Resolve("a:1"), Resolve("b:2")]
    lone.feed(Resolved("a:1", (at(2),)))
    lone.feed(Resolved("b:2", (at(50),)))
    assert [exchange.target for exchange in exchanges(lone) if exchange.state.join] == [at(50)]
    assert not any(isinstance(event, JoinFailed) for event in notices([action for _, action in lone.done]))


def test_alone_again_it_joins_quickly_again():
    lone = Lone(seeds=["a:1"])
    for _ in range(5):
        lone.feed(Resolved("a:1", (), "no such name"))
        lone.run(40.0)
    lone.feed(Resolved("a:1", (at(2),)))
    lone.exchanged(exchanges(lone)[-1], pushed("n2"))
    lone.run(41.0, silent=())  # the round that finds that it is not alone
    lone.feed(Resolved("a:1", (at(2),)))
    lone.hear(departure("n2"))
    lone.run(SEED_RETRY_S + 1)
    lone.done.clear()
    lone.feed(Resolved("a:1", (), "no such name"))
    lone.run(1.3)
    assert only(notices([action for _, action in lone.done])) == JoinFailed(("a:1: no such name",), 2.0)


def test_a_leaving_node_does_not_join():
    lone = Lone(seeds=["a:1"])
    lone.feed(Resolved("a:1", (), "no such name"))
    lone.stop()
    lone.done.clear()
    assert [action for action in lone.run(100.0) if not isinstance(action, Remember)] == []
    lone.feed(Resolved("a:1", (at(2),)))
    assert exchanges(lone) == []


# --- the exchange itself ---------------------------------------------------------------------------------------------


def test_who_is_accused_in_the_answer_tells_the_peer_directly():
    lone = Lone(known=[at(2)])
    exchange = only(exchanges(lone))
    packet = only(of(lone.exchanged(exchange, pushed("n2"), pushed("n1", 4, DEAD)), SendPacket))
    assert packet == SendPacket(at(2), (alive("n1", 5),))
    quiet = Lone(known=[at(2)])
    assert not of(quiet.exchanged(only(exchanges(quiet)), pushed("n2"), pushed("n1")), SendPacket)


def test_an_answer_that_nobody_waits_for_is_ignored():
    lone = Lone(known=[at(2)])
    exchange = only(exchanges(lone))
    lone.exchanged(replace(exchange, number=exchange.number + 1), pushed("n5"))
    assert len(lone.swim.table) == 1
    lone.exchanged(exchange, pushed("n2"))
    lone.exchanged(exchange, pushed("n3"))
    assert lone.view("n3") is None, "once"
    lone.feed(StreamFailed(exchange.number, "late"))
    assert lone.swim.counters.exchanges_failed == 0


def test_one_peer_is_asked_once_at_a_time():
    lone = Lone(known=[at(2)], seeds=["a:1"])
    lone.feed(Resolved("a:1", (at(2),)))
    assert len(exchanges(lone)) == 1
    lone.feed(StreamFailed(exchanges(lone)[0].number, "refused"))
    lone.feed(Resolved("a:1", (at(2),)))
    assert len(exchanges(lone)) == 2


def test_an_exchange_whose_end_got_lost_blocks_its_peer_for_a_while_only():
    lone = Lone(known=[at(2)])
    lone.run(2 * LAN.stream_timeout_s - 0.1)
    assert len(exchanges(lone)) == 1
    lone.run(2 * JOIN_RETRY_S_MAX)
    assert len(exchanges(lone)) >= 2


def test_incompatible_nodes_are_refused_both_ways():
    lone = Lone(known=[at(2)])
    lone.exchanged(only(exchanges(lone)), pushed("n2"), pushed("n3", versions=WRONG_VERSIONS), state=b"heads")
    refusal = only(of(lone.pull(pushed("n2"), pushed("n3", versions=WRONG_VERSIONS), token=9), RefusePull))
    assert refusal.token == 9
    assert refusal.reason == "node n3 speaks the protocol versions 01 05 05 02 04 04, which this one does not"
    assert (len(lone.swim.table), lone.app.states, lone.swim.counters.incompatible) == (1, [], 2)
    assert lone.swim.counters.exchanges == 0


# --- repair and reconnect --------------------------------------------------------------------------------------------


def repairs(lone: Lone, seconds: float) -> list[tuple[float, Exchange]]:
    """The exchanges that are begun in this time. They never end; everybody answers pings."""
    lone.done.clear()
    lone.run(seconds, silent=())
    return [(when, action) for when, action in lone.done if isinstance(action, Exchange)]


def test_everything_is_exchanged_with_one_that_is_alive_at_an_interval():
    lone = Lone(others=6)
    lone.hear(death("n3"), departure("n4"))
    found = repairs(lone, 600.0)
    assert 18 <= len(found) <= 40
    assert {exchange.target for _, exchange in found if exchange.target != at(3)} == {at(2), at(5), at(6), at(7)}
    assert not any(exchange.state.join for _, exchange in found)
    others = [when for when, exchange in found if exchange.target != at(3)]
    assert all(later - earlier == pytest.approx(30.0) for earlier, later in itertools.pairwise(others))
    assert found[0][0] < 131, "the first comes at a random time"


def test_the_interval_grows_with_the_mesh():
    lone = Lone(others=70)
    times = [when for when, _ in repairs(lone, 400.0)]
    assert all(later - earlier == pytest.approx(90.0) for earlier, later in itertools.pairwise(times))
    lone = Lone(KVMESH_LAN, others=127)
    times = [when for when, _ in repairs(lone, 200.0)]
    assert all(later - earlier == pytest.approx(60.0) for earlier, later in itertools.pairwise(times))
    assert len(times) >= 2


def test_suspects_are_not_asked_to_repair():
    lone = Lone(others=2)
    lone.pull(pushed("n2", 1, SUSPECT), pushed("n3", 1, SUSPECT))
    assert repairs(lone, 20.0) == []


def test_one_that_failed_is_tried_again():
    lone = Lone(replace(LAN, push_pull_interval_s=1e9), others=1)
    lone.hear(death("n2", 1, "n3"))
    found = repairs(lone, 200.0)
    assert {exchange.target for _, exchange in found} == {at(2)}
    assert len(found) >= 5
    before = len(lone.done)
    lone.ring_until(lambda: bool(of([action for _, action in lone.done[before:]], Exchange)), within_s=300.0)
    lone.exchanged(exchanges(lone)[-1], pushed("n2", 2))
    assert lone.view("n2") == (2, "ALIVE")


def test_in_a_large_mesh_each_node_tries_seldom():
    """All of them together make one attempt an interval."""
    lone = Lone(replace(LAN, push_pull_interval_s=1e9), others=40)
    lone.hear(death("n3"))
    lone.done.clear()
    assert 1 <= len(repairs(lone, 30.0 * 100)) <= 8


def test_one_that_left_is_not_tried_again():
    lone = Lone(replace(LAN, push_pull_interval_s=1e9), others=1)
    lone.hear(departure("n2"))
    assert repairs(lone, 300.0) == []


def test_a_leaving_node_exchanges_nothing_of_its_own():
    lone = Lone(others=3)
    lone.hear(death("n3"))
    lone.stop()
    assert repairs(lone, 300.0) == []
    assert of(lone.pull(pushed("n2")), AnswerPull), "but it answers"


# --- the next start --------------------------------------------------------------------------------------------------


def test_where_others_are_reached_is_remembered_soon_after_a_change():
    lone = Lone()
    lone.hear(alive("n2"), alive("n3"))
    assert not of([action for _, action in lone.done], Remember), "members seldom change alone"
    assert [set(one.endpoints) for one in of(lone.run(5.0, silent=()), Remember)] == [{at(2), at(3)}]
    assert not of(lone.run(50.0, silent=()), Remember)
    lone.hear(departure("n2"), death("n3"))
    assert [set(one.endpoints) for one in of(lone.run(5.0, silent=()), Remember)] == [{at(3)}], "the failed, too"


def test_of_many_some_are_remembered():
    lone = Lone()
    lone.hear(*(alive(f"n{number}") for number in range(2, 202)))
    endpoints = only(of(lone.run(5.0), Remember)).endpoints
    assert len(set(endpoints)) == len(endpoints) == MEMBERS_REMEMBERED_MAX


def test_a_lone_node_whose_seeds_are_all_itself_waits_longer_and_longer_and_says_nothing():
    lone = Lone(seeds=["a:1"])
    times = []
    for _ in range(6):
        lone.feed(Resolved("a:1", (ME,)))
        before = len(of([action for _, action in lone.done], Resolve))
        lone.ring_until(lambda before=before: len(of([action for _, action in lone.done], Resolve)) > before)
        times.append(lone.now)
    waits = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert all(later > earlier for earlier, later in itertools.pairwise(waits[:4]))
    assert not [event for event in notices([action for _, action in lone.done]) if isinstance(event, JoinFailed)]


# --- a stranger's ping ------------------------------------------------------------------------------------------------


def test_whoever_is_alone_joins_the_node_that_pings_it_unknown():
    lone = Lone()
    lone.hear(Ping(1, "n1", *at(5), "n5"), source=at(5))
    exchange = only(exchanges(lone))
    assert (exchange.target, exchange.state.join) == (at(5), True)
    lone.hear(Ping(2, "n1", *at(5), "n5"), source=at(5))
    assert len(exchanges(lone)) == 1, "one exchange at a time"


def test_in_company_a_strangers_ping_is_answered_and_no_more():
    lone = Lone(others=2)
    before = len(exchanges(lone))
    actions = lone.hear(Ping(1, "n1", *at(5), "n5"), source=at(5))
    assert len(of(actions, SendPacket)) == 1
    assert len(exchanges(lone)) == before


def test_but_not_whoever_asks_for_another_or_does_not_say_who_it_is():
    lone = Lone()
    for ping in (Ping(1, "n7", *at(2), "n2"), Ping(1, "n1"), Ping(1, "n1", *ME, "n1")):
        assert not of(lone.hear(ping, source=at(2)), Exchange)
    assert not of(lone.hear(Ping(1, "n1", *at(2), "n2"), source=ME), Exchange), "nor itself"
    lone.stop()
    assert not of(lone.hear(Ping(1, "n1", *at(2), "n2"), source=at(2)), Exchange)


def test_forged_sources_make_it_dial_a_few_only():
    lone = Lone()
    for number in range(2, 1000):
        lone.hear(Ping(1, "n1", *at(number), f"n{number}"), source=at(number))
    assert len(exchanges(lone)) == 2 * JOIN_DIALS_MAX


def test_a_node_whose_earlier_start_is_not_found_dead_yet_asks_again_soon():
    lone = Lone(KVMESH_LAN, others=2)
    lone.run(1.0, silent=())
    lone.done.clear()
    lone.hear(alive("n1", 9, at(50), b"2"))  # its name elsewhere, of a start that seems later
    lone.hear(alive("n1", 9, at(50), b"2"))
    lone.run(KVMESH_LAN.reconnect_interval_s + 0.1, silent=())
    exchange = exchanges(lone)[-1]
    assert exchange.target in (at(2), at(3))
    lone.exchanged(exchange, pushed("n1", 9, DEAD, at(50), b"2"))
    assert lone.swim.own.incarnation == 10
    assert alive("n1", 10, ME) in [
        one for packet in of([a for _, a in lone.done], SendPacket) for one in packet.messages
    ]
