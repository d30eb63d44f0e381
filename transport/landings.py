"""The loop's end of a read: landings wait here until the reader of the read takes them. All transports use it.

A stream ends at its last landing, at its deadline, or when somebody calls `end`, whichever comes first; what landed
before that is still handed out. Whoever fills the stream hears of its end through `on_end`, exactly once. Runs on the
loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence

from .errors import CallerError
from .interface import Landing, Slice, Want
from .limits import CHAIN_CHUNKS_MAX, CHUNK_BYTES_MAX, KEY_BYTES, SLICE_RUNS_MAX, SLICES_PER_READ_MAX


def check_wants(wants: Sequence[Want]) -> None:
    """Raise `CallerError` for a read that no transport could do."""
    if len(wants) > CHAIN_CHUNKS_MAX:
        raise CallerError(f"{len(wants)} chunks in one read: at most {CHAIN_CHUNKS_MAX}")
    for want in wants:
        if len(want.key) != KEY_BYTES:
            raise CallerError(f"a key has {KEY_BYTES} bytes, not {len(want.key)}")
        if want.into.readonly or not want.into.c_contiguous or not 0 < want.into.nbytes <= CHUNK_BYTES_MAX:
            raise CallerError(f"a chunk is read into a writable, contiguous buffer of 1 to {CHUNK_BYTES_MAX} bytes")
    parts = set()
    for want in wants:
        if want.part is not None:
            parts.add((want.part, want.chunk_bytes))
            if want.into.nbytes != want.part.bytes:
                raise CallerError(f"a part of {want.part.bytes} bytes is read into {want.into.nbytes}")
    for part, chunk_bytes in parts:
        _check_part(part, chunk_bytes)
    if len({part for part, _ in parts}) > SLICES_PER_READ_MAX:
        raise CallerError(f"more than {SLICES_PER_READ_MAX} different slices in one read")


def _check_part(part: Slice, chunk_bytes: int) -> None:
    runs = part.run_bytes > 0 and 1 <= part.count <= SLICE_RUNS_MAX
    if not runs or (part.count > 1 and part.stride_bytes < part.run_bytes):
        raise CallerError(f"a slice has 1 to {SLICE_RUNS_MAX} runs of at least a byte that do not overlap, not {part}")
    if part.offset_bytes < 0 or not 0 <= part.stride_bytes <= CHUNK_BYTES_MAX:
        raise CallerError(f"a slice lies in its chunk, not {part}")
    if part.end > chunk_bytes or chunk_bytes > CHUNK_BYTES_MAX:
        raise CallerError(f"{part} ends beyond its chunk of {chunk_bytes} bytes")


class LandingStream:
    """An asynchronous iterator of landings for one consumer."""

    def __init__(self, count: int, deadline_s: float, on_end: Callable[[], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._left = count
        self._landed: list[Landing] = []
        self._waiter: asyncio.Future[None] | None = None
        self._on_end = on_end
        self._timer = self._loop.call_later(max(0.0, deadline_s), self.end)
        self.ended = False
        if not count:
            self._loop.call_soon(self.end)

    def put(self, landings: Iterable[Landing]) -> None:
        """More chunks have ended. Ignored after the end."""
        if self.ended:
            return
        before = len(self._landed)
        self._landed.extend(landings)
        self._left -= len(self._landed) - before
        assert self._left >= 0, "more landings than wants"
        if self._left == 0:
            self.end()
        self._wake()

    def end(self) -> None:
        """No further landing comes."""
        if not self.ended:
            self.ended = True
            self._timer.cancel()
            self._on_end()
            self._wake()

    def discard(self) -> None:
        """End, and hand out nothing more."""
        self._landed = []
        self.end()

    async def next(self) -> list[Landing]:
        """All that has landed since the last call, at least one; or `StopAsyncIteration`."""
        while not self._landed:
            if self.ended:
                raise StopAsyncIteration
            assert self._waiter is None, "a read has one consumer"
            self._waiter = self._loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        landed, self._landed = self._landed, []
        return landed

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
