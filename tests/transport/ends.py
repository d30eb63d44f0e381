"""What the tests of transports share: a source of chunks that counts its loans, and ends of either backend."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import zmq

from kvmesh.transport.backends import MeshTransport, open_transport
from kvmesh.transport.checksum import checksum
from kvmesh.transport.interface import CallHandler, Landing, Outcome, Reading, Region, Slice, Transport, Want
from kvmesh.transport.memory import MemoryNetwork
from kvmesh.transport.zmq import open_zmq

BACKENDS = ("memory", "zmq", "mesh", "shm")
"""`mesh`: all that an agent opens, when the nodes do not know each other yet; `shm`: the same, when they do."""
LONG_S = 20.0
"""A deadline that no test should reach."""


def key(number: int) -> bytes:
    """A key like no other number's."""
    return number.to_bytes(32, "big")


@dataclass
class CountedLoan:
    """A loan that knows whether it is out."""

    source: Chunks
    buffer: memoryview
    checksum: int
    out: bool = True
    offset: int = 0

    def release(self) -> None:
        self.source.out -= self.out
        self.source.peak_out = max(self.source.peak_out, self.source.out)
        self.out = False


@dataclass
class Chunks:
    """A source: chunks by key, and how many are lent."""

    held: dict[bytes, bytearray | memoryview] = field(default_factory=dict)
    sums: dict[bytes, int] = field(default_factory=dict)
    out: int = 0
    lent: int = 0
    peak_out: int = 0
    on_lend: asyncio.Event = field(default_factory=asyncio.Event)
    region: Region | None = None
    suspected: list[bytes] = field(default_factory=list)

    def add(self, number: int, content: bytes) -> None:
        self.held[key(number)] = bytearray(content)
        self.sums[key(number)] = checksum(content)

    def fill(self, count: int, size_bytes: int) -> None:
        for number in range(count):
            self.add(number, pattern(number, size_bytes))

    def suspect(self, key: bytes) -> None:
        self.suspected.append(key)

    def lend(self, key: bytes) -> CountedLoan | None:
        self.on_lend.set()
        if key not in self.held:
            return None
        self.out += 1
        self.lent += 1
        self.peak_out = max(self.peak_out, self.out)
        return CountedLoan(self, memoryview(self.held[key]), self.sums[key], offset=self.offset(key))

    def offset(self, key: bytes) -> int:
        return 0


class ArenaChunks(Chunks):
    """A source whose chunks lie one after the other in one arena."""

    def __init__(self, size_bytes: int) -> None:
        super().__init__()
        self.arena = np.zeros(size_bytes, np.uint8)
        self.region = Region(-1, self.arena.ctypes.data, size_bytes)
        self.used_bytes = 0

    def add(self, number: int, content: bytes) -> None:
        super().add(number, content)
        place = self.arena[self.used_bytes : self.used_bytes + len(content)]
        place[:] = np.frombuffer(content, np.uint8)
        self.held[key(number)] = place.data
        self.used_bytes += len(content)

    def offset(self, key: bytes) -> int:
        assert self.region is not None
        return int(np.frombuffer(self.held[key], np.uint8).ctypes.data) - self.region.address


