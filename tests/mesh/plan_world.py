"""Holders in virtual time, for tests of the read plan: no loop, no bytes, every run the same.

A holder serves one chunk after the other, its open reads in turn, at `bytes_per_s`; what it says takes half a round
trip in each direction.
"""

from __future__ import annotations

import heapq
import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from kvmesh.plan import ReadPlan
from kvmesh.steps import (
    Action,
    Begin,
    Cancel,
    Commit,
    Ended,
    Event,
    Fate,
    Finish,
    Holder,
    Landed,
    Lose,
    Missed,
    Start,
    Tick,
    Wake,
)

MIB = 1 << 20


@dataclass
class SimHolder:
    """A holder as it really is; `told` is what the plan believes of its rate."""

    bytes_per_s: float
    rtt_s: float = 0.001
    told: float | None = None
    spans: tuple[range, ...] | None = None
    """None: the whole chain."""
    not_held: frozenset[int] = frozenset()
    """What it is believed to hold and does not."""
    dies_at: float = float("inf")
    """From then on its reads end."""
    stalls_at: float = float("inf")
    """From then on it says nothing."""
    jitter: Sequence[float] = (1.0,)
    """Factors of the time of each chunk, in turn."""
    open: dict[int, list[int]] = field(default_factory=dict)
    serving: bool = False
    served: int = 0


class World:
    """One plan and its holders. `run` plays it to its end."""

    def __init__(self, chunks: int, holders: Sequence[SimHolder], *, deadline: float = 60.0, size: int = MIB) -> None:
        self.now = 0.0
        self.chunks = chunks
        self.size = size
        self.holders = holders
        self.deadline = deadline
        everything = (range(chunks),)
        self.plan = ReadPlan(
            chunks,
            size,
            [Holder(everything if h.spans is None else h.spans, h.told, h.rtt_s) for h in holders],
            deadline,
        )
        self.starts: list[tuple[float, Start]] = []
        self.cancels: list[tuple[float, Cancel]] = []
        self.commits: dict[int, float] = {}
        self.lost: dict[int, Fate] = {}
        self.failures: Counter[int] = Counter()
        """Reads that failed a chunk."""
        self.finished_at = -1.0
        self.on_start: Callable[[Start], None] = lambda _start: None
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._reads: dict[int, tuple[int, set[int]]] = {}
        self._wake_number = 0

    @property
    def front(self) -> list[float]:
        """When each chunk and all before it had landed."""
        return list(itertools.accumulate((self.commits[c] for c in range(self.chunks)), max))

    def run(self) -> World:
        self.tell(Begin())
        while self.finished_at < 0:
            assert self._queue, "the plan waits for something that will never come"
            self.now, _, call = heapq.heappop(self._queue)
            call()
        return self

    def tell(self, event: Event) -> None:
        for action in self.plan.handle(event, self.now):
            self._do(action)

    def _at(self, when: float, call: Callable[[], None]) -> None:
        heapq.heappush(self._queue, (max(when, self.now), next(self._numbers), call))

    def _do(self, action: Action) -> None:
        assert self.finished_at < 0, "nothing follows Finish"
        match action:
            case Start():
                self._start(action)
            case Commit(read, chunks):
                assert chunks
                assert read in self._reads
                for chunk in chunks:
                    assert chunk not in self.commits
                    assert chunk not in self.lost
                    self.commits[chunk] = self.now
            case Cancel(read):
                self.cancels.append((self.now, action))
                holder, owed = self._reads.pop(read)
                self.failures.update(chunk for chunk in owed if chunk not in self.commits)
                self._at(self.now + self.holders[holder].rtt_s / 2, lambda: self._stop(holder, read))
            case Lose(chunks, fate):
                assert chunks
                for chunk in chunks:
                    assert chunk not in self.lost
                    assert chunk not in self.commits
                    self.lost[chunk] = fate
            case Wake(at):
                self._wake_number = number = next(self._numbers)
                self._at(at, lambda: self._wake(number))
            case Finish():
                self.finished_at = self.now

    def _start(self, action: Start) -> None:
        assert action.chunks
        self.starts.append((self.now, action))
        self._reads[action.read] = (action.holder, set(action.chunks))
        holder = self.holders[action.holder]
        self._at(self.now + holder.rtt_s / 2, lambda: self._arrive(action))
        self._at(max(holder.dies_at, self.now) + holder.rtt_s, lambda: self._end(action.read))
        self.on_start(action)

    def _wake(self, number: int) -> None:
        if number == self._wake_number:
            self.tell(Tick())

    def _arrive(self, action: Start) -> None:
        holder = self.holders[action.holder]
        holder.open[action.read] = list(action.chunks)
        self._serve(holder)

    def _stop(self, holder: int, read: int) -> None:
        self.holders[holder].open.pop(read, None)

    def _serve(self, holder: SimHolder) -> None:
        if holder.serving or not holder.open or self.now >= min(holder.dies_at, holder.stalls_at):
            return
        holder.serving = True
        read, chunks = next(iter(holder.open.items()))
        chunk = chunks.pop(0)
        del holder.open[read]
        if chunks:
            holder.open[read] = chunks  # behind the others: they take turns
        missing = chunk in holder.not_held
        took_s = 0.0 if missing else self.size / holder.bytes_per_s * holder.jitter[holder.served % len(holder.jitter)]
        holder.served += not missing
        self._at(self.now + took_s, lambda: self._served(holder, read, chunk, missing))

    def _served(self, holder: SimHolder, read: int, chunk: int, missing: bool) -> None:
        holder.serving = False
        if self.now < min(holder.dies_at, holder.stalls_at):
            event = Missed(read, chunk) if missing else Landed(read, [chunk])
            self._at(self.now + holder.rtt_s / 2, lambda: self._deliver(event))
            self._serve(holder)

    def _deliver(self, event: Landed | Missed) -> None:
        if event.read in self._reads:
            chunks = (event.chunk,) if isinstance(event, Missed) else event.chunks
            self._reads[event.read][1].difference_update(chunks)
            self.failures.update(chunks if isinstance(event, Missed) else ())
        self.tell(event)

    def _end(self, read: int) -> None:
        if read in self._reads:
            self.failures.update(self._reads[read][1])
            self.tell(Ended(read))
            self._reads.pop(read, None)
