"""Virtual time: a heap of events, and nothing else."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable


class Clockwork:
    """Runs callbacks in the order of their times; equal times in the order in which they were set."""

    def __init__(self) -> None:
        self.now = 1000.0
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()

    def at(self, when: float, call: Callable[[], None]) -> None:
        """Run `call` at `when`, or now if that is past."""
        heapq.heappush(self._heap, (max(when, self.now), next(self._numbers), call))

    def after(self, delay_s: float, call: Callable[[], None]) -> None:
        """Run `call` in `delay_s`."""
        self.at(self.now + delay_s, call)

    def run_until(self, end: float) -> None:
        """Run everything up to and with `end`."""
        while self._heap and self._heap[0][0] <= end:
            self.now, _, call = heapq.heappop(self._heap)
            call()
        self.now = end
