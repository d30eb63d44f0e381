"""A mover that does as it is told, and a reader and a holder in one loop around it, for tests of one-sided reads."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from kvmesh.transport.backends import MeshReading
from kvmesh.transport.counters import Counters
from kvmesh.transport.errors import ProtocolError, UnreachableError
from kvmesh.transport.interface import Want
from kvmesh.transport.lending_serve import LendingServer
from kvmesh.transport.onesided import OneSidedEnd, Piece
from kvmesh.transport.peers import Peers
from kvmesh.transport.returning import Returns
from kvmesh.transport.taking import Tools
from tests.transport.arenas import MappedChunks
from tests.transport.ends import Chunks

ADDRESS = "holder:1"


class FakeMove:
    """Copies when it is let; and when it is told to write late, after it was asked to stop as well."""

    def __init__(self, mover: FakeMover, pieces: Sequence[Piece]) -> None:
        self._mover = mover
        self.pieces = list(pieces)
        self.stopping = asyncio.Event()
        self.stopped = False

    async def wait(self) -> None:
        await self._mover.go.wait()
        if self._mover.fails:
            raise UnreachableError("the fake mover fails")
        self.write()

    async def stop(self) -> None:
        self.stopping.set()
        await self._mover.let_stop.wait()
        self.stopped = True

    def write(self) -> None:
        """All bytes, at once."""
        assert not self.stopped, "it writes to a buffer that is not the reader's any more"
        for piece in self.pieces:
            size_bytes = piece.into.nbytes
            piece.into[:] = self._mover.arena.view(piece.remote_offset, size_bytes)


class FakeMover:
    """A `Mover` of one process. `go`: moves may copy; `let_stop`: a stop may end."""

    hashes = False

    def __init__(self, end: FakeEnd) -> None:
        self.arena = end.source.arena
        self.go, self.let_stop = end.go, end.let_stop
        self._end = end
        self.moves: list[FakeMove] = []
        self.closed = False

    @property
    def fails(self) -> bool:
        return self._end.fails

    def move(self, pieces: Sequence[Piece]) -> FakeMove:
        if self._end.refuses:
            raise UnreachableError("the fake mover does not start")
        self.moves.append(FakeMove(self, pieces))
        return self.moves[-1]

    async def close(self) -> None:
        self.closed = True


class FakeEnd:
    """A `OneSidedEnd`."""

    def __init__(self, source: MappedChunks) -> None:
        self.source = source
        self.go, self.let_stop = asyncio.Event(), asyncio.Event()
        self.go.set()
        self.let_stop.set()
        self.fails = self.refuses = self.unreachable = False
        self.movers: list[FakeMover] = []

    @property
    def moves(self) -> list[FakeMove]:
        """All that were ever started."""
        return [move for mover in self.movers for move in mover.moves]

    def offer(self) -> bytes:
        return b"fake"

    async def mover(self, peer_offer: bytes, peer_address: str, reader: bytes) -> FakeMover:
        if self.unreachable:
            raise UnreachableError("the fake end reaches nobody")
        self.movers.append(FakeMover(self))
        return self.movers[-1]

    async def close(self) -> None:
        pass


class Stage:
    """A holder with `source`, and a reader that has nothing but fake ends, named as the real ones."""

    def __init__(self, source: Chunks, *backends: str) -> None:
        self.source = source
        self.mapped = MappedChunks(source)
        self.counters, self.served = Counters(), Counters()
        threads = ThreadPoolExecutor(1)
        self.tools = Tools(threads, self.counters, Returns())
        self.fakes = {backend: FakeEnd(self.mapped) for backend in backends or ("shm",)}
        self.ends: dict[str, OneSidedEnd] = {**self.fakes}
        self.calls: list[int] = []
        self.unreachable = self.silent = False
        self.instance = b"i" * 16
        self._start_server()
        self.peers = Peers(self.ends, self.call, self.tools)
        self._readings: list[MeshReading] = []

    @property
    def fake(self) -> FakeEnd:
        """The best end."""
        return next(iter(self.fakes.values()))

    def _start_server(self) -> None:
        self.server = LendingServer(self.mapped, self.instance, self.tools.threads, self.served)
        self.server.offer(self.ends)

    def restart(self, instance: bytes = b"j" * 16) -> None:
        """The holder's process starts anew."""
        self.server.close()
        self.instance = instance
        self._start_server()

    async def call(self, address: str, request: bytes, timeout_s: float) -> bytes:
        """As `Transport.call`. Notes the tag of each message."""
        assert address == ADDRESS
        self.calls.append(request[3])
        if self.silent:
            await asyncio.sleep(timeout_s)
        if self.unreachable or self.silent:
            raise UnreachableError("the holder does not answer")
        try:
            return await self.server.handle(request)
        except ProtocolError as error:
            raise ProtocolError(f"refused: {error}") from None

    def read(self, wanted: Sequence[Want], deadline_s: float) -> MeshReading:
        """A read without ``zmq`` to fall back on."""
        self._readings.append(MeshReading(ADDRESS, wanted, deadline_s, self.peers, None, self.tools))
        return self._readings[-1]

    async def __aenter__(self) -> Stage:
        return self

    async def __aexit__(self, *_: object) -> None:
        for reading in self._readings:
            await reading.close()
        await self.tools.returns.close()
        await self.peers.close()
        self.server.close()
        self.tools.threads.shutdown()
        self.mapped.close()
        assert self.source.out == 0
