"""Fetching: bringing chunks that peers hold into this node's arena, each of them once.

A *flight* is one chunk on its way. Whoever wants the chunk meanwhile joins the flight instead of asking a peer again
(single flight); at landing each of them gets a lease before anything else can evict the chunk. A flight may bring a
part of a chunk: then it goes by the name of the part, and so does what lands.

`Fetcher.want` asks the map who holds what from the front (`kvmesh.survey`), asks the price (`kvmesh.price`) and hands
the rest to a *fetch* (`kvmesh.fetching`): the driver of one `ReadPlan`, which decides all that follows.

    want ── survey ── price ── fetch ── plan
                                └── read, read, …      one task each: landings → plan → commit

A fetch never raises for what a peer does: what did not land by the deadline is a miss. Every read is the owner of its
own extents. They stay reserved, in quarantine, until the transport says that nothing can write there any more; the
read's task waits for that, and nobody waits for the task. Runs on the agent's loop; the bytes move in the transport.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from kvmesh.arena import Arena
from kvmesh.discovery import Run
from kvmesh.extents import aligned
from kvmesh.fetching import Fetch, Read
from kvmesh.keys import part_key
from kvmesh.price import worth
from kvmesh.rates import Rates
from kvmesh.steps import Fate
from kvmesh.store import Chunk, Owner, Store
from kvmesh.survey import Holders, Peer, Surveyor
from kvmesh.transport.interface import Outcome, Slice, Transport
from kvmesh.transport.limits import (
    FETCH_CLOSE_S,
    FETCHES_MAX,
    WIRE_WARNING_INTERVAL_S,
)

__all__ = ["Ask", "Fate", "Fetcher", "Flight"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Ask:
    """What is wanted of each chunk, and what it may cost."""

    space_id: bytes
    chunk_bytes: int
    """Of a whole chunk."""
    chunk_tokens: int
    deadline: float
    """On the fetcher's clock."""
    prefill_tokens_per_s: float | None = None
    """How fast whoever asks computes; None asks no price."""
    part: Slice | None = None

    @property
    def size_bytes(self) -> int:
        """What lands for each chunk."""
        return self.part.bytes if self.part is not None else self.chunk_bytes


class Flight:
    """One chunk on its way, and the owners who get a lease of it when it lands."""

    __slots__ = ("chunk", "fate", "fetch", "kept", "key", "waiters", "watchers")

    def __init__(self, key: bytes) -> None:
        self.key = key
        """What it is stored under."""
        self.chunk: Chunk | None = None
        self.fate: Fate | None = None
        """How it ended; None while it is on its way."""
        self.waiters: list[Owner] = []
        self.watchers: list[Callable[[], None]] = []
        """Called once when it has ended, after all that ended with it."""
        self.kept = False
        """It goes on when nobody waits for it: somebody has asked for it ahead of time."""
        self.fetch: Fetch | None = None


