"""What only the ZeroMQ transport has: a port, connections, and strangers who connect to it."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import random
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator

import msgspec
import pytest
import zmq
import zmq.asyncio

from kvmesh.transport import zmq_bulk, zmq_calls, zmq_links, zmq_serve
from kvmesh.transport.errors import ProtocolError, SettingsError, UnreachableError
from kvmesh.transport.frames import (
    HELD,
    Alive,
    Answer,
    Bulk,
    Call,
    Cancel,
    Grant,
    Item,
    Message,
    Read,
    Refusal,
    encode,
    encode_wanted,
    to_caller,
    to_holder,
)
from kvmesh.transport.interface import Outcome
from kvmesh.transport.limits import (
    KIB,
    MESH_PROTOCOL_VERSION,
    MESSAGE_BYTES_MAX,
    MIB,
    READ_WINDOW_BYTES,
    READ_WINDOW_BYTES_MIN,
)
from kvmesh.transport.zmq import ZmqTransport, open_zmq
from tests.support.waiting import wait_until_async
from tests.transport.ends import LONG_S, Chunks, collect, echo, key, outcomes, two, wants

V = MESH_PROTOCOL_VERSION
Reply = Callable[[list[bytes]], list[list[bytes]]]


@contextlib.asynccontextmanager
async def transport(source: Chunks | None = None) -> AsyncIterator[ZmqTransport]:
    opened = await open_zmq("127.0.0.1", 0, source, echo)
    try:
        yield opened
    finally:
        await opened.close()
    assert source is None or source.out == 0


class Stranger:
    """A socket that speaks ZeroMQ and says what a test wants."""

    def __init__(self, kind: int, address: str = "") -> None:
        self.context = zmq.asyncio.Context()
        self.socket = self.context.socket(kind)
        self.socket.linger = 0
        if address:
            self.socket.connect(f"tcp://{address}")
        else:
            self.address = f"127.0.0.1:{self.socket.bind_to_random_port('tcp://127.0.0.1')}"

    async def say(self, *parts: bytes | Message) -> None:
        await self.socket.send_multipart([encode(part) if isinstance(part, Message) else part for part in parts])

    async def hear(self) -> list[bytes]:
        async with asyncio.timeout(LONG_S):
            while True:
                parts: list[bytes] = await self.socket.recv_multipart()
                if parts != [encode(Alive(V, 0))]:
                    return parts

    def __enter__(self) -> Stranger:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()
        self.context.term()


@contextlib.asynccontextmanager
async def peer(reply: Reply) -> AsyncIterator[str]:
    """The address of a peer that answers each message with what `reply` makes of it."""

    async def serve(stranger: Stranger) -> None:
        while True:
            identity, *parts = await stranger.socket.recv_multipart()
            for answer in reply(parts):
                await stranger.socket.send_multipart([identity, *answer])

    with Stranger(zmq.ROUTER) as stranger:
        task = asyncio.create_task(serve(stranger))
        try:
            yield stranger.address
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task


# --- the port --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org", ""])
def test_only_loopback_is_listened_on(host: str) -> None:
    with pytest.raises(SettingsError, match=r"cannot listen on .*127\.0\.0\.1"):
        asyncio.run(open_zmq(host, 0, None, echo))


def test_a_port_in_use_is_named() -> None:
    async def main() -> None:
        async with transport() as first:
            port = int(first.address.rsplit(":", 1)[1])
            with pytest.raises(SettingsError, match=f"port {port} on 127.0.0.1 is in use"):
                await open_zmq("127.0.0.1", port, None, echo)
        again = await open_zmq("localhost", port, None, echo)  # it is free after the close
        assert again.address == f"127.0.0.1:{port}"
        await again.close()

    asyncio.run(main())


def test_a_port_that_is_none_is_named() -> None:
    with pytest.raises(SettingsError, match="port 70000"):
        asyncio.run(open_zmq("127.0.0.1", 70000, None, echo))


def test_ipv6() -> None:
    async def main() -> None:
        source = Chunks()
        source.fill(2, 300 * KIB)
        holder = await open_zmq("::1", 0, source, echo)
        assert holder.address.startswith("[::1]:")
        async with transport() as reader:
            assert await reader.call(holder.address, b"6", timeout_s=LONG_S) == b"6"
            assert len(await collect(reader.read(holder.address, wants([0, 1], 300 * KIB), deadline_s=LONG_S))) == 2
        await holder.close()

    asyncio.run(main())


@pytest.mark.parametrize("address", ["", "nowhere", "127.0.0.1", "127.0.0.1:99999", "[::1]", "a b:1", "h:1;h:2"])
def test_what_is_no_address_is_unreachable(address: str) -> None:
    async def main() -> None:
        async with transport() as node:
            with pytest.raises(UnreachableError, match="address|cannot connect"):
                await node.call(address, b"", timeout_s=LONG_S)
            assert await collect(node.read(address, wants([0], 1), deadline_s=1000)) == {}

    asyncio.run(main())


# --- strangers at the port -------------------------------------------------------------------------------------------
def test_what_a_stranger_says_is_counted_and_the_node_lives_on() -> None:
    async def main() -> None:
        source = Chunks()
        source.fill(1, 10)
        bad: list[list[bytes | Message]] = [
            [b""],
            [b"\xc1", b""],
            [msgspec.msgpack.encode([1, V, 1, msgspec.msgpack.Ext(1, b"cos\nsystem")]), b""],
            [b"\x91" * 2000],
            [Call(V, 1)],
            [Call(V, 1), bytes(MESSAGE_BYTES_MAX + 1)],
            [Call(V, 1), b"", b"", b""],
            [Read(V, 1, READ_WINDOW_BYTES), b"short"],
            [Read(V, 1, 2**40), encode_wanted(wants([0], 1))],
            [Grant(V, 1, 2**50)],
            [Answer(V, 1), b"unasked"],
            [Bulk(V, 1, [Item(0, HELD, 0, 0, 1)]), b"x"],
        ]
        async with transport(source) as node:
            with Stranger(zmq.DEALER, node.address) as stranger:
                for parts in bad:
                    await stranger.say(*parts)
                await stranger.say(Grant(V, 77, 5))  # of a read that is over, for all we know: no harm, no count
                await stranger.say(Cancel(V, 77))
                await stranger.say(Call(V, 9), b"still there?")
                assert to_caller(await stranger.hear()) == (Answer(V, 9), b"still there?")
            assert node.stats().malformed == len(bad)

    asyncio.run(main())


def test_nobody_acts_on_the_requests_of_another() -> None:
    async def main() -> None:
        source = Chunks()
        source.fill(3, 64 * KIB)
        async with transport(source) as node:
            with Stranger(zmq.DEALER, node.address) as reader, Stranger(zmq.DEALER, node.address) as thief:
                await reader.say(Read(V, 1, READ_WINDOW_BYTES_MIN), encode_wanted(wants(range(3), 64 * KIB)))
                first = await reader.hear()
                await thief.say(Cancel(V, 1))
                await thief.say(Grant(V, 1, READ_WINDOW_BYTES_MIN))
                await thief.say(Call(V, 1), b"seen")
                assert to_caller(await thief.hear()) == (Answer(V, 1), b"seen")
                await reader.say(Grant(V, 1, len(first[1])))
                while (await reader.hear())[0] == b"":
                    pass
                await reader.say(Cancel(V, 1))

    asyncio.run(main())


def test_random_messages_at_the_port(rng: random.Random) -> None:
    heads: list[Message] = [Call(V, 1), Read(V, 2, READ_WINDOW_BYTES), Grant(V, 2, 100), Cancel(V, 1), Answer(V, 1)]

    def part() -> bytes:
        if rng.random() < 0.5:
            return rng.randbytes(rng.randrange(120))
        head = bytearray(encode(rng.choice(heads)))
        head[rng.randrange(len(head))] = rng.randrange(256)
        return bytes(head)

    async def main() -> None:
        source = Chunks()
        source.fill(1, 1)
        async with transport(source) as node:
            with Stranger(zmq.DEALER, node.address) as stranger:
                for _ in range(500):
                    await stranger.say(*(part() for _ in range(rng.randrange(1, 4))))
                with contextlib.closing(socket.create_connection(("127.0.0.1", int(node.address[10:])))) as plain:
                    plain.sendall(rng.randbytes(4096))  # not even ZeroMQ
            async with transport() as other:
                assert await other.call(node.address, b"alive", timeout_s=LONG_S) == b"alive"
                assert len(await collect(other.read(node.address, wants([0], 1), deadline_s=LONG_S))) == 1
            assert node.stats().malformed > 100

    asyncio.run(main())


def test_a_caller_of_another_version_is_told() -> None:
    async def main() -> None:
        async with transport() as node:
            with Stranger(zmq.DEALER, node.address) as stranger:
                for tag in (1, 2):
                    await stranger.say(msgspec.msgpack.encode([tag, V + 1, 5, "what", "we", "know not"]), b"")
                    answer, _ = to_caller(await stranger.hear())
                    assert answer == Refusal(V, 5, f"the peer speaks mesh protocol {V + 1}, this node speaks {V}")
                await stranger.say(msgspec.msgpack.encode([3, V + 1, 5]))
            await wait_until_async(lambda: node.stats().malformed == 3, LONG_S, "all three are counted")

    asyncio.run(main())


def test_calls_beyond_the_bounds_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zmq_serve, "CALLS_PER_PEER_MAX", 1)
    monkeypatch.setattr(zmq_calls, "CALLS_PER_PEER_MAX", 3)

    async def main() -> None:
        async def never(_: bytes) -> bytes:
            await asyncio.Event().wait()
            return b""

        busy = await open_zmq("127.0.0.1", 0, None, never)
        async with transport() as node:
            calls = [asyncio.create_task(node.call(busy.address, b"", timeout_s=LONG_S)) for _ in range(4)]
            for call, error in ((calls[3], UnreachableError), (calls[1], ProtocolError), (calls[2], ProtocolError)):
                with pytest.raises(error, match="wait already|too many calls"):
                    await call
            assert (node.stats().refused, busy.stats().refused) == (1, 2)
            await busy.close()
            with pytest.raises(UnreachableError):
                await calls[0]

    asyncio.run(main())


# --- readers that are of no use --------------------------------------------------------------------------------------
def test_a_reader_that_never_grants_gets_its_window_and_no_more() -> None:
    async def main() -> None:
        source = Chunks()
        source.fill(60, MIB)
        async with transport(source) as node:
            with Stranger(zmq.DEALER, node.address) as greedy:
                await greedy.say(Read(V, 1, READ_WINDOW_BYTES), encode_wanted(wants(range(60), MIB)))
                for _ in range(15):
                    assert len((await greedy.hear())[1]) == MIB
                async with transport() as good:
                    landings = await collect(good.read(node.address, wants(range(60), MIB), deadline_s=LONG_S))
                    assert len(landings) == 60
                assert node.stats().bytes_served == 75 * MIB
                await wait_until_async(lambda: source.out == 0, LONG_S, "what the greedy one got is given back")

    asyncio.run(main())


def test_a_reader_that_grants_nothing_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zmq_serve, "SWEEP_INTERVAL_S", 0.01)
    monkeypatch.setattr(zmq_serve.Lender.sweep, "__defaults__", (0.05,))

    async def main() -> None:
        source = Chunks()
        source.fill(3, MIB)
        async with transport(source) as node:
            with Stranger(zmq.DEALER, node.address) as idle:
                await idle.say(Read(V, 1, READ_WINDOW_BYTES_MIN), encode_wanted(wants(range(3), MIB)))
                while len(parts := await idle.hear()) == 2:
                    pass
                assert to_caller(parts)[0] == Refusal(V, 1, "no credit for 0.05 s")
                assert node.stats().refused == 1
                await wait_until_async(lambda: source.out == 0, LONG_S, "its loans are back")

    asyncio.run(main())


def test_a_reader_that_disappears_is_forgotten() -> None:
    async def main() -> None:
        source = Chunks()
        source.fill(60, MIB)
        began, ended = asyncio.Event(), asyncio.Event()

        async def handler(_: bytes) -> bytes:
            began.set()
            try:
                await asyncio.Event().wait()
            finally:
                ended.set()
            return b""

        node = await open_zmq("127.0.0.1", 0, source, handler)
        with Stranger(zmq.DEALER, node.address) as reader:
            reader.socket.rcvhwm = 1
            await reader.say(Read(V, 1, READ_WINDOW_BYTES), encode_wanted(wants(range(60), MIB)))
            await reader.say(Call(V, 2), b"")
            await asyncio.wait_for(began.wait(), LONG_S)
            await wait_until_async(lambda: node.stats().bytes_served == 15 * MIB, LONG_S, "the window is used up")
            assert node._server.lender.readers
        await asyncio.wait_for(ended.wait(), LONG_S)
        await wait_until_async(lambda: source.out == 0, LONG_S, "its loans are back")
        assert not node._server.lender.readers
        await node.close()

    asyncio.run(main())


# --- holders that are of no use --------------------------------------------------------------------------------------
def lies() -> Iterator[tuple[str, list[bytes | Message]]]:
    yield "a chunk that is not wanted", [Bulk(V, 1, [Item(7, HELD, 1, 0, 1)]), b"x"]
    yield "bytes beyond the chunk", [Bulk(V, 1, [Item(0, HELD, 1, 0, 11)]), bytes(11)]
    yield "a piece without its beginning", [Bulk(V, 1, [Item(0, HELD, 1, 5, 5)]), bytes(5)]


@pytest.mark.parametrize("lie", [pytest.param(lie, id=name) for name, lie in lies()])
def test_a_holder_that_lies_ends_the_read(lie: list[bytes | Message]) -> None:
    heard: list[Message] = []

    def reply(parts: list[bytes]) -> list[list[bytes]]:
        heard.append(to_holder(parts)[0])
        return [[encode(part) if isinstance(part, Message) else part for part in lie]]

    async def main() -> None:
        async with peer(reply) as address, transport() as reader:
            wanted = wants([0, 1], 10)
            assert await collect(reader.read(address, wanted, deadline_s=1000)) == {}
            assert all(bytes(want.into) == b"\xa5" * 10 for want in wanted)
            assert reader.stats().malformed == 1
            await wait_until_async(lambda: heard[1:] == [Cancel(V, 1)], LONG_S, "the holder was told to stop")

    asyncio.run(main())


def test_garbage_on_a_read_is_counted_and_the_rest_still_lands() -> None:
    good = [encode(Bulk(V, 1, [Item(0, 1, 0, 0, 0)]))]

    def reply(_: list[bytes]) -> list[list[bytes]]:
        return [
            [b"garbage"],
            [b""],
            [encode(Answer(V, 1)), b""],
            [encode(Alive(V, 0))],
            [encode(Bulk(V, 99, [Item(0, 1, 0, 0, 0)]))],
            good,
        ]

    async def main() -> None:
        async with peer(reply) as address, transport() as reader:
            landings = await collect(reader.read(address, wants([0], 10), deadline_s=1000))
            assert outcomes(landings) == {0: Outcome.NOT_HELD}
            assert reader.stats().malformed == 3

    asyncio.run(main())


def test_a_holder_that_refuses_ends_the_read(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with peer(lambda _: [[encode(Refusal(V, 1, "too busy"))]]) as address, transport() as reader:
            assert await collect(reader.read(address, wants([0], 10), deadline_s=1000)) == {}
            assert reader.stats().refused == 1

    asyncio.run(main())
    assert "too busy" in caplog.text


def test_a_holder_of_another_version() -> None:
    def reply(parts: list[bytes]) -> list[list[bytes]]:
        _, _, request_id, *_ = msgspec.msgpack.decode(parts[0])
        return [[msgspec.msgpack.encode([6, V + 1, request_id, "we", "speak", "otherwise"])]]

    async def main() -> None:
        async with peer(reply) as address, transport() as node:
            with pytest.raises(ProtocolError, match=f"speaks mesh protocol {V + 1}, this node speaks {V}"):
                await node.call(address, b"", timeout_s=LONG_S)
            assert await collect(node.read(address, wants([0], 10), deadline_s=1000)) == {}
            assert node.stats().malformed == 2

    asyncio.run(main())


def test_answers_that_nobody_waits_for_and_garbage_on_a_call() -> None:
    def reply(parts: list[bytes]) -> list[list[bytes]]:
        message, _ = to_holder(parts)
        return [
            [b"garbage"],
            [encode(Answer(V, 999)), b""],
            [encode(Alive(V, 0))],
            [encode(Answer(V, message.id)), b"ok"],
        ]

    async def main() -> None:
        async with peer(reply) as address, transport() as node:
            assert await node.call(address, b"", timeout_s=LONG_S) == b"ok"
            assert node.stats().malformed == 1

    asyncio.run(main())


def test_late_pieces_of_a_cancelled_read_change_nothing() -> None:
    started = asyncio.Event()

    def reply(parts: list[bytes]) -> list[list[bytes]]:
        message, _ = to_holder(parts)
        if message == Read(V, 1, READ_WINDOW_BYTES):
            started.set()
            return []
        if isinstance(message, Cancel):
            return [[encode(Bulk(V, 1, [Item(0, HELD, 0, 0, 10)])), b"late bytes"]]
        return [[encode(Bulk(V, 2, [Item(0, 1, 0, 0, 0)]))]]

    async def main() -> None:
        async with peer(reply) as address, transport() as reader:
            wanted = wants([0], 10)
            reading = reader.read(address, wanted, deadline_s=1000)
            await asyncio.wait_for(started.wait(), LONG_S)
            await reading.close()
            assert len(await collect(reader.read(address, wants([1], 1), deadline_s=1000))) == 1
            assert bytes(wanted[0].into) == b"\xa5" * 10
            assert reader.stats().malformed == 0

    asyncio.run(main())


# --- connections -----------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def mute() -> Iterator[str]:
    """A listener that accepts connections (the kernel does) and never says a word of ZeroMQ."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


