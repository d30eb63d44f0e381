"""The transport of a node: calls over ``zmq``, and each read by the best backend that both ends have.

    call ────────────────────────────────▶ zmq
    read ──▶ link to the peer? ── shm, nixl ──▶ take (taking.py) ──┐ what has not landed
                     └── none, or not known yet ──▶ zmq ◀──────────┘ when that fails

The order is shm, nixl, zmq: one copy within a host, the network card's own reads, the network. Which of them a peer
can be read by is learned beside its first read (peers.py). That read does not wait when it is small, and waits for some
milliseconds when it is large. A backend that fails is left out for a while, and the same read goes on by the next.

Calls that begin with ``T`` are the transport's own: offers and leases (lending_messages.py). Runs on the loop; copies
and checksums have threads of their own.
"""

from __future__ import annotations

import asyncio
import importlib
import logging
import os
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from .counters import Counters, total
from .errors import PeerError, SettingsError, UnreachableError
from .interface import CallHandler, ChunkSource, Landing, Reading, TransportStats, Want
from .landings import LandingStream, check_wants
from .lending_messages import CALL_PREFIX
from .lending_serve import LendingServer
from .limits import COPY_THREADS, INSTANCE_BYTES, LINKS_PER_READ_MAX, OFFER_WAIT_BYTES_MIN, OFFER_WAIT_S
from .onesided import OneSidedEnd
from .peers import NO_LINK, Peers
from .returning import Returns
from .shm import ShmEnd
from .taking import Link, Tools, take, takeable, to_the_end
from .zmq import ZmqTransport, open_zmq

log = logging.getLogger(__name__)

BACKENDS = ("shm", "nixl", "zmq")
"""The best first."""


async def open_transport(
    host: str,
    port: int,
    source: ChunkSource | None,
    handler: CallHandler,
    *,
    transports: Sequence[str] = BACKENDS,
) -> MeshTransport:
    """A transport that listens on `port` of `host` (0: any free port), and reads by those backends of `transports` that
    this process has. Without ``zmq`` in it, a peer that has none of the others is not read at all; calls go by it all
    the same. Raises `SettingsError` when it cannot listen, and for a name that is none of `BACKENDS`."""
    unknown = [name for name in transports if name not in BACKENDS]
    if unknown or not transports:
        raise SettingsError(f"--transports {','.join(transports)}: use one or more of {', '.join(BACKENDS)}")
    instance = os.urandom(INSTANCE_BYTES)
    threads = ThreadPoolExecutor(COPY_THREADS, "kvmesh-copy")
    counters = Counters()
    verifying = ThreadPoolExecutor(COPY_THREADS, "kvmesh-verify")  # for peers: our own copies do not wait for that
    lending = LendingServer(source, instance, verifying, counters)

    async def handle(request: bytes) -> bytes:
        return await (lending.handle(request) if request[:1] == CALL_PREFIX else handler(request))

    try:
        zmq = await open_zmq(host, port, source, handle)
    except BaseException:
        threads.shutdown()
        verifying.shutdown()
        raise
    transport = MeshTransport(zmq, lending, source, instance, Tools(threads, counters, Returns()), transports)
    try:
        await transport.open_nixl(host)
    except BaseException:
        await transport.close()
        raise
    return transport


