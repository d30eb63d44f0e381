"""Shared memory between two processes: the handshake and who is refused, copies that stop, and death of either side."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import mmap
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor

import msgspec
import numpy as np
import pytest
import xxhash

from kvmesh.transport import shm
from kvmesh.transport.backends import open_transport
from kvmesh.transport.copying import CopyMove, shares
from kvmesh.transport.counters import Counters
from kvmesh.transport.errors import ProtocolError, UnreachableError
from kvmesh.transport.interface import Landing, Outcome, Region
from kvmesh.transport.limits import (
    COPY_ON_LOOP_BYTES_MAX,
    COPY_STEP_BYTES,
    KIB,
    LEND_LEASE_S,
    MESH_PROTOCOL_VERSION,
    MIB,
    SHM_PEERS_MAX,
)
from kvmesh.transport.onesided import Piece
from kvmesh.transport.shm import Hello, Offer, ShmEnd, ShmMover, Welcome
from tests.support.waiting import wait_until_async
from tests.transport.arenas import MappedChunks
from tests.transport.ends import LONG_S, Chunks, echo, pattern, wants

INSTANCE, READER = b"i" * 16, b"r" * 16
ARENA_BYTES = 4 * MIB


class Pair:
    """A holder's end with an arena, and a reader's end; in one process."""

    def __init__(self) -> None:
        self.mapped = MappedChunks(Chunks(), ARENA_BYTES)
        self.mapped.arena.view(0, ARENA_BYTES)[:] = pattern(1, ARENA_BYTES)
        self.counters = Counters()
        self.gone: list[bytes] = []
        self.lost: list[ShmMover] = []
        self.threads = ThreadPoolExecutor(2)
        self.holder = self.end(self.mapped.region)
        self.reader = self.end(None)

    def end(self, region: Region | None) -> ShmEnd:
        return ShmEnd(region, INSTANCE, self.threads, self.counters, self.gone.append, self.lost.append)

    async def mover(self, reader: bytes = READER, **changes: object) -> ShmMover:
        offer = msgspec.msgpack.decode(self.holder.offer(), type=Offer)
        return await self.reader.mover(
            msgspec.msgpack.encode(msgspec.structs.replace(offer, **changes)), "holder:1", reader
        )

    def connect(self) -> socket.socket:
        """A stranger's connection."""
        stranger = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        stranger.connect(b"\0" + msgspec.msgpack.decode(self.holder.offer(), type=Offer).socket_name)
        return stranger


@contextlib.asynccontextmanager
async def pair() -> AsyncIterator[Pair]:
    made = Pair()
    try:
        yield made
    finally:
        await made.holder.close()
        await made.reader.close()
        made.threads.shutdown()
        made.mapped.close()


def piece(offset: int, size_bytes: int, digest: xxhash.xxh3_64 | None = None) -> Piece:
    return Piece(offset, memoryview(bytearray(size_bytes)), digest)


async def closed(stranger: socket.socket) -> bool:
    """Whether the holder closes this connection."""
    stranger.setblocking(False)
    return await asyncio.wait_for(asyncio.get_running_loop().sock_recv(stranger, 1), LONG_S) == b""


# --- copying ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("size_bytes", [1, 1000, COPY_ON_LOOP_BYTES_MAX, COPY_ON_LOOP_BYTES_MAX + 1, 3 * MIB])
def test_pieces_are_copied_and_hashed(size_bytes: int) -> None:
    async def main() -> None:
        async with pair() as made:
            mover = await made.mover()
            whole = memoryview(pattern(1, ARENA_BYTES))
            digests = [xxhash.xxh3_64() for _ in range(2)]
            pieces = [
                piece(5, size_bytes, digests[0]),
                piece(ARENA_BYTES - 10, 10, digests[0]),
                piece(MIB, size_bytes, digests[1]),
                piece(0, 3),
            ]
            move = mover.move(pieces)
            await move.wait()
            await move.wait()
            await move.stop()
            for each in pieces:
                assert each.into == whole[each.remote_offset : each.remote_offset + each.into.nbytes]
            joined = bytes(pieces[0].into) + bytes(pieces[1].into)
            assert digests[0].intdigest() == xxhash.xxh3_64(joined).intdigest()
            assert digests[1].intdigest() == xxhash.xxh3_64(pieces[2].into).intdigest()
            await mover.close()

    asyncio.run(main())


def test_shares_keep_what_has_one_digest_together() -> None:
    a, b = xxhash.xxh3_64(), xxhash.xxh3_64()
    pieces = [piece(0, 10, digest) for digest in (a, a, a, b, None, None, None)]
    cut = list(shares(pieces, 20))
    assert [len(share) for share in cut] == [3, 2, 2]
    assert [each for share in cut for each in share] == pieces


