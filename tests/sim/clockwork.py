"""Virtual time: a heap of events, and nothing else."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from typing import Any


class Clockwork:
    """Runs calls in the order of their times; equal times in the order in which they were set."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.events = 0
        """Calls that were run."""
        self._heap: list[tuple[float, int, Callable[..., object], tuple[Any, ...]]] = []
        self._numbers = itertools.count()

    def at(self, when: float, call: Callable[..., object], *arguments: Any) -> None:
        """Run `call` at `when`, or now if that is past."""
        now = self.now
        heapq.heappush(self._heap, (max(now, when), next(self._numbers), call, arguments))

    def after(self, delay_s: float, call: Callable[..., object], *arguments: Any) -> None:
        """Run `call` in `delay_s`."""
        self.at(self.now + delay_s, call, *arguments)

    def run_until(self, end: float) -> None:
        """Run everything up to and with `end`."""
        heap, pop, events = self._heap, heapq.heappop, 0
        while heap and heap[0][0] <= end:
            self.now, _, call, arguments = pop(heap)
            events += 1
            call(*arguments)
        self.now = end
        self.events += events

    def run_for(self, duration_s: float) -> None:
        """Run everything of the next `duration_s`."""
        self.run_until(self.now + duration_s)

    def run_until_true(self, condition: Callable[[], bool], *, within_s: float, step_s: float = 0.1) -> bool:
        """Run in steps until `condition` holds. False when it does not `within_s`."""
        end = self.now + within_s
        while not condition():
            if self.now >= end:
                return False
            self.run_until(min(self.now + step_s, end))
        return True
