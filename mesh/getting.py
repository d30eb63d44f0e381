"""One get of a client: what is held of the chain is leased at once, the rest is fetched and reported as it lands.

A get reports the chain from its front, and ends at the first chunk that cannot be had. What lies behind that hole goes
back. For a part of each chunk, a whole chunk that is held serves as well as the part by itself.

`Getting` is one get that waits for peers; a get of which all is here needs none (`take_local`). Runs on the agent's
loop.
"""

from __future__ import annotations

import asyncio
import logging
import math
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from kvmesh import protocol
from kvmesh.fetch import Ask, Fate, Fetcher, Flight
from kvmesh.keys import part_key
from kvmesh.leases import Grant
from kvmesh.store import Chunk, Store
from kvmesh.transport.interface import Slice
from kvmesh.transport.limits import PROGRESS_GATHER_S

log = logging.getLogger(__name__)


def take_local(store: Store, grant: Grant, keys: Sequence[bytes], part: Slice | None) -> dict[bytes, Chunk]:
    """Lease what of `keys` is held here."""
    now = time.monotonic()
    if part is None:
        return {chunk.key: chunk for chunk in store.lease_all(grant, keys, now)}
    held: dict[bytes, Chunk] = {}
    for key in keys:
        chunk = store.lease(grant, key, now) or store.lease(grant, part_key(key, part), now)
        if chunk is not None:
            held[key] = chunk
    store.touch([chunk.key for chunk in held.values()])
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


@dataclass(slots=True, eq=False)
class Getting:
    """One get that waits for peers. It goes on in the same turn of the loop in which a chunk lands: there is no task
    that would have to be woken first."""

    id: int
    store: Store
    fetcher: Fetcher
    send: Callable[[protocol.Message], None]
    on_end: Callable[[Getting], None]
    """Called once, when all is reported, or given back."""
    grant: Grant
    keys: Sequence[bytes]
    held: dict[bytes, Chunk]
    """Leased at the start, not reported yet."""
    ask: Ask
    _flights: dict[bytes, Flight] = field(default_factory=dict)
    _used: int = 0
    """How many chunks, from the front, are there."""
    _fetched: int = 0
    _unsent: list[Chunk] = field(default_factory=list)
    """Of those, the ones that are not reported."""
    _stored: list[bytes] = field(default_factory=list)
    """What they are stored under."""
    _priced: bool = False
    _reported_s: float = -math.inf
    _awaited: Flight | None = None
    _timer: asyncio.TimerHandle | None = None
    _over: bool = False

    def begin(self) -> None:
        """Report the front of the chain as it lands; give back what lies behind the first hole."""
        self._go_on()

    def cancel(self) -> None:
        """Nobody waits any more: give everything back."""
        if not self._over:
            self._end()

    def _go_on(self) -> None:
        if self._over:
            return
        try:
            fate = self._advance()
            if fate is not None:
                self._report_all(fate)
        except Exception:
            # Whoever waits hears of a miss at once: what was reported before it counts.
            log.exception("a get failed by an error of our own")
            self.send(report(self.id, [], self.ask.part, final=True, why=Fate.MISS.value))
        else:
            if fate is None:
                return
        self._end()

    def _advance(self) -> Fate | None:
        """Take what is there from the front on. How the run ends; None when the next chunk is on its way."""
        flights = self._flights
        while self._used < len(self.keys):
            key = self.keys[self._used]
            if key in self.held:
                self._take(self.held.pop(key))
                continue
            flight = flights.get(key)
            if flight is None:
                missing = [k for k in self.keys[self._used :] if k not in self.held and k not in flights]
                flights.update(self.fetcher.want(self.grant, missing, self.ask))
                flight = flights.get(key)
                if flight is None:
                    return Fate.MISS
            fate = flight.fate
            if fate is None:
                # A flight belongs to all who wait for it: one waiter's deadline must not end it for the others.
                if time.monotonic() >= self.ask.deadline:
                    return Fate.DEADLINE
                self._await(flight)
                return None
            others = fate is Fate.DEADLINE or (fate is Fate.PRICE and not self._priced)
            if others and time.monotonic() < self.ask.deadline:
                # It was somebody else's deadline, or price. The whole rest of that fetch ended with it: all of it
                # gets a new one together, with ours. A price is asked once more only: it may be ours as well.
                self._priced = self._priced or fate is Fate.PRICE
                flights = self._flights = {k: f for k, f in flights.items() if f.fate is None or f.chunk is not None}
                continue
            chunk = flight.chunk
            if fate is not Fate.LANDED:
                return fate
            if chunk is None or self.store.leased(self.grant, chunk.offset) is not chunk:
                return Fate.MISS  # the time of the grant is over, or the chunk's own
            self._take(chunk)
            del flights[key]
            self._fetched += 1
        return Fate.LANDED

    def _take(self, chunk: Chunk) -> None:
        self._unsent.append(chunk)
        self._stored.append(chunk.key)
        self._used += 1

    def _await(self, flight: Flight) -> None:
        """Go on when the flight has ended; and before that, when what is there must be reported, or at the deadline."""
        if flight is not self._awaited:
            self._awaited = flight
            flight.watchers.append(self._go_on)
        wake_s = self.ask.deadline
        if self._unsent:
            now = time.monotonic()
            if now >= self._reported_s + PROGRESS_GATHER_S:
                self.send(report(self.id, self._unsent, self.ask.part, final=False))
                self._unsent = []
                self._reported_s = now
            else:
                wake_s = min(wake_s, self._reported_s + PROGRESS_GATHER_S)
        if self._timer is None or self._timer.when() != wake_s:
            self._stop_timer()
            self._timer = asyncio.get_running_loop().call_at(wake_s, self._wake)

    def _wake(self) -> None:
        self._timer = None
        self._go_on()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _report_all(self, fate: Fate) -> None:
        self.store.touch(self._stored)  # as they landed the front would be the first to be evicted
        moved = self._fetched * self.ask.size_bytes
        self.send(
            report(self.id, self._unsent, self.ask.part, final=True, fetched=self._fetched, moved=moved, why=fate.value)
        )

    def _end(self) -> None:
        self._over = True
        self._stop_timer()
        if self._awaited is not None and self._awaited.fate is None:
            self._awaited.watchers.remove(self._go_on)
        for flight in self._flights.values():
            self.fetcher.leave(self.grant, flight)
        for chunk in self.held.values():
            self.store.release(self.grant, chunk)
        self.on_end(self)
