"""Chunks on loan: taken from the source, and kept until libzmq has done with their bytes.

A frame is sent without a copy, so the chunk must stay as it is until libzmq has written the frame to the connection
or dropped it. pyzmq keeps a reference to the sent buffer until then, and drops it in a thread of its own (its "gc"
thread). So each loan is exported through a numpy array that nothing else refers to: when the array dies, no frame is
left, and the loan goes back. The array's end is only noted in that thread; the loan is released on the loop, where
the source lives, a batch at a time.
"""

from __future__ import annotations

import asyncio
import logging
import weakref
from collections import deque

import numpy as np

from .interface import ChunkSource, Loan

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


class LoansOut:
    """The loans whose bytes libzmq may still read. Runs on the loop, but for `_note`."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._dead: deque[Loan] = deque()
        self._noted = False
        self._out = 0
        self._none_out = asyncio.Event()
        self._none_out.set()

    def export(self, loan: Loan) -> memoryview:
        """The loan's bytes, to be sliced and sent. The loan is released when the view and all its slices are gone."""
        array = np.frombuffer(loan.buffer, np.uint8)
        weakref.finalize(array, self._note, loan).atexit = False
        self._out += 1
        self._none_out.clear()
        return array.data

    async def all_back(self) -> None:
        """Wait until no loan is out."""
        await self._none_out.wait()

    def _note(self, loan: Loan) -> None:
        """The exported array is going. Called in whichever thread dropped it last; does not block."""
        self._dead.append(loan)
        if self._noted:
            return  # the release that is due finds this one as well
        self._noted = True
        try:
            self._loop.call_soon_threadsafe(self._release)
        except RuntimeError:  # the loop is closed: nobody is left to be raced with
            self._release()

    def _release(self) -> None:
        self._noted = False
        while self._dead:
            self._dead.popleft().release()
            self._out -= 1
        if not self._out:
            self._none_out.set()
