"""Chunks on loan: taken from the source, and kept until their bytes are sent.

A frame is sent without a copy, so the chunk must stay as it is until the kernel has the frame, or it was dropped.
Whoever sends keeps a reference to the buffer until then, in whatever thread. So loans are exported through a numpy
array that nothing else refers to: when the array dies, no frame is left, and they go back. The array's end is only
noted in that thread; the loop, where the source lives, looks every `LOANS_LOOK_S` and releases what is noted.
"""

from __future__ import annotations

import asyncio
import ctypes
import logging
import weakref
from collections import deque
from collections.abc import Sequence

import numpy as np

from .interface import ChunkSource, Loan
from .limits import LOANS_LOOK_S

log = logging.getLogger(__name__)


def lend(source: ChunkSource | None, key: bytes) -> Loan | None:
    """The chunk `key` from `source`; a source that fails does not hold it, as far as a peer is concerned."""
    if source is None:
        return None
    try:
        return source.lend(key)
    except Exception:
        log.exception("the source of chunks failed")
        return None


def suspect(source: ChunkSource | None, key: bytes) -> None:
    """Tell `source` that its chunk `key` may be wrong."""
    if source is not None:
        try:
            source.suspect(key)
        except Exception:
            log.exception("the source of chunks failed")


class LoansOut:
    """The loans whose bytes may still be sent. Runs on the loop, but for the end of an array."""

    def __init__(self, source: ChunkSource | None) -> None:
        self._loop = asyncio.get_running_loop()
        region = source.region if source is not None else None
        self._arena = None
        if region is not None:
            self._arena = np.ctypeslib.as_array((ctypes.c_uint8 * region.size_bytes).from_address(region.address))
        self._dead: deque[Sequence[Loan]] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self._out = 0
        self._none_out = asyncio.Event()
        self._none_out.set()

    def follow(self, first: Loan, second: Loan) -> bool:
        """Whether the bytes of the second come right after the first's, in one arena: then the two are one stretch."""
        return self._arena is not None and first.offset + first.buffer.nbytes == second.offset

    def export(self, loans: Sequence[Loan]) -> memoryview:
        """The bytes of one loan, or of loans that `follow` each other, to be sliced and sent. They are released when
        the view and all its slices are gone."""
        if len(loans) == 1:
            array = np.frombuffer(loans[0].buffer, np.uint8)
        else:
            assert self._arena is not None
            array = self._arena[loans[0].offset : loans[-1].offset + loans[-1].buffer.nbytes]
        weakref.finalize(array, self._dead.append, loans).atexit = False
        if self._timer is None:
            self._timer = self._loop.call_later(LOANS_LOOK_S, self._release)
        self._out += 1
        self._none_out.clear()
        return array.data

    async def all_back(self) -> None:
        """Wait until no loan is out."""
        await self._none_out.wait()

    def _release(self) -> None:
        """Give back what is not on its way any more, and look again as long as something is."""
        while self._dead:
            for loan in self._dead.popleft():
                loan.release()
            self._out -= 1
        self._timer = self._loop.call_later(LOANS_LOOK_S, self._release) if self._out else None
        if not self._out:
            self._none_out.set()
