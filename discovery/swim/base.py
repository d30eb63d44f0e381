"""What the parts of the machine share: the own node, the table of the others, the rumours, the timers, and the actions
that one event leads to. And sending, because every packet may carry rumours.

Nothing is decided here. The parts (`beliefs`, `probing`, `exchanging`) import this; this imports none of them.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from random import Random
from typing import Protocol

from kvmesh.discovery.actions import Action
from kvmesh.discovery.wire.codec import encode
from kvmesh.discovery.wire.compound import HEADER_BYTES as COMPOUND_HEADER_BYTES
from kvmesh.discovery.wire.compound import PART_BYTES
from kvmesh.discovery.wire.messages import Endpoint, Message, User
from kvmesh.transport.limits import GOSSIP_NODES_MAX, RUMOURS_MAX

from .awareness import Awareness
from .events import SendPacket
from .nodes import DEAD, Node, NodeTable
from .profile import Profile
from .queue import RumourQueue
from .timers import Timers
from .timing import transmit_limit


class Change(enum.Enum):
    """What became of a node."""

    JOINED = "joined"
    """It is there: new, or back."""
    UPDATED = "updated"
    """Its meta, its address or its start is another one."""
    SUSPECTED = "suspected"
    TRUSTED = "trusted"
    """It refuted a suspicion."""
    FAILED = "failed"
    LEFT = "left"


class Application(Protocol):
    """What the machine asks and tells the layer above. Each call comes from within `handle`, with its time."""

    def compare_starts(self, known: bytes, told: bytes) -> int | None:
        """Whether the meta `told` is of a later start (positive) of the process than `known`, of an earlier one
        (negative), or of the same one (0). None when the metas do not say."""

    def on_change(self, node: Node, change: Change, now: float) -> None:
        """What is believed of a node changed."""

    def on_conflict(self, node: Node, other: Endpoint, now: float) -> None:
        """The process at `other` uses the name of `node`, too."""

    def on_user(self, payload: bytes, source: Endpoint, now: float) -> None:
        """A user message."""

    def state(self) -> bytes:
        """What a push/pull carries for the application."""

    def on_state(self, state: bytes, now: float) -> None:
        """What the application at the other end of a push/pull said."""


@dataclass(slots=True)
class SwimCounters:
    """Since the start."""

    probes: int = 0
    probes_failed: int = 0
    """Probes that nothing answered: neither the node, nor those who were asked to help, nor a stream."""
    probes_indirect: int = 0
    """Probes for which others were asked."""
    probes_saved_by_stream: int = 0
    """Probes that only a stream got through: packets get lost, or are blocked."""
    relayed: int = 0
    """Probes that were made for others."""
    pings_misdirected: int = 0
    """Pings for a node that is not this one: the address had another owner."""
    suspicions: int = 0
    refutations: int = 0
    """Times that this node had to say that it is alive."""
    deaths: int = 0
    """Nodes that this one itself held for dead: its own suspicion ran out."""
    stale: int = 0
    """Messages about an earlier start of a node."""
    conflicts: int = 0
    """Messages of a process that uses the name of another."""
    refused: int = 0
    """Nodes and relays that found no room."""
    incompatible: int = 0
    """Nodes and push/pulls of protocol versions that this one does not speak."""
    exchanges: int = 0
    """Push/pulls that worked out, whoever began."""
    exchanges_failed: int = 0
    joins_failed: int = 0
    """Rounds of joining in which no address answered."""
    pauses: int = 0
    """Times that this process was found not to have run for a while."""
    unexpected: int = 0
    """Messages that do not belong into a packet."""
    rumours_dropped: int = 0
    """Rumours that found no room in the queue."""


class Shared:
    """See above."""

    def __init__(
        self, own: Node, profile: Profile, random: Random, app: Application, packet_overhead_bytes: int
    ) -> None:
        self.own = own
        self.profile = profile
        self.random = random
        self.app = app
        self.timers = Timers()
        self.table = NodeTable(random, GOSSIP_NODES_MAX)
        self.table.add(own)
        self.awareness = Awareness(profile.awareness_max)
        self.counters = SwimCounters()
        self.rumours = RumourQueue(RUMOURS_MAX)
        """About nodes."""
        self.words = RumourQueue(RUMOURS_MAX)
        """Of the application: they get the room that rumours about nodes leave."""
        self.out: list[Action] = []
        """Actions of the event that is being handled."""
        self.leaving = False
        self._budget_bytes = profile.packet_bytes_max - packet_overhead_bytes - COMPOUND_HEADER_BYTES
        self._next_number = random.randrange(1 << 31)
        self._gossip_set = False
        self._gossiped_at = float("-inf")

    def number(self) -> int:
        """A number for a probe or a stream, within 32 bits. It does not begin at 1: an answer to the process that had
        this address before must not fit."""
        self._next_number = (self._next_number + 1) & 0xFFFFFFFF
        return self._next_number

    # --- telling --------------------------------------------------------------------------------------------------

    def rumour(self, name: str, message: Message, now: float) -> None:
        """Tell the mesh something about the node `name`."""
        self.rumours.put(name, message, len(encode(message)))
        self._arm_gossip(now)

    def word(self, name: str, payload: bytes, now: float) -> None:
        """Tell the mesh something of the application."""
        message = User(payload)
        self.words.put(name, message, len(encode(message)))
        self._arm_gossip(now)

    def send(self, target: Endpoint, *messages: Message) -> None:
        """Send these, with as many rumours as fit beside them."""
        if self.rumours or self.words:
            used = sum(len(encode(message)) + PART_BYTES for message in messages)
            messages = (*messages, *self._rumours_for(self._budget_bytes - used))
        self.out.append(SendPacket(target, messages))

    def _rumours_for(self, budget_bytes: int) -> list[Message]:
        profile = self.profile
        limit = max(transmit_limit(profile.retransmit_mult, self.table.there), profile.transmits_min)
        found, left_bytes = self.rumours.take(budget_bytes, PART_BYTES, limit)
        if self.words:
            found += self.words.take(left_bytes, PART_BYTES, limit)[0]
        return found

    # --- rounds of gossip -----------------------------------------------------------------------------------------

    def _arm_gossip(self, now: float) -> None:
        if self._gossip_set:
            return
        self._gossip_set = True
        at_once = self.profile.gossip_at_once
        wait_s = self.profile.gossip_interval_s * (1.0 if at_once else self.random.random())
        self.timers.at(max(now, self._gossiped_at + wait_s) if at_once else now + wait_s, self._gossip)

    def _gossip(self, now: float) -> None:
        self._gossip_set = False
        self._gossiped_at = now
        hearers = self.table.some(self.profile.gossip_nodes, lambda node: self._hears(node, now))
        if not hearers:
            self._rumours_for(self._budget_bytes)  # told to nobody: whoever comes gets all there is by push/pull
        for node in hearers:
            messages = self._rumours_for(self._budget_bytes)
            if not messages:
                return
            self.out.append(SendPacket(node.endpoint, tuple(messages), crc=node.reads_crc))
        if self.rumours or self.words:
            self._gossip_set = True
            self.timers.at(now + self.profile.gossip_interval_s, self._gossip)

    def _hears(self, node: Node, now: float) -> bool:
        if node is self.own:
            return False
        if node.is_gone:
            # The failed hear it for a while: one that lives learns that it has to refute.
            return node.state is DEAD and now - node.changed_at <= self.profile.gossip_to_the_dead_s
        return True
