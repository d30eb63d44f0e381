"""The holder's turns: fair, within the credit, and ended when the reader is of no use."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

import pytest
import zmq

from kvmesh.transport import zmq_lend
from kvmesh.transport.counters import Counters
from kvmesh.transport.frames import Buffer, Bulk, Read, cost, encode_wanted, to_reader
from kvmesh.transport.limits import (
    FRAMES_PER_WINDOW,
    ITEMS_PER_MESSAGE_MAX,
    KIB,
    MESH_PROTOCOL_VERSION,
    MIB,
    READ_WINDOW_BYTES_MIN,
    READS_PER_PEER_MAX,
)
from kvmesh.transport.zmq_lend import Lender
from tests.support.waiting import wait_until_async
from tests.transport.ends import LONG_S, Chunks, wants


@dataclass
class Wire:
    """Takes the place of the socket: keeps what was sent, and fails when told to."""

    sent: list[tuple[bytes, Bulk]] = field(default_factory=list)
    kept: list[Sequence[Buffer]] = field(default_factory=list)
    dropped: list[tuple[bytes, int, str]] = field(default_factory=list)
    fails: int = 0

    def send(self, reader: bytes, parts: Sequence[Buffer]) -> None:
        if self.fails:
            raise zmq.Again if self.fails == zmq.EAGAIN else zmq.ZMQError(self.fails)
        message = to_reader(parts)
        assert isinstance(message, Bulk)
        self.sent.append((reader, message))
        self.kept.append(parts)

    def drop(self, reader: bytes, read_id: int, why: str) -> None:
        self.dropped.append((reader, read_id, why))


async def settled(turns: int = 50) -> None:
    """Enough turns of the loop for all that can be sent without more credit."""
    for _ in range(turns):
        await asyncio.sleep(0)


def run(test: Callable[[Lender, Wire, Chunks, Counters], Awaitable[None]]) -> None:
    async def main() -> None:
        wire, source, counters = Wire(), Chunks(), Counters()
        lender = Lender(source, wire.send, counters, wire.drop)
        await test(lender, wire, source, counters)
        lender.close()
        wire.kept.clear()
        async with asyncio.timeout(LONG_S):
            await lender.loans.all_back()
        assert (source.out, lender.readers) == (0, [])

    asyncio.run(main())


def read(lender: Lender, reader: bytes, id_: int, numbers: Sequence[int], size: int, window: int = MIB) -> str | None:
    payload = encode_wanted(wants(numbers, size))
    return lender.open(reader, Read(MESH_PROTOCOL_VERSION, id_, window), payload)


@pytest.mark.parametrize("size", [1, 300, 3 * KIB, 64 * KIB, 200 * KIB, 5 * MIB])
@pytest.mark.parametrize("window", [READ_WINDOW_BYTES_MIN, MIB])
def test_no_more_is_sent_than_credit_allows_and_all_with_enough(size: int, window: int) -> None:
    async def test(lender: Lender, wire: Wire, source: Chunks, counters: Counters) -> None:
        count = max(3, min(1000, 2 * MIB // size))
        source.fill(count, size)
        assert read(lender, b"r", 1, range(count), size, window) is None
        granted, seen = window, 0
        while lender.readers:
            before = len(wire.sent)
            await settled(5)
            used = sum(cost(message.items) for _, message in wire.sent)
            assert used <= granted
            assert len(wire.sent) > before or not lender.readers
            wire.kept.clear()
            if lender.readers:
                assert lender.grant(b"r", 1, used - seen)
                granted, seen = granted + used - seen, used
        assert sum(item.bytes for _, message in wire.sent for item in message.items) == count * size
        assert all(len(message.items) <= ITEMS_PER_MESSAGE_MAX for _, message in wire.sent)
        assert max(item.bytes for _, message in wire.sent for item in message.items) <= window // FRAMES_PER_WINDOW
        assert (counters.chunks_served, counters.bytes_served) == (count, count * size)

    run(test)


def test_readers_take_turns() -> None:
    async def test(lender: Lender, wire: Wire, source: Chunks, _: Counters) -> None:
        source.fill(4, MIB)
        for reader in (b"a", b"b", b"c"):
            assert read(lender, reader, 1, range(4), MIB) is None
        await settled()
        order = [reader for reader, _ in wire.sent]
        assert order == [b"a", b"b", b"c"] * (len(order) // 3)
        assert len(order) >= 3 * (FRAMES_PER_WINDOW - 1)

    run(test)


def test_a_chunk_is_leased_only_when_its_turn_comes() -> None:
    async def test(lender: Lender, wire: Wire, source: Chunks, _: Counters) -> None:
        source.fill(100, MIB)
        assert read(lender, b"r", 1, range(100), MIB) is None
        await settled()
        assert source.lent <= 2
        wire.kept.clear()  # libzmq has sent them
        lender.end(b"r", 1)
        await wait_until_async(lambda: source.out == 0, LONG_S, "what was sent is given back")

    run(test)


def test_loans_wait_for_libzmq() -> None:
    async def test(lender: Lender, wire: Wire, source: Chunks, _: Counters) -> None:
        source.fill(1, 200 * KIB)
        assert read(lender, b"r", 1, [0], 200 * KIB) is None
        await settled()
        assert (lender.readers, source.out) == ([], 1)
        del wire.kept[1:]
        await settled()
        assert source.out == 1
        wire.kept.clear()
        await settled()
        assert source.out == 0

    run(test)


def test_a_reader_without_credit_is_dropped_in_time() -> None:
    async def test(lender: Lender, wire: Wire, source: Chunks, counters: Counters) -> None:
        source.fill(10, MIB)
        assert read(lender, b"r", 1, range(10), MIB) is None
        await settled()
        lender.sweep(idle_s=1000)
        assert lender.readers == [b"r"]
        lender.sweep(idle_s=0)
        assert lender.readers == []
        assert counters.refused == 1
        assert wire.dropped == [(b"r", 1, "no credit for 0 s")]

    run(test)


def test_a_full_socket_is_tried_again_and_a_gone_reader_is_not() -> None:
    async def test(lender: Lender, wire: Wire, source: Chunks, _: Counters) -> None:
        source.fill(2, MIB)
        wire.fails = zmq.EAGAIN
        assert read(lender, b"r", 1, range(2), MIB) is None
        assert read(lender, b"r", 2, range(2), MIB) is None
        await settled()
        assert wire.sent == []
        wire.fails = 0
        lender.sweep()
        await settled()
        sent = [item for _, message in wire.sent if message.id == 1 for item in message.items]
        assert [item.offset for item in sent] == [place * MIB // 16 for place in range(len(sent))]
        wire.fails = zmq.EHOSTUNREACH
        assert lender.grant(b"r", 1, MIB // 2)
        await settled()
        assert lender.readers == []

    run(test)


def test_more_credit_than_was_consumed_ends_the_read() -> None:
    async def test(lender: Lender, wire: Wire, source: Chunks, _: Counters) -> None:
        source.fill(10, MIB)
        assert read(lender, b"r", 1, range(10), MIB) is None
        await settled()
        assert not lender.grant(b"r", 1, MIB + 1)
        assert lender.readers == []
        assert lender.grant(b"r", 1, 1)  # late, and of no harm

    run(test)


def test_bounds_on_what_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zmq_lend, "WANTS_SERVED_MAX", READS_PER_PEER_MAX + 10)

    async def test(lender: Lender, wire: Wire, source: Chunks, _: Counters) -> None:
        wire.fails = zmq.EAGAIN
        for id_ in range(READS_PER_PEER_MAX):
            assert read(lender, b"r", id_, [0], 1) is None
        assert read(lender, b"r", 0, [0], 1) == "this read is open already"
        assert read(lender, b"r", 999, [0], 1) == "too many reads at once"
        assert read(lender, b"other", 1, range(11), 1) == "too many chunks asked for at once"
        assert read(lender, b"other", 1, range(10), 1) is None
        lender.forget(b"r")
        assert lender.readers == [b"other"]
        assert read(lender, b"r", 1, range(READS_PER_PEER_MAX), 1) is None
        monkeypatch.setattr(zmq_lend, "READS_SERVED_MAX", 2)
        assert read(lender, b"third", 1, [0], 1) == "too many reads at once"

    run(test)
