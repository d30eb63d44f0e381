"""The thread that receives bulk, and the loop's way to it.

The loop tells it what to do through `start`, `cancel` and `stop`: commands in a queue, and an eventfd that wakes the
thread out of its wait. The thread tells the loop what happened through `call_soon_threadsafe`, a batch at a time: what
happens before the loop has taken one batch joins it. Nothing else is shared, except the buffers:

    the thread may write to a read's buffers from `start` until it has said "ended": by itself (the last chunk, a lost
    connection, a malformed message), or in answer to `cancel`. Bytes that come later find no read, and are dropped.

One thread serves all connections: on two cores a second one made reads 3 to 33 % slower, as its Python waits for the
first one's. What the thread does is the business of `Links` (connections) and `Reads` (what comes over them).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Final

from .counters import Counters
from .limits import READ_WINDOW_BYTES
from .zmq_links import Link, Links
from .zmq_names import Names
from .zmq_reads import Active, BulkRead, Reads

log = logging.getLogger(__name__)

REPORT_S: Final = 0.002
"""Landings of a read that goes on are told at most so often, since each time costs the loop a wake-up. Measured with
1 ms: 256 MiB in chunks of 64 KiB cost 15 % less of the CPU, in chunks of 1 MiB 25 %. The end of a read is told at
once."""


class BulkThread:
    """The thread of one transport."""

    def __init__(self, counters: Counters, at_end: Callable[[], None], window_bytes: int = READ_WINDOW_BYTES) -> None:
        """`at_end` is called in the thread when `stop` was called and all else is done; it may block a little."""
        self._loop = asyncio.get_running_loop()
        self._at_end = at_end
        self._commands: deque[Callable[[], None]] = deque()
        self._lock = threading.Lock()  # a command is either seen by the thread, or refused because it has ended
        self._open = True
        self._stopping = False
        self._may_go = threading.Event()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._ended = self._loop.create_future()
        self._news: deque[Callable[[], None]] = deque()
        self._noted = False
        # From here on the thread's own.
        self._report_due_s = 0.0
        self._unfinished: list[Link[Active]] = []
        self._links: Links[Active] = Links(Names(self._tell).look_up, self._wake)
        self._reads = Reads(self._links, counters, self._news.append, self._commands, window_bytes)
        self._thread = threading.Thread(target=self._run, name="kvmesh-bulk", daemon=True)
        self._thread.start()

    # --- called on the loop ----------------------------------------------------------------------------------------
    def start(self, read: BulkRead) -> None:
        """Begin. Whatever happens, `read.on_ended` is called in the end."""
        if not self._tell(lambda: self._reads.start(read)):
            self._loop.call_soon(read.on_ended)

    def cancel(self, read: BulkRead) -> None:
        """End the read, if it has not ended: `read.on_ended` follows."""
        self._tell(lambda: self._reads.end(read, tell_peer=True))

    async def stop(self) -> None:
        """End every read, and close the connections; returns when the thread has gone."""
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

    def _hear(self) -> None:
        self._noted = False
        for _ in range(len(self._news)):  # what comes now has another call of its own
            self._news.popleft()()

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
        due_s = 0.0 if self._unfinished else self._report_due_s if self._news else math.inf
        readable = dict.fromkeys((*self._unfinished, *self._links.wait(due_s)))
        while self._commands:
            self._commands.popleft()()
        self._unfinished = [link for link in readable if self._reads.receive(link)]
        for link in self._links.look_over():
            self._reads.lose(link)
        if self._news and (self._reads.ended or time.monotonic() >= self._report_due_s):
            self._report()

    def _finish(self) -> None:
        with self._lock:
            self._open = False
        while self._commands:
            self._commands.popleft()()
        self._reads.end_all()
        self._links.shut()
        os.close(self._wake)
        self._report()
        self._may_go.wait()  # after a failure: what the loop has still needs what `at_end` ends
        self._at_end()
        self._news.append(lambda: self._ended.set_result(None))
        self._report()

    def _report(self) -> None:
        self._reads.ended = False
        self._report_due_s = time.monotonic() + REPORT_S
        if not self._noted:
            self._noted = True
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                self._loop.call_soon_threadsafe(self._hear)

    def _stop(self) -> None:
        self._stopping = True
