"""What is done to the nodes of a soak: kills, stops, and all that a network does. One random source decides.

Each fault lasts for a while and is then taken back; several may be under way. At most half of the nodes are killed or
stopped at once, so that there is somebody to ask.
"""

from __future__ import annotations

import heapq
import itertools
import random
import time
from collections import Counter
from collections.abc import Callable

from tests.soak.clients import Seat
from tests.support.plane import Node, Plane
from tests.support.proxy import Faults

LASTS_S = (0.2, 3.0)
EVERY_S = (0.2, 1.5)


class Weather:
    """All faults of one soak. `turn` is called often; `clear` ends what is under way."""

    def __init__(self, plane: Plane, seats: dict[str, Seat], rng: random.Random, memory: dict[str, str]) -> None:
        self._plane = plane
        self._seats = seats
        self._rng = rng
        self._memory = memory
        self._next_s = 0.0
        self._ends: list[tuple[float, int, str, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._down: set[str] = set()  # killed or stopped
        self._touched: set[tuple[str, str]] = set()  # (node, fault) under way
        self.counts: Counter[str] = Counter()

    def turn(self) -> None:
        """Take back what has lasted long enough, and begin something new now and then."""
        now = time.monotonic()
        while self._ends and self._ends[0][0] <= now:
            heapq.heappop(self._ends)[3]()
        if now >= self._next_s:
            self._next_s = now + self._rng.uniform(*EVERY_S)
            self._begin()

    def clear(self) -> None:
        """End every fault."""
        while self._ends:
            heapq.heappop(self._ends)[3]()

    def is_down(self, name: str) -> bool:
        """Whether a node was killed or stopped, and not brought back yet."""
        return name in self._down

    # --- inside ----------------------------------------------------------------------------------------------------
    def _begin(self) -> None:
        rng = self._rng
        node = self._plane.nodes[rng.choice(sorted(self._plane.nodes))]
        name = rng.choices(list(FAULTS), [weight for weight, _ in FAULTS.values()])[0]
        if (node.name, name) in self._touched or node.name in self._down:
            return
        if name in ("kill", "stop") and 2 * (len(self._down) + 1) > len(self._plane.nodes):
            return
        undo = FAULTS[name][1](self, node)
        self.counts[name] += 1
        self._touched.add((node.name, name))

        def end() -> None:
            undo()
            self._touched.discard((node.name, name))

        heapq.heappush(self._ends, (time.monotonic() + rng.uniform(*LASTS_S), next(self._numbers), name, end))

    def _kill(self, node: Node) -> Callable[[], None]:
        seat, name = self._seats[node.name], node.name
        seat.change(in_trouble=True)
        self._down.add(name)
        node.process.kill()

        def again() -> None:
            started = self._plane.start(name, memory=self._memory[name], transports=node.transports)
            self._down.discard(name)
            seat.change(in_trouble=False, socket=started.process.socket)

        return again

    def _stop(self, node: Node) -> Callable[[], None]:
        seat = self._seats[node.name]
        seat.change(in_trouble=True)
        self._down.add(node.name)
        node.process.pause()

        def go_on() -> None:
            node.process.resume()
            self._down.discard(node.name)
            seat.change(in_trouble=False)

        return go_on

    def _cut(self, node: Node) -> Callable[[], None]:
        node.proxy.cut(reset=self._rng.random() < 0.5)
        return _nothing

    def _swallow(self, node: Node) -> Callable[[], None]:
        node.proxy.swallow()
        return _nothing

    def _black_hole(self, node: Node) -> Callable[[], None]:
        node.proxy.black_hole = True

        def end() -> None:
            node.proxy.black_hole = False
            node.proxy.swallow()  # what came meanwhile has lost bytes, for ever

        return end

    def _pause(self, node: Node) -> Callable[[], None]:
        node.proxy.pause(new=self._rng.random() < 0.5)
        return node.proxy.resume

    def _throttle(self, node: Node) -> Callable[[], None]:
        faults = self._side(node)
        faults.bytes_per_s = 2 ** self._rng.uniform(16, 26)

        def end() -> None:
            faults.bytes_per_s = None

        return end

    def _delay(self, node: Node) -> Callable[[], None]:
        faults = self._side(node)
        faults.delay_s, faults.jitter_s = self._rng.uniform(0, 0.1), self._rng.uniform(0, 0.1)

        def end() -> None:
            faults.delay_s = faults.jitter_s = 0.0

        return end

    def _flip(self, node: Node) -> Callable[[], None]:
        faults = self._side(node)
        faults.flip_every_bytes = 2 ** self._rng.uniform(11, 23)

        def end() -> None:
            faults.flip_every_bytes = None

        return end

    def _tear(self, node: Node) -> Callable[[], None]:
        """Every connection ends at a byte: a new one in its handshake, or in some frame."""
        faults = self._side(node)
        faults.cut_after_bytes = int(2 ** self._rng.uniform(0, 23))
        faults.cut_resets = self._rng.random() < 0.5

        def end() -> None:
            faults.cut_after_bytes = None

        return end

    def _side(self, node: Node) -> Faults:
        return node.proxy.down if self._rng.random() < 0.7 else node.proxy.up


def _nothing() -> None:
    """There is nothing to take back."""


FAULTS: dict[str, tuple[float, Callable[[Weather, Node], Callable[[], None]]]] = {
    "kill": (1.0, Weather._kill),
    "stop": (2.0, Weather._stop),
    "cut": (3.0, Weather._cut),
    "swallow": (1.0, Weather._swallow),
    "black hole": (0.5, Weather._black_hole),
    "pause": (2.0, Weather._pause),
    "throttle": (3.0, Weather._throttle),
    "delay": (2.0, Weather._delay),
    "flip": (4.0, Weather._flip),
    "tear": (2.0, Weather._tear),
}
"""By name: how often, beside the others, and what does it; that returns what takes it back."""
