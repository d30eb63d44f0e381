"""What must hold at any moment of a chaos seed, and what must be true of a process at its end.

At any moment, for each process that looks on:
    the epoch that it sees of a name never goes back (late frames of an earlier start are ignored: fault 10)
    a larger epoch empties that node's table in the map at once
    the incarnation that it tells of one start of a name never goes back
    nobody is said to use the name of another: here every name has one process at a time
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from kvmesh.discovery.gossip import GossipMembership
from kvmesh.discovery.membership import Changed, Conflict, Joined
from kvmesh.discovery.meta import Meta, decode_meta
from kvmesh.discovery.wire.messages import Alive, Dead, Message, Suspect
from kvmesh.transport.limits import RUMOURS_MAX
from tests.sim.clockwork import Clockwork
from tests.sim.network import Network
from tests.sim.process import Node, Process

TIMERS_PER_NODE_MAX = 20
PACKET_BYTES_MAX = 1400
"""What memberlist's profiles allow."""


class Watch:
    """Reports through `expect(holds, problem)`."""

    def __init__(self, clockwork: Clockwork, expect: Callable[[bool, str], None]) -> None:
        self._clockwork = clockwork
        self._expect = expect
        self._epochs: dict[Node, dict[str, int]] = {}
        self._told: dict[Node, dict[str, tuple[int, int]]] = {}
        """The newest epoch and incarnation of each name, of those that a process told others."""
        self._to_check: list[str] = []
        """Names whose tables are looked at after the event that is being handled."""

    def on_start(self, node: Node) -> None:
        """A process starts."""
        self._epochs[node], self._told[node] = {}, {}

    def on_notice(self, viewer: Node, event: object) -> None:
        """A membership told something."""
        if isinstance(event, Conflict):
            self._say(f"{viewer.name} saw a conflict of names: {event}")
        elif isinstance(event, (Joined, Changed)):
            name, epoch = event.member.name, event.member.epoch
            epochs = self._epochs[viewer]
            if epoch < epochs.get(name, 0):
                self._say(f"{viewer.name} went back from epoch {epochs[name]} of {name} to {epoch}")
            epochs[name] = max(epoch, epochs.get(name, 0))
            self._to_check.append(name)

    def on_event(self, viewer: Process) -> None:
        """An event was handled."""
        while self._to_check:
            name = self._to_check.pop()
            if viewer.leaving:  # it follows nobody any more
                continue
            table, epoch = viewer.map.table(name), self._epochs[viewer].get(name, 0)
            if table is not None and table.epoch < epoch and len(table.holdings):
                self._say(f"{viewer.name} keeps {len(table.holdings)} chunks of epoch {table.epoch} of {name}: "
                          f"it is at {epoch}")  # fmt: skip

    def on_packet(self, sender: Node, messages: Iterable[Message]) -> None:
        """A packet was sent."""
        told = self._told[sender]
        for message in messages:
            if isinstance(message, (Alive, Suspect, Dead)):
                name = message.node
                before = told.get(name, (0, 0))
                epoch = before[0] if not isinstance(message, Alive) else _epoch(message)
                if (epoch, message.incarnation) < before:
                    self._say(f"{sender.name} went back from epoch {before[0]}, incarnation {before[1]} of {name} to "
                              f"{type(message).__name__} {epoch}, {message.incarnation}")  # fmt: skip
                told[name] = max(before, (epoch, message.incarnation))

    def at_the_end(self, process: Process, network: Network) -> None:
        """Nothing has piled up."""
        self._expect(network.largest_packet_bytes <= PACKET_BYTES_MAX, f"{network.largest_packet_bytes} B in a packet")
        unreadable = network.unreadable + (network.wire.left_out if network.wire is not None else 0)
        self._expect(unreadable == 0, f"{unreadable} packets and messages could not be read")
        self._expect(not process.tokens, f"{process.name} left push/pulls without an answer: {len(process.tokens)}")
        self._expect(not process.sleeps, f"{process.name} asked for no further tick")
        membership = process.membership
        if isinstance(membership, GossipMembership):
            swim = membership.swim
            nodes, timers = len(swim.table), len(swim._shared.timers._heap)
            self._expect(timers <= TIMERS_PER_NODE_MAX * nodes, f"{process.name} has {timers} timers")
            self._expect(swim.rumours <= RUMOURS_MAX, f"{process.name} has {swim.rumours} rumours")
            self._expect(len(swim._prober._relays) <= nodes, f"{process.name} has {len(swim._prober._relays)} relays")
            self._expect(len(swim._exchanger._under_way) <= 4, f"{process.name} has exchanges without an end")

    def _say(self, problem: str) -> None:
        self._expect(False, f"{problem} (at {self._clockwork.now:.3f})")


def _epoch(message: Alive) -> int:
    meta = decode_meta(message.meta)
    assert isinstance(meta, Meta)
    return meta.epoch


def differences(viewer: Process, running: list[Process]) -> list[str]:
    """Where the viewer's map differs from the journals."""
    problems = []
    for owner in running:
        if owner is viewer:
            continue
        table = viewer.map.table(owner.name)
        if table is None:
            problems.append(f"has no table of {owner.name}")
            continue
        truth, seen = dict(owner.journal.holdings.items()), dict(table.holdings.items())
        if truth != seen:
            phantoms, missing = len(seen.keys() - truth.keys()), len(truth.keys() - seen.keys())
            problems.append(f"of {owner.name}: {phantoms} phantom, {missing} missing chunks")
        elif table.holdings.fingerprint != owner.journal.holdings.fingerprint:
            problems.append(f"of {owner.name}: equal chunks, another fingerprint")
        elif not table.synced:
            problems.append(f"of {owner.name}: equal, but not known to be")
    if viewer.map.entries != sum(len(p.journal.holdings) for p in running if p is not viewer):
        problems.append("counts another number of entries than there are")
    return problems
