"""Things to do later, in the order of their times. A heap; no clock."""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Callable

NEVER = float("inf")


class Timers:
    """Callbacks get the time at which they run. None can be taken back: each looks whether it is still wanted."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Callable[[float], None]]] = []
        self._numbers = itertools.count()

    def at(self, when: float, call: Callable[[float], None]) -> None:
        """Run `call` at `when`."""
        heapq.heappush(self._heap, (when, next(self._numbers), call))

    def next_at(self) -> float:
        """The time of the earliest; `NEVER` when there is none."""
        return self._heap[0][0] if self._heap else NEVER

    def run(self, now: float) -> None:
        """Run what is due, but nothing that is set meanwhile for now: a timer that sets itself cannot hang this."""
        due: deque[Callable[[float], None]] = deque()
        while self._heap and self._heap[0][0] <= now:
            due.append(heapq.heappop(self._heap)[2])
        try:
            while due:
                due.popleft()(now)
        finally:
            for call in due:  # after an error of one: it is not that of the others
                self.at(now, call)

    def delay(self, by_s: float) -> None:
        """Put everything off: the process did not run for so long."""
        self._heap = [(when + by_s, number, call) for when, number, call in self._heap]
