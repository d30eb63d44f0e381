"""Fetching: bringing chunks that peers hold into this node's arena, each of them once.

A *flight* is one chunk on its way. Whoever wants the chunk meanwhile joins the flight instead of asking a peer again
(single flight); at landing each of them gets a lease before anything else can evict the chunk. `best_holder` decides
whom to ask: the node with the longest run from the first missing chunk, never merely the first that has something.

A fetch never raises for what a peer does: what did not land by the deadline is a miss, and its extent goes back to the
store once the transport says that nothing can write there any more. An answer "not held" corrects the map at once. Runs
on the agent's loop; the bytes move in the transport.
"""

from __future__ import annotations

import asyncio
import enum
import logging
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

from kvmesh.arena import Arena
from kvmesh.discovery import Run
from kvmesh.store import Chunk, Owner, Refusal, Store
from kvmesh.transport.interface import Outcome, Slice, Transport, Want
from kvmesh.transport.limits import FETCH_FAILED_HOLDERS_MAX, FETCHES_MAX

log = logging.getLogger(__name__)


class Fate(enum.StrEnum):
    """How a flight ended, or why there was none. The words are what a hit gives as its reason."""

    LANDED = "complete"
    MISS = "miss"
    """No node that could be asked has it."""
    DEADLINE = "deadline"
    FULL = "arena full"
    """No room to receive it: the arena is full of leased, pinned or reserved chunks."""


@dataclass(frozen=True, slots=True)
class Ask:
    """What is wanted of each chunk of a chain, and until when."""

    space_id: bytes
    chunk_bytes: int
    """Of a whole chunk."""
    chunk_tokens: int
    deadline: float
    """On the monotonic clock."""
    prefill_tokens_per_s: float | None = None
    """How fast whoever asks computes; None: it cannot, or does not say, and then no price is too high."""
    part: Slice | None = None


class Holders(Protocol):
    """What a fetch must know of the cluster."""

    def runs(self, keys: Sequence[bytes], start: int = 0, *, exclude: Collection[str] = ()) -> list[Run]:
        """For every node outside `exclude` that holds ``keys[start]``: how many it holds from there."""

    def forget(self, node: str, key: bytes) -> bool:
        """`node` said that it does not hold `key`."""


class Flight:
    """One chunk on its way, and the owners who get a lease of it when it lands."""

    __slots__ = ("chunk", "done", "key", "waiters")

    def __init__(self, key: bytes) -> None:
        self.key = key
        self.chunk: Chunk | None = None
        self.done: asyncio.Future[Fate] = asyncio.get_running_loop().create_future()
        self.waiters: list[Owner] = []


def best_holder(runs: Sequence[Run]) -> Run | None:
    """The holder with the longest run; of equals the one with the faster tier. `runs` comes in random order."""
    order = {"gpu": 0, "ram": 1, "disk": 2}
    return min(runs, key=lambda run: (-run.run_chunks, order[run.tier]), default=None)


