"""Membership from a list of addresses: everyone pings everyone, and one address of the list is enough to find the rest.

    alive ──(a ping lost, and silent for an interval and a timeout)──▶ suspect ──(silent for SUSPICION_S)──▶ failed
      ▲                                                                   │                                     │
      └───────────────────── it speaks: an answer, a ping, an answer to its follower ───────────────────────────┘
    any ──(it says so)──▶ left ──(a larger epoch speaks)──▶ alive

A ping says who pings, so joining is two-way; an answer names other members. Rules that were paid for elsewhere:

1. An address is only a way to reach a name. A newer epoch of a name takes its new address and the old one is dropped
   (fault 4); an older epoch is ignored, and when it keeps speaking it is reported as a conflict of names.
2. Speaking is life, whoever asked: a member that reaches us but cannot be reached stays alive, and does not flap.
3. After a pause of this process (SIGSTOP, a sleeping laptop) nothing that went unanswered counts: everybody is pinged
   again before anybody is judged (fault 2).

Sans-IO. Which address is pinged when is `kvmesh.discovery.pinging`; here is what the answers mean.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from kvmesh.transport.limits import (
    NAME_CONFLICT_S,
    PAUSE_S,
    PING_INTERVAL_S,
    PING_TIMEOUT_S,
    PINGS_LOST_UNTIL_SUSPECT,
    SUSPICION_S,
)

from .actions import (
    Action,
    Answered,
    Call,
    Event,
    Heard,
    JournalChanged,
    Lost,
    Notify,
    Reply,
    Requested,
    Started,
    Stopping,
    Tag,
    Wake,
)
from .head import Head, node_id
from .membership import (
    Changed,
    Conflict,
    ConflictTable,
    Failed,
    HeadTold,
    Joined,
    Left,
    Member,
    MembershipEvent,
    MemberState,
)
from .messages import Done, Identity, Leave, Ping, Pong
from .peers import Peer, PeerTable
from .pinging import Pace, PingSchedule

_PINGS_LOST_UNTIL_FAILED = 2
"""At least so many after the suspicion: when pings have to queue, time alone fails nobody."""
_SWEEP_S = 60.0
"""Between two looks for members that are long gone."""


@dataclass(slots=True)
class PingCounters:
    """Since the start."""

    pings_sent: int = 0
    pings_lost: int = 0
    pings_answered: int = 0
    """Pings of others that got an answer."""
    pauses: int = 0
    """Times that this process was found to have been stopped."""
    stale: int = 0
    """Messages of an epoch older than the one that is known."""
    conflicts: int = 0
    refused: int = 0
    """Processes and addresses that found no room: `PEERS_MAX`."""
    malformed: int = 0
    """Answers that do not answer a ping."""


class StaticMembership:
    """`kvmesh.discovery.membership.Membership` for a list of peers."""

    def __init__(
        self, identity: Identity, seeds: Sequence[str], *, head: Callable[[], Head | None], random: Random
    ) -> None:
        self.identity = identity
        self.counters = PingCounters()
        self._head = head
        self._random = random
        self._peers = PeerTable()
        self._conflicts = ConflictTable()
        self._schedule = PingSchedule(seeds, identity.address, self._pace, random)
        self._started_at = self._swept_at = 0.0
        self._last_at: float | None = None
        self._stopping = False

    # --- what others ask -----------------------------------------------------------------------------------------

    def members(self) -> list[Member]:
        """Everyone but this process, failed and left ones included."""
        return [peer.member() for peer in self._peers]

    def member(self, name: str) -> Member | None:
        """One of them."""
        peer = self._peers.get(name)
        return None if peer is None else peer.member()

    def conflicts(self) -> list[Conflict]:
        """Names that two processes were seen to use."""
        return self._conflicts.all()

    # --- events --------------------------------------------------------------------------------------------------

    def handle(self, event: Event, now: float) -> list[Action]:
        """Take one event. The actions are `Call`, `Reply`, `Notify` and `Wake`."""
        if isinstance(event, JournalChanged):
            return []  # each ping carries the head
        if self._last_at is not None and now - self._last_at > PAUSE_S:
            self._resume(now)
        self._last_at = now
        if isinstance(event, Stopping):
            return self._leave()
        actions: list[Action] = []
        match event:
            case Started():
                self._started_at = self._swept_at = now
                self._schedule.start(now)
            case Requested(token, Ping() as ping):
                actions += self._notify(self._learn(ping, None, now))
                self.counters.pings_answered += 1
                actions.append(Reply(token, Pong(self.identity, self._head_bytes(), self._peers.to_tell())))
            case Requested(token, Leave() as leave):
                actions += self._notify(self._on_leave(leave, now))
                actions.append(Reply(token, Done()))
            case Answered(tag, Pong() as pong):
                actions += self._notify(self._on_pong(tag.number, pong, now))
            case Answered(_, Done()):
                pass
            case Answered(tag, _):
                self.counters.malformed += 1
                actions += self._notify(self._on_lost(tag.number, now))
            case Lost(tag):
                actions += self._notify(self._on_lost(tag.number, now))
            case Heard(name, epoch):
                peer = self._peers.get(name)
                if peer is not None and peer.identity.epoch == epoch and peer.state is not MemberState.LEFT:
                    actions += self._notify(self._revive(peer, now))
            case _:
                self._sweep(now)
        return actions + self._ping_due(now)

    @staticmethod
    def _notify(events: list[MembershipEvent]) -> list[Action]:
        return [Notify(event) for event in events]

    def _ping_due(self, now: float) -> list[Action]:
        if self._stopping:
            return []
        actions: list[Action] = []
        for number, address in self._schedule.due(now):
            self.counters.pings_sent += 1
            ping = Ping(self.identity, self._head_bytes())
            actions.append(Call(Tag("", number), address, ping, PING_TIMEOUT_S))
        # A tick at least every interval, so that a pause is seen as one.
        actions.append(Wake(min(self._schedule.wake_at(), now + PING_INTERVAL_S)))
        return actions

    def _leave(self) -> list[Action]:
        self._stopping = True
        leave = Leave(self.identity.name, self.identity.epoch)
        return [
            Call(Tag("", self._schedule.number()), peer.address, leave, PING_TIMEOUT_S)
            for peer in self._peers
            if not peer.is_gone
        ]

    def _resume(self, now: float) -> None:
        """This process was stopped. What was lost meanwhile was lost here."""
        self.counters.pauses += 1
        for peer in self._peers:
            peer.lost, peer.epoch_since = 0, now
            if not peer.is_gone:
                peer.heard_at = now
            if peer.state is MemberState.SUSPECT:
                peer.changed_at = now
        self._schedule.start(now)

    # --- answers -------------------------------------------------------------------------------------------------

    def _on_pong(self, number: int, pong: Pong, now: float) -> list[MembershipEvent]:
        asked = self._schedule.answered(number, now)
        if asked is None:
            return []
        address, sent_at, before = asked
        if (pong.identity.name, pong.identity.epoch) == (self.identity.name, self.identity.epoch):
            self._schedule.drop_own(address)
            return []
        name = pong.identity.name
        events: list[MembershipEvent] = []
        if before != name and (peer := self._peers.get(before)) and peer.address == address and not peer.is_gone:
            # Somebody else lives there now, so the one that did is not there any more.
            peer.state, peer.changed_at = MemberState.FAILED, now
            events.append(Failed(peer.member()))
        self._schedule.belongs(address, name)
        events += self._learn(pong, address, now)
        peer = self._peers.get(name)
        if peer is not None and peer.address == address:
            peer.measured(max(now - sent_at, 0.0))
        self._schedule.settle(address, now)
        for told in pong.known:
            self._hear_of(told, now)
        return events

    def _hear_of(self, address: str, now: float) -> None:
        """Another member says that somebody is alive at `address`."""
        peer = self._peers.who_gave(address)
        if peer is not None and not peer.is_gone:
            return
        if peer is not None and peer.state is MemberState.FAILED:
            address = peer.address
        if not self._schedule.hear_of(address, now):
            self.counters.refused += 1

    def _on_lost(self, number: int, now: float) -> list[MembershipEvent]:
        asked = self._schedule.lost(number, now)
        if asked is None:
            return []
        self.counters.pings_lost += 1
        address, _, name = asked
        peer = self._peers.get(name)
        return self._missed(peer, now) if peer is not None and peer.address == address else []

    def _missed(self, peer: Peer, now: float) -> list[MembershipEvent]:
        """A ping to `peer` went unanswered."""
        peer.lost += 1
        silent_s = now - peer.heard_at
        if peer.state is MemberState.ALIVE:
            if peer.lost >= PINGS_LOST_UNTIL_SUSPECT and silent_s >= PING_INTERVAL_S + PING_TIMEOUT_S:
                peer.state, peer.changed_at, peer.lost = MemberState.SUSPECT, now, 0
                return [Changed(peer.member())]
        elif (
            peer.state is MemberState.SUSPECT
            and peer.lost >= _PINGS_LOST_UNTIL_FAILED
            and now - peer.changed_at >= SUSPICION_S
        ):
            peer.state, peer.changed_at = MemberState.FAILED, now
            return [Failed(peer.member())]
        return []

    # --- names and epochs ----------------------------------------------------------------------------------------

    def _learn(self, said: Ping | Pong, answered_at: str | None, now: float) -> list[MembershipEvent]:
        """A process said who it is: in a ping, or as the answer from the address `answered_at`."""
        identity, name = said.identity, said.identity.name
        head = _head_of(said)
        if name == self.identity.name:
            if identity.epoch == self.identity.epoch:
                return []
            # A ping just after our start may be a late one of our own earlier start; an answer cannot.
            lives = answered_at is not None or now - self._started_at > NAME_CONFLICT_S
            return self._conflict(name, self.identity.address, answered_at or identity.address) if lives else []
        peer = self._peers.get(name)
        address = answered_at or identity.address
        if peer is None:
            return self._joined(Peer(identity, address, head, MemberState.ALIVE, now, now, now), now)
        known = peer.identity
        if identity.epoch < known.epoch:
            self.counters.stale += 1
            if peer.is_gone and address != peer.address:
                return self._namesake(peer, identity, answered_at, head, now)
            lasting = now - peer.epoch_since > NAME_CONFLICT_S and address != peer.address
            return self._conflict(name, peer.address, address) if lasting else []
        if identity.epoch > known.epoch:
            return self._restarted(peer, identity, address, head, now)
        if peer.state is MemberState.LEFT:
            return []
        if identity.address != known.address:
            return self._conflict(name, known.address, identity.address)
        if answered_at is not None and answered_at != peer.address and peer.lost:
            self._move(peer, answered_at, now)
        if head is not None and (peer.head is None or head.seq >= peer.head.seq):
            peer.head = head
        return [*self._revive(peer, now), *_told(peer)]

    def _joined(self, peer: Peer, now: float) -> list[MembershipEvent]:
        if (gone := self._peers.in_the_way()) is not None:
            self._forget(gone)
        if self._peers.is_full:
            self.counters.refused += 1
            return []
        self._peers.add(peer)
        self._schedule.watch(peer.address, peer.identity.name, now)
        return [Joined(peer.member()), *_told(peer)]

    def _restarted(
        self, peer: Peer, identity: Identity, address: str, head: Head | None, now: float
    ) -> list[MembershipEvent]:
        was_there = not peer.is_gone
        self._peers.restart(peer, identity)
        peer.head = head
        peer.state, peer.heard_at, peer.epoch_since, peer.changed_at = MemberState.ALIVE, now, now, now
        peer.lost, peer.rtt_s = 0, None
        self._move(peer, address, now)
        member = peer.member()
        return [Changed(member) if was_there else Joined(member), *_told(peer)]

    def _namesake(
        self, peer: Peer, identity: Identity, answered_at: str | None, head: Head | None, now: float
    ) -> list[MembershipEvent]:
        """The newest start of a name is gone, and an older one speaks from elsewhere: there were two of one name. Its
        answer to a ping of ours shows that it lives; anything else may be late, and only makes us ask."""
        if answered_at is not None:
            return self._restarted(peer, identity, answered_at, head, now)
        if not self._schedule.hear_of(identity.address, now):
            self.counters.refused += 1
        return []

    def _move(self, peer: Peer, address: str, now: float) -> None:
        """From now on `peer` is reached at `address`."""
        if address != peer.address:
            self._schedule.unwatch(peer.address, peer.identity.name)
        peer.address = address
        self._schedule.watch(address, peer.identity.name, now)

    def _revive(self, peer: Peer, now: float) -> list[MembershipEvent]:
        before = peer.state
        peer.state, peer.heard_at, peer.lost = MemberState.ALIVE, now, 0
        if before is MemberState.ALIVE:
            return []
        peer.changed_at = now
        self._schedule.watch(peer.address, peer.identity.name, now)
        return [Changed(peer.member()) if before is MemberState.SUSPECT else Joined(peer.member())]

    def _on_leave(self, leave: Leave, now: float) -> list[MembershipEvent]:
        peer = self._peers.get(leave.name)
        if peer is None or leave.epoch < peer.identity.epoch or peer.state is MemberState.LEFT:
            return []
        peer.state, peer.changed_at = MemberState.LEFT, now
        self._schedule.unwatch(peer.address, leave.name)
        return [Left(peer.member())]

    def _conflict(self, name: str, address: str, other_address: str) -> list[MembershipEvent]:
        conflict = self._conflicts.add(name, address, other_address)
        if conflict is None:
            return []
        self.counters.conflicts += 1
        return [conflict]

    # --- small things --------------------------------------------------------------------------------------------

    def _pace(self, name: str | None) -> Pace:
        """How often the address of `name` is to be pinged."""
        peer = self._peers.get(name)
        if peer is None or peer.is_gone:
            return Pace.SLOW
        return Pace.QUICK if peer.lost or peer.state is MemberState.SUSPECT else Pace.STEADY

    def _head_bytes(self) -> bytes:
        head = self._head()
        return b"" if head is None else head.to_bytes()

    def _forget(self, peer: Peer) -> None:
        self._peers.remove(peer)
        self._schedule.unwatch(peer.address, peer.identity.name)

    def _sweep(self, now: float) -> None:
        if now - self._swept_at >= _SWEEP_S:
            self._swept_at = now
            for peer in self._peers.long_gone(now):
                self._forget(peer)


def _head_of(said: Ping | Pong) -> Head | None:
    """The head in a message: none when there is none, or when it is not the speaker's own."""
    if not said.head:
        return None
    head = Head.from_bytes(said.head)
    own = head.node_id == node_id(said.identity.name) and head.epoch == said.identity.epoch
    return head if own else None


def _told(peer: Peer) -> list[MembershipEvent]:
    return [] if peer.head is None else [HeadTold(peer.identity.name, peer.head)]
