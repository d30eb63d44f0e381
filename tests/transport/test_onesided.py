"""Reads in which the reader takes the bytes itself: leases, checksums, quarantine and ways out, with a mover that
delays, fails and writes late."""

from __future__ import annotations

import asyncio
import itertools
import time

import pytest

from kvmesh.transport import taking
from kvmesh.transport.errors import UnreachableError
from kvmesh.transport.interface import Outcome, Slice, Want
from kvmesh.transport.lending_messages import Ask, GiveBack, Lend, Renew
from kvmesh.transport.limits import (
    LEND_BATCH_BYTES_MAX,
    LEND_BATCH_BYTES_MIN,
    LEND_BATCH_CHUNKS_MAX,
    LEND_BATCHES_AT_ONCE,
    LEND_RUN_BYTES_MIN,
    LEND_RUNS_MAX,
    LINKS_PER_READ_MAX,
    MIB,
)
from kvmesh.transport.slices import runs
from tests.support.waiting import wait_until_async
from tests.transport.ends import LONG_S, Chunks, collect, key, outcomes, pattern, wants
from tests.transport.movers import ADDRESS, FakeMove, Stage

TAGS = {kind: kind.__struct_config__.tag for kind in (Ask, Lend, Renew, GiveBack)}


def chunks(count: int, size_bytes: int) -> Chunks:
    source = Chunks()
    source.fill(count, size_bytes)
    return source


def test_the_runs_of_a_part() -> None:
    assert list(runs(Slice(7, 5))) == [(7, 5)]
    assert list(runs(Slice(7, 5, 10, 3))) == [(7, 5), (17, 5), (27, 5)]
    assert list(runs(Slice(7, 5, 5, 3))) == [(7, 15)]


def test_chunks_and_parts_land_front_first_in_batches() -> None:
    async def main() -> None:
        size, count = MIB, 20
        source = chunks(count, size)
        part = Slice(100, 5000, 10_000, 7)
        async with Stage(source) as stage:
            wanted = [*wants(range(count), size), Want(key(0), memoryview(bytearray(35_000)), part, size)]
            reading = stage.read(wanted, LONG_S)
            order = [landing.index async for landings in reading for landing in landings]
            assert order == list(range(count + 1))
            assert all(want.into == source.held[want.key] for want in wanted[:count])
            content = pattern(0, size)
            assert bytes(wanted[count].into) == b"".join(content[at : at + 5000] for at in range(100, 70_100, 10_000))
            assert stage.calls.count(TAGS[Lend]) == 4  # 2, 4 and 8 MiB, and the rest
            assert stage.calls.count(TAGS[Ask]) == 1
            assert (stage.counters.chunks_read, stage.counters.bytes_read) == (count + 1, count * size + 35_000)
            assert stage.counters.bytes_read_shm == stage.served.bytes_served == stage.counters.bytes_read
            await wait_until_async(lambda: source.out == 0, LONG_S, "every lease is back")

    asyncio.run(main())


def test_what_a_reader_takes_itself() -> None:
    def part(number: int, of: Slice) -> Want:
        return Want(key(number), memoryview(bytearray(of.bytes)), of, of.end)

    small, many = Slice(0, 100, 200, 2), Slice(0, LEND_RUN_BYTES_MIN, LEND_RUN_BYTES_MIN + 1, LEND_RUNS_MAX + 1)
    wanted = [
        part(0, Slice(0, 1)),
        part(1, Slice(0, 100, 100, LEND_RUNS_MAX + 1)),
        part(2, Slice(0, LEND_RUN_BYTES_MIN, 2 * LEND_RUN_BYTES_MIN, 2)),
        part(3, small),
        part(3, Slice(0, 10)),
        part(4, many),
        *wants([3, 5], 10),
    ]
    assert [index for index, _ in taking.takeable(enumerate(wanted))] == [0, 1, 2, 7]


def test_parts_of_one_chunk_are_one_batch_whatever_their_size() -> None:
    size = LEND_BATCH_BYTES_MIN // 2
    buffer = memoryview(bytearray(size))
    parts = [Want(key(0), buffer, Slice(at, size), 8 * size) for at in range(0, 4 * size, size)]
    whole = [Want(key(number), buffer) for number in range(1, 61)]
    batches = list(taking._batches(enumerate([*parts, *whole])))
    assert 32 * size == LEND_BATCH_BYTES_MAX
    assert [len(batch) for batch in batches] == [4, 4, 8, 16, 32]
    tiny = wants([0] * (LEND_BATCH_CHUNKS_MAX + 1), 1)
    assert [len(batch) for batch in taking._batches(enumerate(tiny))] == [LEND_BATCH_CHUNKS_MAX, 1]
    strided = Slice(0, 1, 2, LEND_RUNS_MAX)
    many = [Want(key(0), memoryview(bytearray(LEND_RUNS_MAX)), strided, strided.end)] * 2
    assert [len(batch) for batch in taking._batches(enumerate(many))] == [1, 1]