class Fetcher:
    """All flights of one node."""

    def __init__(
        self,
        store: Store,
        arena: Arena,
        transport: Transport,
        holders: Holders,
        address_of: Callable[[str], str | None],
        *,
        node: str,
        shuffle: Callable[[list[Run]], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`address_of(name)`: where a live node is reached, or None. `node`: this node, which is never asked."""
        self._store = store
        self._arena = arena
        self._transport = transport
        self._holders = holders
        self._address_of = address_of
        self._node = node
        self._shuffle = shuffle
        self._clock = clock
        self._flights: dict[bytes, Flight] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self.counts: Counter[str] = Counter()

    def want(self, owner: Owner | None, keys: Sequence[bytes], ask: Ask) -> dict[bytes, Flight]:
        """Put the front of the missing `keys` under way, as far as some node has them.

        `owner` gets a lease of each that lands, and must `leave` each flight; None wants no lease (prefetch).
        """
        joined: dict[bytes, Flight] = {}
        fresh: list[Flight] = []
        obtainable = 0
        if len(self._tasks) < FETCHES_MAX:
            obtainable = self._obtainable([key for key in keys if key not in self._flights])
        for key in keys:
            flight = self._flights.get(key)
            if flight is None:
                if len(fresh) == obtainable:
                    break
                flight = Flight(key)
                fresh.append(flight)
            joined[key] = flight
            if owner is not None:
                flight.waiters.append(owner)
        if fresh:
            for flight in fresh:
                self._flights[flight.key] = flight
            task = asyncio.create_task(self._fly(fresh, ask.space_id, ask.chunk_bytes, ask.deadline))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        return joined

    def _obtainable(self, keys: Sequence[bytes]) -> int:
        """How many of `keys`, from the front, some other node holds."""
        count = 0
        while count < len(keys):
            runs = self._holders.runs(keys, count, exclude=(self._node,))
            if not runs:
                break
            count += max(run.run_chunks for run in runs)
        return count

    def leave(self, owner: Owner, flight: Flight) -> None:
        """`owner` does not wait for the flight any more; a lease that it got by it goes back."""
        if not flight.done.done():
            flight.waiters.remove(owner)
        elif flight.chunk is not None:
            self._store.release(owner, flight.chunk)

    async def close(self) -> None:
        """End every flight."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # --- one task: the flights of one chain --------------------------------------------------------------------------
    async def _fly(self, flights: list[Flight], space_id: bytes, chunk_bytes: int, deadline: float) -> None:
        owner = object()  # holds the reservations of this task alone
        self._store.add_owner(owner)
        pending = flights
        failed: set[str] = set()
        fate = Fate.MISS
        try:
            while pending and len(failed) < FETCH_FAILED_HOLDERS_MAX:
                if self._clock() >= deadline:
                    fate = Fate.DEADLINE
                    break
                runs = self._holders.runs([f.key for f in pending], exclude={self._node, *failed})
                self._shuffle(runs)
                run = best_holder(runs)
                address = self._address_of(run.node) if run is not None else None
                if run is None:
                    break
                if address is None:
                    failed.add(run.node)
                    continue
                before = len(pending)
                batch = self._reserve(owner, pending[: run.run_chunks], space_id, chunk_bytes)
                pending = [f for f in pending if not f.done.done()]
                if not batch and len(pending) == before:
                    fate = Fate.FULL
                    break
                if batch and not await self._read(owner, run.node, address, batch, chunk_bytes, deadline):
                    failed.add(run.node)
                pending = [f for f in pending if not f.done.done()]
            if pending and self._clock() >= deadline:
                fate = Fate.DEADLINE
        finally:
            self._store.drop_owner(owner)
            for flight in pending:
                self._end(flight, fate)

    def _reserve(
        self, owner: Owner, flights: Sequence[Flight], space_id: bytes, chunk_bytes: int
    ) -> list[tuple[Flight, int]]:
        """Extents for as many of `flights` as there is room for, from the front."""
        batch: list[tuple[Flight, int]] = []
        for flight in flights:
            offset = self._store.reserve(owner, flight.key, space_id, chunk_bytes)
            if offset == Refusal.EXISTS:
                self._land(flight, self._store.get(flight.key))  # a client put it meanwhile
            elif offset < 0:
                break
            else:
                batch.append((flight, offset))
        return batch

    async def _read(
        self,
        owner: Owner,
        node: str,
        address: str,
        batch: Sequence[tuple[Flight, int]],
        chunk_bytes: int,
        deadline: float,
    ) -> bool:
        """Read `batch` from one holder. False when the holder did not give all of it."""
        wants = [Want(flight.key, self._arena.view(offset, chunk_bytes)) for flight, offset in batch]
        reading = self._transport.read(address, wants, deadline_s=max(0.0, deadline - self._clock()))
        landed = 0
        try:
            async for landing in reading:
                flight, _ = batch[landing.index]
                self.counts[landing.outcome.value] += 1
                if landing.outcome is Outcome.LANDED:
                    landed += 1
                    self.counts["bytes"] += chunk_bytes
                    self._land(flight, self._store.commit(owner, flight.key, landing.checksum))
                elif landing.outcome is Outcome.NOT_HELD:
                    self._holders.forget(node, flight.key)
                else:
                    log.warning("chunk %s from %s: %s; not used", flight.key.hex()[:16], node, landing.outcome.value)
        finally:
            await reading.close()  # from here on nothing writes to the extents
            for flight, _ in batch:
                self._store.abandon(owner, flight.key)
        return landed == len(batch)

    def _land(self, flight: Flight, chunk: Chunk | None) -> None:
        flight.chunk = chunk
        for waiter in flight.waiters:
            self._store.lease(waiter, flight.key, self._clock())
        self._end(flight, Fate.LANDED)

    def _end(self, flight: Flight, fate: Fate) -> None:
        if self._flights.get(flight.key) is flight:
            del self._flights[flight.key]
        if not flight.done.done():
            flight.done.set_result(fate)
