"""The holder's turns: fair, within the credit and the lease, and ended when the reader is of no use."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

import pytest

from kvmesh.transport import zmq_lend
from kvmesh.transport.checksum import bound, checksum
from kvmesh.transport.counters import Counters
from kvmesh.transport.frames import CORRUPT_HERE, Buffer, Bulk, Read, cost, encode_read, to_holder, to_reader
from kvmesh.transport.interface import Slice, Want
from kvmesh.transport.limits import (
    FRAME_BYTES_DEFAULT,
    FRAMES_PER_WINDOW,
    ITEMS_PER_MESSAGE_MAX,
    KIB,
    MIB,
    PARTS_PER_MESSAGE_MAX,
    READ_WINDOW_BYTES_MIN,
    READS_PER_PEER_MAX,
)
from kvmesh.transport.zmq_lend import PUMP_BYTES, TURN_BYTES, TURNS_AT_ONCE, Lender
from kvmesh.transport.zmq_pack import STEP_BYTES
from kvmesh.transport.zmq_port import FullError, GoneError
from tests.support.waiting import wait_until_async
from tests.transport.ends import LONG_S, ArenaChunks, Chunks, CountedLoan, bytes_of, key, part_of, pattern, wants


@dataclass
class Wire:
    """Takes the place of the socket: keeps what was sent, and fails when told to."""

    sent: list[tuple[bytes, Bulk]] = field(default_factory=list)
    kept: list[Sequence[Buffer]] = field(default_factory=list)
    dropped: list[tuple[bytes, int, str]] = field(default_factory=list)
    fails: type[Exception] | None = None

    def send(self, reader: bytes, parts: Sequence[Buffer]) -> None:
        if self.fails:
            raise self.fails
        message = to_reader(parts[0])
        assert isinstance(message, Bulk)
        assert len(parts) <= 1 + PARTS_PER_MESSAGE_MAX
        assert sum(map(len, parts[1:])) == sum(item.bytes for item in message.items)
        self.sent.append((reader, message))
        self.kept.append(parts)

    def drop(self, reader: bytes, read_id: int, why: str) -> None:
        self.dropped.append((reader, read_id, why))


async def settled(turns: int = 50) -> None:
    """Enough turns of the loop for all that can be sent without more credit."""
    for _ in range(turns):
        await asyncio.sleep(0)


def run(test: Callable[[Lender, Wire, Chunks, Counters], Awaitable[None]], chunks: Chunks | None = None) -> None:
    async def main() -> None:
        wire, source, counters = Wire(), chunks or Chunks(), Counters()
        lender = Lender(source, wire.send, counters, wire.drop)
        await test(lender, wire, source, counters)
        lender.close()
        wire.kept.clear()
        async with asyncio.timeout(LONG_S):
            await lender.loans.all_back()
        assert (source.out, lender.readers) == (0, [])

    asyncio.run(main())


def read(
    lender: Lender,
    reader: bytes,
    id_: int,
    numbers: Sequence[int],
    size: int,
    window: int = MIB,
    lease_s: float = LONG_S,
) -> str | None:
    return ask(lender, reader, id_, wants(numbers, size), window, lease_s)


def ask(
    lender: Lender, reader: bytes, id_: int, wanted: Sequence[Want], window: int = MIB, lease_s: float = LONG_S
) -> str | None:
    message, payload = to_holder(encode_read(id_, window, lease_s, wanted))
    assert isinstance(message, Read)
    return lender.open(reader, message, payload)


def payload_of(wire: Wire) -> bytes:
    return b"".join(bytes(part) for parts in wire.kept for part in parts[1:])


def sent_bytes(wire: Wire, reader: bytes) -> int:
    return sum(item.bytes for name, message in wire.sent for item in message.items if name == reader)


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


def test_readers_share_by_bytes_whatever_they_ask_for() -> None:
    async def test(lender: Lender, wire: Wire, source: Chunks, _: Counters) -> None:
        source.fill(16, MIB)
        source.add(100, pattern(100, 3000))
        window = 64 * MIB
        assert read(lender, b"large frames", 1, range(16), MIB, window) is None
        for id_ in range(4):
            assert read(lender, b"several reads", id_, range(16), MIB, window // 4) is None
        assert read(lender, b"tiny chunks", 1, [100] * 6000, 3000, window) is None
        parts = [part_of(number, MIB, Slice(0, KIB, 2 * KIB, 512)) for number in range(16)]
        assert ask(lender, b"parts", 1, parts, window) is None
        served = [0]
        while min(served) < 12 * MIB:
            await asyncio.sleep(0)
            served = [sent_bytes(wire, reader) for reader in (b"large frames", b"several reads", b"tiny chunks")]
            # A turn, and the message that it ends with. Tiny chunks cost more than their bytes.
            assert max(served) * 0.9 - min(served) < TURN_BYTES + FRAME_BYTES_DEFAULT
            wire.kept.clear()
        # Verified bytes count like sent ones, so half a chunk costs its reader more than a whole one.
        assert 3 * MIB <= sent_bytes(wire, b"parts") <= 8 * MIB

    run(test)


def test_32_readers_get_the_same_and_none_waits_for_another() -> None:
    async def test(lender: Lender, wire: Wire, source: Chunks, _: Counters) -> None:
        source.fill(16, MIB)
        readers = [b"%d" % number for number in range(32)]
        for reader in readers:
            assert read(lender, reader, 1, range(16), MIB, 16 * MIB) is None
        while lender.readers:
            before = len(wire.sent)
            await asyncio.sleep(0)
            assert len(wire.sent) - before <= TURNS_AT_ONCE
            wire.kept.clear()
            served = [sent_bytes(wire, reader) for reader in readers]
            assert max(served) - min(served) <= MIB
            if min(served) == 15 * MIB:
                break
        assert lender.grant(b"7", 1, MIB)
        await settled()
        assert sent_bytes(wire, b"7") == 16 * MIB

    run(test)


def test_the_loop_gets_its_turn_however_much_is_served() -> None:
    """What stands for a call here is a callback: it comes when 32 readers want parts of large chunks, each of which is
    verified first, and runs after a bounded piece of that."""

    async def test(lender: Lender, wire: Wire, source: Chunks, _: Counters) -> None:
        source.fill(1, 48 * MIB)
        for number in range(32):
            part = part_of(0, 48 * MIB, Slice(5, 100, 200, 1000))
            assert ask(lender, b"%d" % number, 1, [part], 16 * MIB) is None
        turns = 0
        while not wire.sent:
            await asyncio.sleep(0)  # a turn of the loop
            turns += 1
        least = 48 * MIB // (PUMP_BYTES + STEP_BYTES + MIB)
        assert turns >= least
        while lender.readers:
            await asyncio.sleep(0)
            turns += 1
        assert turns >= 32 * least
        assert len(wire.sent) == 32

    run(test)


def test_a_part_is_verified_once_for_neighbours_and_again_for_strangers() -> None:
    async def test(lender: Lender, wire: Wire, source: Chunks, counters: Counters) -> None:
        source.fill(2, 300 * KIB)
        one, two = Slice(0, 1000), Slice(10, 7, 100, 500)
        size = 300 * KIB
        near = [part_of(0, size, one), part_of(0, size, two), part_of(0, size, one), *wants([0], size)]
        assert ask(lender, b"r", 1, [*near, part_of(1, size, two), part_of(0, size, two)]) is None
        await settled()
        assert source.lent == 3
        items = [item for _, message in wire.sent for item in message.items]
        chunk = bytes(source.held[key(0)])
        assert items[0].checksum == bound(checksum(bytes_of(chunk, one)), key(0), one)
        sums = [item.checksum for item in items if item.index == 3]
        assert sums == [bound(checksum(chunk), key(0), None)] * (size // (64 * KIB) + 1)
        assert payload_of(wire)[:1000] == chunk[:1000]
        assert counters.chunks_served == 6
        source.held[key(0)][-1] ^= 1
        assert ask(lender, b"r", 2, near) is None
        await settled()
        items = [item for _, message in wire.sent for item in message.items if message.id == 2]
        assert [(item.index, item.state, item.bytes) for item in items] == [(n, CORRUPT_HERE, 0) for n in range(4)]
        assert (source.lent, source.suspected, counters.corrupt) == (4, [key(0)], 1)

    run(test)


@pytest.mark.parametrize(
    "part",
    [
        Slice(3, 5 * MIB),
        Slice(3, KIB, 3 * KIB, 2000),
        Slice(0, 200 * KIB, 256 * KIB, 24),
        Slice(0, 3 * MIB - 1, 3 * MIB + 1, 2),
        Slice(1, 100 * KIB, 100 * KIB, 50),
        Slice(7, 1, 2, 1000),
    ],
)
@pytest.mark.parametrize("window", [READ_WINDOW_BYTES_MIN, 16 * MIB])
def test_parts_arrive_in_pieces(part: Slice, window: int) -> None:
    async def test(lender: Lender, wire: Wire, source: Chunks, _: Counters) -> None:
        size = 6 * MIB + 1
        source.fill(1, size)
        assert ask(lender, b"r", 1, [part_of(0, size, part)], window) is None
        seen = 0
        while lender.readers:
            await asyncio.sleep(0)
            used = sum(cost(message.items) for _, message in wire.sent)
            if used > seen and lender.readers:
                assert lender.grant(b"r", 1, used - seen)
                seen = used
        items = [item for _, message in wire.sent for item in message.items]
        expected = bytes_of(source.held[key(0)], part)
        assert {item.checksum for item in items} == {bound(checksum(expected), key(0), part)}
        assert [item.offset for item in items] == [sum(i.bytes for i in items[:n]) for n in range(len(items))]
        assert payload_of(wire) == expected
        assert max(item.bytes for item in items) <= window // FRAMES_PER_WINDOW
        assert all(len({item.index for item in m.items}) == len(m.items) for _, m in wire.sent)

    run(test)


def test_small_chunks_that_follow_each_other_are_sent_as_one() -> None:
    source = ArenaChunks(4 * MIB)
    source.fill(40, 64 * KIB)
    order = [*range(16), 30, 20, 21, 22, 39, 38, 37]

    async def test(lender: Lender, wire: Wire, _: Chunks, counters: Counters) -> None:
        assert read(lender, b"r", 1, order, 64 * KIB, 32 * MIB) is None
        await settled()
        assert [[len(part) // (64 * KIB) for part in parts[1:]] for parts in wire.kept] == [[16, 1, 3, 3]]
        assert payload_of(wire) == b"".join(bytes(source.held[key(number)]) for number in order)
        assert source.out == 16 + 3  # the others were copied
        assert counters.chunks_served == len(order)

    run(test, source)


def test_the_lease_of_a_read_ends() -> None:
    async def test(lender: Lender, wire: Wire, source: Chunks, counters: Counters) -> None:
        source.fill(4, MIB)
        assert read(lender, b"r", 1, range(4), MIB, MIB, lease_s=1e-6) is None
        assert read(lender, b"r", 2, range(4), MIB, MIB) is None
        await settled()
        assert [message.id for _, message in wire.sent] == [2] * len(wire.sent)  # it was over before its first turn
        assert wire.dropped == [(b"r", 1, "its 1e-06 s are over")]
        assert read(lender, b"r", 3, range(4), MIB, MIB, lease_s=0.03) is None
        await settled()
        sent = len(wire.sent)
        await wait_until_async(lambda: lender.sweep() or wire.dropped[1:] != [], LONG_S, "the second lease is over")
        assert wire.dropped[1:] == [(b"r", 3, "its 0.03 s are over")]
        assert (len(wire.sent), counters.expired, counters.refused) == (sent, 2, 0)
        assert lender.readers == [b"r"]

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
        await wait_until_async(lambda: source.out == 0, 10, "the loop has looked what is back")

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
        wire.fails = FullError
        assert read(lender, b"r", 1, range(2), MIB) is None
        assert read(lender, b"r", 2, range(2), MIB) is None
        await settled()
        assert wire.sent == []
        wire.fails = None
        lender.sweep()
        await settled()
        sent = [item for _, message in wire.sent if message.id == 1 for item in message.items]
        assert [item.offset for item in sent] == [place * MIB // 16 for place in range(len(sent))]
        wire.fails = GoneError
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
        wire.fails = FullError
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


def test_a_read_that_cannot_be_served_ends_no_other(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Chunks):
        def lend(self, wanted: bytes) -> CountedLoan | None:
            loan = super().lend(wanted)
            if loan is not None and wanted == key(0):
                loan.release()
                loan.buffer = None  # type: ignore[assignment]
            return loan

    async def test(lender: Lender, wire: Wire, source: Chunks, _: Counters) -> None:
        source.fill(2, 1000)
        assert read(lender, b"a", 1, [0], 1000) is None
        assert read(lender, b"b", 1, [1], 1000) is None
        await settled()
        assert wire.dropped == [(b"a", 1, "internal error")]
        assert sent_bytes(wire, b"b") == 1000

    run(test, Broken())
    assert "a read could not be served" in caplog.text
