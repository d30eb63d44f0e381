"""Strangers at the port, and readers that are of no use: all counted, none of harm."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket

import msgspec
import pytest
import zmq
import zmq.asyncio

from kvmesh.transport import zmq_calls, zmq_serve
from kvmesh.transport.errors import ProtocolError, UnreachableError
from kvmesh.transport.frames import (
    HELD,
    Answer,
    Bulk,
    Call,
    Cancel,
    Grant,
    Item,
    Message,
    Read,
    Refusal,
    Suspect,
    encode,
    encode_read,
    to_caller,
)
from kvmesh.transport.limits import (
    HEADER_BYTES_MAX,
    KIB,
    MESH_PROTOCOL_VERSION,
    MESSAGE_BYTES_MAX,
    MIB,
    READ_WINDOW_BYTES,
    READ_WINDOW_BYTES_MIN,
)
from kvmesh.transport.zmq import open_zmq
from kvmesh.transport.zmq_lend import Lender
from tests.support.waiting import wait_until_async
from tests.transport.ends import LONG_S, Chunks, Endless, collect, key, wants
from tests.transport.strangers import GREETING, READY, Stranger, frames, transport

V = MESH_PROTOCOL_VERSION


# --- strangers at the port ----------------------------------------------------------------------------------------
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
            [Read(V, 1, READ_WINDOW_BYTES, 1.0, 0), b"short"],
            [Read(V, 1, 2**40, 1.0, 0), encode_read(1, READ_WINDOW_BYTES, LONG_S, wants([0], 1))[1]],
            [Suspect(V, 1), b"no key"],
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


@pytest.mark.parametrize(
    "parts",
    [
        pytest.param([b"a header", b"a payload", b"more"], id="more parts than any message has"),
        pytest.param([encode(Call(V, 1)), bytes(MESSAGE_BYTES_MAX + 1)], id="too long a payload"),
        pytest.param([bytes(HEADER_BYTES_MAX + 1)], id="too long a header"),
    ],
)
def test_what_no_message_can_be_costs_the_connection(parts: list[bytes]) -> None:
    async def main() -> None:
        async with transport() as node:
            reader, writer = await asyncio.open_connection("127.0.0.1", int(node.address[10:]))
            writer.write(GREETING + READY.replace(b"ROUTER", b"DEALER") + frames(*parts))
            async with asyncio.timeout(LONG_S):
                with contextlib.suppress(ConnectionError):
                    while await reader.read(1000):
                        pass  # its greeting
            writer.close()
            assert node.stats().malformed == 1
            async with transport() as other:
                assert await other.call(node.address, b"alive", timeout_s=LONG_S) == b"alive"

    asyncio.run(main())


def test_nobody_acts_on_the_requests_of_another() -> None:
    async def main() -> None:
        source = Chunks()
        source.fill(3, 64 * KIB)
        async with transport(source) as node:
            with Stranger(zmq.DEALER, node.address) as reader, Stranger(zmq.DEALER, node.address) as thief:
                await reader.say(*encode_read(1, READ_WINDOW_BYTES_MIN, LONG_S, wants(range(3), 64 * KIB)))
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
    heads: list[Message] = [
        Call(V, 1),
        Read(V, 2, READ_WINDOW_BYTES, 1.0, 0),
        Grant(V, 2, 100),
        Cancel(V, 1),
        Answer(V, 1),
    ]

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
                    await stranger.say(*(part() for _ in range(rng.randrange(1, 3))))
                await stranger.say(Call(V, 2**40), b"all heard?")
                while (await stranger.hear())[-1] != b"all heard?":
                    pass
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
                    why = f"one side speaks mesh protocol {V + 1} and the other {V}: upgrade kvmesh where it is {V}"
                    assert answer == Refusal(V, 5, why)
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
                with pytest.raises(error, match=r"wait already|too many calls"):
                    await call
            assert (node.stats().refused, busy.stats().refused) == (1, 2)
            await busy.close()
            with pytest.raises(UnreachableError):
                await calls[0]

    asyncio.run(main())


def test_who_calls_while_the_node_closes_leaves_nothing_behind() -> None:
    async def main() -> None:
        began, asked_to_end, may_end = asyncio.Event(), asyncio.Event(), asyncio.Event()
        calls: list[bytes] = []

        async def handler(request: bytes) -> bytes:
            calls.append(request)
            began.set()
            try:
                await asyncio.Event().wait()
            finally:
                asked_to_end.set()
                await may_end.wait()
            return b""

        def nobody_listens() -> bool:
            try:
                socket.create_connection(("127.0.0.1", int(node.address[10:]))).close()
            except ConnectionRefusedError:
                return True
            return False

        node = await open_zmq("127.0.0.1", 0, None, handler)
        with Stranger(zmq.DEALER, node.address) as stranger:
            await stranger.say(Call(V, 1), b"first")
            await asyncio.wait_for(began.wait(), LONG_S)
            closing = asyncio.create_task(node.close())
            await asyncio.wait_for(asked_to_end.wait(), LONG_S)
            await stranger.say(Call(V, 2), b"second")
            await wait_until_async(lambda: calls[1:] or nobody_listens(), LONG_S, "it is heard, or the port is closed")
            may_end.set()
            await asyncio.wait_for(closing, LONG_S)
        assert calls == [b"first"]

    asyncio.run(main())


def test_what_readers_suspect_is_bounded_and_told_to_the_source(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zmq_serve, "SUSPECTS_PER_SWEEP_MAX", 3)

    async def main() -> None:
        source = Chunks()
        async with transport(source) as node:
            with Stranger(zmq.DEALER, node.address) as liar, Stranger(zmq.DEALER, node.address) as other:
                for number in range(5):
                    await liar.say(Suspect(V, 0), key(number))
                await liar.say(Call(V, 1), b"heard")
                assert to_caller(await liar.hear()) == (Answer(V, 1), b"heard")
                assert source.suspected == [key(0), key(1), key(2)]
                assert (node.stats().refused, node.stats().malformed) == (2, 0)
                await other.say(Suspect(V, 0), key(7))
                await wait_until_async(lambda: source.suspected[3:] == [key(7)], LONG_S, "each has a bound of its own")
                node._server._sweep()
                await liar.say(Suspect(V, 0), key(8))
                await wait_until_async(lambda: source.suspected[4:] == [key(8)], LONG_S, "it is heard again")

    asyncio.run(main())


def test_a_source_that_fails_ends_nothing(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Chunks):
        def suspect(self, key: bytes) -> None:
            raise ZeroDivisionError

    async def main() -> None:
        async with transport(Broken()) as node:
            with Stranger(zmq.DEALER, node.address) as stranger:
                await stranger.say(Suspect(V, 0), key(1))
                await stranger.say(Call(V, 1), b"alive?")
                assert to_caller(await stranger.hear()) == (Answer(V, 1), b"alive?")

    asyncio.run(main())
    assert "the source of chunks failed" in caplog.text


# --- readers that are of no use -----------------------------------------------------------------------------------
def test_a_reader_that_never_grants_gets_its_window_and_no_more() -> None:
    async def main() -> None:
        source = Chunks()
        source.fill(60, MIB)
        async with transport(source) as node:
            with Stranger(zmq.DEALER, node.address) as greedy:
                await greedy.say(*encode_read(1, READ_WINDOW_BYTES, LONG_S, wants(range(60), MIB)))
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
    monkeypatch.setattr(Lender.sweep, "__defaults__", (0.05,))

    async def main() -> None:
        source = Chunks()
        source.fill(3, MIB)
        async with transport(source) as node:
            with Stranger(zmq.DEALER, node.address) as idle:
                await idle.say(*encode_read(1, READ_WINDOW_BYTES_MIN, LONG_S, wants(range(3), MIB)))
                while len(parts := await idle.hear()) == 2:
                    pass
                assert to_caller(parts)[0] == Refusal(V, 1, "no credit for 0.05 s")
                assert node.stats().refused == 1
                await wait_until_async(lambda: source.out == 0, LONG_S, "its loans are back")

    asyncio.run(main())


def test_a_read_is_kept_no_longer_than_its_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zmq_serve, "SWEEP_INTERVAL_S", 0.01)

    async def main() -> None:
        source = Chunks()
        source.fill(3, MIB)
        async with transport(source) as node:
            with Stranger(zmq.DEALER, node.address) as late:
                await late.say(*encode_read(1, READ_WINDOW_BYTES_MIN, 0.05, wants(range(3), MIB)))
                while len(parts := await late.hear()) == 2:
                    pass
                assert to_caller(parts)[0] == Refusal(V, 1, "its 0.05 s are over")
                assert (node.stats().expired, node.stats().refused) == (1, 0)
                await wait_until_async(lambda: source.out == 0, LONG_S, "its loans are back")

    asyncio.run(main())


def test_a_reader_that_disappears_is_forgotten() -> None:
    async def main() -> None:
        source = Chunks()
        source.fill(60, MIB)
        handler = Endless()
        node = await open_zmq("127.0.0.1", 0, source, handler)
        with Stranger(zmq.DEALER, node.address) as reader:
            reader.socket.rcvhwm = 1
            await reader.say(*encode_read(1, READ_WINDOW_BYTES, LONG_S, wants(range(60), MIB)))
            await reader.say(Call(V, 2), b"")
            await asyncio.wait_for(handler.began.wait(), LONG_S)
            await wait_until_async(lambda: node.stats().bytes_served == 15 * MIB, LONG_S, "the window is used up")
            assert node._server.lender.readers
        await asyncio.wait_for(handler.ended.wait(), LONG_S)
        await wait_until_async(lambda: source.out == 0, LONG_S, "its loans are back")
        assert not node._server.lender.readers
        await node.close()

    asyncio.run(main())