def test_a_peer_that_never_shakes_hands_is_lost_before_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvmesh.transport.zmq_sockets.HANDSHAKE_TIMEOUT_S", 0.05)

    async def main() -> None:
        with mute() as address:
            async with transport() as node:
                with pytest.raises(UnreachableError, match="nothing answers"):
                    await node.call(address, b"", timeout_s=1000)
                assert await collect(node.read(address, wants([0], 1), deadline_s=1000)) == {}
                assert node.stats().peers_lost == 1

    asyncio.run(main())


def test_a_connection_that_never_comes_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zmq_calls, "READY_TIMEOUT_S", 0.05)
    monkeypatch.setattr(zmq_links, "READY_TIMEOUT_S", 0.05)

    async def main() -> None:
        with mute() as address:
            async with transport() as node:
                with pytest.raises(UnreachableError, match="nothing answers"):
                    await node.call(address, b"", timeout_s=1000)
                assert await collect(node.read(address, wants([0], 1), deadline_s=1000)) == {}

    asyncio.run(main())


def test_idle_connections_are_closed_and_opened_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zmq_calls, "LINK_IDLE_S", 0.02)
    monkeypatch.setattr(zmq_links, "LINK_IDLE_S", 0.02)
    monkeypatch.setattr(zmq_links, "READY_TIMEOUT_S", 0.05)

    async def main() -> None:
        source = Chunks()
        source.fill(1, 10)
        async with transport(source) as holder, transport() as reader:
            for _ in range(2):
                assert await reader.call(holder.address, b"x", timeout_s=LONG_S) == b"x"
                assert len(await collect(reader.read(holder.address, wants([0], 10), deadline_s=LONG_S))) == 1
                await wait_until_async(lambda: not reader._caller._links, LONG_S, "the control connection is closed")
                await wait_until_async(lambda: not list(reader._bulk._links), LONG_S, "the bulk connection is closed")
            assert reader.stats().peers_lost == 0

    asyncio.run(main())