def test_a_copy_that_is_stopped_copies_no_further() -> None:
    async def main() -> None:
        arena = np.ones(4 * COPY_STEP_BYTES, np.uint8)
        threads = ThreadPoolExecutor(1)
        gate = threading.Event()
        blocked = threads.submit(gate.wait)
        into = bytearray(len(arena))
        move = CopyMove(arena, [Piece(0, memoryview(into))], threads)
        assert not move.done
        stopping = asyncio.create_task(move.stop())
        await asyncio.sleep(0)
        assert not stopping.done(), "a thread may still write"
        gate.set()
        await stopping
        assert move.done
        assert not any(into)
        with pytest.raises(UnreachableError):
            await move.wait()
        assert blocked.result()
        threads.shutdown()

    asyncio.run(main())


def test_waiting_may_be_given_up_and_taken_up_again() -> None:
    async def main() -> None:
        arena = np.ones(2 * COPY_ON_LOOP_BYTES_MAX, np.uint8)
        threads = ThreadPoolExecutor(1)
        gate = threading.Event()
        threads.submit(gate.wait)
        into = bytearray(len(arena))
        move = CopyMove(arena, [Piece(0, memoryview(into))], threads)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(move.wait(), 0.001)
        gate.set()
        await move.wait()
        assert all(into)
        threads.shutdown()

    asyncio.run(main())


# --- who is let in ---------------------------------------------------------------------------------------------------
def test_the_arena_is_mapped_for_reading_alone() -> None:
    async def main() -> None:
        async with pair() as made:
            mover = await made.mover()
            with pytest.raises(ValueError, match="read-only"):
                mover._arena[0] = 1
            with made.connect() as stranger:
                stranger.send(msgspec.msgpack.encode(Hello(MESH_PROTOCOL_VERSION, INSTANCE, b"s" * 16)))
                stranger.setblocking(False)
                await shm._readable(stranger)
                _, fds, _, _ = socket.recv_fds(stranger, 100, 1)
            with pytest.raises(PermissionError):
                mmap.mmap(fds[0], ARENA_BYTES)
            os.close(fds[0])
            await mover.close()
            await wait_until_async(lambda: sorted(made.gone) == [READER, b"s" * 16], LONG_S, "both are gone")
            assert made.lost == [], "it was not the holder that ended"

    asyncio.run(main())


def test_an_end_without_an_arena_offers_nothing() -> None:
    async def main() -> None:
        async with pair() as made:
            assert made.reader.offer() == b""

    asyncio.run(main())


def test_peers_that_cannot_be_met_are_told_apart() -> None:
    async def main() -> None:
        async with pair() as made:
            with pytest.raises(UnreachableError, match="another host"):
                await made.mover(boot_id="another")
            with pytest.raises(UnreachableError, match="refused"):
                await made.mover(socket_name=b"kvmesh-nobody")
            with pytest.raises(UnreachableError, match="with this process"):
                await made.mover(instance=b"j" * 16)
            with pytest.raises(ProtocolError, match="version 99"):
                await made.mover(version=99)
            with pytest.raises(ProtocolError):
                await made.reader.mover(b"\xc1", "holder:1", READER)
            first = await made.mover()
            with pytest.raises(UnreachableError, match="with this process"):
                await made.mover()  # the name of a reader that is there already
            assert made.counters.malformed == 2
            await first.close()

    asyncio.run(main())


def test_another_user_is_refused_on_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with pair() as made:
            monkeypatch.setattr(os, "geteuid", lambda: 1_000_000)
            with pytest.raises(UnreachableError, match="another user"):
                await made.mover()
            with made.connect() as stranger:
                assert await closed(stranger)
            assert made.counters.refused >= 1
            assert made.gone == []

    asyncio.run(main())


@pytest.mark.parametrize("noise", [b"\xc1", b"x" * 300, msgspec.msgpack.encode(Welcome(MESH_PROTOCOL_VERSION, 5))])
def test_a_stranger_that_talks_nonsense_is_cut_off(noise: bytes) -> None:
    async def main() -> None:
        async with pair() as made:
            with made.connect() as stranger:
                stranger.send(noise)
                assert await closed(stranger)
            assert made.counters.malformed == 1

    asyncio.run(main())


def test_a_stranger_that_says_nothing_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shm, "HANDSHAKE_TIMEOUT_S", 0.02)

    async def main() -> None:
        async with pair() as made:
            with made.connect() as stranger:
                assert await closed(stranger)

    asyncio.run(main())


