"""The table of leases for one-sided readers, its messages, and the server that answers them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmesh.transport import lending, lending_serve
from kvmesh.transport.backends import open_transport
from kvmesh.transport.checksum import bound, checksum
from kvmesh.transport.counters import Counters
from kvmesh.transport.errors import ProtocolError
from kvmesh.transport.frames import CORRUPT_HERE, HELD, NOT_HELD, WRONG_SIZE, encode_read
from kvmesh.transport.interface import Outcome, Slice, Want
from kvmesh.transport.lending import Lease, LeaseTable
from kvmesh.transport.lending_messages import (
    Ask,
    Done,
    GiveBack,
    Lend,
    Lent,
    LentItem,
    Offers,
    Renew,
    Request,
    Returned,
    decode_answer,
    decode_request,
    encode_answer,
    encode_request,
    lend_request,
    pack_items,
    unpack_items,
)
from kvmesh.transport.lending_serve import LendingServer
from kvmesh.transport.limits import (
    COPY_THREADS,
    LEASES_PER_READER_MAX,
    LEND_BATCH_CHUNKS_MAX,
    LEND_LEASE_S,
    LEND_RUNS_MAX,
    MESH_PROTOCOL_VERSION,
    MIB,
)
from tests.support.waiting import wait_until_async
from tests.transport.arenas import MappedChunks
from tests.transport.ends import LONG_S, Chunks, collect, echo, key, outcomes, pattern

A, B = b"a" * 16, b"b" * 16
"""Two readers."""
HOLDER = b"h" * 16


def chunks(count: int = 4, size_bytes: int = 100) -> Chunks:
    source = Chunks()
    source.fill(count, size_bytes)
    return source


def listed(*numbers: int, size_bytes: int = 100) -> list[lending.Wanted]:
    return [(key(number), size_bytes, None) for number in numbers]


def lent(table: LeaseTable, reader: bytes, number: int, *numbers: int, lease_s: float = 5.0, now: float = 0.0) -> Lease:
    lease = table.lend(reader, number, listed(*numbers), lease_s, now)
    assert isinstance(lease, Lease), lease
    return lease


# --- the table -------------------------------------------------------------------------------------------------------
def test_what_is_lent_comes_back_once() -> None:
    source = chunks()
    table = LeaseTable(source)
    lease = lent(table, A, 1, 0, 1, 2)
    assert [item.state for item in lease.items] == [HELD] * 3
    assert [item.checksum for item in lease.items] == [source.sums[key(number)] for number in range(3)]
    assert (source.out, table.leases, lease.live) == (3, 1, True)
    assert table.give_back(A, 1)
    assert (source.out, table.leases, lease.live) == (0, 0, False)
    assert not table.give_back(A, 1)
    assert lent(table, A, 1, 0)  # the number is free again
    table.clear()
    assert source.out == 0


def test_what_is_not_there_or_of_another_size_is_said_and_not_kept() -> None:
    source = chunks()
    table = LeaseTable(source)
    lease = table.lend(A, 1, [(key(99), 100, None), (key(0), 101, None), (key(1), 100, None)], 5.0, 0.0)
    assert isinstance(lease, Lease)
    assert [item.state for item in lease.items] == [NOT_HELD, WRONG_SIZE, HELD]
    assert lease.items[1].checksum == source.sums[key(0)]
    assert source.out == 1
    table.give_back(A, 1)
    assert source.out == 0


def test_adjacent_parts_of_one_chunk_are_one_loan() -> None:
    source = chunks()
    table = LeaseTable(source)
    parts = [(key(0), 100, Slice(at, 10)) for at in (0, 20, 40)]
    lease = table.lend(A, 1, [*parts, (key(1), 100, Slice(0, 1)), (key(1), 99, Slice(0, 1))], 5.0, 0.0)
    assert isinstance(lease, Lease)
    assert [item.state for item in lease.items] == [HELD] * 4 + [WRONG_SIZE]
    assert (source.lent, source.out) == (3, 2)
    assert lease.bytes == 200
    table.give_back(A, 1)
    assert source.out == 0


def test_a_lease_ends_at_its_time_unless_it_is_renewed() -> None:
    source = chunks()
    table = LeaseTable(source)
    lent(table, A, 1, 0, lease_s=2.0, now=100.0)
    lent(table, B, 1, 1, lease_s=3.0, now=100.0)
    assert table.next_end_s == 102.0
    assert table.renew(A, 1, 2.0, 101.9)
    assert table.next_end_s == 103.0
    assert table.expire(102.9) == 0
    assert table.expire(103.0) == 1
    assert source.out == 1
    assert not table.renew(B, 1, 2.0, 103.0)
    assert not table.renew(A, 1, 2.0, 200.0), "its time was over before it was asked for again"
    assert source.out == 0
    assert table.next_end_s is None


def test_a_reader_that_is_gone_keeps_nothing_and_others_keep_theirs() -> None:
    source = chunks()
    table = LeaseTable(source)
    for number in range(3):
        lent(table, A, number, number)
    lent(table, B, 0, 3)
    assert table.drop(A) == 3
    assert table.drop(A) == 0
    assert (source.out, table.leases) == (1, 1)
    assert table.clear() == 1
    assert source.out == 0


def test_leases_of_one_reader_are_bounded() -> None:
    source = chunks()
    table = LeaseTable(source)
    for number in range(LEASES_PER_READER_MAX):
        lent(table, A, number, 0)
    assert table.lend(A, 1, listed(0), 5.0, 0.0) == "this reader has a lease of that number already"
    table.give_back(A, 1)
    lent(table, A, 1000, 0)
    assert table.lend(A, 1001, listed(0), 5.0, 0.0) == "too many leases at once"
    lent(table, B, 0, 0)
    table.clear()
    assert source.out == 0


@pytest.mark.parametrize(
    ("bound", "value", "says"),
    [
        ("LEASES_MAX", 2, "too many leases at once"),
        ("LENT_CHUNKS_MAX", 7, "too many chunks are lent"),
        ("LENT_BYTES_PER_READER_MAX", 799, "too many bytes are lent to this reader"),
    ],
)
def test_bounds_over_all_refuse_and_lend_nothing(
    monkeypatch: pytest.MonkeyPatch, bound: str, value: int, says: str
) -> None:
    monkeypatch.setattr(lending, bound, value)
    source = chunks()
    table = LeaseTable(source)
    lent(table, A, 1, 0, 1, 2)
    lent(table, A, 2, 3)
    assert table.lend(A, 3, listed(0, 1, 2, 3), 5.0, 0.0) == says
    assert (source.out, table.leases) == (4, 2)
    table.give_back(A, 1)
    lent(table, A, 3, 0, 1, 2)
    assert table.drop(A) == 2
    assert source.out == 0


# --- messages --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "message",
    [
        Ask(),
        Lend(HOLDER, A, b"header", b"wanted"),
        Renew(A, 7, LEND_LEASE_S),
        GiveBack(A, [Returned(7, []), Returned(8, [0, 5])]),
    ],
)
def test_requests_survive_the_wire(message: Request) -> None:
    data = encode_request(message)
    assert data[:1] == b"T"
    assert decode_request(data) == message


def test_answers_survive_the_wire() -> None:
    for answer in (Offers(HOLDER, 10, {"shm": b"x"}), Lent(pack_items([LentItem(HELD, 5, 0)])), Done(False)):
        assert decode_answer(type(answer), encode_answer(answer)) == answer
    with pytest.raises(ProtocolError):
        decode_answer(Lent, encode_answer(Done(True)))


@pytest.mark.parametrize(
    "message",
    [
        Renew(A, -1, 1.0),
        Renew(A, 1, 0.0),
        Renew(A, 1, LEND_LEASE_S + 1),
        Renew(A[:5], 1, 1.0),
        GiveBack(A, []),
        GiveBack(A, [Returned(1, [])] * (LEASES_PER_READER_MAX + 1)),
        GiveBack(A, [Returned(1, [0] * (LEND_BATCH_CHUNKS_MAX + 1))]),
        Done(True),
    ],
)
def test_what_is_beyond_its_bounds_is_malformed(message: Request) -> None:
    with pytest.raises(ProtocolError, match="not a message about lending"):
        decode_request(encode_request(message))


def test_another_version_is_named() -> None:
    data = b"T" + bytes([MESH_PROTOCOL_VERSION + 1]) + encode_request(Ask())[2:]
    with pytest.raises(ProtocolError, match=f"version {MESH_PROTOCOL_VERSION + 1}"):
        decode_request(data)
    with pytest.raises(ProtocolError, match="version none"):
        decode_request(b"T")


@given(st.binary(max_size=200))
@settings(deadline=None)
def test_noise_is_malformed_and_nothing_else(noise: bytes) -> None:
    for prefix in (b"T", b"T" + bytes([MESH_PROTOCOL_VERSION])):
        try:
            decode_request(prefix + noise)
        except ProtocolError:
            continue


def test_what_lies_outside_the_arena_is_not_believed() -> None:
    wanted = [Want(key(0), memoryview(bytearray(10))), Want(key(1), memoryview(bytearray(4)), Slice(0, 4), 20)]
    good = [LentItem(HELD, 1, 90), LentItem(HELD, 1, 80)]
    assert unpack_items(pack_items(good), wanted, 100) == good
    for items in ([LentItem(HELD, 1, 91), good[1]], [good[0], LentItem(HELD, 1, 81)], [LentItem(4, 1, 0), good[1]]):
        with pytest.raises(ProtocolError):
            unpack_items(pack_items(items), wanted, 100)
    with pytest.raises(ProtocolError):
        unpack_items(pack_items(good[:1]), wanted, 100)
    assert unpack_items(pack_items([LentItem(NOT_HELD, 0, 1 << 60)] * 2), wanted, 100)


# --- the server ------------------------------------------------------------------------------------------------------
class Served:
    """A server of `source`, asked as a reader would."""

    def __init__(self, source: Chunks) -> None:
        self.counters = Counters()
        self.source = source
        self.threads = ThreadPoolExecutor(1)
        self.server = LendingServer(source, HOLDER, self.threads, self.counters)

    async def __aenter__(self) -> Served:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.server.close()
        self.threads.shutdown()
        assert self.source.out == 0

    async def lend(self, wants: list[Want], number: int = 1, lease_s: float = 5.0) -> list[LentItem]:
        answer = await self.server.handle(encode_request(lend_request(HOLDER, A, number, lease_s, wants)))
        return unpack_items(decode_answer(Lent, answer).items, wants, 1 << 40)

    async def give_back(self, number: int, *corrupt: int) -> bool:
        request = GiveBack(A, [Returned(number, list(corrupt))])
        return decode_answer(Done, await self.server.handle(encode_request(request))).known


def wants(*numbers: int, size_bytes: int = 100) -> list[Want]:
    return [Want(key(number), memoryview(bytearray(size_bytes))) for number in numbers]


def part(number: int, of: Slice, whole_bytes: int = 100) -> Want:
    return Want(key(number), memoryview(bytearray(of.bytes)), of, whole_bytes)


def test_a_part_is_lent_with_a_checksum_of_its_own() -> None:
    async def main() -> None:
        source = chunks()
        strided = Slice(5, 3, 10, 9)
        async with Served(source) as served:
            items = await served.lend([part(0, Slice(10, 50)), part(0, strided), part(1, Slice(0, 100)), *wants(2)])
            content = pattern(0, 100)
            runs = b"".join(content[at : at + 3] for at in range(5, 95, 10))
            assert [item.checksum for item in items] == [
                bound(checksum(content[10:60]), key(0), Slice(10, 50)),
                bound(checksum(runs), key(0), strided),
                bound(source.sums[key(1)], key(1), Slice(0, 100)),
                bound(source.sums[key(2)], key(2), None),
            ]
            assert (served.counters.chunks_served, served.counters.bytes_served) == (4, 50 + 27 + 100 + 100)
            assert source.lent == 3

    asyncio.run(main())


def test_a_part_of_a_chunk_that_went_wrong_is_refused_and_suspected() -> None:
    async def main() -> None:
        source = chunks()
        source.held[key(1)][99] ^= 1  # outside the part that is wanted
        async with Served(source) as served:
            items = await served.lend([part(0, Slice(0, 10)), part(1, Slice(0, 10)), part(1, Slice(20, 10))])
            assert [item.state for item in items] == [HELD, CORRUPT_HERE, CORRUPT_HERE]
            assert source.suspected == [key(1)]
            assert served.counters.corrupt == 1

    asyncio.run(main())


def test_a_reader_says_which_chunks_came_corrupt() -> None:
    async def main() -> None:
        async with Served(chunks()) as served:
            await served.lend(wants(0, 1, 2))
            assert await served.give_back(1, 2, 900)
            assert served.source.suspected == [key(2)]
            assert not await served.give_back(1, 1)
            assert served.source.suspected == [key(2)], "the lease had ended: other bytes may stand there"

    asyncio.run(main())


def test_a_lease_ends_in_time_by_itself() -> None:
    async def main() -> None:
        async with Served(chunks()) as served:
            await served.lend(wants(0), 1, lease_s=0.02)
            await served.lend(wants(1), 2, lease_s=5.0)
            await wait_until_async(lambda: served.source.out == 1, LONG_S, "the short lease is over")
            assert served.counters.expired == 1
            await served.lend(wants(0), 1, lease_s=0.02)
            await wait_until_async(lambda: served.counters.expired == 2, LONG_S, "the next one is over as well")

    asyncio.run(main())


def test_what_is_not_for_this_process_or_not_well_formed_is_refused() -> None:
    async def main() -> None:
        many = Slice(0, 1, 2, LEND_RUNS_MAX + 1)
        async with Served(chunks()) as served:
            other = lend_request(os.urandom(16), A, 1, 1.0, wants(0))
            with pytest.raises(ProtocolError, match="another process"):
                await served.server.handle(encode_request(other))
            for wrong in (
                Lend(HOLDER, A, b"", b""),
                Lend(HOLDER, A, *encode_read(1, 1 << 20, LEND_LEASE_S + 1, wants(0))),
                Lend(HOLDER, A, *encode_read(1 << 63, 1 << 20, 1.0, wants(0))),
                lend_request(HOLDER, A, 1, 1.0, wants(*[0] * (LEND_BATCH_CHUNKS_MAX + 1))),
                lend_request(HOLDER, A, 1, 1.0, [part(0, many, many.end)]),
            ):
                with pytest.raises(ProtocolError):
                    await served.server.handle(encode_request(wrong))
            with pytest.raises(ProtocolError):
                await served.server.handle(b"T" + msgspec.msgpack.encode([1, 2, 3]))
            assert served.counters.malformed == 6
            assert served.source.lent == 0
            served.server.close()
            with pytest.raises(ProtocolError, match="closing"):
                await served.server.handle(encode_request(Ask()))

    asyncio.run(main())


def test_a_call_that_is_given_up_while_a_part_is_verified_keeps_nothing() -> None:
    async def main() -> None:
        async with Served(chunks()) as served:
            held = asyncio.Event()
            loop = asyncio.get_running_loop()
            blocked = served.threads.submit(lambda: asyncio.run_coroutine_threadsafe(held.wait(), loop).result())
            lending_call = asyncio.create_task(served.lend([part(0, Slice(0, 10))]))
            await wait_until_async(lambda: served.source.out == 1, LONG_S, "it is lent")
            lending_call.cancel()
            await asyncio.wait([lending_call])
            assert served.source.out == 0
            held.set()
            await asyncio.wrap_future(blocked)

    asyncio.run(main())


def test_a_reader_that_goes_while_its_part_is_verified_gets_no_verdict() -> None:
    async def main() -> None:
        async with Served(chunks()) as served:
            held = asyncio.Event()
            loop = asyncio.get_running_loop()
            blocked = served.threads.submit(lambda: asyncio.run_coroutine_threadsafe(held.wait(), loop).result())
            lending_call = asyncio.create_task(served.lend([part(0, Slice(0, 10))]))
            await wait_until_async(lambda: served.source.out == 1, LONG_S, "it is lent")
            served.server.reader_gone(A)
            served.source.held[key(0)][0] ^= 1  # evicted meanwhile, and written anew
            held.set()
            with pytest.raises(ProtocolError, match="the lease ended"):
                await lending_call
            await asyncio.wrap_future(blocked)
            assert served.source.suspected == []

    asyncio.run(main())


def test_a_copy_does_not_wait_for_what_is_verified_for_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does the end of a read, which waits for its copies: peers may have any number of chunks verified."""
    begun, go_on = threading.Semaphore(0), threading.Event()

    def slow(*_: object) -> list[LentItem]:
        begun.release()
        go_on.wait(LONG_S)
        return []

    async def main() -> None:
        monkeypatch.setattr(lending_serve, "_with_parts", slow)
        source = chunks(2, MIB)
        async with contextlib.AsyncExitStack() as stack:
            ends = []
            for _ in range(2):
                mapped = MappedChunks(source)
                stack.callback(mapped.close)
                ends.append(await open_transport("127.0.0.1", 0, mapped, echo, transports=("shm",)))
                stack.push_async_callback(ends[-1].close)
            stack.callback(go_on.set)
            node, peer = ends
            for _ in range(COPY_THREADS):
                ask = peer.read(node.address, [part(0, Slice(0, 100), MIB)], deadline_s=1000)
                stack.push_async_callback(ask.close)
                await asyncio.to_thread(begun.acquire, timeout=LONG_S)
            landings = await collect(node.read(peer.address, wants(1, size_bytes=MIB), deadline_s=LONG_S / 4))
            assert outcomes(landings) == {0: Outcome.LANDED}

    asyncio.run(main())
