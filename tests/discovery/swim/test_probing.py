"""The failure detector: who is asked, what silence means, and what this node does for the probes of others."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kvmesh.discovery.swim.base import Change
from kvmesh.discovery.swim.events import SendPacket, StreamFailed, StreamPing, StreamPinged
from kvmesh.discovery.swim.probing import NAMESAKE_S
from kvmesh.discovery.swim.profile import KVMESH_LAN, LAN
from kvmesh.discovery.wire.messages import Ack, Alive, Endpoint, IndirectPing, Nack, Ping, Suspect
from kvmesh.transport.limits import RELAYS_MAX
from tests.discovery.swim.support import (
    ME,
    STRANGER,
    Exchange,
    Lone,
    accusation,
    alive,
    at,
    of,
    only,
    pushed,
    sent,
)

# --- a probe of ours -------------------------------------------------------------------------------------------------


def test_a_probe_asks_one_node_whether_it_is_there():
    lone = Lone(others=3)
    ping = lone.next_ping()
    target, first = only(sent([action for _, action in lone.done], Ping)[-1:])
    assert first is ping
    assert target == at(int(ping.node[1:]))
    assert (ping.source_ip, ping.source_port, ping.source_node) == (*ME, "n1")


def test_every_node_is_probed_once_a_round_at_the_interval():
    lone = Lone(others=5)
    lone.answer(only(of(lone.run(1.0), SendPacket)))
    pings = []
    for _ in range(10):
        packet = only(of(lone.run(1.0), SendPacket))  # one interval, one packet: where all is well there is no more
        pings.append(only(sent([packet], Ping))[1].node)
        lone.answer(packet)
    assert lone.swim.counters.probes_indirect == 0
    assert sorted(set(pings)) == ["n2", "n3", "n4", "n5", "n6"]
    assert max(pings.count(name) for name in pings) <= 3


def test_an_ack_ends_the_probe_and_measures_the_round_trip():
    lone = Lone(others=3)
    ping = lone.next_ping()
    node, asked_at = lone.node(ping.node), lone.done[-1][0]
    lone.now = asked_at + 0.125
    lone.hear(Ack(ping.seq))
    assert node.rtt_s == pytest.approx(0.125)
    assert node.seen_at == lone.now
    lone.run(0.8)
    assert lone.swim.counters.probes_indirect == 0


def test_silence_asks_others_then_a_stream_then_suspects_then_buries():
    lone = Lone(others=5)
    ping = lone.next_ping("n3")
    began_at = lone.now
    lone.run(0.49)
    assert lone.swim.counters.probes_indirect == 0
    actions = lone.run(0.02)  # the probe's timeout
    asked = sent(actions, IndirectPing)
    assert len(asked) == 3
    for target, question in asked:
        assert target in (at(2), at(4), at(5), at(6))
        assert question == IndirectPing(ping.seq, *at(3), "n3", True, *ME, "n1")
    assert len({target for target, _ in asked}) == 3
    stream = only(of(actions, StreamPing))
    assert (stream.target, stream.ping, stream.number) == (at(3), ping, ping.seq)
    assert stream.timeout_s == pytest.approx(0.5)
    lone.feed(StreamFailed(stream.number, "refused"))
    assert lone.view("n3") == (1, "ALIVE")
    lone.run(0.5)  # the interval is over
    assert lone.view("n3") == (1, "SUSPECT")
    suspicion = lone.node("n3").suspicion
    assert suspicion is not None
    # 6 nodes: 4 intervals at least, six times that while nobody confirms it
    assert suspicion.deadline - lone.now == pytest.approx(24.0, abs=0.1)
    assert lone.app.changes[-1] == ("n3", Change.SUSPECTED)
    lone.run(suspicion.deadline - lone.now - 0.01)
    assert lone.view("n3") == (1, "SUSPECT")
    lone.run(0.02)
    assert lone.view("n3") == (1, "DEAD")
    assert ("n3", Change.FAILED) in lone.app.changes
    assert lone.swim.counters.deaths >= 1
    assert lone.now - began_at < 26.0


def test_what_is_found_is_told():
    lone = Lone(others=2)
    lone.next_ping("n3")
    lone.run(1.0)
    told = sent(lone.run(0.5), Suspect)
    assert (at(2), Suspect(1, "n3", "n1")) in told
    assert (at(3), Suspect(1, "n3", "n1")) in told, "the suspect hears it, too"


@pytest.mark.parametrize("late_s", [0.6, 0.9])
def test_an_ack_may_come_late(late_s: float):
    """Directly, or through one of those that were asked: the number is the same."""
    lone = Lone(others=4)
    ping = lone.next_ping()
    lone.run(late_s)
    assert lone.swim.counters.probes_indirect == 1
    lone.hear(Ack(ping.seq))
    lone.run(0.35)
    assert lone.view(ping.node) == (1, "ALIVE")
    assert lone.swim.counters.probes_failed == 0
    assert lone.node(ping.node).rtt_s is None, "nobody knows which of the questions it answers"


def test_an_ack_with_another_number_saves_nobody():
    lone = Lone(others=2)
    ping = lone.next_ping()
    lone.hear(Ack(ping.seq + 1), Ack(ping.seq - 1))
    lone.run(1.0)
    assert lone.view(ping.node) == (1, "SUSPECT")


def test_an_answer_over_the_stream_saves_the_target_at_the_end():
    lone = Lone(others=4)
    ping = lone.next_ping()
    stream = only(of(lone.run(0.55), StreamPing))
    lone.feed(StreamPinged(stream.number))
    assert lone.swim.counters.probes_saved_by_stream == 0
    lone.run(0.45)
    assert lone.swim.counters.probes_saved_by_stream == 1
    assert lone.view(ping.node) == (1, "ALIVE")


def test_an_answer_over_the_stream_of_another_probe_saves_nobody():
    lone = Lone(others=4)
    ping = lone.next_ping()
    only(of(lone.run(0.55), StreamPing))
    lone.feed(StreamPinged(ping.seq + 1))
    lone.run(0.45)
    assert lone.view(ping.node) == (1, "SUSPECT")


def test_those_that_are_asked_are_alive_and_neither_the_target_nor_this_node():
    lone = Lone(others=5)
    lone.hear(accusation("n5"), accusation("n6"))
    lone.next_ping("n3")
    assert {target for target, _ in sent(lone.run(0.55), IndirectPing)} == {at(2), at(4)}


def test_only_one_probe_is_under_way():
    lone = Lone(others=5)
    pings = sent(lone.run(30.0), Ping)
    numbers = [ping.seq for _, ping in pings]
    assert len(set(numbers)) == len(numbers)
    assert lone.swim.counters.probes == lone.swim.counters.probes_failed + 1


# --- pinging again and again (ours) ----------------------------------------------------------------------------------


def test_our_profile_pings_until_the_answer_comes():
    lone = Lone(replace(KVMESH_LAN, insist_interval_s=0.0), others=3)
    ping = lone.next_ping()
    lone.run(0.2)
    repeated = [one for _, one in sent([action for _, action in lone.done], Ping) if one.seq == ping.seq]
    assert 3 <= len(repeated) <= 4
    assert set(repeated) == {ping}
    lone.hear(Ack(ping.seq))
    assert lone.node(ping.node).rtt_s is None
    assert not [one for _, one in sent(lone.run(0.2), Ping) if one.seq == ping.seq]


def test_our_profile_pings_no_longer_than_the_probe_lasts():
    lone = Lone(replace(KVMESH_LAN, insist_interval_s=0.0), others=3)
    ping = lone.next_ping()
    lone.run(0.5)
    assert lone.view(ping.node) == (1, "SUSPECT")
    assert not [one for _, one in sent(lone.run(3.0), Ping) if one.seq == ping.seq]


# --- how well this node itself is ------------------------------------------------------------------------------------


def failed_probe(lone: Lone, nacks: int) -> int:
    """A probe that nobody answers but for some nacks; how the health changed."""
    before, failed = lone.swim.health, lone.swim.counters.probes_failed
    ping = lone.next_ping()
    lone.run(0.55)
    lone.hear(*(Nack(ping.seq) for _ in range(nacks)), Nack(ping.seq + 5))
    lone.ring_until(lambda: lone.swim.counters.probes_failed > failed)
    assert lone.node(ping.node).state.name == "SUSPECT"
    return lone.swim.health - before


@pytest.mark.parametrize(("nacks", "delta"), [(0, 3), (1, 2), (2, 1), (3, 0), (9, 0)])
def test_each_nack_that_is_missing_counts_against_this_node(nacks: int, delta: int):
    assert failed_probe(Lone(others=6), nacks) == delta


def test_where_nobody_could_send_a_nack_a_failed_probe_counts_once():
    lone = Lone()
    lone.hear(*(alive(f"n{number}", versions=b"") for number in range(2, 8)))
    ping = lone.next_ping()
    asked = sent(lone.run(0.55), IndirectPing)
    assert [question.nack for _, question in asked] == [False, False, False]
    lone.ring_until(lambda: lone.swim.counters.probes_failed == 1)
    assert lone.node(ping.node).state.name == "SUSPECT"
    assert lone.swim.health == 1
    alone = Lone(others=1)
    assert failed_probe(alone, 0) == 1


def test_a_probe_that_works_makes_it_better():
    lone = Lone(others=6)
    assert failed_probe(lone, 1) == 2
    for health in (1, 0, 0):
        lone.hear(Ack(lone.next_ping().seq))
        assert lone.swim.health == health


def test_so_does_one_that_only_the_stream_saved():
    lone = Lone(others=6)
    assert failed_probe(lone, 2) == 1
    lone.next_ping()
    lone.feed(StreamPinged(only(of(lone.run(0.55), StreamPing)).number))
    lone.ring_until(lambda: lone.swim.counters.probes_saved_by_stream == 1, within_s=1.5)
    assert lone.swim.health == 0


def test_bad_health_makes_the_interval_longer_but_not_the_first_timeout():
    lone = Lone(others=6)
    assert failed_probe(lone, 0) == 3
    ping = lone.next_ping()
    stream = only(of(lone.run(0.55), StreamPing))
    assert stream.timeout_s == pytest.approx(3.5)
    lone.run(3.4)
    assert lone.view(ping.node) == (1, "ALIVE")
    lone.run(0.1)
    assert lone.view(ping.node) == (1, "SUSPECT")


def test_who_has_to_refute_is_not_well():
    lone = Lone(others=3)
    lone.hear(accusation("n1"))
    assert lone.swim.health == 1


# --- suspects --------------------------------------------------------------------------------------------------------


def test_a_suspect_that_is_probed_hears_of_it():
    lone = Lone(others=2)
    lone.hear(accusation("n3", 4))
    lone.quiet()
    ping = lone.next_ping("n3")
    packet = only([one for one in of([action for _, action in lone.done], SendPacket) if ping in one.messages])
    assert packet.messages[:2] == (ping, Suspect(4, "n3", "n1"))


def test_our_profile_asks_a_suspect_again_from_half_of_the_time_on():
    lone = Lone(KVMESH_LAN, others=10)
    lone.hear(accusation("n3"))
    suspicion = lone.node("n3").suspicion
    assert suspicion is not None
    lone.quiet()
    insisted = []
    while lone.now < 106 and lone.node("n3").suspicion is suspicion:
        packets = [packet for packet in of(lone.run(0.05), SendPacket) if packet.target == at(3)]
        asked = lone.swim._prober._insisted  # and not rounds of gossip, nor the probe whose turn it is
        for packet in packets:
            if isinstance(ping := packet.messages[0], Ping) and ping.seq in asked:
                assert Suspect(1, "n3", "n1") in packet.messages
                insisted.append(lone.now)
    assert insisted[0] >= suspicion.half_time
    assert len(insisted) >= 4


def test_our_profile_asks_further_helpers_with_each_later_ping_and_wants_no_nack_of_them():
    lone = Lone(KVMESH_LAN, others=10)
    ping = lone.next_ping()
    lone.done.clear()
    lone.run(KVMESH_LAN.probe_interval_s)
    asked = [
        (when, message.nack)
        for when, action in lone.done
        if isinstance(action, SendPacket)
        for message in action.messages
        if isinstance(message, IndirectPing) and message.seq == ping.seq
    ]
    first = min(when for when, _ in asked)
    assert [nack for when, nack in asked if when == first] == [True] * 3
    later = [nack for when, nack in asked if when > first]
    assert len(later) >= 6
    assert not any(later)


def test_a_name_at_two_addresses_is_a_conflict_once_both_are_seen_to_run():
    lone = Lone(others=2)
    elsewhere = Ping(9, "n1", *at(50), "n3")
    lone.hear(elsewhere, source=at(50))
    lone.hear(elsewhere, source=at(50))
    assert lone.app.conflicts == [], "a new start of n3, maybe, of which nothing was heard yet"
    lone.run(5.0, silent=())  # the one that is known answers its probes
    lone.hear(elsewhere, source=at(50))
    assert lone.app.conflicts == [("n3", at(3), at(50))]
    forged = Ping(9, "n1", *at(60), "n2")
    for _ in range(3):
        lone.hear(forged, source=at(61))
        lone.run(5.0, silent=())
    assert len(lone.app.conflicts) == 1


def test_late_pings_of_an_earlier_start_are_no_conflict():
    """n3 has started again at another address, and packets of its earlier start are still on their way."""
    lone = Lone(others=2)
    late = Ping(9, "n1", *at(50), "n3")
    lone.hear(late, source=at(50))
    lone.run(NAMESAKE_S / 2, silent=())  # n3 answers where it is now
    lone.hear(late, source=at(50))
    assert lone.app.conflicts == []
    lone.run(NAMESAKE_S, silent=())
    lone.hear(late, source=at(50))
    assert lone.app.conflicts == [("n3", at(3), at(50))], "nothing is that late"


def insisting(lone: Lone) -> Ping:
    """The question to a suspect beside the probes."""
    for _ in range(200):
        for action in lone.run(0.05):
            if isinstance(action, SendPacket) and any(type(one) is Suspect for one in action.messages):
                ping = action.messages[0]
                if isinstance(ping, Ping) and ping.seq in lone.swim._prober._insisted:
                    return ping
            lone.answer(action)
    raise AssertionError("nobody asked")


def test_a_suspect_of_another_kind_that_answers_is_asked_for_everything():
    """It does not refute in its ack. So a push/pull tells it what is said of it, and brings its answer."""
    lone = Lone(KVMESH_LAN, others=10)
    lone.hear(accusation("n3"))
    suspicion = lone.node("n3").suspicion
    assert suspicion is not None
    ping = insisting(lone)
    exchange = only(of(lone.hear(Ack(ping.seq)), Exchange))
    assert exchange.target == at(3)
    assert suspicion.half_time > lone.now, "it begins again"
    assert lone.view("n3") == (1, "SUSPECT")
    lone.exchanged(exchange, pushed("n3", 2))
    assert lone.view("n3") == (2, "ALIVE")


def test_one_that_refutes_with_its_answer_is_asked_nothing():
    lone = Lone(KVMESH_LAN, others=10)
    lone.hear(accusation("n3"))
    ping = insisting(lone)
    assert not of(lone.hear(alive("n3", 2), Ack(ping.seq)), Exchange)
    assert lone.view("n3") == (2, "ALIVE")


def test_memberlists_profile_does_not_insist():
    lone = Lone(LAN, others=10)
    lone.hear(accusation("n3"))
    lone.run(10.0)
    assert not lone.swim._prober._insisted


# --- the probes of others --------------------------------------------------------------------------------------------


def test_a_ping_is_answered():
    lone = Lone(others=3)
    assert sent(lone.hear(Ping(77, "n1", *at(2), "n2")), Ack) == [(at(2), Ack(77))]
    assert lone.node("n2").seen_at == lone.now


def test_a_ping_without_a_name_is_for_whoever_gets_it():
    lone = Lone(others=3)
    assert sent(lone.hear(Ping(77, "")), Ack) == [(STRANGER, Ack(77))]


def test_a_ping_for_another_name_is_not_answered():
    """Another node had this address before; its peers shall not take this one for it."""
    lone = Lone(others=3)
    assert lone.hear(Ping(77, "n9", *at(2), "n2")) == []
    assert lone.swim.counters.pings_misdirected == 1


@pytest.mark.parametrize(
    ("source", "answered_to"),
    [
        ((*at(2), "n2"), at(2)),
        ((*at(9), "n2"), STRANGER),  # not where n2 is known to be
        ((*at(2), "n9"), STRANGER),  # a stranger
        ((b"", 0, "n2"), STRANGER),
        ((b"", 0, ""), STRANGER),
    ],
)
def test_the_answer_goes_to_the_source_that_is_known_else_to_the_packets(
    source: tuple[bytes, int, str], answered_to: Endpoint
):
    lone = Lone(others=3)
    ip, port, name = source
    assert sent(lone.hear(Ping(77, "n1", ip, port, name)), Ack) == [(answered_to, Ack(77))]
    relayed = sent(lone.hear(IndirectPing(78, *at(3), "n3", True, ip, port, name)), Ping)
    assert [target for target, _ in relayed] == [at(3)]
    assert sent(lone.hear(Ack(relayed[0][1].seq)), Ack) == [(answered_to, Ack(78))]


def test_whoever_suspects_this_node_gets_its_refutation_with_the_answer():
    lone = Lone(others=3)
    actions = lone.hear(Ping(77, "n1", *at(2), "n2"), Suspect(1, "n1", "n2"))
    packet = only([one for one in of(actions, SendPacket) if Ack(77) in one.messages])
    assert packet.target == at(2)
    assert packet.messages[:2] == (Ack(77), alive("n1", 2))
    assert lone.swim.counters.refutations == 1


def test_so_does_one_that_repeats_an_old_accusation():
    """The refutation that it missed is told again, but not made louder."""
    lone = Lone(others=3)
    lone.hear(Suspect(1, "n1", "n2"))
    lone.quiet()
    actions = lone.hear(Ping(77, "n1", *at(2), "n2"), Suspect(1, "n1", "n2"))
    assert (at(2), alive("n1", 2)) in sent(actions, Alive)
    assert lone.swim.counters.refutations == 1


def test_an_answer_carries_rumours():
    lone = Lone(others=3)
    lone.hear(alive("n9"))
    packet = only(of(lone.hear(Ping(77, "n1", *at(2), "n2")), SendPacket))
    assert packet.messages == (Ack(77), alive("n9"))


def test_a_node_is_pinged_for_another_and_its_ack_passed_on():
    lone = Lone(others=3)
    target, ping = only(sent(lone.hear(IndirectPing(78, *at(3), "n3", True, *at(2), "n2")), Ping))
    assert target == at(3)
    assert ping == Ping(ping.seq, "n3", *ME, "n1")
    assert ping.seq != 78
    assert sent(lone.hear(Ack(ping.seq)), Ack) == [(at(2), Ack(78))]
    assert sent(lone.hear(Ack(ping.seq)), Ack) == [], "once"
    assert sent(lone.run(1.0), Nack) == []
    assert lone.swim.counters.relayed == 1


@pytest.mark.parametrize("wanted", [True, False])
def test_or_its_silence_where_that_is_wanted(wanted: bool):
    lone = Lone(others=3)
    _target, ping = only(sent(lone.hear(IndirectPing(78, *at(3), "n3", wanted, *at(2), "n2")), Ping))
    assert sent(lone.run(0.49), Nack) == []
    assert sent(lone.run(0.02), Nack) == ([(at(2), Nack(78))] if wanted else [])
    assert sent(lone.hear(Ack(ping.seq)), Ack) == [], "too late"


def test_a_node_is_pinged_for_another_only_where_it_is_known_to_be():
    lone = Lone(others=3)
    assert lone.hear(IndirectPing(78, *at(9), "n9", True, *at(2), "n2")) == []
    assert lone.swim.counters.refused == 1
    target, _ = only(sent(lone.hear(IndirectPing(78, *STRANGER, "n3", True, *at(2), "n2")), Ping))
    assert target == at(3)


def test_nobody_makes_this_node_send_packets_to_itself():
    lone = Lone(others=3)
    assert lone.hear(IndirectPing(78, *ME, "n1", True, *at(2), "n2")) == []
    assert lone.swim.counters.refused == 1
    assert [packet.target for packet in of(lone.hear(Ping(1, "n1", *ME, "n1")), SendPacket)] == [STRANGER]


def test_probes_for_others_are_bounded():
    lone = Lone(others=3)
    for number in range(RELAYS_MAX + 10):
        lone.hear(IndirectPing(number, *at(3), "n3", True, *at(2), "n2"))
    assert len(lone.swim._prober._relays) == RELAYS_MAX
    assert lone.swim.counters.refused == 10
    lone.run(0.6)
    assert not lone.swim._prober._relays
