"""What reads are on every transport (interface.py), on both backends."""

from __future__ import annotations

import asyncio
import time

import pytest

from kvmesh.transport.checksum import checksum
from kvmesh.transport.errors import CallerError
from kvmesh.transport.interface import Landing, Outcome, Slice, Want
from kvmesh.transport.limits import (
    CHAIN_CHUNKS_MAX,
    CHUNK_BYTES_MAX,
    KIB,
    MIB,
    SLICE_RUNS_MAX,
    SLICES_PER_READ_MAX,
)
from tests.support.waiting import wait_until_async
from tests.transport.ends import (
    LONG_S,
    Chunks,
    Ends,
    bytes_of,
    collect,
    key,
    outcomes,
    part_of,
    pattern,
    two,
    wants,
)


@pytest.mark.parametrize(
    ("count", "size_bytes"),
    [(1, 1), (300, 1), (150, 1000), (100, 64 * KIB), (9, 200 * KIB), (20, MIB), (3, 9 * MIB + 5)],
)
def test_chunks_land_byte_for_byte(backend: str, count: int, size_bytes: int) -> None:
    async def main() -> None:
        source = Chunks()
        source.fill(count, size_bytes)
        async with two(backend, source) as (holder, reader):
            wanted = wants(range(count), size_bytes)
            landings = await collect(reader.read(holder.address, wanted, deadline_s=LONG_S))
            assert landings == {
                number: Landing(number, Outcome.LANDED, source.sums[key(number)]) for number in range(count)
            }
            assert all(want.into == source.held[want.key] for want in wanted)
            assert (reader.stats().chunks_read, reader.stats().bytes_read) == (count, count * size_bytes)
            assert (holder.stats().chunks_served, holder.stats().bytes_served) == (count, count * size_bytes)

    asyncio.run(main())


def test_sizes_mixed_in_one_read(backend: str) -> None:
    async def main() -> None:
        sizes = [5 * MIB, 1, 100 * KIB, 2 * MIB, 128 * KIB, 128 * KIB + 1, 64, MIB + 1, 4096, 3]
        source = Chunks()
        for number, size in enumerate(sizes):
            source.add(number, pattern(number, size))
        async with two(backend, source) as (holder, reader):
            wanted = wants(range(len(sizes)), sizes)
            landings = await collect(reader.read(holder.address, wanted, deadline_s=LONG_S))
            assert set(outcomes(landings).values()) == {Outcome.LANDED}
            assert len(landings) == len(sizes)
            assert all(want.into == source.held[want.key] for want in wanted)

    asyncio.run(main())


def test_what_is_not_there_or_not_right_is_said(backend: str) -> None:
    async def main() -> None:
        source = Chunks()
        source.fill(6, 3 * MIB)
        source.add(6, pattern(6, 1000))
        source.held[key(1)][2 * MIB] ^= 1  # no longer what its checksum says
        source.sums[key(6)] ^= 1
        async with two(backend, source) as (holder, reader):
            wanted = wants([0, 1, 99, 3, 4, 6], [3 * MIB, 3 * MIB, 10, 5, 3 * MIB, 1000])
            landings = await collect(reader.read(holder.address, wanted, deadline_s=LONG_S))
            assert outcomes(landings) == {
                0: Outcome.LANDED,
                1: Outcome.CORRUPT,
                2: Outcome.NOT_HELD,
                3: Outcome.WRONG_SIZE,
                4: Outcome.LANDED,
                5: Outcome.CORRUPT,
            }
            assert bytes(wanted[2].into) == b"\xa5" * 10
            assert bytes(wanted[3].into) == b"\xa5" * 5
            assert (landings[2].checksum, landings[3].checksum) == (0, source.sums[key(3)])
            assert (reader.stats().corrupt, reader.stats().not_held, holder.stats().not_held) == (2, 1, 1)
            assert reader.stats().chunks_read == 2

    asyncio.run(main())


