"""The bounds on streams: time, number and bytes, with peers that do what no honest peer does."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Awaitable, Callable

import pytest

from kvmesh.discovery.network import open_network, streams
from kvmesh.discovery.swim.events import Exchange, Exchanged, Pulled, SendUser, StreamFailed, StreamPing, StreamPinged
from kvmesh.discovery.wire import Ack, Endpoint, ErrorReply, Keyring, Ping, StreamCodec, User
from kvmesh.discovery.wire.errors import WireError
from kvmesh.transport.limits import MIB
from tests.discovery.network_support import WAIT_S, Side, state_of
from tests.support.waiting import wait_until_async

CODEC = StreamCodec(None)
ENCRYPTED_HEADER = b"\x0a" + (7 * MIB).to_bytes(4, "big")
"""Of a stream that will be long."""


class Peer:
    """A stream whose other end is the test."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        sock.setblocking(False)

    async def send(self, data: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(self.socket, data)

    async def receive(self, count: int = 1 << 16) -> bytes:
        async with asyncio.timeout(WAIT_S):
            return await asyncio.get_running_loop().sock_recv(self.socket, count)

    async def is_closed(self) -> bool:
        try:
            return await self.receive() == b""
        except ConnectionError:
            return True


class World:
    """One node, and peers of it. All are closed in the end."""

    def __init__(self, side: Side) -> None:
        self.a = side
        self._sockets: list[socket.socket] = []

    async def peer(self) -> Peer:
        sock = socket.create_connection(("127.0.0.1", self.a.endpoint.port))
        self._sockets.append(sock)
        return Peer(sock)

    def listen(self, backlog: int = 16) -> tuple[socket.socket, Endpoint]:
        sock = socket.create_server(("127.0.0.1", 0), backlog=backlog)
        sock.setblocking(False)
        self._sockets.append(sock)
        return sock, Endpoint(b"\x7f\0\0\1", sock.getsockname()[1])

    async def accept(self, sock: socket.socket) -> Peer:
        connection, _ = await asyncio.wait_for(asyncio.get_running_loop().sock_accept(sock), WAIT_S)
        self._sockets.append(connection)
        return Peer(connection)

    def close(self) -> None:
        for sock in self._sockets:
            sock.close()


def run(scene: Callable[[World], Awaitable[None]], keyring: Keyring | None = None) -> None:
    async def play() -> None:
        side = Side(await open_network("127.0.0.1", 0, name="a", keyring=keyring), state_of("a"))
        side.start()
        world = World(side)
        try:
            await scene(world)
        finally:
            world.close()
            await side.network.close()
        assert side.network._streams._served_bytes.count == side.network._streams._opened_bytes.count == 0

    asyncio.run(play())


async def counted(world: World, counter: str, count: int) -> None:
    await wait_until_async(lambda: getattr(world.a.network.counters, counter) == count, WAIT_S, f"{counter} is {count}")


# --- served ----------------------------------------------------------------------------------------------------------


def test_a_stream_that_ends_early_is_counted() -> None:
    async def scene(world: World) -> None:
        whole = CODEC.seal(state_of("b"), answer=False)
        for data in (b"", b"\x06", whole[:-1]):
            peer = await world.peer()
            await peer.send(data)
            peer.socket.shutdown(socket.SHUT_WR)
            assert await peer.is_closed()
        await counted(world, "streams_unread", 3)
        assert world.a.events == []
        assert world.a.network.counters.refused == {}

    run(scene)


def test_a_message_may_come_byte_by_byte() -> None:
    async def scene(world: World) -> None:
        peer = await world.peer()
        for byte in CODEC.seal(Ping(5, "a"), answer=False):
            await peer.send(bytes([byte]))
            await asyncio.sleep(0)
        assert CODEC.reader(answer=True).feed(await peer.receive()) == Ack(5)
        assert await peer.is_closed()

    run(scene)


def test_garbage_is_answered_with_the_reason_and_who_then_waits_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "STREAM_LINGER_S", 0.02)

    async def scene(world: World) -> None:
        peer = await world.peer()
        await peer.send(b"\x63" + os.urandom(100))
        reply = CODEC.reader(answer=True).feed(await peer.receive())
        assert isinstance(reply, ErrorReply)
        assert "kind 99" in reply.text
        assert await peer.is_closed()
        assert world.a.network.counters.refused == {"unknown_kind": 1}
        await wait_until_async(lambda: not world.a.network._streams._served, WAIT_S, "it is over")

    run(scene)