class Fetcher:
    """All flights of one node."""

    def __init__(
        self,
        store: Store,
        arena: Arena,
        transport: Transport,
        holders: Holders,
        address_of: Callable[[str], str | None],
        rtt_of: Callable[[str], float | None],
        *,
        node: str,
        shuffle: Callable[[list[Run]], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`address_of(name)`: where a live node is reached, or None. `rtt_of(name)`: its round trip in seconds, as
        membership measured it. `node`: this node, which is never asked."""
        self.store = store
        self.arena = arena
        self.transport = transport
        self.holders = holders
        self.clock = clock
        self.rates = Rates()
        self.counts: Counter[str] = Counter()
        self._surveyor = Surveyor(holders, self.rates, transport.backend, address_of, rtt_of, shuffle, node)
        self._flights: dict[bytes, Flight] = {}
        self._fetches: set[Fetch] = set()
        self._reads: set[Read] = set()
        self._told: deque[Callable[[], None]] = deque()
        self._telling = False
        self._warned: dict[str, float] = {}
        self._closed = False

    def want(self, owner: Owner | None, keys: Sequence[bytes], ask: Ask) -> dict[bytes, Flight]:
        """Put the front of the missing `keys` under way, as far as some node has them and it pays.

        The keys are those of whole chunks, whatever is asked of them. A flight that is done already says why there is
        none. `owner` gets a lease of each that lands, and must `leave` each flight; None wants no lease (prefetch).
        """
        part = ask.part
        stored = {key: key if part is None else part_key(key, part) for key in keys}
        fresh = [key for key in keys if stored[key] not in self._flights]
        peers: list[Peer] = []
        count = 0
        refused = False
        if fresh and len(self._fetches) < FETCHES_MAX and not self._closed:
            count, refused, peers = self._prospect(fresh, ask)
            if owner is None:  # nobody leases what lands: more than fits would evict its own front
                count = min(count, self.store.room_bytes() // aligned(ask.size_bytes))
        flights: list[Flight] = []
        joined: dict[bytes, Flight] = {}
        for key in keys:
            flight = self._flights.get(stored[key])
            if flight is None:
                if len(flights) == count and not refused:
                    break
                flight = Flight(stored[key])
                if refused:
                    flight.fate = Fate.PRICE if self.clock() < ask.deadline else Fate.DEADLINE
                    joined[key] = flight
                    break
                flights.append(flight)
            joined[key] = flight
            if owner is not None:
                flight.waiters.append(owner)
            else:
                flight.kept = True
        if flights:
            self._flights.update((flight.key, flight) for flight in flights)
            fetch = Fetch(self, flights, fresh[:count], peers, ask)
            for flight in flights:
                flight.fetch = fetch
            self._fetches.add(fetch)
            fetch.begin()
        return joined

    def _prospect(self, keys: Sequence[bytes], ask: Ask) -> tuple[int, bool, list[Peer]]:
        """How many of `keys`, from the front, to fetch; whether the price alone says none; and from whom."""
        now = self.clock()
        survey = self._surveyor.survey(keys, now)
        if not survey.chunks:
            return 0, False, []
        count = worth(
            survey.stretches,
            chunk_bytes=ask.size_bytes,
            chunk_tokens=ask.chunk_tokens,
            rtt_s=survey.rtt_s,
            prefill_tokens_per_s=ask.prefill_tokens_per_s,
            left_s=ask.deadline - now,
        )
        if not count and now < ask.deadline:
            self.counts["refused_by_price"] += 1
        return count, not count, survey.peers

    def leave(self, owner: Owner, flight: Flight) -> None:
        """`owner` does not wait for the flight any more; a lease that it got by it goes back. A fetch that nobody waits
        for ends."""
        if flight.fate is None:
            flight.waiters.remove(owner)
            if not flight.waiters and flight.fetch is not None:
                flight.fetch.left()
        elif flight.chunk is not None:
            self.store.release(owner, flight.chunk)

    def stats(self) -> dict[str, Any]:
        """Counters since the start, and what is known of the paths to peers."""
        names = (*(outcome.value for outcome in Outcome), "bytes", "reads", "hedges", "reassigned", "refused_by_price")
        return {name: self.counts[name] for name in names} | {
            "flights": len(self._flights),
            "quarantined_bytes": sum(read.owed_bytes for read in self._reads if read.over),
            "paths": self.rates.document(self.clock()),
        }

    async def close(self) -> None:
        """End every flight, begin no other, and wait until nothing writes to the arena any more."""
        self._closed = True
        for fetch in list(self._fetches):
            fetch.stop()
        tasks = [read.task for read in self._reads]
        if tasks:
            await asyncio.wait(tasks, timeout=FETCH_CLOSE_S)
        for task in tasks:
            task.cancel()  # of those that are left the transport will speak its last word when it closes

    # --- for the fetches ---------------------------------------------------------------------------------------------
    def land(self, flight: Flight, chunk: Chunk | None) -> None:
        """The chunk of the flight is in the store."""
        flight.chunk = chunk
        now = self.clock()
        for waiter in flight.waiters:
            self.store.lease(waiter, flight.key, now)
        self.end(flight, Fate.LANDED)

    def end(self, flight: Flight, fate: Fate) -> None:
        """The flight is over."""
        if flight.fate is None:
            del self._flights[flight.key]
            flight.fate = fate
            if flight.watchers:
                self._told += flight.watchers
                flight.watchers = []

    def tell(self) -> None:
        """Tell those who watch what has ended."""
        if self._telling:
            return  # by one of them: the rest is told when that one is done
        self._telling = True
        try:
            while self._told:
                self._told.popleft()()
        finally:
            self._telling = False

    def over(self, fetch: Fetch) -> None:
        """A fetch has no flight left."""
        self._fetches.discard(fetch)

    def opened(self, read: Read) -> None:
        """A read is under way."""
        self._reads.add(read)
        self.counts["reads"] += 1

    def closed(self, read: Read) -> None:
        """Nothing can write to the extents of the read any more."""
        self._reads.discard(read)
        self.store.drop_owner(read)

    def warn(self, peer: str, key: bytes, outcome: Outcome) -> None:
        """Say that a peer's chunk was not usable: once a peer and minute."""
        now = self.clock()
        if now - self._warned.get(peer, -WIRE_WARNING_INTERVAL_S) >= WIRE_WARNING_INTERVAL_S:
            self._warned = {name: at for name, at in self._warned.items() if now - at < WIRE_WARNING_INTERVAL_S}
            self._warned[peer] = now
            log.warning("chunk %s from %s: %s; not used", key.hex()[:16], peer, outcome.value)
