"""The thread that receives bulk: it copies what comes from peers to where it belongs, and grants credit.

The loop tells it what to do through `start`, `cancel` and `stop`: commands in a queue, and an eventfd that wakes the
thread out of its poll. The thread tells the loop what happened in batches, through `call_soon_threadsafe`. Nothing
else is shared, except the buffers:

    the thread may write to a read's buffers from `start` until it has said "ended": by itself (the last chunk, a lost
    connection, a malformed message), or in answer to `cancel`. Frames that come later find no read, and are dropped.

A lost connection ends its reads. Which connections there are is `Links`' business, and what fits together the
`Assembly`'s.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import zmq

from .assembly import Assembly
from .counters import Counters
from .errors import UnreachableError
from .frames import (
    Bulk,
    Cancel,
    ForeignVersionError,
    FrameError,
    Grant,
    Message,
    Read,
    Refusal,
    cost,
    encode,
    encode_wanted,
    to_reader,
)
from .interface import Landing, Outcome, Want
from .limits import MESH_PROTOCOL_VERSION, READ_WINDOW_BYTES, RECEIVE_QUEUE_MESSAGES
from .zmq_links import Link, Links
from .zmq_sockets import Sockets

log = logging.getLogger(__name__)

MESSAGES_PER_TURN: Final = 8
"""Messages of one connection before the others, and the loop's commands, get their turn."""
GRANTS_PER_WINDOW: Final = 4


@dataclass(slots=True, eq=False)
class BulkRead:
    """One read, as it goes to the thread. Both functions are called on the loop."""

    address: str
    wants: Sequence[Want]
    on_landed: Callable[[list[Landing]], None]
    on_ended: Callable[[], None]
    """The thread writes to no buffer of the read any more. Called exactly once."""


@dataclass(slots=True, eq=False)
class _Active:
    """One read under way."""

    read: BulkRead
    id: int
    link: Link[_Active]
    assembly: Assembly
    consumed_bytes: int = 0
    """Of the credit, since the last grant."""