def test_who_was_refused_in_the_middle_of_a_long_message_can_still_read_why() -> None:
    async def scene(world: World) -> None:
        peer = await world.peer()
        await peer.send(CODEC.seal(state_of("b", 2000, os.urandom(400)), answer=False))  # not encrypted
        data = await peer.receive()
        reply = StreamCodec(Keyring([bytes(32)])).reader(answer=True).feed(data)
        assert isinstance(reply, ErrorReply)
        assert world.a.network.counters.refused == {"plaintext": 1}

    run(scene, Keyring([bytes(32)]))


@pytest.mark.parametrize("says", [b"", b"\x06", ENCRYPTED_HEADER])
def test_a_silent_peer_has_a_time_for_everything_together(monkeypatch: pytest.MonkeyPatch, says: bytes) -> None:
    monkeypatch.setattr(streams, "STREAM_SERVE_TIMEOUT_S", 0.03)

    async def scene(world: World) -> None:
        peer = await world.peer()
        await peer.send(says)
        assert await peer.is_closed()
        await counted(world, "streams_unread", 1)

    run(scene, Keyring([bytes(32)]) if says == ENCRYPTED_HEADER else None)


def test_a_peer_that_never_reads_our_answer_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "STREAM_SERVE_TIMEOUT_S", 0.1)

    async def scene(world: World) -> None:
        world.a.state = state_of("a", 8000, os.urandom(500))  # more than the kernel takes from us
        peer = await world.peer()
        await peer.send(CODEC.seal(state_of("b"), answer=False))
        await world.a.hears(Pulled)
        held = world.a.network._streams._served_bytes
        await wait_until_async(lambda: held.count > 4 * MIB, WAIT_S, "our answer waits, and is counted")
        await counted(world, "streams_unread", 1)
        await wait_until_async(lambda: held.count == 0, WAIT_S, "nothing is held")

    run(scene)


def test_a_protocol_that_does_not_answer_costs_a_stream_its_time_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "STREAM_SERVE_TIMEOUT_S", 0.03)

    async def scene(world: World) -> None:
        world.a.on_pulled = lambda _: None
        peer = await world.peer()
        await peer.send(CODEC.seal(state_of("b"), answer=False))
        assert await peer.is_closed()
        assert world.a.network._streams._answers == {}

    run(scene)


@pytest.mark.parametrize("bound", ["STREAMS_SERVED_MAX", "STREAMS_PER_SOURCE_MAX"])
def test_streams_beyond_the_bound_are_closed_at_once_and_others_served_later(
    bound: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, bound, 3)

    async def scene(world: World) -> None:
        peers = [await world.peer() for _ in range(3)]
        await counted(world, "streams_served", 3)
        beyond = await world.peer()
        assert await beyond.is_closed()
        assert world.a.network.counters.streams_refused == 1
        peers[0].socket.close()
        await counted(world, "streams_unread", 1)
        later = await world.peer()
        await later.send(CODEC.seal(Ping(5, ""), answer=False))
        assert CODEC.reader(answer=True).feed(await later.receive()) == Ack(5)

    run(scene)


def test_all_streams_together_hold_no_more_than_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "STREAM_BYTES_HELD_MAX", 2 * MIB)

    async def scene(world: World) -> None:
        held = world.a.network._streams._served_bytes
        peers = [await world.peer() for _ in range(3)]
        for number, peer in enumerate(peers[:2], 1):
            await peer.send(ENCRYPTED_HEADER + bytes(MIB - 100))
            await wait_until_async(lambda number=number: held.count >= number * (MIB - 100), WAIT_S, "it is held")
        assert held.count <= 2 * MIB
        await peers[2].send(ENCRYPTED_HEADER + bytes(1000))
        assert await peers[2].is_closed()
        await counted(world, "streams_refused", 1)
        assert held.count <= 2 * MIB
        peers[0].socket.close()
        await wait_until_async(lambda: held.count <= MIB, WAIT_S, "room is given back")
        small = await world.peer()
        await small.send(StreamCodec(KEYRING).seal(Ping(5, "a"), answer=False))
        assert StreamCodec(KEYRING).reader(answer=True).feed(await small.receive()) == Ack(5)

    run(scene, KEYRING)


KEYRING = Keyring([bytes(32)])


def test_an_unforeseen_error_is_counted_and_the_node_lives_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def scene(world: World) -> None:
        reader = type(CODEC.reader(answer=False))
        with monkeypatch.context() as patch:
            patch.setattr(reader, "feed", lambda *_: 1 / 0)
            peers = [await world.peer() for _ in range(2)]
            for peer in peers:
                await peer.send(b"x")
                assert await peer.is_closed()
            listener, endpoint = world.listen()
            world.a.do(StreamPing(1, endpoint, Ping(1, "b"), WAIT_S))
            answering = await world.accept(listener)
            await answering.send(b"x")
            (failed,) = await world.a.hears(StreamFailed)
            assert failed.reason.endswith("an unexpected error")
        assert world.a.network.counters.unexpected_errors == 3
        world.a.do(StreamPing(2, world.a.endpoint, Ping(2, "a"), WAIT_S))
        await world.a.hears(StreamPinged)

    with caplog.at_level(logging.ERROR):
        run(scene)
    assert len(caplog.records) == 2