def test_only_so_many_batches_are_lent_at_once() -> None:
    async def main() -> None:
        source = chunks(40, MIB)
        async with Stage(source) as stage:
            stage.fake.go.clear()
            reading = stage.read(wants(range(40), MIB), LONG_S)
            await wait_until_async(lambda: len(stage.fake.moves) == LEND_BATCHES_AT_ONCE, LONG_S, "moves are under way")
            assert source.out == 2 + 4 + 8 + 16
            stage.fake.go.set()
            assert len(await collect(reading)) == 40

    asyncio.run(main())


def test_what_is_not_there_or_not_right_is_said() -> None:
    async def main() -> None:
        source = chunks(5, 1000)
        source.sums[key(1)] ^= 1
        async with Stage(source) as stage:
            parts = [Want(key(number), memoryview(bytearray(10)), Slice(0, 10), 1000) for number in (1, 2)]
            wanted = [*wants([0, 1, 99, 3], [1000, 1000, 10, 5]), *parts]
            landings = await collect(stage.read(wanted, LONG_S))
            assert outcomes(landings) == {
                0: Outcome.LANDED,
                1: Outcome.CORRUPT,
                2: Outcome.NOT_HELD,
                3: Outcome.WRONG_SIZE,
                4: Outcome.CORRUPT,
                5: Outcome.LANDED,
            }
            assert bytes(wanted[3].into) == b"\xa5" * 5
            assert bytes(wanted[4].into) == bytes(10), "no byte of a chunk that went wrong at its holder"
            assert landings[3].checksum == source.sums[key(3)]
            assert (stage.counters.corrupt, stage.counters.not_held, stage.served.not_held) == (2, 1, 1)
            await wait_until_async(lambda: len(source.suspected) == 2, LONG_S, "the holder is told")
            assert set(source.suspected) == {key(1)}

    asyncio.run(main())


@pytest.mark.parametrize("ending", ["close", "deadline"])
def test_a_buffer_is_quarantined_until_the_mover_has_stopped(ending: str) -> None:
    async def main() -> None:
        source = chunks(1, 100)
        async with Stage(source) as stage:
            fake = stage.fake
            fake.go.clear()
            fake.let_stop.clear()
            wanted = wants([0], 100)
            reading = stage.read(wanted, 0.05 if ending == "deadline" else LONG_S)
            await wait_until_async(lambda: fake.moves, LONG_S, "it moves")
            [move] = fake.moves
            if ending == "deadline":
                assert [landings async for landings in reading] == []
            closing = asyncio.create_task(reading.close())
            await asyncio.wait_for(move.stopping.wait(), LONG_S)
            move.write()  # late, after the reader gave up
            for _ in range(20):
                await asyncio.sleep(0)
            assert not closing.done()
            assert source.out == 1, "what still moves is still leased"
            fake.let_stop.set()
            await asyncio.wait_for(closing, LONG_S)
            assert move.stopped
            await wait_until_async(lambda: source.out == 0, LONG_S, "the lease is back")
            with pytest.raises(StopAsyncIteration):
                await reading.__anext__()
            wanted[0].into.release()

    asyncio.run(main())


def test_a_second_cancellation_does_not_cut_the_quarantine_short() -> None:
    async def main() -> None:
        async with Stage(chunks(30, MIB)) as stage:
            fake = stage.fake
            fake.go.clear()
            fake.let_stop.clear()
            reading = stage.read(wants(range(30), MIB), LONG_S)
            await wait_until_async(lambda: len(fake.moves) == LEND_BATCHES_AT_ONCE, LONG_S, "it moves")
            for _ in range(3):
                reading.task.cancel()
                await asyncio.sleep(0)
                await asyncio.sleep(0)
            assert not reading.task.done()
            fake.let_stop.set()
            await asyncio.wait_for(reading.close(), LONG_S)
            assert all(move.stopped for move in fake.moves)

    asyncio.run(main())


def test_a_mover_that_fails_is_left_out_and_the_next_backend_goes_on() -> None:
    async def main() -> None:
        source = chunks(20, MIB)
        async with Stage(source, "shm", "nixl") as stage:
            wanted = wants(range(20), MIB)
            stage.fakes["shm"].fails = True
            assert outcomes(await collect(stage.read(wanted, LONG_S))) == dict.fromkeys(range(20), Outcome.LANDED)
            assert all(want.into == source.held[want.key] for want in wanted)
            assert stage.counters.fallbacks == 1
            assert (stage.counters.bytes_read_shm, stage.counters.bytes_read_nixl) == (0, 20 * MIB)
            assert stage.peers.backend(ADDRESS) == "nixl"
            await wait_until_async(lambda: stage.fakes["shm"].movers[0].closed, LONG_S, "the failed mover is closed")
            assert all(move.stopped for move in stage.fakes["shm"].moves)
            assert len(await collect(stage.read(wanted, LONG_S))) == 20
            assert len(stage.fakes["shm"].movers) == 1, "it is not tried again so soon"

    asyncio.run(main())


@pytest.mark.parametrize("how", ["fails", "refuses", "unreachable"])
def test_a_read_that_no_backend_can_do_ends(how: str) -> None:
    async def main() -> None:
        async with Stage(chunks(3, 100)) as stage:
            setattr(stage.fake, how, True)
            assert await collect(stage.read(wants(range(3), 100), LONG_S)) == {}
            assert stage.counters.peers_lost == 1
            assert stage.peers.backend(ADDRESS) == "zmq"

    asyncio.run(main())


