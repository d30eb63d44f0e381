"""Rounds of gossip: who hears, how often, how much fits into a packet."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from kvmesh.discovery.actions import Action
from kvmesh.discovery.swim.events import SendPacket
from kvmesh.discovery.swim.profile import KVMESH_LAN, LAN, Profile
from kvmesh.discovery.wire.keyring import Keyring
from kvmesh.discovery.wire.messages import Ack, Alive, Dead, IndirectPing, Ping, User
from kvmesh.discovery.wire.packets import PacketCodec, overhead_bytes
from kvmesh.transport.limits import RUMOURS_MAX
from tests.discovery.swim.support import Lone, accusation, alive, at, death, departure, of, only, sent


def rounds(actions: list[Action]) -> list[SendPacket]:
    """The packets of gossip: those that nothing but rumours is in."""
    return [one for one in of(actions, SendPacket) if not isinstance(one.messages[0], Ping | Ack | IndirectPing)]


# --- who hears -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("profile", "hearers"), [(LAN, 3), (replace(LAN, gossip_nodes=4), 4)])
def test_a_round_goes_to_some_nodes_each_another(profile: Profile, hearers: int):
    lone = Lone(profile, others=8)
    lone.hear(alive("n20"))
    lone.ring_until(lambda: bool(rounds([action for _, action in lone.done])))
    packets = rounds([action for _, action in lone.done])
    assert len({packet.target for packet in packets}) == len(packets) == hearers
    assert all(packet.messages == (alive("n20"),) for packet in packets)


def test_over_the_rounds_everyone_hears():
    lone = Lone(others=9)
    for incarnation in range(2, 12):
        lone.hear(alive("n2", incarnation))
        lone.run(0.5, silent=())
    told = {packet.target for packet in rounds([action for _, action in lone.done])}
    assert told == {at(number) for number in range(2, 11)}


def test_rounds_keep_their_interval_and_end_with_the_rumours():
    lone = Lone(others=9)
    lone.hear(alive("n20"))
    lone.run(5.0, silent=())
    times = sorted({when for when, action in lone.done if rounds([action])})
    assert lone.swim.rumours == 0
    assert all(later - earlier == pytest.approx(0.2) for earlier, later in itertools.pairwise(times))
    told = sum(alive("n20") in action.messages for _, action in lone.done if isinstance(action, SendPacket))
    assert told == 8, "with eleven nodes, 4 * ceil(log10(12)) times"


def test_our_profile_tells_in_a_small_mesh_as_often_as_in_one_of_ninety():
    lone = Lone(KVMESH_LAN, others=3)
    lone.hear(alive("n3", 2))
    lone.run(5.0, silent=())
    told = sum(alive("n3", 2) in action.messages for _, action in lone.done if isinstance(action, SendPacket))
    assert told == KVMESH_LAN.transmits_min == 18


def test_our_profile_begins_at_once_and_then_keeps_the_interval():
    lone = Lone(KVMESH_LAN, others=9)
    lone.run(1.0, silent=())
    lone.done.clear()
    lone.hear(alive("n20"))
    lone.run(0.0)
    assert rounds([action for _, action in lone.done])
    began_at = lone.now
    lone.quiet()
    lone.now = max(lone.now, began_at)
    lone.hear(alive("n20", 2))
    lone.run(1.0, silent=())
    assert min(when for when, action in lone.done if rounds([action])) >= began_at + 0.1


def test_those_that_failed_hear_for_a_while_and_those_that_left_do_not():
    lone = Lone(others=5)
    lone.hear(death("n2", 1, "n5"), departure("n3"), accusation("n4"))

    def told_within(seconds: float) -> set[int]:
        before, until = len(lone.done), lone.now + seconds
        while lone.now < until:
            lone.hear(alive("n6", lone.node("n6").incarnation + 1))
            lone.run(min(0.5, until - lone.now), silent=())
        return {packet.target.ip[3] for packet in rounds([action for _, action in lone.done[before:]])}

    failed_at = lone.now
    assert told_within(3.0) == {2, 4, 5, 6}
    while lone.now < failed_at + 29:
        lone.run(1.0, silent=())
    assert 2 in told_within(failed_at + 30 - lone.now)
    lone.run(0.1)
    assert 2 not in told_within(3.0)


def test_packets_of_gossip_have_a_crc_where_it_is_read():
    lone = Lone()
    lone.hear(alive("n2"), alive("n3", versions=b""))
    packets = rounds(lone.run(2.0))
    assert {(packet.target, packet.crc) for packet in packets} == {(at(2), True), (at(3), False)}


def test_with_nobody_there_rumours_come_to_an_end():
    lone = Lone()
    assert lone.swim.rumours == 1, "its own word"
    assert lone.run(5.0) == []
    assert lone.swim.rumours == 0


# --- what fits -------------------------------------------------------------------------------------------------------


def test_words_of_the_application_get_the_room_that_is_left():
    lone = Lone(others=3)
    for number in range(40):
        lone.swim.tell(f"word {number}", bytes([number]) * 100, lone.now)
    lone.hear(alive("n20", meta=b"m" * 500), alive("n21", meta=b"m" * 500))
    packet = rounds(lone.run(0.3))[0]
    assert [type(message) for message in packet.messages] == [Alive, Alive, User, User]


def test_the_newest_word_about_a_node_is_told():
    lone = Lone(others=3)
    lone.hear(alive("n3", 5), accusation("n3", 5), death("n3", 5))
    told = {message for packet in rounds(lone.run(3.0, silent=())) for message in packet.messages}
    assert told == {death("n3", 5)}


@pytest.mark.parametrize("keyring", [None, Keyring([bytes(16)])], ids=["plain", "encrypted"])
@pytest.mark.parametrize("label", ["", "a-label-of-some-length" * 3])
def test_no_packet_is_larger_than_the_profile_says(keyring: Keyring | None, label: str):
    """Sealed and measured, with the largest of everything: names, metas, words."""
    codec = PacketCodec(keyring, label)
    overhead = overhead_bytes(keyring is not None, label)
    lone = Lone(KVMESH_LAN, overhead_bytes=overhead, meta=b"1")
    names = [f"n{number}".ljust(128, "x") for number in range(2, 12)]
    for number, name in enumerate(names, 2):
        lone.hear(alive(name, (1 << 32) - 2, place=at(number), meta=b"m" * 512))
    for number in range(30):
        lone.swim.tell(f"word {number}", bytes(37 * number % 256), lone.now)
    largest = 0
    for step in range(60):
        lone.hear(Ping(step, "n1", *at(2), names[0]), accusation(names[step % 10], (1 << 32) - 2, names[step % 7]))
        lone.hear(IndirectPing(step, *at(3), names[1], True, *at(2), names[0]))
        lone.hear(alive(names[step % 10], (1 << 32) - 1, place=at(2 + step % 10), meta=bytes([step % 250]) * 512))
        lone.run(0.1, silent=())
    assert any(isinstance(message, Dead | User) for _, message in sent([action for _, action in lone.done], User))
    for packet in of([action for _, action in lone.done], SendPacket):
        sealed = codec.seal(packet.messages, crc=True)
        assert len(sealed) <= KVMESH_LAN.packet_bytes_max
        assert codec.open(sealed) == list(packet.messages)
        largest = max(largest, len(sealed))
    assert largest > KVMESH_LAN.packet_bytes_max - 60, "and the room is used"


def test_rumours_are_bounded_and_what_found_no_room_is_counted():
    lone = Lone(others=2)
    for number in range(RUMOURS_MAX + 10):
        lone.swim.tell(f"word {number}", b"w", lone.now)
    assert lone.swim.rumours == RUMOURS_MAX
    assert lone.swim.counters.rumours_dropped == 10


def test_a_word_that_fits_no_packet_stops_nobody_else():
    lone = Lone(others=2)
    lone.swim.tell("too large", bytes(5000), lone.now)
    lone.hear(alive("n2", 2))
    lone.run(3.0, silent=())
    assert (at(3), alive("n2", 2)) in sent([action for _, action in lone.done], Alive)
    assert only([len(lone.swim._shared.words)]) == 1