def test_reads_at_once_spread_over_a_bounded_number_of_connections() -> None:
    async def main() -> None:
        source = Chunks()
        source.fill(8, MIB)
        async with transport(source) as holder, transport() as reader:
            reads = [collect(reader.read(holder.address, wants(range(8), MIB), deadline_s=LONG_S)) for _ in range(5)]
            assert [len(landings) for landings in await asyncio.gather(*reads)] == [8] * 5
            assert len(list(reader._bulk._links)) == 2

    asyncio.run(main())


def test_a_failure_of_the_thread_ends_its_reads(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError

    async def main() -> None:
        source = Chunks()
        source.fill(1, 10)
        async with two("zmq", source) as (holder, reader):
            monkeypatch.setattr(zmq_bulk.Assembly, "accept", fail)
            assert await collect(reader.read(holder.address, wants([0], 10), deadline_s=1000)) == {}
            assert await collect(reader.read(holder.address, wants([0], 10), deadline_s=1000)) == {}
            assert await reader.call(holder.address, b"calls go on", timeout_s=LONG_S) == b"calls go on"

    asyncio.run(main())
    assert "the bulk thread failed" in caplog.text


def test_opening_and_closing_leaves_nothing() -> None:
    """What is left of threads, descriptors and contexts is for the leak detector to find; here: no object is either."""

    async def main() -> None:
        for _ in range(5):
            source = Chunks()
            source.fill(4, MIB)
            async with transport(source) as holder, transport() as reader:
                await reader.call(holder.address, b"", timeout_s=LONG_S)
                reading = reader.read(holder.address, wants(range(4), MIB), deadline_s=LONG_S)
                await reading.__anext__()
                await reading.close()

    asyncio.run(main())
    gc.collect()
    assert not [thing for thing in gc.get_objects() if isinstance(thing, ZmqTransport)]


def test_the_loop_is_never_held_up_by_a_close() -> None:
    async def main() -> None:
        source = Chunks()
        source.fill(60, MIB)
        async with transport(source) as holder:
            reader = await open_zmq("127.0.0.1", 0, None, echo)
            reading = reader.read(holder.address, wants(range(60), MIB), deadline_s=LONG_S)
            await reading.__anext__()
            began = time.monotonic()
            await reader.close()
            assert time.monotonic() - began < LONG_S / 4
            assert key(0) in source.held

    asyncio.run(main())