# --- opened ----------------------------------------------------------------------------------------------------------


def test_streams_of_our_own_are_bounded_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "STREAMS_OPENED_MAX", 2)

    async def scene(world: World) -> None:
        _, endpoint = world.listen()
        for number in (1, 2, 3):
            world.a.do(Exchange(number, endpoint, state_of("a"), WAIT_S))
        assert world.a.events == []  # never from within the protocol
        assert await world.a.hears(StreamFailed) == [StreamFailed(3, "too many streams are open")]
        assert world.a.network.counters.streams_failed == 1

    run(scene)


def test_what_our_own_streams_hold_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "STREAM_BYTES_HELD_MAX", 1 * MIB)

    async def scene(world: World) -> None:
        _, endpoint = world.listen()
        world.a.do(SendUser(1, endpoint, bytes(MIB), WAIT_S))
        (failed,) = await world.a.hears(StreamFailed)
        assert failed.reason.endswith("hold more than 1048576 bytes")

    run(scene)


@pytest.mark.parametrize("says", [b"", b"\x06\x83"])
def test_a_peer_that_is_half_open_costs_the_time_of_the_action(says: bytes) -> None:
    async def scene(world: World) -> None:
        listener, endpoint = world.listen()
        world.a.do(Exchange(1, endpoint, state_of("a"), 0.05))
        peer = await world.accept(listener)
        await peer.send(says)
        (failed,) = await world.a.hears(StreamFailed)
        assert failed.reason.endswith("no answer within 0.05 s")
        while await peer.receive():
            pass  # and then the end: the socket is closed

    run(scene)


def test_a_peer_that_never_reads_what_we_send_costs_the_time_of_the_action() -> None:
    async def scene(world: World) -> None:
        listener, endpoint = world.listen()
        world.a.do(Exchange(1, endpoint, state_of("a", 8000, os.urandom(500)), 0.1))
        world.a.do(SendUser(2, endpoint, bytes(7 * MIB), 0.1))
        _ = await world.accept(listener), await world.accept(listener)
        assert {failed.number for failed in await world.a.hears(StreamFailed, 2)} == {1, 2}

    run(scene)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (CODEC.seal(User(b"x"), answer=True), "another answer than its state"),
        (CODEC.seal(ErrorReply("not you"), answer=True), "it refused: not you"),
        (b"", "the stream was closed without an answer"),
        (CODEC.seal(state_of("b"), answer=True)[:-1], "the stream was closed without an answer"),
        (
            b"\x63",
            "its answer could not be read: a message of kind 99 over a stream; what listens there does not gossip: "
            "give the gossip port, not the mesh port",
        ),
    ],
)
def test_an_answer_that_is_none_is_a_failure(answer: bytes, reason: str) -> None:
    async def scene(world: World) -> None:
        listener, endpoint = world.listen()
        world.a.do(Exchange(1, endpoint, state_of("a"), WAIT_S))
        peer = await world.accept(listener)
        await peer.receive()
        await peer.send(answer)
        peer.socket.shutdown(socket.SHUT_WR)
        assert await world.a.hears(StreamFailed) == [StreamFailed(1, f"127.0.0.1:{endpoint.port}: {reason}")]
        assert world.a.told(Exchanged) == []

    run(scene)


def test_an_ack_of_another_ping_is_no_answer() -> None:
    async def scene(world: World) -> None:
        listener, endpoint = world.listen()
        world.a.do(StreamPing(1, endpoint, Ping(7, "b"), WAIT_S))
        peer = await world.accept(listener)
        assert CODEC.reader(answer=False).feed(await peer.receive()) == Ping(7, "b")
        await peer.send(CODEC.seal(Ack(8), answer=True))
        (failed,) = await world.a.hears(StreamFailed)
        assert failed.reason.endswith("another answer than an ack to this ping")

    run(scene)


def test_a_refusal_of_any_length_is_bounded() -> None:
    sealed = CODEC.seal(ErrorReply("x" * 100_000), answer=True)
    assert len(sealed) < 1024
    with pytest.raises(WireError):
        CODEC.reader(answer=True).feed(b"\x0d\x81\xa5Error\xdb" + (100_000).to_bytes(4, "big") + b"x" * 100_000)
