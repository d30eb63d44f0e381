"""The transport within one process: a network of names, for tests and simulations of what runs above a transport.

It keeps every rule of interface.py: bytes are copied a frame at a time with a turn of the loop in between, checksums
are verified, loans are counted, bounds are the same. A whole chunk is verified where it is read, and a part of one
where it is held, before the part is taken; either way a wrong one is told to the holder's source. Both ends of a read
are one task, so a holder keeps nothing beyond the reader's deadline. It adds what a test wants to do to a network, on
`MemoryNetwork`:

| call | as if |
|---|---|
| `stop(name)` | the process was killed: nobody listens there, reads from it end, its own end too |
| `stall(name)`, `resume(name)` | SIGSTOP, SIGCONT: nothing is refused and nothing answers |
| `cut(a, b)`, `heal(a, b)` | a partition: no byte passes between the two, and neither is told |

Given the same calls in the same order, all happens in the same order: there is no clock but the loop's. Runs on one
loop.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import AsyncIterator, Sequence

import numpy as np

from .checksum import checksum
from .counters import Counters, total
from .errors import KVMeshError, ProtocolError, SettingsError, UnreachableError
from .interface import CallHandler, ChunkSource, Landing, Loan, Outcome, TransportStats, Want
from .landings import LandingStream, check_wants
from .limits import CALLS_SERVED_MAX, FRAME_BYTES_DEFAULT, MESSAGE_BYTES_MAX, READS_SERVED_MAX
from .loans import lend, suspect
from .slices import taken

log = logging.getLogger(__name__)


class MemoryNetwork:
    """Where memory transports find each other."""

    def __init__(self) -> None:
        self._ends: dict[str, MemoryTransport] = {}
        self._stalled: set[str] = set()
        self._cut: set[frozenset[str]] = set()
        self._changed = asyncio.Event()

    def open(self, name: str, source: ChunkSource | None, handler: CallHandler, *, port: int = 1) -> MemoryTransport:
        """A transport at the address ``NAME:PORT``. Raises `SettingsError` when another one has it."""
        address = f"{name}:{port}"
        if address in self._ends:
            raise SettingsError(f"port {port} on {name} is in use: another transport of this network has it")
        self._ends[address] = MemoryTransport(self, name, address, source, handler)
        return self._ends[address]

    async def stop(self, name: str) -> None:
        """Kill every transport of `name`: it says goodbye to nobody."""
        for transport in [end for end in self._ends.values() if end.name == name]:
            await transport.close()

    def stall(self, name: str) -> None:
        """Let nothing to and from `name` go on until `resume`."""
        self._stalled.add(name)

    def resume(self, name: str) -> None:
        """End `stall`: what waited goes on."""
        self._stalled.discard(name)
        self._wake()

    def cut(self, a: str, b: str) -> None:
        """Let no byte pass between `a` and `b` until `heal`."""
        self._cut.add(frozenset((a, b)))

    def heal(self, a: str, b: str) -> None:
        """End `cut`: what waited goes on."""
        self._cut.discard(frozenset((a, b)))
        self._wake()

    async def reach(self, caller: MemoryTransport, address: str) -> MemoryTransport:
        """The transport at `address`, as soon as bytes pass between the two; `UnreachableError` when there is none."""
        while True:
            peer = self._ends.get(address)
            if peer is None:
                raise UnreachableError(f"nothing listens at {address}")
            blocked = {caller.name, peer.name} & self._stalled or frozenset((caller.name, peer.name)) in self._cut
            if not blocked:
                return peer
            await self._changed.wait()

    def leave(self, transport: MemoryTransport) -> None:
        """The transport is closed: nobody finds it any more."""
        if self._ends.get(transport.address) is transport:
            del self._ends[transport.address]
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


class MemoryTransport:
    """One end on a `MemoryNetwork`."""

    def __init__(
        self, network: MemoryNetwork, name: str, address: str, source: ChunkSource | None, handler: CallHandler
    ) -> None:
        self.name = name
        self._address = address
        self._network = network
        self._source = source
        self._handler = handler
        self.counters = Counters()
        self._closed = False
        self._answering: set[asyncio.Task[bytes | ProtocolError]] = set()
        self._calling: set[asyncio.Task[bytes]] = set()
        self._readings: set[MemoryReading] = set()
        self._served: set[MemoryReading] = set()

    @property
    def address(self) -> str:
        """``NAME:PORT``."""
        return self._address

    async def call(self, address: str, request: bytes, *, timeout_s: float) -> bytes:
        """As `Transport.call`."""
        if len(request) > MESSAGE_BYTES_MAX:
            raise ProtocolError(f"a request of {len(request)} bytes: at most {MESSAGE_BYTES_MAX}")
        if self._closed:
            raise UnreachableError("this transport is closed")
        task = asyncio.create_task(self._call(address, bytes(request)))
        self._calling.add(task)
        try:
            done, _ = await asyncio.wait([task], timeout=timeout_s)
            if not done:
                raise UnreachableError(f"{address} did not answer within {timeout_s:g} s")
            if task.cancelled():
                raise UnreachableError("this transport is closed")
            return task.result()
        finally:
            self._calling.discard(task)
            if not task.cancel() and not task.cancelled():
                task.exception()  # looked at, even when whoever called was cancelled meanwhile

    async def _call(self, address: str, request: bytes) -> bytes:
        peer = await self._network.reach(self, address)
        answering = peer.answer(request)
        try:
            await asyncio.wait([answering])
        finally:
            answering.cancel()
        await self._network.reach(self, address)  # the answer has to come back
        if answering.cancelled():
            raise UnreachableError(f"{address} went away")
        answer = answering.result()
        if isinstance(answer, ProtocolError):
            raise answer
        return answer

    def answer(self, request: bytes) -> asyncio.Task[bytes | ProtocolError]:
        """Run the handler for a peer. For the other end's use."""
        if len(self._answering) >= CALLS_SERVED_MAX:
            self.counters.refused += 1
            raise ProtocolError(f"{self.address} refused: too many calls at once")
        task = asyncio.create_task(self._answer(request))
        self._answering.add(task)
        task.add_done_callback(self._answering.discard)
        return task

    async def _answer(self, request: bytes) -> bytes | ProtocolError:
        try:
            answer = await self._handler(request)
        except KVMeshError as error:
            return ProtocolError(f"{self.address} refused: {error}")
        except Exception:
            log.exception("the handler of calls failed")
        else:
            if len(answer) <= MESSAGE_BYTES_MAX:
                return answer
            log.error("an answer of %d bytes is longer than %d", len(answer), MESSAGE_BYTES_MAX)
        return ProtocolError(f"{self.address} refused: internal error")

    def read(self, address: str, wants: Sequence[Want], *, deadline_s: float) -> MemoryReading:
        """As `Transport.read`."""
        check_wants(wants)
        reading = MemoryReading(self, self._network, address, wants, deadline_s)
        if self._closed:
            reading.lose()
        self._readings.add(reading)
        reading.task.add_done_callback(lambda _: self._readings.discard(reading))
        return reading

    def serve(self, reading: MemoryReading) -> bool:
        """Whether this node takes one more read. For the other end's use."""
        if len(self._served) >= READS_SERVED_MAX:
            self.counters.refused += 1
            return False
        self._served.add(reading)
        reading.task.add_done_callback(lambda _: self._served.discard(reading))
        return True

    def lend(self, key: bytes) -> Loan | None:
        """The chunk, for a reading of the other end."""
        return lend(self._source, key)

    def suspect(self, key: bytes) -> None:
        """A chunk of this node is not what was put. For the other end's use."""
        suspect(self._source, key)

    def backend(self, address: str) -> str:
        """As `Transport.backend`."""
        return "memory"

    def stats(self) -> TransportStats:
        """As `Transport.stats`."""
        return total([self.counters])

    async def close(self) -> None:
        """As `Transport.close`."""
        self._closed = True
        self._network.leave(self)
        for reading in [*self._readings, *self._served]:
            reading.lose()
        tasks = {*self._answering, *self._calling, *(reading.task for reading in (*self._readings, *self._served))}
        for task in (*self._answering, *self._calling):
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)


