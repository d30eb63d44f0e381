"""Streams within one process: two ends, a buffer in front of each, and the manners of TCP. For `memory`, which knows
who is connected to whom and whether bytes pass."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable

from kvmesh.transport.limits import STREAM_READ_BYTES


class Pair:
    """A stream, with both of its ends."""

    def __init__(self, is_blocked: Callable[[], bool], forget: Callable[[Pair], None]) -> None:
        """`is_blocked` says whether nothing passes now; `wake` says that it may have changed."""
        self.is_blocked = is_blocked
        self.forget = forget
        self.changed = asyncio.Event()
        """Set, and replaced, whenever one of the two may go on."""
        self.ends = (MemoryConnection(self, 0), MemoryConnection(self, 1))

    async def passable(self) -> None:
        """Until bytes pass."""
        while self.is_blocked():
            await self.changed.wait()

    def wake(self) -> None:
        """Something changed."""
        self.changed.set()
        self.changed = asyncio.Event()


class MemoryConnection:
    """`carrier.Connection`: one end of a pair. As with TCP, closing with something unread resets the other end."""

    def __init__(self, pair: Pair, side: int) -> None:
        self._pair = pair
        self._side = side
        self.came = bytearray()
        self.is_ended = False
        """The other end sends nothing more."""
        self.is_reset = False
        self.is_closed = False

    @property
    def _other(self) -> MemoryConnection:
        return self._pair.ends[1 - self._side]

    async def receive(self) -> bytes:
        """As `Connection.receive`."""
        while True:
            await self._pair.passable()
            if self.came:
                data = bytes(self.came[:STREAM_READ_BYTES])
                del self.came[:STREAM_READ_BYTES]
                self._pair.wake()
                return data
            if self.is_reset:
                raise ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")
            if self.is_ended:
                return b""
            await self._pair.changed.wait()

    async def send(self, data: bytes) -> None:
        """As `Connection.send`. The other end's buffer is one piece long."""
        left = memoryview(data)
        while left:
            await self._pair.passable()
            if self._other.is_closed:
                raise BrokenPipeError(errno.EPIPE, "Broken pipe")
            room = STREAM_READ_BYTES - len(self._other.came)
            if room > 0:
                self._other.came += left[:room]
                left = left[room:]
                self._pair.wake()
            else:
                await self._pair.changed.wait()

    def end(self) -> None:
        """As `Connection.end`."""
        self._other.is_ended = True
        self._pair.wake()

    def close(self) -> None:
        """As `Connection.close`."""
        if self.is_closed:
            return
        self.is_closed = self._other.is_ended = True
        self._other.is_reset = bool(self.came)
        if self._other.is_closed:
            self._pair.forget(self._pair)
        self._pair.wake()
