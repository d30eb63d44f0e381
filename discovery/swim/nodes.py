"""What this node believes of each node, itself included, and the order in which it probes them. Bookkeeping only: what
a message changes is decided in `beliefs`.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random

from kvmesh.discovery.membership import smoothed_s
from kvmesh.discovery.wire.messages import Alive, Endpoint, PushedNode, PushedState
from kvmesh.transport.limits import FAILED_FORGOTTEN_S

from .suspicion import Suspicion
from .timers import NEVER

ALIVE, SUSPECT, DEAD, LEFT = PushedState.ALIVE, PushedState.SUSPECT, PushedState.DEAD, PushedState.LEFT
_CRC_SINCE = 5
_NACK_SINCE = 4


@dataclass(slots=True, eq=False)
class Node:
    """One node, as believed here."""

    name: str
    endpoint: Endpoint
    meta: bytes
    versions: bytes
    incarnation: int
    state: PushedState
    changed_at: float
    """When `state` last changed."""
    seen_at: float
    """When it last answered, or spoke for itself."""
    suspicion: Suspicion | None = None
    """While it is suspect."""
    verdict_at: float = NEVER
    """When its suspicion is looked at next."""
    namesake: tuple[Endpoint, float] | None = None
    """Where a process pings from that has its name and another address, and since when."""
    rtt_s: float | None = None
    """A smoothed round trip; None before the first."""

    @property
    def is_gone(self) -> bool:
        """Dead or left."""
        return self.state >= DEAD

    @property
    def reads_crc(self) -> bool:
        """It checks a packet's CRC."""
        return len(self.versions) >= 2 and self.versions[1] >= _CRC_SINCE

    @property
    def sends_nack(self) -> bool:
        """It says so when a node that it was asked to probe does not answer."""
        return len(self.versions) >= 2 and self.versions[1] >= _NACK_SINCE

    def measured(self, rtt_s: float) -> None:
        """A round trip took so long."""
        self.rtt_s = smoothed_s(self.rtt_s, rtt_s)

    def alive(self) -> Alive:
        """The message that says what is believed."""
        return Alive(
            self.incarnation, self.name, self.endpoint.ip, self.endpoint.port, self.meta, self.versions
        )  # fmt: skip

    def pushed(self) -> PushedNode:
        """The same for a push/pull."""
        ip, port = self.endpoint
        return PushedNode(self.name, ip, port, self.meta, self.incarnation, self.state, self.versions)


class NodeTable:
    """Name → node. Bounded by `nodes_max`."""

    def __init__(self, random: Random, nodes_max: int) -> None:
        self.there = 0
        """Nodes that are not gone."""
        self._random = random
        self._max = nodes_max
        self._nodes: dict[str, Node] = {}
        self._order: list[Node] = []
        """In which they are probed; shuffled each round, so that no two nodes probe in the same order for long."""
        self._next = 0

    def __iter__(self) -> Iterator[Node]:
        return iter(self._order)

    def __len__(self) -> int:
        return len(self._order)

    def get(self, name: str) -> Node | None:
        """The node of that name."""
        return self._nodes.get(name)

    def add(self, node: Node) -> bool:
        """A new name, at a random place of the order: were it always the last, its crash would be seen late. False when
        there is no room, and nobody is gone who could make room."""
        if len(self._order) >= self._max:
            gone = len(self._order) - self.there
            if not gone:
                return False
            # A sixteenth at once: a look at all of them for each new name would stop this process for seconds.
            longest = heapq.nsmallest(
                1 + gone // 16, (other for other in self._order if other.is_gone), key=lambda other: other.changed_at
            )
            self._remove(longest)
        self._nodes[node.name] = node
        place = self._random.randrange(len(self._order) + 1)
        self._order.append(node)
        self._order[place], self._order[-1] = node, self._order[place]
        self.there += not node.is_gone
        return True

    def set_state(self, node: Node, state: PushedState, now: float) -> None:
        """The state changes; whoever becomes anything but suspect is not suspected any more."""
        self.there += (state < DEAD) - (node.state < DEAD)
        node.state, node.changed_at = state, now
        if state is not SUSPECT:
            node.suspicion = None

    def next_to_probe(self, own: Node, now: float) -> Node | None:
        """The next in order that is there; None when nobody is."""
        for _ in range(2 * len(self._order)):
            if self._next >= len(self._order):
                self._forget_long_gone(now)
                self._random.shuffle(self._order)
                self._next = 0
            node = self._order[self._next]
            self._next += 1
            if node is not own and node.state < DEAD:
                return node
        return None

    def some(self, count: int, wanted: Callable[[Node], bool]) -> list[Node]:
        """At most `count` different ones that are wanted, at random."""
        order, random = self._order, self._random.random
        size = len(order)
        if size <= 3 * count:
            return (
                self._random.sample(found, min(count, len(found))) if (found := [n for n in order if wanted(n)]) else []
            )
        chosen: list[Node] = []
        # Where few are wanted among many, drawing would take for ever: it stops, and one look at all decides.
        for _ in range(3 * size if size < 64 else 64):
            node = order[int(random() * size)]
            if wanted(node) and node not in chosen:
                chosen.append(node)
                if len(chosen) == count:
                    return chosen
        rest = [node for node in order if wanted(node) and node not in chosen]
        return chosen + self._random.sample(rest, min(count - len(chosen), len(rest)))

    def _forget_long_gone(self, now: float) -> None:
        self._remove([node for node in self._order if node.is_gone and now - node.changed_at >= FAILED_FORGOTTEN_S])

    def _remove(self, nodes: list[Node]) -> None:
        if nodes:
            for node in nodes:
                del self._nodes[node.name]
            self._order = [node for node in self._order if self._nodes.get(node.name) is node]
            self._next = min(self._next, len(self._order))
