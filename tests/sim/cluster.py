"""A mesh of memberships alone, for the figures: no journals, no maps, so a thousand nodes fit into one process.

A cluster is made once for each size and grown by the protocol itself: nodes join through one that is there. Then it
rests until nobody has anything to say any more. Figures are measured on forks of the process, so each begins with the
same rested cluster.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from kvmesh.discovery.gossip import GossipMembership
from kvmesh.discovery.membership import Failed
from kvmesh.discovery.swim.machine import Swim
from kvmesh.discovery.swim.profile import Profile
from kvmesh.discovery.wire.messages import PushedState
from tests.sim.clockwork import Clockwork
from tests.sim.kinds import gossip_kind
from tests.sim.network import Network, Weather
from tests.sim.process import GOSSIP_PORT, Node, Start, dotted, ip_of
from tests.sim.wire import Wire

JOIN_AT_ONCE = 50
"""Nodes that join in the same second while a cluster is made."""
DELAY_S = 0.001


class Cluster:
    """`size` nodes that know each other."""

    def __init__(self, size: int, profile: Profile, *, seed: int, wire: Wire | None = None) -> None:
        self.profile = profile
        self.random = Random(seed)
        self.clockwork = Clockwork()
        self.network = Network(self.clockwork, self.random, Weather(delay_s=DELAY_S), wire)
        self.nodes: list[Node] = []
        self.watchers: list[Callable[[Node, object], None]] = []
        """Called with each event that a membership tells."""
        self._kind = gossip_kind(profile)
        self._starts = 0
        for first in range(0, size, JOIN_AT_ONCE):
            for _ in range(first, min(first + JOIN_AT_ONCE, size)):
                self.join()
            self.clockwork.run_for(1.0)
        assert self.clockwork.run_until_true(self.all_know_all, within_s=300.0, step_s=1.0), "the cluster never formed"
        assert self.clockwork.run_until_true(self.is_at_rest, within_s=300.0, step_s=1.0), "the cluster never rested"

    def join(self, *, name: str | None = None, ip: bytes | None = None) -> Node:
        """Start a node, through one that is there."""
        self._starts += 1
        number = self._starts
        there = [node for node in self.nodes if node.running]
        seeds = [f"{dotted(self.random.choice(there).ip)}:{GOSSIP_PORT}"] if there else []
        start = Start(name or f"n{number}", number, ip or ip_of(number), seeds)
        node = Node(start, self._kind, self.network, self.random, self._on_notice)
        self.nodes.append(node)
        node.begin()
        return node

    def crash(self, node: Node, *, host_up: bool = True) -> None:
        """Gone."""
        node.crash(host_up=host_up)
        self.nodes.remove(node)

    def all_know_all(self) -> bool:
        """Everybody sees everybody alive, and nobody else."""
        names = {node.name for node in self.nodes}
        return all(alive_at(node) == names for node in self.nodes)

    def nobody_sleeps(self) -> bool:
        """Every machine that runs will be woken: one that forgot to ask for it is dead, and does not know."""
        return not any(node.sleeps for node in self.nodes)

    def is_at_rest(self) -> bool:
        """Nobody has a rumour to tell."""
        return not any(rumours_of(node) for node in self.nodes)

    @property
    def sent_bytes(self) -> int:
        """By all nodes that are there, so far."""
        return sum(node.sent_bytes for node in self.nodes)

    def _on_notice(self, viewer: Node, event: object) -> None:
        for watcher in self.watchers:
            watcher(viewer, event)


def alive_at(node: Node) -> set[str]:
    """The names that a node sees alive, its own included. (Not by `members()`: that is slow for a million of them.)"""
    return {known.name for known in swim_of(node).table if known.state is PushedState.ALIVE}


def swim_of(node: Node) -> Swim:
    """The protocol of a node."""
    assert isinstance(node.membership, GossipMembership)
    return node.membership.swim


def rumours_of(node: Node) -> int:
    """Rumours that the node still passes on."""
    return swim_of(node).rumours


class FalseDeaths:
    """Counts who is declared failed and runs, by node that says so."""

    def __init__(self, cluster: Cluster) -> None:
        self._by_name = {node.name: node for node in cluster.nodes}
        self.told: list[tuple[float, str, str]] = []
        """When, who, and of whom."""
        self._cluster = cluster
        cluster.watchers.append(self._on_notice)

    def _on_notice(self, viewer: Node, event: object) -> None:
        if isinstance(event, Failed):
            victim = self._by_name.get(event.member.name)
            if victim is not None and victim.running:
                self.told.append((self._cluster.clockwork.now, viewer.name, victim.name))
