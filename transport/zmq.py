"""The transport over ZeroMQ: one TCP port that serves peers, and connections to peers for control and for bulk.

    this node                                          a peer
    Caller      (loop)    libzmq ── calls, answers ──── Port (loop, a thread that sends)  Server: handler, Lender
    SmallReads  (loop)    ZMTP   ── small reads ───────   "
    BulkThread  (thread)  ZMTP   ── reads, credit, bulk   "

Control and bulk have connections of their own, so a call never waits behind a chunk. Port and readers speak ZMTP over
plain sockets: so bytes go straight from the arena, and straight into the buffers that wait for them. The loop decides
and counts. For now peers are not authenticated (mechanism
NULL), so a transport listens on loopback only. This module puts the parts together; what each does is in its own
file.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence

from .counters import Counters, total
from .interface import CallHandler, ChunkSource, Landing, TransportStats, Want
from .landings import LandingStream, check_wants
from .limits import LOANS_RETURN_S, SMALL_READ_BYTES_MAX, SMALL_READ_CHUNKS_MAX
from .malloc import keep_freed_pages
from .zmq_bulk import BulkThread
from .zmq_calls import Caller
from .zmq_port import listen
from .zmq_reads import BulkRead
from .zmq_serve import Server
from .zmq_small import SmallReads
from .zmq_sockets import Sockets

log = logging.getLogger(__name__)


async def open_zmq(host: str, port: int, source: ChunkSource | None, handler: CallHandler) -> ZmqTransport:
    """A transport that listens on `port` of `host` (0: any free port). Raises `SettingsError` when it cannot."""
    keep_freed_pages()
    return ZmqTransport(host, port, source, handler)


class ZmqTransport:
    """One node's end. Make it with `open_zmq`, on the loop that it is to run on."""

    def __init__(self, host: str, port: int, source: ChunkSource | None, handler: CallHandler) -> None:
        listening, self._address = listen(host, port)
        sockets = Sockets()
        self._on_loop, self._in_thread = Counters(), Counters()
        self._bulk = BulkThread(self._in_thread, sockets.close)  # it may block: not on the loop
        self._caller = Caller(sockets, self._on_loop)
        self._small = SmallReads(self._on_loop)
        self._server = Server(listening, source, handler, self._on_loop)  # last: from here on peers are heard
        self._closing: asyncio.Task[None] | None = None

    @property
    def address(self) -> str:
        """``HOST:PORT``, with brackets around an IPv6 host."""
        return self._address

    async def call(self, address: str, request: bytes, *, timeout_s: float) -> bytes:
        """As `Transport.call`."""
        return await self._caller.call(address, request, timeout_s)

    def read(self, address: str, wants: Sequence[Want], *, deadline_s: float) -> ZmqReading:
        """As `Transport.read`."""
        check_wants(wants)
        small = sum(want.into.nbytes for want in wants) <= SMALL_READ_BYTES_MAX and len(wants) <= SMALL_READ_CHUNKS_MAX
        return ZmqReading(self._small if small else self._bulk, address, wants, deadline_s)

    def backend(self, address: str) -> str:
        """As `Transport.backend`."""
        return "zmq"

    def stats(self) -> TransportStats:
        """As `Transport.stats`."""
        return total([self._on_loop, self._in_thread])

    async def close(self) -> None:
        """As `Transport.close`."""
        if self._closing is None:
            self._closing = asyncio.create_task(self._close())
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        self._caller.close()
        await self._server.close()
        self._small.close()
        await self._bulk.stop()  # it ends the context as well, once every socket is closed
        try:
            async with asyncio.timeout(LOANS_RETURN_S):
                await self._server.lender.loans.all_back()
        except TimeoutError:
            log.exception("closed while chunks were still on loan")


class ZmqReading:
    """A read under way: whoever receives fills the stream of landings."""

    def __init__(self, bulk: BulkThread | SmallReads, address: str, wants: Sequence[Want], deadline_s: float) -> None:
        self._bulk = bulk
        self._stream = LandingStream(len(wants), deadline_s, self._stop)
        self._quiet = asyncio.Event()
        self._read = BulkRead(address, tuple(wants), max(0.0, deadline_s) + 1.0, self._stream.put, self._ended)
        if wants:
            bulk.start(self._read)  # it does not call `_ended` in here
        else:
            self._quiet.set()

    def __aiter__(self) -> AsyncIterator[list[Landing]]:
        return self

    async def __anext__(self) -> list[Landing]:
        """As `Reading.__anext__`."""
        return await self._stream.next()

    async def close(self) -> None:
        """As `Reading.close`."""
        self._stream.discard()
        await self._quiet.wait()

    def _ended(self) -> None:
        """Nothing will be written again."""
        self._quiet.set()
        self._stream.end()

    def _stop(self) -> None:
        """The stream has ended: by its last landing, its deadline, or its consumer. With the last landing comes the end
        of the read, in the same batch of news: so the thread is told, and woken, only if it goes on."""
        asyncio.get_running_loop().call_soon(self._cancel)

    def _cancel(self) -> None:
        if not self._quiet.is_set():
            self._bulk.cancel(self._read)
