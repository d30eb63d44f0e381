"""The read plan: from which holders a chain is read, in which reads, and what happens when they do not deliver.

A chunk's life in a plan: *waiting* (nobody was asked) → *asked* (one read or more have it) → *done*, or *lost* with a
`Fate`. `kvmesh.shares` says who reads what next; this module keeps account and handles what goes wrong:

| what happens | what the plan does |
|---|---|
| a holder does not have a chunk, or its bytes are wrong | asks another one for it, best one that is at work already |
| the same | asks that holder no more for what others are said to have as well |
| a read ends early: the holder is dead, or refuses | leaves the holder, deals out all that it owed |
| the front is *late*, and another holder would be sooner | a *hedge*: asks that one for the first chunks as well |
| a late holder is *slow*: the others would be done sooner | leaves it as if it were dead |
| two holders failed a chunk, or nobody else has it | it is lost, and what waits behind it |
| two holders did not have it, and nobody else is at work | the same |
| there is no room to receive a chunk | it is lost, and what waits behind it |
| the deadline | all that is not done is lost |
| nobody can land the front by the deadline | all that is not done is lost at once: waiting costs, too |

Late: `PLAN_LATE_FACTOR` times as long as expected. Slow: its rest takes `PLAN_SLOW_FACTOR` times as long as the others
would take for theirs and for that. There is one hedge in a plan at most; whoever lands a chunk first wins. What is
lost takes with it what waits behind it, since a chain without its front is worth nothing; what was asked for already
still lands.

So a plan always ends, at its deadline at the latest, and a chunk is read by at most 1 + hedge + failed holders reads.
Sans-IO: events and the time (monotonic seconds) go in, actions come out. It sees neither bytes nor extents, and knows
its holders by their places in its list. The driver is `kvmesh.fetching`; the tests run it in virtual time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from kvmesh.shares import Source, divide
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
    Holder,
    Landed,
    Lose,
    Missed,
    NoRoom,
    Start,
    Tick,
    Wake,
)
from kvmesh.transport.limits import (
    DEADLINE_OPTIMISM,
    FETCH_FAILED_HOLDERS_MAX,
    PLAN_HEDGE_BYTES_MAX,
    PLAN_LATE_FACTOR,
    PLAN_LATE_S_MIN,
    PLAN_SHARE_S_MIN,
    PLAN_SLOW_FACTOR,
)

_WAITING, _ASKED, _DONE, _LOST = range(4)


class _Read:
    """An open read: what it owes, and what was expected of it."""

    __slots__ = ("ahead", "hedge", "id", "left", "pace_s", "places", "source", "started")

    def __init__(self, id_: int, source: Source, chunks: Sequence[int], now: float, *, hedge: bool) -> None:
        self.id = id_
        self.source = source
        self.hedge = hedge
        self.started = now
        self.ahead = source.out
        self.pace_s = source.pace_s(now)
        self.left = dict.fromkeys(chunks)
        self.places = {chunk: place for place, chunk in enumerate(chunks, 1)}

    def due(self, chunk: int) -> float:
        """From when on the chunk is late."""
        expected_s = (self.ahead + self.places[chunk]) * self.pace_s
        return self.started + self.source.rtt_s + PLAN_LATE_FACTOR * expected_s + PLAN_LATE_S_MIN


class ReadPlan:
    """The plan for `chunks` chunks of equal size. `holders`: the preferred first, equals in random order."""

    def __init__(self, chunks: int, chunk_bytes: int, holders: Sequence[Holder], deadline: float) -> None:
        self._chunk_bytes = chunk_bytes
        self._deadline = deadline
        self._sources = [Source(i, chunk_bytes, h.bytes_per_s, h.rtt_s) for i, h in enumerate(holders)]
        self._masks = [0] * chunks
        """Who may be asked for each chunk: bits of sources."""
        for source, holder in zip(self._sources, holders, strict=True):
            for chunk in (chunk for span in holder.spans for chunk in span):
                self._masks[chunk] |= source.bit
        self._states = bytearray(chunks)
        self._askers = bytearray(chunks)
        """How many open reads have the chunk."""
        self._failures: dict[int, tuple[int, int]] = {}
        """Of a chunk: how many holders failed it, and how many did not have it."""
        self._waiting = list(range(chunks))
        self._open = chunks
        self._front = 0
        """No chunk before it is open."""
        self._hole = chunks
        """The first chunk that is lost: nothing behind it is asked for any more."""
        self._reads: dict[int, _Read] = {}
        self._next_read = 0
        self._near_end = deadline
        """From here on each landing asks whether the next one can be in time."""
        self.hedges = 0
        self.reassigned = 0
        """Chunks that were asked for again because a holder was dead, slow or without them."""

    def handle(self, event: Event, now: float) -> list[Action]:
        """What to do about `event`. Events of reads that are over, and all events after `Finish`, do nothing."""
        if not self._open:
            return []
        actions: list[Action] = []
        match event:
            case Landed():
                self._landed(event, now, actions)
            case Tick():
                self._tick(now, actions)
            case Begin():
                self._lose([c for c, mask in enumerate(self._masks) if not mask], Fate.MISS, actions)
                self._fill(now, actions)
                self._tick(now, actions)
            case _:
                read = self._reads.get(event.read)
                if read is not None:
                    self._changed(event, read, now, actions)
        if not self._open:
            actions += [Cancel(read.id, late=False) for read in self._reads.values()]
            self._reads.clear()
            actions.append(Finish())
        return actions

    # --- landings: the common case, cheap ----------------------------------------------------------------------------
    def _landed(self, event: Landed, now: float, actions: list[Action]) -> None:
        read = self._reads.get(event.read)
        if read is None:
            return
        source, left, states, askers = read.source, read.left, self._states, self._askers
        settled = len(left)
        came: list[int] = []
        raced: list[int] = []
        for chunk in event.chunks:
            if chunk not in left:
                continue
            del left[chunk]
            askers[chunk] -= 1
            if states[chunk] == _ASKED:
                states[chunk] = _DONE
                came.append(chunk)
                if askers[chunk]:
                    raced.append(chunk)
        settled -= len(left)
        if not settled:
            return
        source.settle(now, settled, landed=True)
        if not left:
            self._close(read)
        if came:
            self._open -= len(came)
            actions.append(Commit(read.id, came))
        for chunk in raced:
            self._drop_useless(chunk, now, actions)
        if self._waiting and source.out <= source.low:
            self._fill(now, actions)
        if now >= self._near_end:
            self._tick(now, actions)

    def _settle(self, read: _Read, chunk: int, now: float) -> None:
        """The read owes the chunk no more, which it did not bring."""
        del read.left[chunk]
        self._askers[chunk] -= 1
        read.source.settle(now)
        if not read.left:
            self._close(read)

    def _close(self, read: _Read) -> None:
        del self._reads[read.id]
        read.source.reads -= 1

    def _done(self, chunk: int) -> None:
        self._states[chunk] = _DONE
        self._open -= 1

    def _drop_useless(self, chunk: int, now: float, actions: list[Action]) -> None:
        """The chunk is done, and other reads have it too: is there anything left that they are good for?"""
        for read in [read for read in self._reads.values() if chunk in read.left]:
            if all(self._states[other] != _ASKED for other in read.left):
                self._cancel(read, now, actions, late=not read.hedge)

    # --- what goes wrong ---------------------------------------------------------------------------------------------
    def _changed(self, event: Missed | Held | NoRoom | Ended, read: _Read, now: float, actions: list[Action]) -> None:
        match event:
            case Missed() if event.chunk in read.left:
                self._settle(read, event.chunk, now)
                self._doubt(read.source)
                self._ask_again([event.chunk], read.source, actions, missed=True)
            case Held() if event.chunk in read.left:
                self._settle(read, event.chunk, now)
                if self._states[event.chunk] == _ASKED:
                    self._done(event.chunk)
            case NoRoom():
                for chunk in event.chunks:
                    self._settle(read, chunk, now)
                if not read.hedge:
                    self._lose(event.chunks, Fate.FULL, actions)
            case Ended() if now >= self._deadline:
                self._give_up(now, actions)
            case Ended():
                self._leave(read.source, now, actions, late=False, ended=read)
        if self._open:
            self._fill(now, actions)
            self._wake(now, actions)

    def _leave(self, source: Source, now: float, actions: list[Action], *, late: bool, ended: _Read | None) -> None:
        """Ask nothing more of a holder, and others for all that it owes."""
        source.failed = True
        owed: list[int] = []
        for read in [read for read in self._reads.values() if read.source is source]:
            owed += read.left
            self._cancel(read, now, actions, late=late, tell=read is not ended)
        self._ask_again(owed, source, actions)

    def _cancel(self, read: _Read, now: float, actions: list[Action], *, late: bool, tell: bool = True) -> None:
        for chunk in read.left:
            self._askers[chunk] -= 1
        read.source.settle(now, len(read.left))
        read.left.clear()
        self._close(read)
        if tell:
            actions.append(Cancel(read.id, late))

    def _ask_again(self, chunks: Iterable[int], failed: Source, actions: list[Action], *, missed: bool = False) -> None:
        """These chunks did not come from `failed`. `missed`: at the cost of a round trip only."""
        lost: list[int] = []
        again: list[int] = []
        for chunk in chunks:
            self._masks[chunk] &= ~failed.bit
            failures, misses = self._failures.get(chunk, (0, 0))
            failures, misses = self._failures[chunk] = (failures + (not missed), misses + missed)
            if self._askers[chunk] or self._states[chunk] != _ASKED:
                continue  # the other read of a hedge has it, or brought it
            # Those that are at work for this plan anyway: the map was not wrong about them yet.
            at_work = sum(s.bit for s in self._others(chunk) if not s.doubtful and (s.landed or s.out))
            tried = failures + (0 if at_work else misses)
            if tried >= FETCH_FAILED_HOLDERS_MAX or chunk > self._hole or not any(self._others(chunk)):
                lost.append(chunk)
            else:
                self._masks[chunk] = at_work or self._masks[chunk]
                self._states[chunk] = _WAITING
                again.append(chunk)
        if again:
            self.reassigned += len(again)
            self._waiting = sorted([*again, *self._waiting])
        # What waited for this holder alone waits for nobody now.
        lost += [c for c in self._waiting if failed.failed and not any(self._others(c))]
        self._lose(lost, Fate.MISS, actions)

    def _doubt(self, source: Source) -> None:
        """Ask a holder no more for what another one is said to have as well, after it did not have a chunk."""
        if source.doubtful:
            return
        source.doubtful = True
        for chunk in self._waiting:
            if any(not other.doubtful for other in self._others(chunk)):
                self._masks[chunk] &= ~source.bit

    def _lose(self, chunks: Sequence[int], fate: Fate, actions: list[Action]) -> None:
        """These chunks do not come, and what waits behind the first of them is not asked for."""
        gone = {c for c in chunks if self._states[c] < _DONE and not self._askers[c]}
        if not gone:
            return
        self._hole = min(self._hole, *gone)
        gone.update(c for c in self._waiting if c > self._hole)
        for chunk in gone:
            self._states[chunk] = _LOST
        self._open -= len(gone)
        self._waiting = [c for c in self._waiting if c not in gone]
        actions.append(Lose(tuple(sorted(gone)), fate))

    def _others(self, chunk: int) -> Iterator[Source]:
        """The holders that may be asked for the chunk."""
        return (s for s in self._sources if self._masks[chunk] & s.bit and not s.failed)

    # --- dealing out -------------------------------------------------------------------------------------------------
    def _fill(self, now: float, actions: list[Action]) -> None:
        if not self._waiting:
            return
        if not self._reads and self._too_late(self._waiting[0], None, now):
            self._give_up(now, actions)
            return
        urgent = self._waiting[0] == self._first_open()
        live = [source for source in self._sources if not source.failed]
        shares, self._waiting = divide(
            self._waiting, self._masks, live, now, self._deadline - now, urgent=urgent and bool(self._reads)
        )
        for source, share in shares:
            self._start(source, share, now, actions)
        for source in live:
            rate = source.rate(now) if len(live) > 1 else None
            if rate is not None:
                source.low = int(rate * (source.rtt_s + PLAN_SHARE_S_MIN) / self._chunk_bytes)
            # Half of what is out: a source that got no more than this is not asked about at every landing.
            source.low = min(source.low, source.out // 2) if rate is not None else source.out // 2
        self._near_end = self._deadline - max((s.pace_s(now) for s in live), default=0.0)
        if self._waiting and not self._reads:
            self._give_up(now, actions)

    def _start(
        self, source: Source, chunks: Sequence[int], now: float, actions: list[Action], *, hedge: bool = False
    ) -> None:
        read = _Read(self._next_read, source, chunks, now, hedge=hedge)
        self._next_read += 1
        self._reads[read.id] = read
        source.ask(len(chunks), now)
        for chunk in chunks:
            self._states[chunk] = _ASKED
            self._askers[chunk] += 1
        actions.append(Start(read.id, source.index, tuple(chunks), hedge))

    # --- time --------------------------------------------------------------------------------------------------------
    def _first_open(self) -> int:
        states = self._states
        front = self._front
        while states[front] >= _DONE:
            front += 1
        self._front = front
        return front

    def _reader(self, chunk: int) -> _Read | None:
        """Of the reads that have the chunk, the one that was started last."""
        found = None
        for read in self._reads.values():
            if chunk in read.left:
                found = read
        return found

    def _tick(self, now: float, actions: list[Action]) -> None:
        if not self._open:
            return
        if now >= self._deadline:
            self._give_up(now, actions)
            return
        front = self._first_open()
        read = self._reader(front)
        if self._too_late(front, read, now):
            self._give_up(now, actions)
            return
        if read is not None and front < self._hole and now >= read.due(front):
            self._late(read, front, now, actions)
        if self._open:
            self._wake(now, actions)

    def _wake(self, now: float, actions: list[Action]) -> None:
        front = self._first_open()
        read = self._reader(front)
        at = self._deadline
        if read is not None and front < self._hole and len(self._sources) > 1:
            at = min(at, max(read.due(front), now + PLAN_LATE_S_MIN))
        actions.append(Wake(at))

    def _late(self, read: _Read, front: int, now: float, actions: list[Action]) -> None:
        """The front is late at `read`: ask another holder as well, or instead."""
        source = read.source
        others = [other for other in self._others(front) if other is not source]
        if not others:
            return
        best = min(others, key=lambda other: other.rtt_s + other.pace_s(now))
        if not self.hedges and 2 * (best.rtt_s + best.pace_s(now)) < source.dragging_s(now):
            self.hedges += 1
            most = max(1, PLAN_HEDGE_BYTES_MAX // self._chunk_bytes)
            first = [c for c in read.left if c >= front and self._masks[c] & best.bit and self._states[c] == _ASKED]
            self._start(best, sorted(first)[:most], now, actions, hedge=True)
            return
        together = sum(self._chunk_bytes / other.pace_s(now) for other in others)
        rest_s = (source.out + sum(other.out for other in others)) * self._chunk_bytes / together
        if source.out * source.dragging_s(now) > PLAN_SLOW_FACTOR * (rest_s + best.rtt_s):
            self._leave(source, now, actions, late=True, ended=None)
            if self._open:
                self._fill(now, actions)

    def _too_late(self, front: int, read: _Read | None, now: float) -> bool:
        """Whether no holder can land the front by the deadline, even if it is faster than it seems."""
        left_s = (self._deadline - now) * DEADLINE_OPTIMISM
        if read is not None and read.source.pace_s(now) <= left_s:
            return False
        return all(other.rtt_s + other.pace_s(now) > left_s for other in self._others(front))

    def _give_up(self, now: float, actions: list[Action]) -> None:
        """All that is open is lost: it is too late, or will be."""
        fate = Fate.DEADLINE if now >= self._deadline else Fate.PRICE
        lost = tuple(c for c in range(self._first_open(), len(self._states)) if self._states[c] < _DONE)
        actions += [Cancel(read.id, late=True) for read in self._reads.values()]
        self._reads.clear()
        self._waiting = []
        self._open = 0
        actions.append(Lose(lost, fate))
