"""Lends the chunks of a node's store to its transport, for peers to read.

A loan is a lease of its own in the store. It comes back from any thread; the store belongs to the loop. Runs on the
agent's loop, but for `Loan.release`.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time

from kvmesh.arena import Arena
from kvmesh.inspection import Inspector
from kvmesh.store import Chunk, Store
from kvmesh.transport.interface import Region


class Lender:
    """The store as a transport's source of chunks: `kvmesh.transport.interface.ChunkSource`."""

    def __init__(self, store: Store, arena: Arena, inspector: Inspector) -> None:
        """Make it on the loop that it runs on."""
        self._store = store
        self._arena = arena
        self._inspector = inspector
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        store.add_owner(self)

    @property
    def region(self) -> Region:
        """The whole arena."""
        return Region(self._arena.fileno(), self._arena.address, self._arena.size_bytes)

    def lend(self, key: bytes) -> Loan | None:
        """The chunk `key`, kept from eviction until released."""
        chunk = self._store.lease(self, key, time.monotonic())
        if chunk is None:
            return None
        return Loan(self, chunk, self._arena.view(chunk.offset, chunk.size_bytes))

    def suspect(self, key: bytes) -> None:
        """The chunk's bytes may be wrong."""
        self._inspector.suspect(key)

    def take_back(self, chunk: Chunk) -> None:
        """A loan ended, in whichever thread."""
        if threading.get_ident() == self._thread:
            self._store.release(self, chunk)
            return
        with contextlib.suppress(RuntimeError):  # the loop is closed: so is the store
            self._loop.call_soon_threadsafe(self._store.release, self, chunk)


class Loan:
    """One lent chunk."""

    __slots__ = ("_chunk", "_lender", "buffer", "checksum", "offset")

    def __init__(self, lender: Lender, chunk: Chunk, buffer: memoryview) -> None:
        self._lender: Lender | None = lender
        self._chunk = chunk
        self.buffer = buffer
        self.offset = chunk.offset
        self.checksum = chunk.checksum

    def release(self) -> None:
        """Give the chunk back. A second call does nothing."""
        lender, self._lender = self._lender, None
        if lender is not None:
            lender.take_back(self._chunk)
