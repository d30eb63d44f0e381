"""Inspection: whether a held chunk still has the bytes that were put, and what happens when it has not.

Somebody suspects a chunk: a client that found a wrong checksum before it used the bytes, a peer that received it wrong,
the transport that verified it before it sent a part. Each could be wrong itself (a wire flips bits as well), so the
node looks for itself: it hashes its own copy in a thread, and takes the chunk out only when that copy is wrong. Its
extent is not used again soon (`Store.quarantine`), its holders' map loses the entry by the journal.

One inspection at a time, a bounded line of them, and a rest after each that is as much longer as it took: so whoever
sends suspicions, client or peer, costs a small part of one core. Runs on the agent's loop; the hash runs in a thread
and lets the loop go on.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter, deque

from kvmesh.arena import Arena
from kvmesh.store import Store
from kvmesh.transport.checksum import checksum
from kvmesh.transport.limits import INSPECTION_REST, SUSPECTS_MAX

log = logging.getLogger(__name__)


class Inspector:
    """Verifies the chunks of one store that somebody suspects."""

    def __init__(self, store: Store, arena: Arena) -> None:
        self._store = store
        self._arena = arena
        self._line: deque[bytes] = deque()
        self._task: asyncio.Task[None] | None = None
        self._closing = asyncio.Event()
        self.counts: Counter[str] = Counter()
        """suspected; sound: the own copy was right; corrupt: it was wrong, and was taken out."""

    def suspect(self, key: bytes) -> None:
        """Look at the chunk `key` soon. On the loop; returns at once."""
        self.counts["suspected"] += 1
        if key in self._line or len(self._line) >= SUSPECTS_MAX or self._closing.is_set():
            return
        self._line.append(key)
        if self._task is None:
            self._task = asyncio.create_task(self._run())

    async def close(self) -> None:
        """Look no further. Waits for the hash that is under way."""
        self._closing.set()
        self._line.clear()
        if self._task is not None:
            await self._task

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while self._line:
                began = loop.time()
                await self._inspect(self._line.popleft())
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(INSPECTION_REST * (loop.time() - began)):
                        await self._closing.wait()
        finally:
            self._task = None

    async def _inspect(self, key: bytes) -> None:
        owner = object()
        self._store.add_owner(owner)
        try:
            chunk = self._store.lease(owner, key, time.monotonic())
            if chunk is None:
                return
            view = self._arena.view(chunk.offset, chunk.size_bytes)
            found = await asyncio.to_thread(checksum, view)
            if found == chunk.checksum:
                self.counts["sound"] += 1
            elif self._store.quarantine(chunk):
                self.counts["corrupt"] += 1
                log.error(
                    "chunk %s changed in this node's memory (%d bytes at offset %d): it was taken out; if this "
                    "repeats, test the host's memory",
                    key.hex()[:16], chunk.size_bytes, chunk.offset,
                )  # fmt: skip
        finally:
            self._store.drop_owner(owner)
