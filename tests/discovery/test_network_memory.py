"""What a test can do to gossip in memory: stop, stall, cut, lose."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from random import Random

import pytest

from kvmesh.discovery.network import MemoryGossip, memory
from kvmesh.discovery.swim.events import (
    Exchange,
    Exchanged,
    PacketCame,
    Resolve,
    Resolved,
    SendPacket,
    SendUser,
    StreamFailed,
    StreamPing,
    StreamPinged,
    UserCame,
)
from kvmesh.discovery.wire import Ack, Endpoint, Ping
from kvmesh.transport.errors import SettingsError
from tests.discovery.network_support import WAIT_S, Place, Side, play, state_of

Scene = Callable[[Place, MemoryGossip, Side, Side], Awaitable[None]]


def run(scene: Scene) -> None:
    async def at(here: Place) -> None:
        assert here.memory is not None
        await scene(here, here.memory, await here.open("a"), await here.open("b"))

    play("memory", at)


async def turns(count: int = 20) -> None:
    """Long enough for all that is going to happen."""
    for _ in range(count):
        await asyncio.sleep(0)


def numbers(side: Side) -> list[int]:
    return [message.seq for came in side.told(PacketCame) for message in came.messages if isinstance(message, Ack)]


def test_what_is_sent_from_or_to_a_stalled_host_waits_in_its_order() -> None:
    async def scene(here: Place, gossip: MemoryGossip, a: Side, b: Side) -> None:
        gossip.stall("b")
        for number in range(3):
            a.do(SendPacket(b.endpoint, (Ack(number),)))
            b.do(SendPacket(a.endpoint, (Ack(number),)))
        a.do(StreamPing(1, b.endpoint, Ping(1, "b"), WAIT_S))
        b.do(StreamPing(2, a.endpoint, Ping(2, "a"), WAIT_S))
        await turns()
        assert a.events == b.events == []
        gossip.resume("b")
        await a.hears(StreamPinged)
        await b.hears(StreamPinged)
        assert numbers(a) == numbers(b) == [0, 1, 2]

    run(scene)


def test_a_stalled_host_holds_no_more_than_a_kernel_would(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "MEMORY_PACKETS_HELD_MAX", 2)

    async def scene(here: Place, gossip: MemoryGossip, a: Side, b: Side) -> None:
        gossip.stall("b")
        for number in range(5):
            a.do(SendPacket(b.endpoint, (Ack(number),)))
            b.do(SendPacket(a.endpoint, (Ack(number),)))
        await turns()
        gossip.resume("b")
        await turns()
        assert numbers(a) == numbers(b) == [0, 1]

    run(scene)


def test_a_cut_loses_packets_and_lets_streams_wait() -> None:
    async def scene(here: Place, gossip: MemoryGossip, a: Side, b: Side) -> None:
        c = await here.open("c")
        b.on_pulled = lambda _: gossip.cut("a", "b")  # in the middle of an exchange: then nobody answers
        a.do(Exchange(1, b.endpoint, state_of("a", 1000, bytes(300)), 0.05))
        await a.hears(StreamFailed)
        a.do(SendPacket(b.endpoint, (Ack(1),)))
        a.do(StreamPing(2, b.endpoint, Ping(1, "b"), WAIT_S))
        c.do(SendPacket(b.endpoint, (Ack(2),)))
        await b.hears(PacketCame)
        assert numbers(b) == [2]
        assert a.told(StreamPinged) == []
        gossip.heal("a", "b")
        await a.hears(StreamPinged)

    run(scene)


def test_who_is_stopped_is_gone_and_its_streams_end() -> None:
    async def scene(here: Place, gossip: MemoryGossip, a: Side, b: Side) -> None:
        b.on_pulled = lambda _: None
        a.do(Exchange(1, b.endpoint, a.state, WAIT_S))
        gossip.stall("c")
        await turns()
        await gossip.stop("b")
        a.do(StreamPing(2, b.endpoint, Ping(1, "b"), WAIT_S))
        reasons = {failed.number: failed.reason for failed in await a.hears(StreamFailed, 2)}
        assert reasons == {
            1: "10.0.0.2:7951: the stream was closed without an answer",
            2: "10.0.0.2:7951: Connection refused",
        }
        again = await here.open("b")
        assert again.endpoint == b.endpoint
        a.do(Exchange(3, again.endpoint, a.state, WAIT_S))
        await a.hears(Exchanged)

    run(scene)


def test_who_is_stopped_while_others_wait_for_it_refuses_them() -> None:
    async def scene(here: Place, gossip: MemoryGossip, a: Side, b: Side) -> None:
        gossip.stall("b")
        a.do(StreamPing(1, b.endpoint, Ping(1, "b"), WAIT_S))
        await turns()
        await gossip.stop("b")
        gossip.resume("b")
        assert (await a.hears(StreamFailed))[0].reason.endswith("Connection refused")

    run(scene)


def test_a_writer_whose_reader_goes_away_is_told() -> None:
    async def scene(here: Place, gossip: MemoryGossip, a: Side, b: Side) -> None:
        c = await here.open("c", start=False)
        a.do(SendUser(1, c.endpoint, bytes(1 << 20), WAIT_S))  # more than c's buffer, and it reads nothing
        await turns()
        await gossip.stop("c")
        assert (await a.hears(StreamFailed))[0].reason.endswith("Broken pipe")
        a.do(SendUser(2, b.endpoint, bytes(1 << 20), WAIT_S))
        await b.hears(UserCame)

    run(scene)


@pytest.mark.parametrize(("share", "least", "most"), [(0.0, 1000, 1000), (0.3, 600, 800), (1.0, 0, 0)])
def test_a_share_of_the_packets_gets_lost_the_same_with_the_same_random_source(
    share: float, least: int, most: int
) -> None:
    def arrived() -> list[int]:
        async def play_once() -> list[int]:
            gossip = MemoryGossip(Random(7))
            gossip.lose(share)
            a, b = (Side(gossip.open(name), state_of(name)) for name in "ab")
            a.start()
            b.start()
            for number in range(1000):
                a.do(SendPacket(b.endpoint, (Ack(number),)))
            await turns()
            await a.network.close()
            await b.network.close()
            return numbers(b)

        return asyncio.run(play_once())

    first = arrived()
    assert least <= len(first) <= most
    assert first == arrived()


def test_names_and_ports() -> None:
    async def scene(here: Place, gossip: MemoryGossip, a: Side, b: Side) -> None:
        gossip.name_hosts("seed.mesh", ["b", "a", "b", "d"])
        a.do(Resolve("seed.mesh:7951"))
        found = (b.endpoint, a.endpoint, Endpoint(b"\x0a\0\0\3", 7951))
        assert await a.hears(Resolved) == [Resolved("seed.mesh:7951", found)]
        with pytest.raises(SettingsError, match="--gossip-port: port 7951 on a is in use"):
            gossip.open("other", host="a")
        other = gossip.open("other", host="a", port=7000)
        assert other.address == "10.0.0.1:7000"
        await gossip.stop("a")
        assert gossip.open("other", host="a", port=7000).endpoint == other.endpoint

    run(scene)