class BulkThread:
    """The thread, and the loop's way to it."""

    def __init__(self, sockets: Sockets, counters: Counters, window_bytes: int = READ_WINDOW_BYTES) -> None:
        self._loop = asyncio.get_running_loop()
        self._sockets = sockets
        self._counters = counters
        self._window_bytes = window_bytes
        self._commands: deque[Callable[[], None]] = deque()
        self._lock = threading.Lock()  # a command is either seen by the thread, or refused because it has ended
        self._open = True
        self._stopping = False
        self._may_go = threading.Event()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._ended = self._loop.create_future()
        self._news: list[Callable[[], None]] = []
        # From here on the thread's own.
        self._links: Links[_Active] = Links(sockets, self._wake)
        self._active: dict[BulkRead, _Active] = {}
        self._ids = itertools.count(1)
        self._thread = threading.Thread(target=self._run, name="kvmesh-bulk", daemon=True)
        self._thread.start()

    # --- called on the loop ----------------------------------------------------------------------------------------
    def start(self, read: BulkRead) -> None:
        """Begin. Whatever happens, `read.on_ended` is called in the end."""
        if not self._tell(lambda: self._start(read)):
            self._loop.call_soon(read.on_ended)

    def cancel(self, read: BulkRead) -> None:
        """End the read, if it has not ended: `read.on_ended` follows."""
        self._tell(lambda: self._end(read, tell_peer=True))

    async def stop(self) -> None:
        """End every read, close the connections and then the sockets' context; returns when the thread has gone.

        The loop's sockets must be closed before.
        """
        self._may_go.set()
        self._tell(self._stop)
        await asyncio.shield(self._ended)
        self._thread.join()  # it has said its last word: this does not wait

    def _tell(self, command: Callable[[], None]) -> bool:
        with self._lock:
            if self._open:
                self._commands.append(command)
                os.eventfd_write(self._wake, 1)
            return self._open

    # --- the thread ------------------------------------------------------------------------------------------------
    def _run(self) -> None:
        try:
            while not self._stopping:
                self._turn()
        except Exception:
            log.exception("the bulk thread failed: this node reads nothing from peers any more")
        finally:
            self._finish()

    def _turn(self) -> None:
        readable, lost = self._links.wait()
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake)
        while self._commands:
            self._commands.popleft()()
        for link in readable:
            self._receive(link, MESSAGES_PER_TURN)
        unready, idle = self._links.overdue()
        for link in (*lost, *unready):
            self._lose(link)
        for link in idle:
            self._links.close(link)
        self._report()

    def _finish(self) -> None:
        with self._lock:
            self._open = False
        while self._commands:
            self._commands.popleft()()
        for read in list(self._active):
            self._end(read)
        for link in list(self._links):
            self._links.close(link)
        os.close(self._wake)
        self._report()
        self._may_go.wait()  # after a failure: the loop's sockets still need the context
        self._sockets.close()
        self._news.append(lambda: self._ended.set_result(None))
        self._report()

    def _report(self) -> None:
        news, self._news = self._news, []
        if news:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                self._loop.call_soon_threadsafe(_run_all, news)

    def _stop(self) -> None:
        self._stopping = True

    # --- reads -----------------------------------------------------------------------------------------------------
    def _start(self, read: BulkRead) -> None:
        try:
            link = self._links.to(read.address)
        except UnreachableError:
            self._counters.peers_lost += 1
            self._news.append(read.on_ended)
            return
        active = _Active(read, next(self._ids), link, Assembly(read.wants))
        self._active[read] = link.reads[active.id] = active
        message = Read(MESH_PROTOCOL_VERSION, active.id, self._window_bytes)
        if not self._send(link, message, encode_wanted(read.wants)):
            self._counters.refused += 1
            self._end(read)

    def _end(self, read: BulkRead, *, tell_peer: bool = False) -> None:
        """Forget the read. Nothing is written to its buffers from here on."""
        active = self._active.pop(read, None)
        if active is None:
            return  # it has ended by itself, and the loop was told
        del active.link.reads[active.id]
        active.link.used_s = time.monotonic()
        if tell_peer:
            self._send(active.link, Cancel(MESH_PROTOCOL_VERSION, active.id))
        self._news.append(read.on_ended)

    def _receive(self, link: Link[_Active], messages_max: int) -> None:
        for _ in range(messages_max):
            if self._commands or link.socket.closed:
                return
            try:
                frames = link.socket.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            self._accept(link, [frame.buffer for frame in frames])

    def _lose(self, link: Link[_Active]) -> None:
        """The connection will carry nothing more; what has come over it still counts."""
        if not link.socket.closed:
            self._receive(link, RECEIVE_QUEUE_MESSAGES)
        if not link.socket.closed:
            self._close(link)

    def _close(self, link: Link[_Active]) -> None:
        self._counters.peers_lost += len(link.reads)
        for active in list(link.reads.values()):
            self._end(active.read)
        self._links.close(link)

    def _send(self, link: Link[_Active], message: Message, *payload: bytes) -> bool:
        """Whether the connection took the message."""
        try:
            link.socket.send_multipart([encode(message), *payload], zmq.NOBLOCK)
        except zmq.ZMQError:
            return False
        return True

    def _accept(self, link: Link[_Active], parts: list[memoryview]) -> None:
        try:
            message = to_reader(parts)
        except ForeignVersionError:
            self._counters.malformed += 1
            self._close(link)
            return
        except FrameError:
            self._counters.malformed += 1
            return
        active = link.reads.get(message.id)
        if active is None:
            return  # `Alive`, or a late message of a read that has ended
        if isinstance(message, Bulk):
            self._take(active, message, parts[1] if len(parts) > 1 else memoryview(b""))
        elif isinstance(message, Refusal):
            self._counters.refused += 1
            log.warning("%s ended a read: %s", link.address, message.text)
            self._end(active.read)

    def _take(self, active: _Active, message: Bulk, payload: memoryview) -> None:
        try:
            landings = active.assembly.accept(message.items, payload)
        except FrameError as error:
            self._counters.malformed += 1
            log.warning("%s broke a read: %s", active.link.address, error)
            self._end(active.read, tell_peer=True)
            return
        if landings:
            self._count(active, landings)
            self._news.append(lambda: active.read.on_landed(landings))
        if active.assembly.complete:
            self._end(active.read)
            return
        active.consumed_bytes += cost(message.items)
        if active.consumed_bytes * GRANTS_PER_WINDOW >= self._window_bytes:
            grant = Grant(MESH_PROTOCOL_VERSION, active.id, active.consumed_bytes)
            if self._send(active.link, grant):
                active.consumed_bytes = 0

    def _count(self, active: _Active, landings: list[Landing]) -> None:
        for landing in landings:
            match landing.outcome:
                case Outcome.LANDED:
                    self._counters.chunks_read += 1
                    self._counters.bytes_read += active.read.wants[landing.index].into.nbytes
                case Outcome.NOT_HELD:
                    self._counters.not_held += 1
                case Outcome.CORRUPT:
                    self._counters.corrupt += 1


def _run_all(news: list[Callable[[], None]]) -> None:
    for tell in news:
        tell()
