"""One get of a client: what is held of the chain is leased at once, the rest is fetched and reported as it lands.

A get reports the chain from its front, and ends at the first chunk that cannot be had. What lies behind that hole goes
back. For a part of each chunk, a whole chunk that is held serves as well as the part by itself.

`Getting` is one get that waits for peers; a get of which all is here needs none (`take_local`). Runs on the agent's
loop, as a task of the session that asked.
"""

from __future__ import annotations

import asyncio
import math
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvmesh import protocol
from kvmesh.fetch import Ask, Fate, Fetcher, Flight
from kvmesh.keys import part_key
from kvmesh.leases import Grant
from kvmesh.store import Chunk, Store
from kvmesh.transport.interface import Slice
from kvmesh.transport.limits import PROGRESS_GATHER_S


def take_local(store: Store, grant: Grant, keys: Sequence[bytes], part: Slice | None) -> dict[bytes, Chunk]:
    """Lease what of `keys` is held here."""
    now = time.monotonic()
    held: dict[bytes, Chunk] = {}
    for key in keys:
        chunk = store.lease(grant, key, now)
        if chunk is None and part is not None:
            chunk = store.lease(grant, part_key(key, part), now)
        if chunk is not None:
            held[key] = chunk
    store.touch(keys if part is None else [chunk.key for chunk in held.values()])
    return held


def report(
    id_: int,
    chunks: Sequence[Chunk],
    part: Slice | None,
    *,
    final: bool,
    fetched: int = 0,
    moved: int = 0,
    why: str = "",
) -> protocol.Progress:
    """The message that `chunks` are leased."""
    return protocol.Progress(
        id_,
        [chunk.offset for chunk in chunks],
        struct.pack(f"<{len(chunks)}Q", *[chunk.checksum for chunk in chunks]),
        final,
        fetched,
        moved,
        why,
        [] if part is None else [chunk.offset for chunk in chunks if not chunk.private],
    )


@dataclass(slots=True)
class Getting:
    """One get that waits for peers."""

    id: int
    store: Store
    fetcher: Fetcher
    send: Callable[[protocol.Message], None]
    grant: Grant
    keys: Sequence[bytes]
    held: dict[bytes, Chunk]
    """Leased at the start, not reported yet."""
    ask: Ask

    async def run(self) -> None:
        """Report the front of the chain as it lands; give back what lies behind the first hole."""
        flights: dict[bytes, Flight] = {}
        unsent: list[Chunk] = []
        used = fetched = 0
        stored: list[bytes] = []
        fate = Fate.LANDED
        priced = False
        reported_s = -math.inf
        try:
            while used < len(self.keys):
                key = self.keys[used]
                if key in self.held:
                    unsent.append(self.held.pop(key))
                    stored.append(unsent[-1].key)
                    used += 1
                    continue
                flight = flights.get(key)
                if flight is None:
                    missing = [k for k in self.keys[used:] if k not in self.held and k not in flights]
                    flights.update(self.fetcher.want(self.grant, missing, self.ask))
                    flight = flights.get(key)
                    if flight is None:
                        fate = Fate.MISS
                        break
                if not flight.done.done() and unsent and await self._is_late(flight, reported_s + PROGRESS_GATHER_S):
                    self.send(report(self.id, unsent, self.ask.part, final=False))
                    unsent = []
                    reported_s = time.monotonic()
                fate = flight.done.result() if flight.done.done() else await self._landing(flight)
                others = fate is Fate.DEADLINE or (fate is Fate.PRICE and not priced)
                if others and time.monotonic() < self.ask.deadline:
                    # It was somebody else's deadline, or price. The whole rest of that fetch ended with it: all of it
                    # gets a new one together, with ours. A price is asked once more only: it may be ours as well.
                    priced = priced or fate is Fate.PRICE
                    flights = {k: f for k, f in flights.items() if not f.done.done() or f.chunk is not None}
                    continue
                chunk = flight.chunk
                if fate is not Fate.LANDED:
                    break
                if chunk is None or self.store.leased(self.grant, chunk.offset) is not chunk:
                    fate = Fate.MISS  # the time of the grant is over, or the chunk's own
                    break
                unsent.append(chunk)
                stored.append(chunk.key)
                del flights[key]
                used += 1
                fetched += 1
            self.store.touch(stored)  # as they landed the front would be the first to be evicted
            moved = fetched * self.ask.size_bytes
            self.send(report(self.id, unsent, self.ask.part, final=True, fetched=fetched, moved=moved, why=fate.value))
        finally:
            for flight in flights.values():
                self.fetcher.leave(self.grant, flight)
            for chunk in self.held.values():
                self.store.release(self.grant, chunk)

    async def _is_late(self, flight: Flight, until_s: float) -> bool:
        """Whether the flight has not ended by then."""
        left_s = min(until_s, self.ask.deadline) - time.monotonic()
        if not flight.done.done() and left_s > 0:
            await asyncio.wait([flight.done], timeout=left_s)
        return not flight.done.done()

    async def _landing(self, flight: Flight) -> Fate:
        # A flight belongs to all who wait for it: one waiter's deadline must not end it for the others.
        late = await self._is_late(flight, self.ask.deadline)
        return Fate.DEADLINE if late else flight.done.result()