class MeshTransport:
    """One node's end. Make it with `open_transport`."""

    def __init__(
        self,
        zmq: ZmqTransport,
        lending: LendingServer,
        source: ChunkSource | None,
        instance: bytes,
        tools: Tools,
        transports: Sequence[str],
    ) -> None:
        self._zmq = zmq
        self._lending = lending
        self._tools = tools
        self._by_zmq = zmq if NO_LINK in transports else None
        self._region = source.region if source is not None else None
        self._transports = transports
        self._ends: dict[str, OneSidedEnd] = {}
        if "shm" in transports:
            self._ends["shm"] = ShmEnd(
                self._region,
                instance,
                tools.threads,
                tools.counters,
                on_reader_gone=lending.reader_gone,
                on_holder_gone=lambda mover: self.peers.lost(mover),
            )
        self.peers = Peers(self._ends, self._call, tools)
        self._readings: set[MeshReading] = set()
        self._closing: asyncio.Task[None] | None = None
        lending.offer(self._ends)

    async def open_nixl(self, host: str) -> None:
        """Offer NIXL as well, where its package is installed and works. It moves bytes into the arena alone."""
        if "nixl" not in self._transports or self._region is None:
            return
        nixl = importlib.import_module(".nixl", __package__)
        end: OneSidedEnd | None = await nixl.open_nixl(self._region, host)
        if end is not None:
            self._ends["nixl"] = end

    @property
    def address(self) -> str:
        """``HOST:PORT``, with brackets around an IPv6 host."""
        return self._zmq.address

    async def call(self, address: str, request: bytes, *, timeout_s: float) -> bytes:
        """As `Transport.call`."""
        return await self._call(address, request, timeout_s)

    def read(self, address: str, wants: Sequence[Want], *, deadline_s: float) -> Reading:
        """As `Transport.read`."""
        check_wants(wants)
        if self._closing is not None:
            return self._zmq.read(address, wants, deadline_s=deadline_s)
        link, settled = self.peers.link(address)
        if link is None and self._by_zmq is not None and (settled or not _worth_waiting(wants)):
            return self._by_zmq.read(address, wants, deadline_s=deadline_s)
        reading = MeshReading(address, wants, deadline_s, self.peers, self._by_zmq, self._tools)
        self._readings.add(reading)
        reading.task.add_done_callback(lambda _: self._readings.discard(reading))
        return reading

    def backend(self, address: str) -> str:
        """As `Transport.backend`."""
        return self.peers.backend(address)

    def stats(self) -> TransportStats:
        """As `Transport.stats`."""
        return total([self._zmq.stats(), self._tools.counters])

    async def close(self) -> None:
        """As `Transport.close`."""
        if self._closing is None:
            self._closing = asyncio.create_task(self._close())
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        self._lending.close()  # at once: nobody may keep a chunk of an arena that is about to go
        for reading in list(self._readings):
            reading.end()
        if self._readings:
            await asyncio.wait([reading.task for reading in self._readings])
        await self._tools.returns.close()
        await self.peers.close()
        for end in self._ends.values():
            await end.close()
        await self._zmq.close()
        self._tools.threads.shutdown()
        self._lending.threads.shutdown()

    async def _call(self, address: str, request: bytes, timeout_s: float) -> bytes:
        try:
            return await self._zmq.call(address, request, timeout_s=timeout_s)
        except UnreachableError:
            self.peers.stale(address)
            raise


class MeshReading:
    """A read under way, by one backend after the other until all has landed or none is left."""

    def __init__(
        self,
        address: str,
        wants: Sequence[Want],
        deadline_s: float,
        peers: Peers,
        by_zmq: ZmqTransport | None,
        tools: Tools,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._address = address
        self._peers = peers
        self._by_zmq = by_zmq
        self._counters = tools.counters
        self._ends_s = self._loop.time() + deadline_s
        self._left = dict(enumerate(wants))
        self._stream = LandingStream(len(wants), deadline_s, self._stop)
        self.task = asyncio.create_task(self._run())

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

    def end(self) -> None:
        """The transport closes: nothing more lands."""
        self._stream.end()

    def _stop(self) -> None:
        """The stream has ended. By its last landing: then the task is about to end by itself."""
        if self._left:
            self.task.cancel()

    async def _run(self) -> None:
        try:
            await self._take()
            if self._left and self._by_zmq is not None:
                await self._read_by(self._by_zmq)
            elif self._left:
                self._counters.peers_lost += 1
        except Exception:
            log.exception("a read of %s failed", self._address)
        finally:
            self._stream.end()

    async def _take(self) -> None:
        """Take what can be taken. A failure leaves a backend out, unless the holder claims to be another process by
        then."""
        last: Link | None = None
        wait_s = OFFER_WAIT_S if self._by_zmq is not None else self._ends_s - self._loop.time()
        for _ in range(LINKS_PER_READ_MAX):
            link = await self._peers.wait_for_link(self._address, wait_s)
            if link is None or link is last:
                return
            try:
                await take(link, takeable(self._left.items()), self._ends_s, self._land)
            except PeerError as error:
                log.info("reading from %s by %s failed: %s", self._address, link.backend, error)
                self._counters.fallbacks += 1
                self._peers.failed(self._address, link)
            else:
                return
            last = link

    async def _read_by(self, zmq: ZmqTransport) -> None:
        indices, wants = list(self._left), list(self._left.values())
        reading = zmq.read(self._address, wants, deadline_s=self._ends_s - self._loop.time())
        try:
            async for landings in reading:
                self._land([Landing(indices[landing.index], landing.outcome, landing.checksum) for landing in landings])
        finally:
            await to_the_end(reading.close())

    def _land(self, landings: Sequence[Landing]) -> None:
        for landing in landings:
            del self._left[landing.index]
        self._stream.put(landings)


def _worth_waiting(wants: Sequence[Want]) -> bool:
    return sum(want.into.nbytes for want in wants) >= OFFER_WAIT_BYTES_MIN
