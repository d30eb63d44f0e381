"""Copying out of a mapped arena: a list of pieces, over the transport's copy threads, hashed on the way.

Each step is copied and then hashed while it is in the processor's cache, so that the checksum costs little beside the
copy. numpy and xxhash release the GIL meanwhile; a thread that takes it back waits for the loop, so steps are not too
small. A list is cut into as many shares as there are threads, of whole chunks, since a chunk has one digest. A list so
small that waking a thread would take longer is copied at once, by whoever asks.

Owns no mapping and no thread. Made and awaited on the loop; `_copy` runs in a copy thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor

import numpy as np
from numpy.typing import NDArray

from .errors import UnreachableError
from .limits import COPY_ON_LOOP_BYTES_MAX, COPY_STEP_BYTES, COPY_THREADS
from .onesided import Piece

Bytes = NDArray[np.uint8]


class CopyMove:
    """Pieces being copied: a `kvmesh.transport.onesided.Move`."""

    def __init__(self, arena: Bytes, pieces: Sequence[Piece], threads: Executor) -> None:
        """`arena`: the holder's, as it is mapped here; every piece lies in it."""
        self._loop = asyncio.get_running_loop()
        self._stopping = threading.Event()
        self._complete = True
        self._quiet = asyncio.Event()
        size_bytes = sum(piece.into.nbytes for piece in pieces)
        if size_bytes <= COPY_ON_LOOP_BYTES_MAX:
            _copy(arena, pieces, self._stopping)
            self._quiet.set()
            return
        cut = list(shares(pieces, -(-size_bytes // COPY_THREADS)))
        self._lock = threading.Lock()
        self._left = len(cut)
        for share in cut:
            threads.submit(self._copy_share, arena, share)

    @property
    def done(self) -> bool:
        """Whether no thread works on it any more."""
        return self._quiet.is_set()

    async def wait(self) -> None:
        """As `Move.wait`."""
        await self._quiet.wait()
        if not self._complete:
            raise UnreachableError("the copy was stopped, since its peer is gone")

    async def stop(self) -> None:
        """As `Move.stop`. Takes one step of each thread, or what else they work on before."""
        self.give_up()
        await self._quiet.wait()

    def give_up(self) -> None:
        """The peer is gone: what is not copied yet is not worth it."""
        self._stopping.set()

    def _copy_share(self, arena: Bytes, share: Sequence[Piece]) -> None:
        """Runs in a copy thread. The last one wakes the loop: one wake a move, not one a thread."""
        copied = False
        try:
            copied = _copy(arena, share, self._stopping)
        finally:
            with self._lock:
                self._complete &= copied
                self._left -= 1
                last = not self._left
            if last:
                with contextlib.suppress(RuntimeError):  # the loop is closed
                    self._loop.call_soon_threadsafe(self._quiet.set)


def shares(pieces: Sequence[Piece], share_bytes: int) -> Iterator[Sequence[Piece]]:
    """`pieces` cut into shares of about that size, never between two pieces of one digest."""
    start, taken_bytes = 0, 0
    for at, piece in enumerate(pieces):
        together = at > 0 and piece.digest is not None and piece.digest is pieces[at - 1].digest
        if taken_bytes >= share_bytes and not together:
            yield pieces[start:at]
            start, taken_bytes = at, 0
        taken_bytes += piece.into.nbytes
    yield pieces[start:]


def _copy(arena: Bytes, pieces: Sequence[Piece], stopping: threading.Event) -> bool:
    """Copy and hash. False when it was stopped before the end."""
    for piece in pieces:
        into = np.frombuffer(piece.into, np.uint8)
        origin = arena[piece.remote_offset : piece.remote_offset + len(into)]
        for at in range(0, len(into), COPY_STEP_BYTES):
            if stopping.is_set():
                return False
            step = into[at : at + COPY_STEP_BYTES]
            np.copyto(step, origin[at : at + COPY_STEP_BYTES])
            if piece.digest is not None:
                piece.digest.update(step.data)
    return True
