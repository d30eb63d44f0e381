"""One fetch: the driver of one read plan, and its reads.

A `Fetch` tells its plan what happens and does what the plan says: reserves extents, starts reads, commits what lands,
ends flights. It decides nothing. A `Read` is one read of one holder: the owner of its extents in the store, and one
task that takes landings until there are none or the read is dropped, and then waits until the transport says that
nothing is written any more. Runs on the agent's loop.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

from kvmesh.plan import ReadPlan
from kvmesh.rates import Path
from kvmesh.steps import (
    Action,
    Begin,
    Cancel,
    Commit,
    Ended,
    Event,
    Fate,
    Finish,
    Held,
    Landed,
    Lose,
    Missed,
    NoRoom,
    Start,
    Tick,
    Wake,
)
from kvmesh.store import Refusal
from kvmesh.survey import Peer
from kvmesh.transport.interface import Landing, Outcome, Want
from kvmesh.transport.limits import READ_GRACE_S

if TYPE_CHECKING:
    from kvmesh.fetch import Ask, Fetcher, Flight

log = logging.getLogger(__name__)

NO_CHECKSUMS: Final[Mapping[int, int]] = {}


class Fetch:
    """The flights of one chain: does what their plan says."""

    def __init__(
        self, fetcher: Fetcher, flights: list[Flight], keys: Sequence[bytes], peers: Sequence[Peer], ask: Ask
    ) -> None:
        """`keys`: of the whole chunks, as holders know them."""
        self.fetcher = fetcher
        self.flights = flights
        self.keys = keys
        self.ask = ask
        self.size_bytes = ask.size_bytes
        self.plan = ReadPlan(len(flights), self.size_bytes, [peer.holder(len(flights)) for peer in peers], ask.deadline)
        self._peers = peers
        self._reads: dict[int, Read] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._busy = False
        self._left = False
        self._found: deque[Event] = deque()

    def begin(self) -> None:
        """Start."""
        self.handle(Begin())

    def handle(self, event: Event, checksums: Mapping[int, int] = NO_CHECKSUMS) -> None:
        """Tell the plan, and do what it says. `checksums`: of what has just landed, by place."""
        if self._busy:
            self._found.append(event)  # by an action: it is told when the actions before it are done
            return
        self._busy = True
        clock = self.fetcher.clock
        try:
            for action in self.plan.handle(event, clock()):
                self._do(action, checksums)
            while self._found:
                for action in self.plan.handle(self._found.popleft(), clock()):
                    self._do(action, NO_CHECKSUMS)
        except Exception:
            # Whoever waits gets a miss at once, and what is under way is closed: nothing of a fetch may be left over.
            log.exception("a fetch failed by an error of our own")
            self._found.clear()
            self.stop()
        finally:
            self._busy = False
        self.fetcher.tell()

    def stop(self) -> None:
        """End everything."""
        for flight in self.flights:
            self.fetcher.end(flight, Fate.MISS)
        for read in self._reads.values():
            read.drop(late=False)
        self._finish()
        if not self._busy:
            self.fetcher.tell()

    def left(self) -> None:
        """Nobody waits for one of the flights any more. Soon, when a get has left all of its own, look whether any is
        wanted."""
        if not self._left:
            self._left = True
            asyncio.get_running_loop().call_soon(self._stop_unwanted)

    def _stop_unwanted(self) -> None:
        self._left = False
        pending = [flight for flight in self.flights if flight.fate is None]
        if pending and not any(flight.waiters or flight.kept for flight in pending):
            self.stop()

    def _do(self, action: Action, checksums: Mapping[int, int]) -> None:
        match action:
            case Commit():
                self._commit(action, checksums)
            case Start():
                self._start(action)
            case Cancel():
                read = self._reads.pop(action.read, None)
                if read is not None:
                    read.drop(late=action.late)
            case Lose():
                for place in action.chunks:
                    self.fetcher.end(self.flights[place], action.fate)
            case Wake():
                self._wake(action.at)
            case Finish():
                self._finish()

    def _commit(self, action: Commit, checksums: Mapping[int, int]) -> None:
        read, store, land = self._reads[action.read], self.fetcher.store, self.fetcher.land
        private = self.ask.part is not None
        for place in action.chunks:
            flight = self.flights[place]
            chunk = store.commit(read, flight.key, checksums[place], private=private)
            land(flight, chunk or store.get(flight.key))

    def _start(self, action: Start) -> None:
        fetcher, size_bytes = self.fetcher, self.size_bytes
        peer = self._peers[action.holder]
        read = Read(self, action.read, peer)
        fetcher.store.add_owner(read)
        reserve, space_id = fetcher.store.reserve, self.ask.space_id
        now = fetcher.clock()
        full = False
        no_room: list[int] = []
        for place in action.chunks:
            flight = self.flights[place]
            offset = Refusal.FULL if full else reserve(read, flight.key, space_id, size_bytes, beside=True, now=now)
            if offset >= 0:
                read.add(place, offset)
            elif offset == Refusal.EXISTS:  # a client put it meanwhile
                fetcher.land(flight, fetcher.store.get(flight.key))
                self.handle(Held(action.read, place))
            else:
                full = True  # what follows is worth less, and trying again for each would only take time
                no_room.append(place)
        if no_room:
            self.handle(NoRoom(action.read, tuple(no_room)))
        fetcher.counts["hedges"] += action.hedge
        if read.places:
            self._reads[action.read] = read
            read.begin()
        else:
            fetcher.store.drop_owner(read)

    def _wake(self, at: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        delay_s = max(0.0, at - self.fetcher.clock())
        self._timer = asyncio.get_running_loop().call_later(delay_s, self.handle, Tick())

    def _finish(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self.fetcher.counts["reassigned"] += self.plan.reassigned
        # Who waits for a chunk uses it; what was asked for ahead of time is to be evicted in order as well.
        self.fetcher.store.touch([flight.key for flight in self.flights if flight.kept])
        self.fetcher.over(self)


class Read:
    """One read of one holder, and the owner of its extents."""

    def __init__(self, fetch: Fetch, number: int, peer: Peer) -> None:
        self.task: asyncio.Task[None]
        self.places: list[int] = []
        """Which flight each of its wants is for."""
        self.over = False
        """Nobody wants anything of it any more."""
        self._fetch = fetch
        self._fetcher = fetch.fetcher
        self._number = number
        self._peer = peer
        self._path = Path(peer.name, fetch.fetcher.transport.backend(peer.address))
        self._wants: list[Want] = []
        self._owed = 0
        self._waits = False

    @property
    def owed_bytes(self) -> int:
        """In extents that the transport may still write to."""
        return self._owed * self._fetch.size_bytes

    def add(self, place: int, offset: int) -> None:
        """Read the chunk of a flight into the extent at `offset`."""
        ask = self._fetch.ask
        into = self._fetcher.arena.view(offset, self._fetch.size_bytes)
        self._wants.append(Want(self._fetch.keys[place], into, ask.part, ask.chunk_bytes))
        self.places.append(place)

    def begin(self) -> None:
        """Ask the holder."""
        fetcher = self._fetcher
        now = fetcher.clock()
        self._owed = len(self._wants)
        fetcher.rates.began(self._path, now)
        # The plan ends at the deadline by itself. The read's own comes after that, so it does not look like a failure.
        left_s = max(0.0, self._fetch.ask.deadline - now) + READ_GRACE_S
        self._reading = fetcher.transport.read(self._peer.address, self._wants, deadline_s=left_s)
        fetcher.opened(self)
        self.task = asyncio.create_task(self._run())

    def drop(self, *, late: bool) -> None:
        """Nothing is wanted of it any more. `late`: it did not deliver in time."""
        if not self.over:
            self._end(late=late)
            if self._waits:
                self.task.cancel()

    def _end(self, *, late: bool) -> None:
        self.over = True
        late_bytes = self._fetch.size_bytes if late else 0
        self._fetcher.rates.ended(self._path, self._fetcher.clock(), late_bytes=late_bytes)

    async def _run(self) -> None:
        try:
            while not self.over:
                self._waits = True
                try:
                    landings = await self._reading.__anext__()
                finally:
                    self._waits = False
                self._landed(landings)
        except (StopAsyncIteration, asyncio.CancelledError):
            pass  # it has nothing more, or it was dropped
        except Exception:
            log.exception("a read failed by an error of our own")
            self._fetch.stop()
        if not self.over:
            self._end(late=False)
            self._fetch.handle(Ended(self._number))
        try:
            await self._reading.close()  # from here on nothing writes to the extents
        finally:
            self._fetcher.closed(self)

    def _landed(self, landings: Sequence[Landing]) -> None:
        """What came with a good checksum is told of together: most often that is all."""
        fetcher, fetch, places = self._fetcher, self._fetch, self.places
        good = {places[landing.index]: landing.checksum for landing in landings if landing.outcome is Outcome.LANDED}
        if good:
            self._owed -= len(good)
            fetcher.counts["landed"] += len(good)
            fetcher.counts["bytes"] += len(good) * fetch.size_bytes
            fetcher.rates.answered(self._path, len(good) * fetch.size_bytes, fetcher.clock())
            fetch.handle(Landed(self._number, list(good)), good)
        if len(good) < len(landings):
            for landing in landings:
                if landing.outcome is not Outcome.LANDED:
                    self._failed(landing)

    def _failed(self, landing: Landing) -> None:
        fetcher, fetch = self._fetcher, self._fetch
        place = self.places[landing.index]
        self._owed -= 1
        fetcher.counts[landing.outcome.value] += 1
        # Bytes that came wrong took the time of bytes; a copy that the holder found wrong itself has no checksum.
        moved = landing.outcome is Outcome.CORRUPT and landing.checksum
        fetcher.rates.answered(self._path, fetch.size_bytes if moved else 0, fetcher.clock())
        if landing.outcome is Outcome.NOT_HELD:
            fetcher.holders.forget(self._peer.name, fetch.keys[place])
        else:
            fetcher.warn(self._peer.name, fetch.keys[place], landing.outcome)
        fetch.handle(Missed(self._number, place))