def pattern(number: int, size_bytes: int) -> bytes:
    """Bytes that differ from chunk to chunk and from place to place."""
    words = np.arange(-(-size_bytes // 8), dtype=np.uint64) * np.uint64(2 * number + 0x9E3779B97F4A7C15)
    return words.tobytes()[:size_bytes]


def wants(numbers: Sequence[int], sizes: int | Sequence[int]) -> list[Want]:
    """One buffer for each number."""
    each = [sizes] * len(numbers) if isinstance(sizes, int) else sizes
    return [
        Want(key(number), memoryview(bytearray(b"\xa5" * size))) for number, size in zip(numbers, each, strict=True)
    ]


def part_of(number: int, chunk_bytes: int, part: Slice) -> Want:
    """A want of a part, with its buffer."""
    return Want(key(number), memoryview(bytearray(b"\xa5" * part.bytes)), part, chunk_bytes)


def bytes_of(chunk: bytes | bytearray | memoryview, part: Slice) -> bytes:
    """What a part of a chunk is, run by run: slow and plain."""
    starts = range(
        part.offset_bytes, part.offset_bytes + part.count * max(part.stride_bytes, 1), part.stride_bytes or 1
    )
    return b"".join(bytes(chunk[start : start + part.run_bytes]) for start in starts[: part.count])


async def collect(reading: Reading) -> dict[int, Landing]:
    """All landings until the read ends, by index; then close."""
    landings = {}
    async for landed in reading:
        assert landed
        for landing in landed:
            assert landing.index not in landings
            landings[landing.index] = landing
    await reading.close()
    return landings


def outcomes(landings: dict[int, Landing]) -> dict[int, Outcome]:
    """Only what became of each."""
    return {index: landing.outcome for index, landing in landings.items()}


class Endless:
    """A handler that never answers, and says when it began and when it was ended."""

    def __init__(self) -> None:
        self.began, self.ended = asyncio.Event(), asyncio.Event()

    async def __call__(self, _: bytes) -> bytes:
        self.began.set()
        try:
            await asyncio.Event().wait()
        finally:
            self.ended.set()
        return b""


async def echo(request: bytes) -> bytes:
    """The simplest handler."""
    return request


class Ends:
    """Opens transports of one backend, and the peers that misbehave."""

    def __init__(self, backend: str) -> None:
        self.backend = backend
        self.network = MemoryNetwork()
        self._stack = contextlib.AsyncExitStack()
        self._count = 0
        self._meshes: list[tuple[MeshTransport, bool]] = []
        """Those that were opened, and whether they lend."""

    async def __aenter__(self) -> Ends:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def open(self, source: Chunks | None = None, handler: CallHandler = echo) -> Transport:
        """A transport that is closed at the end."""
        self._count += 1
        transport: Transport
        if self.backend == "memory":
            transport = self.network.open(f"node{self._count}", source, handler)
        elif self.backend == "zmq":
            transport = await open_zmq("127.0.0.1", 0, source, handler)
        else:
            return await self._open_mesh(source, handler)
        self._stack.push_async_callback(transport.close)
        return transport

    async def _open_mesh(self, source: Chunks | None, handler: CallHandler) -> MeshTransport:
        from tests.transport.arenas import MappedChunks  # it builds on this module

        mapped = None
        if source is not None:
            mapped = MappedChunks(source)
            self._stack.callback(mapped.close)
        opened = await open_transport("127.0.0.1", 0, mapped, handler, transports=("shm", "zmq"))
        self._stack.push_async_callback(opened.close)
        if self.backend == "shm":
            for other, lends in [*self._meshes, (opened, source is not None)]:
                if lends:
                    await opened.peers.wait_for_link(other.address, LONG_S)
                if source is not None and other is not opened:
                    await other.peers.wait_for_link(opened.address, LONG_S)
        self._meshes.append((opened, source is not None))
        return opened

    async def stalled(self) -> str:
        """The address of a peer that accepts everything and answers nothing."""
        if self.backend == "memory":
            transport = await self.open()
            self.network.stall(transport.address.split(":")[0])
            return transport.address
        context = self._stack.enter_context(zmq.Context())
        router = self._stack.enter_context(context.socket(zmq.ROUTER))
        router.linger = 0
        return f"127.0.0.1:{router.bind_to_random_port('tcp://127.0.0.1')}"

    async def nobody(self) -> str:
        """An address where nothing listens."""
        transport = await self.open()
        await transport.close()
        return transport.address


@contextlib.asynccontextmanager
async def two(backend: str, source: Chunks) -> AsyncIterator[tuple[Transport, Transport]]:
    """A holder with `source`, and a reader. At the end every loan is back."""
    async with Ends(backend) as ends:
        yield await ends.open(source), await ends.open()
    assert source.out == 0
