"""The machine as a whole: its start and its end, pauses, alarms, what it does with messages of every kind."""

from __future__ import annotations

import pytest

from kvmesh.discovery.actions import Ticked, Wake
from kvmesh.discovery.swim.base import Change
from kvmesh.discovery.swim.events import (
    AnswerPull,
    Departed,
    Exchange,
    SendPacket,
    StreamFailed,
    StreamPing,
    StreamPinged,
    UserCame,
)
from kvmesh.discovery.swim.profile import KVMESH_LAN, LAN, Profile
from kvmesh.discovery.wire.messages import Ack, Alive, ErrorReply, IndirectPing, Nack, Ping, PushPull, Suspect, User
from kvmesh.transport.limits import LEAVE_PACKETS_MAX, LEAVE_ROUND_S, LEAVE_ROUNDS, TIMER_LATE_S
from tests.discovery.swim.support import (
    STRANGER,
    Lone,
    accusation,
    alive,
    at,
    death,
    departure,
    of,
    only,
    pushed,
    sent,
)


def test_it_knows_itself_and_says_so():
    lone = Lone(seed=3)
    assert (lone.swim.own.name, len(lone.swim.table), lone.view("n1")) == ("n1", 1, (1, "ALIVE"))
    lone.hear(alive("n2"))
    told = sent(lone.run(1.0), Alive)
    assert (at(2), alive("n1")) in told
    assert lone.app.changes == [("n2", Change.JOINED)], "it is no member of its own"


def test_nodes_that_begin_together_do_not_probe_together():
    times = set()
    for seed in range(10):
        lone = Lone(seed=seed)
        lone.hear(alive("n2"))
        lone.next_ping()
        assert 100.0 <= lone.now <= 102.0
        times.add(round(lone.now, 2))
    assert len(times) >= 8


def test_numbers_do_not_begin_at_one():
    """The process that had this address before may still get answers."""
    first = {Lone(seed=seed).swim.number() for seed in range(50)}
    assert len(first) == 50
    lone = Lone()
    numbers = [lone.swim.number() for _ in range(5)]
    assert numbers == list(range(numbers[0], numbers[0] + 5))
    lone.swim._shared._next_number = (1 << 32) - 1
    assert lone.swim.number() == 0


# --- messages --------------------------------------------------------------------------------------------------------


def test_user_messages_go_up_however_they_come():
    lone = Lone(others=1)
    lone.hear(User(b"in a packet"), User(b""))
    lone.feed(UserCame(STRANGER, b"over a stream"))
    assert lone.app.users == [b"in a packet", b"", b"over a stream"]


def test_words_of_the_application_are_told():
    lone = Lone(others=2)
    lone.swim.tell("head", b"old", lone.now)
    lone.swim.tell("head", b"new", lone.now)
    assert lone.swim.rumours == 1
    told = sent(lone.run(2.0), User)
    assert {word for _, word in told} == {User(b"new")}
    assert {target for target, _ in told} == {at(2), at(3)}


def test_messages_that_do_not_belong_into_a_packet_are_counted():
    lone = Lone(others=1)
    assert lone.hear(PushPull(False, ()), ErrorReply("what?")) == []
    assert lone.swim.counters.unexpected == 2


def test_the_messages_of_a_packet_are_taken_in_their_order():
    lone = Lone(others=1)
    lone.hear(alive("n9"), accusation("n9"), alive("n9", 2), death("n9", 2))
    assert lone.app.changes[-4:] == [
        ("n9", Change.JOINED), ("n9", Change.SUSPECTED), ("n9", Change.TRUSTED), ("n9", Change.FAILED),
    ]  # fmt: skip


def test_what_answers_nothing_changes_nothing():
    lone = Lone(others=1)
    assert lone.hear(Ack(1), Nack(1), Ack(1, b"payload")) == []
    assert lone.feed(StreamPinged(1)) == []
    assert lone.feed(StreamFailed(1, "why")) == []


def test_the_layer_above_is_called_back():
    lone, called = Lone(), list[float]()
    lone.swim.later(lone.now + 2.5, called.append)
    lone.run(2.4)
    assert called == []
    lone.run(0.2)
    assert called == [102.5]


# --- alarms ----------------------------------------------------------------------------------------------------------