def test_a_holder_that_does_not_answer_ends_the_read() -> None:
    async def main() -> None:
        async with Stage(chunks(3, 100)) as stage:
            stage.unreachable = True
            assert await collect(stage.read(wants(range(3), 100), LONG_S)) == {}
            stage.unreachable, stage.silent = False, True
            began = time.monotonic()
            assert await collect(stage.read(wants(range(3), 100), 0.05)) == {}
            assert time.monotonic() - began < LONG_S / 2

    asyncio.run(main())


def test_a_holder_that_restarted_is_asked_again_and_read_in_the_same_read() -> None:
    async def main() -> None:
        source = chunks(3, 100)
        async with Stage(source) as stage:
            assert len(await collect(stage.read(wants(range(3), 100), LONG_S))) == 3
            stage.restart()
            assert len(await collect(stage.read(wants(range(3), 100), LONG_S))) == 3
            assert stage.calls.count(TAGS[Ask]) == 2
            assert [mover.closed for mover in stage.fake.movers] == [True, False]

    asyncio.run(main())


@pytest.mark.parametrize("instances", [1, 1000])
def test_a_holder_that_hangs_up_each_time_costs_a_few_links(instances: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its connection ends, so it is gone, for all we know; but when it is asked again it is there, with an offer. The
    same process, or another each time."""

    async def main() -> None:
        async with Stage(chunks(3, 100)) as stage:
            numbers = itertools.cycle(range(instances))

            async def hang_up(move: FakeMove) -> None:
                if instances > 1:
                    stage.restart(b"%016d" % next(numbers))
                stage.peers.lost(move._mover)
                raise UnreachableError("it is gone")

            monkeypatch.setattr(FakeMove, "wait", hang_up)
            assert await collect(stage.read(wants(range(3), 100), 1.0)) == {}
            assert stage.counters.peers_lost == 1, "it ended before its deadline"
            assert len(stage.fake.movers) == (1 if instances == 1 else LINKS_PER_READ_MAX)

    asyncio.run(main())


def test_a_lease_is_renewed_while_its_chunks_still_move(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(taking, "LEND_RENEW_S", 0.02)

    async def main() -> None:
        source = chunks(1, 100)
        async with Stage(source) as stage:
            stage.fake.go.clear()
            reading = stage.read(wants([0], 100), LONG_S)
            await wait_until_async(lambda: stage.calls.count(TAGS[Renew]) == 4, LONG_S, "four renewals")
            assert (source.out, stage.served.expired) == (1, 0)
            stage.fake.go.set()
            assert outcomes(await collect(reading)) == {0: Outcome.LANDED}

    asyncio.run(main())


def test_a_move_whose_lease_cannot_be_renewed_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(taking, "LEND_RENEW_S", 0.02)

    async def main() -> None:
        source = chunks(1, 100)
        async with Stage(source) as stage:
            stage.fake.go.clear()
            reading = stage.read(wants([0], 100), LONG_S)
            await wait_until_async(lambda: stage.fake.moves, LONG_S, "it moves")
            stage.server.table.clear()  # as if its time had been over there
            await wait_until_async(lambda: stage.fake.moves[0].stopped, LONG_S, "the move is stopped")
            stage.fake.go.set()
            await collect(reading)

    asyncio.run(main())


def test_other_bytes_after_the_end_of_a_lease_are_no_corruption(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(taking, "LEND_MARGIN_S", taking.LEND_LEASE_S)  # to the reader each lease has just ended

    async def main() -> None:
        source = chunks(2, 100)
        async with Stage(source) as stage:
            stage.mapped.view(key(1))[0] ^= 1
            landings = await collect(stage.read(wants(range(2), 100), LONG_S))
            assert outcomes(landings) == {0: Outcome.LANDED}, "the checksum says that these bytes are right"
            assert (stage.counters.corrupt, source.suspected) == (0, [])

    asyncio.run(main())


def test_a_holder_that_lies_about_the_place_is_not_believed() -> None:
    async def main() -> None:
        source = chunks(1, 100)
        async with Stage(source) as stage:
            real = stage.mapped.lend

            def outside(key: bytes) -> object:
                loan = real(key)
                assert loan is not None
                loan.offset = stage.mapped.region.size_bytes - 99
                return loan

            stage.mapped.lend = outside  # type: ignore[method-assign,assignment]
            assert await collect(stage.read(wants([0], 100), LONG_S)) == {}
            assert stage.counters.malformed == 1
            assert stage.peers.backend(ADDRESS) == "zmq"
            assert stage.fake.moves == []

    asyncio.run(main())


def test_a_large_batch_is_hashed_beside_the_loop() -> None:
    async def main() -> None:
        source = chunks(2, 2 * MIB)
        async with Stage(source) as stage:
            assert len(await collect(stage.read(wants(range(2), 2 * MIB), LONG_S))) == 2

    asyncio.run(main())