class MemoryReading:
    """A read under way: one task that copies from the holder's loans."""

    def __init__(
        self, reader: MemoryTransport, network: MemoryNetwork, address: str, wants: Sequence[Want], deadline_s: float
    ) -> None:
        self._reader = reader
        self._counters = reader.counters
        self._network = network
        self._address = address
        self._stream = LandingStream(len(wants), deadline_s, self._stop)
        self.task = asyncio.create_task(self._run(list(wants)))

    def __aiter__(self) -> AsyncIterator[list[Landing]]:
        return self

    async def __anext__(self) -> list[Landing]:
        """As `Reading.__anext__`."""
        return await self._stream.next()

    async def close(self) -> None:
        """As `Reading.close`."""
        self._stream.discard()
        if not self.task.done():
            await asyncio.wait([self.task])

    def lose(self) -> None:
        """One of the two ends is gone."""
        if not self._stream.ended:
            self._counters.peers_lost += 1
            self._stream.end()

    def _stop(self) -> None:
        self.task.cancel()

    async def _run(self, wants: list[Want]) -> None:
        try:
            peer = await self._network.reach(self._reader, self._address)
            if peer.serve(self):
                for key, group in itertools.groupby(enumerate(wants), lambda numbered: numbered[1].key):
                    await self._network.reach(self._reader, self._address)
                    await self._read_chunk(peer, key, list(group))
        except UnreachableError:
            self.lose()
        self._stream.end()

    async def _read_chunk(self, peer: MemoryTransport, key: bytes, wants: Sequence[tuple[int, Want]]) -> None:
        loan = peer.lend(key)
        if loan is None:
            for counters in (peer.counters, self._counters):
                counters.not_held += len(wants)
            self._stream.put([Landing(index, Outcome.NOT_HELD, 0) for index, _ in wants])
            return
        try:
            sound = all(want.part is None for _, want in wants) or checksum(loan.buffer) == loan.checksum
            if not sound:
                peer.counters.corrupt += 1
                peer.suspect(key)
            for index, want in wants:
                self._stream.put([await self._copy(peer, loan, sound, index, want)])
        finally:
            loan.release()

    async def _copy(self, peer: MemoryTransport, loan: Loan, sound: bool, index: int, want: Want) -> Landing:
        if loan.buffer.nbytes != want.whole_bytes:
            return Landing(index, Outcome.WRONG_SIZE, loan.checksum)
        if not sound:
            self._counters.corrupt += 1
            return Landing(index, Outcome.CORRUPT, 0)
        origin = loan.buffer if want.part is None else taken(loan.buffer, want.part)
        expected = loan.checksum if want.part is None else checksum(origin)
        for start in range(0, want.into.nbytes, FRAME_BYTES_DEFAULT):
            _copy_frame(want.into, origin, start)
            await asyncio.sleep(0)
            await self._network.reach(self._reader, self._address)
        peer.counters.chunks_served += 1
        peer.counters.bytes_served += want.into.nbytes
        if checksum(want.into) != expected:
            self._counters.corrupt += 1
            peer.suspect(want.key)
            return Landing(index, Outcome.CORRUPT, expected)
        self._counters.chunks_read += 1
        self._counters.bytes_read += want.into.nbytes
        return Landing(index, Outcome.LANDED, expected)


def _copy_frame(into: memoryview, origin: memoryview, start: int) -> None:
    frame = slice(start, start + FRAME_BYTES_DEFAULT)
    np.copyto(np.frombuffer(into, np.uint8)[frame], np.frombuffer(origin, np.uint8)[frame])