def test_an_alarm_is_set_once_and_anew_when_it_rang():
    lone = Lone(others=1)
    woken = lone.swim.handle(Ticked(), lone.now)
    assert not of(woken, Wake), "the one that is set is right"
    lone.now = lone.wake_at
    wake = only(of(lone.swim.handle(Ticked(), lone.now), Wake))
    assert wake.at >= lone.now
    lone.wake_at = wake.at


def test_an_event_that_comes_later_than_the_alarm_does_its_work():
    lone = Lone(others=1)
    lone.now = lone.wake_at + 0.5
    actions = lone.hear(Ack(1))
    assert actions, "the timer ran"
    assert lone.wake_at > lone.now - 0.5


def test_before_its_start_it_wants_no_alarm():
    lone = Lone()
    lone.swim._shared.timers._heap.clear()
    assert only(of(lone.swim.handle(Ticked(), lone.now), Wake)).at == float("inf")


# --- leaving ---------------------------------------------------------------------------------------------------------


def test_a_leaving_node_says_so_several_times_words_first():
    lone = Lone(others=3)
    lone.hear(alive("n1", 4), death("n4"))
    lone.run(2.0, silent=())
    lone.swim.leave_with(b"first", b"second")
    lone.done.clear()
    began_at = lone.now
    lone.stop()
    lone.run(1.0, silent=())
    goodbye = (User(b"first"), User(b"second"), departure("n1", 5))
    said = [
        (when, action) for when, action in lone.done if isinstance(action, SendPacket) and goodbye[0] in action.messages
    ]
    assert [packet.messages for _, packet in said] == [goodbye] * 2 * LEAVE_ROUNDS
    assert {packet.target for _, packet in said} == {at(2), at(3)}, "not to the dead"
    assert all(packet.crc for _, packet in said)
    assert sorted({round(when - began_at, 6) for when, _ in said}) == [
        pytest.approx(LEAVE_ROUND_S * number) for number in range(LEAVE_ROUNDS)
    ]
    departed_at = only([when for when, action in lone.done if action == Departed()])
    assert departed_at == pytest.approx(began_at + LEAVE_ROUND_S * LEAVE_ROUNDS)


def test_with_nobody_there_it_departs_at_once():
    assert Departed() in Lone().stop()
    lone = Lone(others=2)
    lone.hear(death("n2", 1, "n3"), departure("n3"))
    assert Departed() in lone.stop()


def test_it_tells_many_but_not_all():
    lone = Lone(others=LEAVE_PACKETS_MAX + 20)
    packets = [one for one in of(lone.stop(), SendPacket) if departure("n1") in one.messages]
    assert len({packet.target for packet in packets}) == len(packets) == LEAVE_PACKETS_MAX


def test_it_departs_once():
    lone = Lone(others=2)
    lone.stop()
    lone.stop()
    lone.run(1.0, silent=())
    lone.stop()
    assert [action for _, action in lone.done].count(Departed()) == 1


def test_who_leaves_refutes_nothing_and_probes_nobody():
    lone = Lone(others=3)
    lone.stop()
    lone.hear(accusation("n1"), death("n1"), alive("n1", 9, meta=b"0"), alive("n1", 9, place=at(50), meta=b"2"))
    assert (lone.view("n1"), lone.swim.counters.refutations) == ((1, "LEFT"), 0)
    assert lone.app.conflicts == []
    actions = lone.run(5.0)
    assert not sent(actions, Ping)
    assert not sent(actions, Alive)
    assert of(lone.pull(pushed("n2")), AnswerPull)[0].state.nodes.count(pushed("n1", 1, 3)) == 1


def test_a_leaving_node_that_is_accused_with_a_ping_answers_the_ping_alone():
    lone = Lone(others=3)
    lone.stop()
    lone.run(2.0)
    actions = lone.hear(Ping(7, "n1", *at(2), "n2"), Suspect(1, "n1", "n2"))
    assert sent(actions, Ack) == [(at(2), Ack(7))]
    assert sent(actions, Alive) == []


# --- pauses ----------------------------------------------------------------------------------------------------------


def paused(seconds: float, profile: Profile = LAN) -> Lone:
    """A machine that suspects n3, waits for the answer of somebody, and then does not run for a while."""
    lone = Lone(profile, others=9)
    lone.hear(accusation("n3", 1, "n4"))
    lone.quiet()
    lone.next_ping()
    lone.done.clear()
    for action in lone.sleep(seconds):
        lone.answer(action)  # a probe of now
    return lone