KV = (4, 2, 8, 64, 16)
"""Layers, K and V, heads, tokens, head_dim: a chunk of 64 KiB, a byte an element."""
ROW = KV[3] * KV[4]
CHUNK = 4 * 2 * 8 * ROW
PARTS = {
    "a byte": Slice(77, 1),
    "one run": Slice(12_345, 4321),
    "all of it": Slice(0, CHUNK),
    "two layers": Slice(1 * 2 * 8 * ROW, 2 * 2 * 8 * ROW),
    "half of the heads": Slice(4 * ROW, 4 * ROW, 8 * ROW, 4 * 2),
    "each token's first element": Slice(0, 1, KV[4], CHUNK // KV[4]),
    "runs without gaps": Slice(10, 100, 100, 50),
}


@pytest.mark.parametrize("scale", [1, 40])
def test_parts_land_byte_for_byte(backend: str, scale: int) -> None:
    """Several parts of each chunk, with the whole of it, in one read: of small chunks, and of ones in many frames."""

    async def main() -> None:
        source = Chunks()
        source.fill(3, scale * CHUNK)
        async with two(backend, source) as (holder, reader):
            wanted = [
                part_of(
                    number, scale * CHUNK, Slice(p.offset_bytes, p.run_bytes * scale, p.stride_bytes * scale, p.count)
                )
                for number in range(3)
                for p in PARTS.values()
            ] + wants([2, 0], scale * CHUNK)
            landings = await collect(reader.read(holder.address, wanted, deadline_s=LONG_S))
            assert len(landings) == len(wanted)
            for index, want in enumerate(wanted):
                chunk = bytes(source.held[want.key])
                expected = bytes_of(chunk, want.part) if want.part else chunk
                assert want.into == expected
                assert landings[index] == Landing(index, Outcome.LANDED, checksum(expected))
            assert source.lent == 4  # each chunk once for wants that stand next to each other
            read_bytes = sum(want.into.nbytes for want in wanted)
            assert (reader.stats().bytes_read, holder.stats().bytes_served) == (read_bytes, read_bytes)
            assert (reader.stats().chunks_read, holder.stats().chunks_served) == (len(wanted), len(wanted))

    asyncio.run(main())


def test_a_part_of_what_is_not_there_or_not_right(backend: str) -> None:
    async def main() -> None:
        source = Chunks()
        source.fill(4, 1000)
        source.held[key(1)][999] ^= 1  # far from the part
        async with two(backend, source) as (holder, reader):
            part = Slice(10, 5, 20, 3)
            beyond = Slice(990, 20)  # in a chunk of 2000 bytes, which the holder's is not
            wanted = [
                part_of(0, 1000, part),
                part_of(0, 1001, part),
                part_of(0, 2000, beyond),
                part_of(1, 1000, part),
                part_of(1, 1000, Slice(0, 1)),
                part_of(99, 1000, part),
                *wants([2], 1000),
                part_of(3, 1000, part),
            ]
            landings = await collect(reader.read(holder.address, wanted, deadline_s=LONG_S))
            assert outcomes(landings) == {
                0: Outcome.LANDED,
                1: Outcome.WRONG_SIZE,
                2: Outcome.WRONG_SIZE,
                3: Outcome.CORRUPT,
                4: Outcome.CORRUPT,
                5: Outcome.NOT_HELD,
                6: Outcome.LANDED,
                7: Outcome.LANDED,
            }
            assert all(bytes(want.into) == b"\xa5" * want.into.nbytes for want in wanted[1:6])
            assert [landings[index].checksum for index in (3, 4, 5)] == [0, 0, 0]
            assert set(source.suspected) == {key(1)}
            assert (holder.stats().corrupt, reader.stats().corrupt) == (1, 2)

    asyncio.run(main())


def test_the_holder_hears_of_a_chunk_that_came_corrupt(backend: str) -> None:
    async def main() -> None:
        source = Chunks()
        source.fill(3, 3 * MIB)
        source.held[key(1)][2 * MIB] ^= 1
        async with two(backend, source) as (holder, reader):
            landings = await collect(reader.read(holder.address, wants(range(3), 3 * MIB), deadline_s=LONG_S))
            assert landings[1].outcome is Outcome.CORRUPT
            await wait_until_async(lambda: source.suspected == [key(1)], LONG_S, "it is told once, and no other is")

    asyncio.run(main())


def test_a_node_without_a_source_holds_nothing(backend: str) -> None:
    async def main() -> None:
        async with Ends(backend) as ends:
            a, b = await ends.open(), await ends.open(None)
            landings = await collect(a.read(b.address, wants(range(200), 10), deadline_s=LONG_S))
            assert outcomes(landings) == dict.fromkeys(range(200), Outcome.NOT_HELD)

    asyncio.run(main())


def test_a_source_that_fails_holds_nothing(backend: str, caplog: pytest.LogCaptureFixture) -> None:
    class Failing(Chunks):
        def lend(self, key: bytes) -> None:
            raise ZeroDivisionError

    async def main() -> None:
        async with two(backend, Failing()) as (holder, reader):
            landings = await collect(reader.read(holder.address, wants([0], 10), deadline_s=LONG_S))
            assert outcomes(landings) == {0: Outcome.NOT_HELD}

    asyncio.run(main())
    assert "ZeroDivisionError" in caplog.text


def test_nothing_wanted_ends_at_once(backend: str) -> None:
    async def main() -> None:
        async with two(backend, Chunks()) as (holder, reader):
            assert await collect(reader.read(holder.address, [], deadline_s=LONG_S)) == {}

    asyncio.run(main())


def test_a_read_that_cannot_be_is_an_error_of_the_caller(backend: str) -> None:
    async def main() -> None:
        async with two(backend, Chunks()) as (holder, reader):
            for wanted in (
                [Want(b"short", memoryview(bytearray(1)))],
                [Want(key(0), memoryview(b"read only"))],
                [Want(key(0), memoryview(bytearray(8))[::2])],
                [Want(key(0), memoryview(bytearray()))],
                wants([0] * (CHAIN_CHUNKS_MAX + 1), 1),
                [Want(key(0), memoryview(bytearray(4)), Slice(0, 5), 100)],
                [part_of(0, 100, Slice(96, 5))],
                [part_of(0, 100, Slice(-1, 5))],
                [part_of(0, 100, Slice(0, 5, 24, 5))],
                [part_of(0, 100, Slice(0, 5, 4, 2))],
                [part_of(0, 100, Slice(0, 0, 4, 2))],
                [part_of(0, 100, Slice(0, 5, 5, 0))],
                [part_of(0, CHUNK_BYTES_MAX + 1, Slice(0, 5))],
                [part_of(0, CHUNK_BYTES_MAX, Slice(0, 1, 1, SLICE_RUNS_MAX + 1))],
                [part_of(0, 5000, Slice(place, 1)) for place in range(SLICES_PER_READ_MAX + 1)],
            ):
                with pytest.raises(CallerError):
                    reader.read(holder.address, wanted, deadline_s=LONG_S)

    asyncio.run(main())


def test_the_deadline_ends_a_read_whose_holder_is_silent(backend: str) -> None:
    async def main() -> None:
        async with Ends(backend) as ends:
            reader, stalled = await ends.open(), await ends.stalled()
            began = time.monotonic()
            assert await collect(reader.read(stalled, wants(range(3), 10), deadline_s=0.1)) == {}
            assert 0.09 < time.monotonic() - began < LONG_S

    asyncio.run(main())


def test_a_holder_that_does_not_exist_ends_the_read_at_once(backend: str) -> None:
    async def main() -> None:
        async with Ends(backend) as ends:
            reader, nobody = await ends.open(), await ends.nobody()
            assert await asyncio.wait_for(collect(reader.read(nobody, wants([0], 10), deadline_s=1000)), LONG_S) == {}
            assert reader.stats().peers_lost == 1

    asyncio.run(main())


def test_after_close_no_buffer_changes(backend: str) -> None:
    async def main() -> None:
        count, size = 24, 2 * MIB
        source = Chunks()
        source.fill(count, size)
        async with two(backend, source) as (holder, reader):
            wanted = wants(range(count), size)
            reading = reader.read(holder.address, wanted, deadline_s=LONG_S)
            await reading.__anext__()
            await reading.close()
            after = [bytes(want.into) for want in wanted]
            with pytest.raises(StopAsyncIteration):
                await reading.__anext__()
            await reading.close()
            # A later read over the same connections says that whatever was under way has come by.
            assert len(await collect(reader.read(holder.address, wants([0], size), deadline_s=LONG_S))) == 1
            assert [bytes(want.into) for want in wanted] == after
            assert any(content != source.held[want.key] for content, want in zip(after, wanted, strict=True))
            for want in wanted:
                want.into.release()  # nobody refers to the buffers any more
            await wait_until_async(lambda: source.out == 0, LONG_S, "every loan is back")

    asyncio.run(main())


def test_a_deadline_in_the_middle_keeps_what_has_landed(backend: str) -> None:
    async def main() -> None:
        source = Chunks()
        source.fill(40, 2 * MIB)
        async with two(backend, source) as (holder, reader):
            wanted = wants(range(40), 2 * MIB)
            landings = await collect(reader.read(holder.address, wanted, deadline_s=0.01))
            for index, outcome in outcomes(landings).items():
                assert outcome is Outcome.LANDED
                assert wanted[index].into == source.held[key(index)]
            await wait_until_async(lambda: source.out == 0, LONG_S, "every loan is back")

    asyncio.run(main())


@pytest.mark.parametrize("closing", ["holder", "reader"])
def test_a_peer_that_closes_in_mid_read(backend: str, closing: str) -> None:
    async def main() -> None:
        source = Chunks()
        source.fill(60, 2 * MIB)
        async with two(backend, source) as (holder, reader):
            wanted = wants(range(60), 2 * MIB)
            reading = reader.read(holder.address, wanted, deadline_s=1000)
            landings = await reading.__anext__()
            ends = {"holder": holder, "reader": reader}
            await asyncio.wait_for(ends[closing].close(), LONG_S)
            if closing == "holder":
                assert source.out == 0
            async with asyncio.timeout(LONG_S):
                landings += [landing async for landed in reading for landing in landed]
                await reading.close()
            assert len(landings) < 60
            assert all(wanted[landing.index].into == source.held[key(landing.index)] for landing in landings)
            await wait_until_async(lambda: source.out == 0, LONG_S, "every loan is back")
            if closing == "holder":
                assert reader.stats().peers_lost == 1

    asyncio.run(main())


def test_several_readers_at_once(backend: str) -> None:
    async def main() -> None:
        source = Chunks()
        source.fill(12, MIB)
        async with Ends(backend) as ends:
            holder = await ends.open(source)
            readers = [await ends.open() for _ in range(3)]
            wanted = [wants(range(12), MIB) for _ in range(6)]
            reads = [
                collect(readers[number % 3].read(holder.address, each, deadline_s=LONG_S))
                for number, each in enumerate(wanted)
            ]
            for landings in await asyncio.gather(*reads):
                assert outcomes(landings) == dict.fromkeys(range(12), Outcome.LANDED)
            assert all(want.into == source.held[want.key] for each in wanted for want in each)
            await wait_until_async(lambda: source.out == 0, LONG_S, "every loan is back")

    asyncio.run(main())


def test_32_readers_at_once_all_get_everything_and_calls_go_through(backend: str) -> None:
    async def main() -> None:
        source = Chunks()
        source.fill(4, MIB)
        size = 64 * KIB
        for number in range(4, 20):
            source.add(number, pattern(number, size))
        async with Ends(backend) as ends:
            holder = await ends.open(source)
            reader = await ends.open()
            kinds = [
                wants(range(4), MIB),
                wants(range(4, 20), size),
                [part_of(number, MIB, Slice(0, 8 * KIB, 16 * KIB, 64)) for number in range(4)],
                [*wants([99], 1), *(part_of(number, size, Slice(5, 1000)) for number in range(4, 20))],
            ]
            reads = [
                asyncio.create_task(collect(reader.read(holder.address, kinds[number % 4], deadline_s=LONG_S)))
                for number in range(32)
            ]
            assert await reader.call(holder.address, b"meanwhile", timeout_s=LONG_S) == b"meanwhile"
            for number, landings in enumerate(await asyncio.gather(*reads)):
                assert len(landings) == len(kinds[number % 4])
            await wait_until_async(lambda: source.out == 0, LONG_S, "every loan is back")

    asyncio.run(main())


def test_a_node_reads_from_itself(backend: str) -> None:
    async def main() -> None:
        source = Chunks()
        source.fill(5, 300 * KIB)
        async with two(backend, source) as (holder, _):
            wanted = wants(range(5), 300 * KIB)
            assert len(await collect(holder.read(holder.address, wanted, deadline_s=LONG_S))) == 5
            assert all(want.into == source.held[want.key] for want in wanted)

    asyncio.run(main())


def test_reading_with_a_closed_transport_ends(backend: str) -> None:
    async def main() -> None:
        async with two(backend, Chunks()) as (holder, reader):
            await reader.close()
            await reader.close()
            assert await collect(reader.read(holder.address, wants([0], 1), deadline_s=1000)) == {}

    asyncio.run(main())


def test_calls_go_through_beside_bulk(backend: str) -> None:
    async def main() -> None:
        source = Chunks()
        source.fill(32, 2 * MIB)
        async with two(backend, source) as (holder, reader):
            reading = reader.read(holder.address, wants(range(32), 2 * MIB), deadline_s=LONG_S)
            read = asyncio.create_task(collect(reading))
            answered = 0
            while not read.done():
                await reader.call(holder.address, b"ping", timeout_s=LONG_S)
                answered += 1
            assert len(read.result()) == 32
            assert answered > 1

    asyncio.run(main())
