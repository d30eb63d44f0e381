"""Small reads: what the bulk thread does, done by the loop itself, over connections of its own.

A read of at most `SMALL_READ_BYTES_MAX` is over in less time than it takes to wake a thread and to be woken by it, and
it does not wait behind a large one. Everything else is the same code (zmq_links.py, zmq_reads.py). Runs on the loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections import deque
from collections.abc import Callable

from .counters import Counters
from .limits import READ_WINDOW_BYTES
from .zmq_links import Link, Links
from .zmq_names import Names
from .zmq_reads import Active, BulkRead, Reads

log = logging.getLogger(__name__)


class SmallReads:
    """All small reads of one transport."""

    def __init__(self, counters: Counters) -> None:
        self._loop = asyncio.get_running_loop()
        self._closed = False
        self._news: deque[Callable[[], None]] = deque()
        self._links: Links[Active] = Links(Names(self._tell).look_up)
        self._reads = Reads(self._links, counters, self._news.append, (), READ_WINDOW_BYTES)
        self._unfinished: list[Link[Active]] = []
        self._timer: asyncio.TimerHandle | None = None
        self._loop.add_reader(self._links.fileno(), self._turn)

    def start(self, read: BulkRead) -> None:
        """Begin. Whatever happens, `read.on_ended` is called in the end, and not in here."""
        if self._closed:
            self._loop.call_soon(read.on_ended)
            return
        self._reads.start(read)
        self._arm()

    def cancel(self, read: BulkRead) -> None:
        """End the read, if it has not ended: `read.on_ended` follows."""
        self._reads.end(read, tell_peer=True)
        self._arm()

    def close(self) -> None:
        """End every read, and close the connections."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        self._loop.remove_reader(self._links.fileno())
        self._reads.end_all()
        self._links.shut()
        self._hear()

    def _tell(self, call: Callable[[], None]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(self._told, call)

    def _told(self, call: Callable[[], None]) -> None:
        if not self._closed:
            call()
            self._arm()

    def _turn(self) -> None:
        if self._closed:
            return
        readable = dict.fromkeys((*self._unfinished, *self._links.wait(0.0)))
        self._unfinished = [link for link in readable if self._receive(link)]
        if self._unfinished:
            self._loop.call_soon(self._turn)
        for link in self._links.look_over():
            self._reads.lose(link)
        self._hear()
        self._arm()

    def _receive(self, link: Link[Active]) -> bool:
        try:
            return self._reads.receive(link)
        except Exception:
            log.exception("reads failed by an error of our own")
            self._reads.lose(link)
            return False

    def _arm(self) -> None:
        """See to it that there is a turn when something is due, and when there are news."""
        if self._news:
            self._loop.call_soon(self._hear)
        due_s = self._links.due_s
        if self._timer is not None and due_s < self._timer.when():
            self._timer.cancel()
            self._timer = None
        if self._timer is None and due_s < math.inf:
            self._timer = self._loop.call_at(due_s, self._tick)

    def _tick(self) -> None:
        self._timer = None
        self._turn()

    def _hear(self) -> None:
        for _ in range(len(self._news)):
            self._news.popleft()()