def test_after_a_pause_nobody_is_blamed_for_the_silence():
    lone = paused(60.0)
    assert lone.swim.counters.pauses == 1
    assert lone.view("n3") == (1, "SUSPECT")
    suspicion = lone.node("n3").suspicion
    assert suspicion is not None
    assert suspicion.deadline == pytest.approx(lone.now + 24.0)
    lone.run(10.0, silent=())
    assert lone.swim.counters.probes_failed == 0
    assert lone.swim.health == 0
    assert {node.state.name for node in lone.swim.table if node.name != "n3"} == {"ALIVE"}
    assert lone.view("n3") == (1, "SUSPECT")
    lone.run(14.1, silent=())
    assert lone.view("n3") == (1, "DEAD"), "but silent it must not stay"


def test_after_a_pause_it_asks_at_once_what_it_missed():
    exchange = only(of([action for _, action in paused(60.0).done], Exchange))
    assert exchange.target in {at(number) for number in range(2, 11) if number != 3}


def test_probes_for_others_from_before_are_forgotten():
    lone = Lone(others=3)
    ping = only(sent(lone.hear(IndirectPing(78, *at(3), "n3", True, *at(2), "n2")), Ping))[1]
    assert sent(lone.sleep(60.0) + lone.run(2.0, silent=()), Nack) == []
    assert sent(lone.hear(Ack(ping.seq)), Ack) == []


def test_a_timer_that_is_a_little_late_is_no_pause():
    lone = Lone(others=9)
    lone.run(3.0, silent=())
    lone.sleep(lone.wake_at - lone.now + TIMER_LATE_S)
    assert lone.swim.counters.pauses == 0
    lone.sleep(lone.wake_at - lone.now + TIMER_LATE_S + 0.01)
    assert lone.swim.counters.pauses == 1


def test_a_pause_that_a_packet_ends_is_one_too():
    lone = Lone(others=9)
    ping = lone.next_ping()
    lone.now += 60.0
    lone.hear(Ack(ping.seq))
    assert lone.swim.counters.pauses == 1
    assert lone.node(ping.node).rtt_s is None, "a minute was not the round trip"


def test_probing_goes_on_after_a_pause():
    lone = paused(60.0)
    probes = lone.swim.counters.probes
    lone.run(10.0, silent=())
    assert 8 <= lone.swim.counters.probes - probes <= 11


def test_a_pause_within_a_stage_that_asks_others_starts_no_second_probe():
    lone = Lone(others=9)
    lone.next_ping()
    stream = only(of(lone.run(0.6), StreamPing))
    for action in lone.sleep(30.0):
        lone.answer(action)
    lone.feed(StreamPinged(stream.number))
    probes = lone.swim.counters.probes
    lone.run(20.0, silent=())
    assert lone.swim.counters.probes - probes <= 21
    assert lone.swim.counters.probes_failed == 0


def test_several_pauses_put_the_verdict_off_each_time():
    lone = paused(60.0, KVMESH_LAN)
    for _ in range(5):
        lone.run(1.4, silent=())
        lone.sleep(30.0)
        assert lone.view("n3") == (1, "SUSPECT")
    lone.run(100.0, silent=["n3"])
    assert lone.view("n3") == (1, "DEAD")


# --- memory ----------------------------------------------------------------------------------------------------------


def test_whoever_accuses_and_refutes_in_turn_does_not_fill_the_memory():
    """Each suspicion has a deadline; timers of those that are over must not pile up until then."""
    lone = Lone(others=9)
    for incarnation in range(2, 2000):
        lone.hear(alive("n3", incarnation), accusation("n3", incarnation, "n4"), accusation("n3", incarnation, "n5"))
        lone.hear(accusation("n1", incarnation), accusation("n3", incarnation, f"n{incarnation}"))
    assert len(lone.swim._shared.timers._heap) < 30
    lone.run(3.0, silent=())
    assert lone.view("n3") == (1999, "SUSPECT")
    lone.run(2.0, silent=())
    assert lone.view("n3") == (1999, "DEAD"), "and the last one still counts"