def test_more_readers_than_the_bound_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert SHM_PEERS_MAX > 2
    monkeypatch.setattr(shm, "SHM_PEERS_MAX", 2)

    async def main() -> None:
        async with pair() as made:
            movers = [await made.mover(bytes([number]) * 16) for number in range(2)]
            with pytest.raises(UnreachableError):
                await made.mover(b"\x09" * 16)
            await movers[0].close()
            await wait_until_async(lambda: made.gone, LONG_S, "one is gone")
            movers[0] = await made.mover(b"\x09" * 16)
            for mover in movers:
                await mover.close()

    asyncio.run(main())


@pytest.mark.parametrize("how", ["unsealed", "size", "pipe"])
def test_memory_that_could_be_taken_away_is_not_mapped(how: str) -> None:
    if how == "pipe":
        fd, other = os.pipe()
        os.close(other)
    else:
        fd = os.memfd_create("test", os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, 4096)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK if how == "size" else fcntl.F_SEAL_GROW)
    try:
        with pytest.raises(ProtocolError):
            shm._map(fd, 8192 if how == "size" else 4096)
    finally:
        os.close(fd)


# --- the end of either ------------------------------------------------------------------------------------------------
def test_a_holder_that_closes_stops_copies_and_is_told_of() -> None:
    async def main() -> None:
        async with pair() as made:
            gate = threading.Event()
            for _ in range(2):
                made.threads.submit(gate.wait)
            mover = await made.mover()
            move = mover.move([piece(0, MIB)])
            await made.holder.close()
            await wait_until_async(lambda: made.lost == [mover], LONG_S, "the reader hears of it")
            gate.set()
            with pytest.raises(UnreachableError, match="gone"):
                await move.wait()
            with pytest.raises(UnreachableError, match="gone"):
                mover.move([piece(0, 1)])
            await mover.close()
            assert made.gone == [READER]

    asyncio.run(main())


def test_what_lies_outside_is_not_started() -> None:
    async def main() -> None:
        async with pair() as made:
            mover = await made.mover()
            with pytest.raises(UnreachableError, match="not inside"):
                mover.move([piece(0, 10), piece(ARENA_BYTES - 9, 10)])
            await mover.close()

    asyncio.run(main())


@contextlib.contextmanager
def process(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A process of shm_peer.py, and the line that it printed; killed at the end."""
    command = [sys.executable, "-m", "tests.transport.shm_peer", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        try:
            yield child, child.stdout.readline().strip()
        finally:
            child.kill()


@pytest.mark.slow  # starts a process
@pytest.mark.cluster
def test_a_reader_that_is_killed_gives_its_leases_back_at_once() -> None:
    async def main() -> None:
        source = Chunks()
        source.fill(8, MIB)
        mapped = MappedChunks(source)
        holder = await open_transport("127.0.0.1", 0, mapped, echo, transports=("shm", "zmq"))
        loop = asyncio.get_running_loop()
        with contextlib.ExitStack() as stack:
            child, line = await loop.run_in_executor(None, stack.enter_context, process("reader", holder.address))
            assert (line, source.out) == ("leased", 8)
            child.send_signal(signal.SIGKILL)
            killed_s = loop.time()
            await wait_until_async(lambda: source.out == 0, LONG_S, "every lease is back")
            assert loop.time() - killed_s < LEND_LEASE_S / 2, "by the end of the connection, not by time"
            assert holder.stats().expired == 0
        await holder.close()
        mapped.close()

    asyncio.run(main())


@pytest.mark.slow  # starts a process
@pytest.mark.cluster
def test_a_holder_that_is_killed_ends_the_read() -> None:
    async def main() -> None:
        reader = await open_transport("127.0.0.1", 0, None, echo, transports=("shm", "zmq"))
        loop = asyncio.get_running_loop()
        with contextlib.ExitStack() as stack:
            child, address = await loop.run_in_executor(None, stack.enter_context, process("holder"))
            assert await reader.peers.wait_for_link(address, LONG_S) is not None
            wanted = wants(range(256), 256 * KIB)
            reading = reader.read(address, wanted, deadline_s=1000)
            landings: list[Landing] = []
            while len(landings) < 100:
                landings += await reading.__anext__()
            assert [landing.index for landing in landings] == list(range(len(landings)))
            killed_s = loop.time()
            child.send_signal(signal.SIGKILL)
            landings += [landing async for landed in reading for landing in landed]
            await reading.close()
            assert loop.time() - killed_s < LONG_S
            assert 100 <= len(landings) < 200
            for landing in landings:
                assert landing.outcome is Outcome.LANDED
                assert wanted[landing.index].into == pattern(landing.index, 256 * KIB)
            assert reader.stats().peers_lost == 1
            assert reader.backend(address) == "zmq"
        await reader.close()

    asyncio.run(main())
