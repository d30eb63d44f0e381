"""A slow process: one that gets the processor too seldom. For a while it does nothing for 0.1 to 1.5 s, then runs for a
moment, again and again; what comes meanwhile waits. So whatever reaches it is handled up to 1.5 s late."""

from __future__ import annotations

from random import Random

from tests.sim.clockwork import Clockwork
from tests.sim.process import Node

STALL_S = (0.1, 1.5)
RUN_S = (0.0, 0.3)


def be_slow(node: Node, clockwork: Clockwork, random: Random, for_s: float) -> None:
    """From now on, `for_s` long."""
    until = clockwork.now + for_s

    def stall() -> None:
        if node.running and clockwork.now < until:
            node.stop()
            clockwork.after(random.uniform(*STALL_S), resume)

    def resume() -> None:
        node.resume()
        clockwork.after(random.uniform(*RUN_S), stall)

    stall()


class Bouts:
    """Makes a node slow again and again."""

    def __init__(
        self,
        node: Node,
        clockwork: Clockwork,
        random: Random,
        *,
        slow_s: tuple[float, float],
        well_s: tuple[float, float],
    ) -> None:
        self.node = node
        self.slow_until = float("-inf")
        self._clockwork, self._random = clockwork, random
        self._slow_s, self._well_s = slow_s, well_s
        clockwork.after(random.uniform(*well_s), self._begin)

    def _begin(self) -> None:
        for_s = self._random.uniform(*self._slow_s)
        self.slow_until = self._clockwork.now + for_s + STALL_S[1]
        be_slow(self.node, self._clockwork, self._random, for_s)
        self._clockwork.after(for_s + self._random.uniform(*self._well_s), self._begin)
