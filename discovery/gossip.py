"""Membership by gossip: members, epochs and heads over the protocol of `kvmesh.discovery.swim`.

    swim says     a node with some bytes of meta is there, suspected, failed, or left
    here          its meta says what it is and where its transport is; heads say how far its journal is
    above         sees `Member`s and their events, as from every membership

A node's own head is gossiped when its journal changed, at most once in HEAD_INTERVAL_S, and newer heads of others are
passed on; each push/pull carries all of them. A node of ours is followed as soon as it is there, so a lost head delays
nothing but the notice of a follower that fell behind. What a Serf agent in the same gossip needs is in `serf`.

Sans-IO; runs wherever the core runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from random import Random
from typing import Final

from kvmesh.transport.errors import ProtocolError
from kvmesh.transport.limits import HEAD_INTERVAL_S, INCARNATION_MAX

from .actions import (
    Action,
    Event,
    Heard,
    JournalChanged,
    KeysAsked,
    Notify,
    Refuse,
    Requested,
    Started,
    Stopping,
    Ticked,
)
from .head import Head
from .heads import HeadTable, pack_heads, unpack_heads
from .keying import ID_BYTES, PAYLOAD_PREFIX, KeyManager
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
from .messages import Identity
from .meta import Foreign, Meta, decode_meta
from .serf import SerfSide, Word, is_serf
from .swim.base import Change
from .swim.events import StreamFailed, UserCame
from .swim.machine import Swim
from .swim.nodes import Node
from .swim.profile import KVMESH_LAN, Profile
from .swim.timers import NEVER
from .wire.keyring import Keyring
from .wire.messages import VERSIONS, Alive, Endpoint, text_of

HEAD_PREFIX: Final = b"KH"
"""Of a user message with one head. Serf notes in its log that it does not know the type, and passes over it."""
_STATES: Final = (MemberState.ALIVE, MemberState.SUSPECT, MemberState.FAILED, MemberState.LEFT)


@dataclass(slots=True)
class GossipCounters:
    """Since the start, beside those of the protocol below."""

    heads_told: int = 0
    """Heads of the own journal that were gossiped."""
    heads_taken: int = 0
    """Heads of others that were news."""
    malformed: int = 0
    """Metas, heads and states that claim to be ours and cannot be read."""
    foreign: int = 0
    """User messages of another application."""


class GossipMembership:
    """`kvmesh.discovery.membership.Membership` by gossip. It is the protocol's `Application`."""

    def __init__(
        self,
        identity: Identity,
        endpoint: Endpoint,
        *,
        head: Callable[[], Head | None],
        random: Random,
        profile: Profile = KVMESH_LAN,
        seeds: Sequence[str] = (),
        known: Sequence[Endpoint] = (),
        packet_overhead_bytes: int = 0,
        public_key: bytes = b"",
        keyring: Keyring | None = None,
        save_keys: Callable[[], None] = lambda: None,
    ) -> None:
        """`keyring` is the one that the network seals with; `save_keys` keeps it over a restart."""
        self.identity = identity
        self.public_key = public_key
        self.counters = GossipCounters()
        self._head = head
        self._heads = HeadTable()
        self._serf = SerfSide(identity.name)
        self._conflicts = ConflictTable()
        self._events: list[MembershipEvent] = []
        """Of the event that is being handled."""
        self._key_actions: list[Action] = []
        self._foreign_seen = False
        self._head_due = self._head_timer = False
        self._head_told_at = float("-inf")
        mesh_port = int(identity.address.rpartition(":")[2])
        meta = Meta(identity.role, mesh_port, identity.epoch, public_key=public_key, facts=identity.meta).encode()
        self.swim = Swim(
            Alive(_first_incarnation(identity.epoch), identity.name, endpoint.ip, endpoint.port, meta, VERSIONS),
            self,
            profile=profile,
            random=random,
            seeds=seeds,
            known=known,
            packet_overhead_bytes=packet_overhead_bytes,
        )
        self.keys = KeyManager(
            identity.name,
            keyring,
            endpoint=lambda: self.swim.own.endpoint,
            numbers=self.swim.number,
            new_id=lambda: random.randbytes(ID_BYTES),
            save=save_keys,
        )

    # --- what others ask ------------------------------------------------------------------------------------------

    def members(self) -> list[Member]:
        """Everyone but this process, failed and left ones included."""
        return [self._member(node) for node in self.swim.table if node is not self.swim.own]

    def member(self, name: str) -> Member | None:
        """One of them."""
        node = self.swim.table.get(name)
        return None if node is None or node is self.swim.own else self._member(node)

    def conflicts(self) -> list[Conflict]:
        """Names that two processes were seen to use."""
        return self._conflicts.all()

    # --- events ---------------------------------------------------------------------------------------------------

    def handle(self, event: Event, now: float) -> list[Action]:
        """Take one event. The actions are those of `swim.events`, `Refuse`, `Notify` and `Wake`."""
        match event:
            case Requested(token, _):
                return [Refuse(token, "this mesh finds its members by gossip: join with a gossip address")]
            case Heard(name, epoch):
                node = self.swim.table.get(name)
                if node is not None and _epoch(node.meta) == epoch:
                    node.seen_at = now
                return []
            case JournalChanged() if self._head_timer:
                return []  # it tells all that changes until then: a put costs nothing here
            case JournalChanged() | Started():
                self._head_due = True
            case Stopping() if self._foreign_seen:
                self.swim.leave_with(self._serf.leave().payload)
        self._events, self._key_actions = [], []
        self._tell_head(now)
        if self._is_of_keys(event, now):
            event = Ticked()
        actions = self.swim.handle(Ticked() if isinstance(event, JournalChanged) else event, now)
        actions += [Notify(told) for told in self._events]
        return actions + self._key_actions

    # --- keys -----------------------------------------------------------------------------------------------------

    def _is_of_keys(self, event: Event, now: float) -> bool:
        """Take an event that is about the keys alone. Questions and answers come over streams only: in a packet anybody
        could repeat them."""
        match event:
            case KeysAsked(token, operation, key):
                ours = [
                    (node.name, node.endpoint)
                    for node in self.swim.table
                    if node is not self.swim.own and not node.is_gone and isinstance(_read(node.meta), Meta)
                ]
                self._of_keys(self.keys.ask(token, operation, key, ours, now))
            case UserCame(_, payload) if payload.startswith(PAYLOAD_PREFIX):
                self._of_keys(self.keys.on_payload(payload, now))
            case StreamFailed(number, _):
                self._of_keys(self.keys.on_failed(number, now))
                return False
            case _:
                return False
        return True

    def _of_keys(self, actions: list[Action]) -> None:
        self._key_actions += actions
        if self.keys.wake_at() < NEVER:
            self.swim.later(self.keys.wake_at(), lambda now: self._of_keys(self.keys.tick(now)))

    # --- heads ----------------------------------------------------------------------------------------------------

    def _tell_head(self, now: float) -> None:
        """Gossip the own head when it is due. A busy journal tells each second, not each entry."""
        if not self._head_due or (head := self._head()) is None:
            return
        if now >= self._head_told_at + HEAD_INTERVAL_S:  # as the timer reckons it: a difference may round the other way
            self._head_due, self._head_told_at = False, now
            self.counters.heads_told += 1
            self.swim.tell(self.identity.name, HEAD_PREFIX + head.to_bytes(), now)
        elif not self._head_timer:
            self._head_timer = True
            self.swim.later(self._head_told_at + HEAD_INTERVAL_S, self._on_head_timer)

    def _on_head_timer(self, now: float) -> None:
        self._head_timer = False
        self._tell_head(now)

    # --- what the protocol says (`swim.base.Application`) ---------------------------------------------------------

    def compare_starts(self, known: bytes, told: bytes) -> int | None:
        """By their epochs, when both are ours."""
        first, second = _epoch(known), _epoch(told)
        return None if first is None or second is None else second - first

    def on_change(self, node: Node, change: Change, now: float) -> None:
        """Turn a change of the protocol into events about a member."""
        if isinstance(_read(node.meta), _Unreadable) and change in (Change.JOINED, Change.UPDATED):
            self.counters.malformed += 1
        if change in (Change.JOINED, Change.UPDATED):
            self._heads.know(node.name, _epoch(node.meta))
        member = self._member(node)
        match change:
            case Change.JOINED:
                self._events.append(Joined(member))
                self._meet_foreign(node, now)
            case Change.FAILED:
                self._heads.forget(node.name)
                self._events.append(Failed(member))
            case Change.LEFT:
                self._heads.forget(node.name)
                self._events.append(Left(member))
            case _:
                self._events.append(Changed(member))
        if change in (Change.JOINED, Change.UPDATED) and member.head is not None:
            self._events.append(HeadTold(node.name, member.head))

    def _meet_foreign(self, node: Node, now: float) -> None:
        """The first member of another application may be a Serf agent, which wants to hear that we are here on
        purpose."""
        if not self._foreign_seen and isinstance(_read(node.meta), Foreign):
            self._foreign_seen = True
            self._pass_on([self._serf.join()], now)

    def on_conflict(self, node: Node, other: Endpoint, now: float) -> None:
        """Another process uses the name."""
        conflict = self._conflicts.add(node.name, text_of(node.endpoint), text_of(other))
        if conflict is not None:
            self._events.append(conflict)

    def on_user(self, payload: bytes, source: Endpoint, now: float) -> None:
        """A head, a word of a Serf agent, or something of which nothing is known here."""
        try:
            if payload.startswith(HEAD_PREFIX):
                self._on_head(Head.from_bytes(payload[len(HEAD_PREFIX) :]), now, pass_on=True)
            elif is_serf(payload):
                self._pass_on(self._serf.on_message(payload), now)
            else:
                self.counters.foreign += 1
        except ProtocolError:
            self.counters.malformed += 1

    def state(self) -> bytes:
        """The heads of all, for a push/pull."""
        own = self._head()
        return self._serf.state(pack_heads([*self._heads.all(), *([own] if own is not None else [])]))

    def on_state(self, state: bytes, now: float) -> None:
        """The heads that a peer knows."""
        try:
            ours, words = self._serf.merge(state)
            heads = unpack_heads(ours)
        except ProtocolError:
            self.counters.malformed += 1
            return
        self._pass_on(words, now)
        for head in heads:
            self._on_head(head, now, pass_on=False)

    def _on_head(self, head: Head, now: float, *, pass_on: bool) -> None:
        name = self._heads.take(head, now)
        if name is None:
            return
        self.counters.heads_taken += 1
        if pass_on:
            self.swim.tell(name, HEAD_PREFIX + head.to_bytes(), now)
        node = self.swim.table.get(name)
        if node is not None and not node.is_gone and _epoch(node.meta) == head.epoch:
            self._events.append(HeadTold(name, head))

    def _pass_on(self, words: Sequence[Word], now: float) -> None:
        for word in words:
            self.swim.tell(f"serf:{word.node}", word.payload, now)

    # --- members --------------------------------------------------------------------------------------------------

    def _member(self, node: Node) -> Member:
        meta, gossip_address, state = _read(node.meta), text_of(node.endpoint), _STATES[node.state]
        if not isinstance(meta, Meta):
            return Member(
                node.name, meta.role, state, gossip_address, 0, 0, node.seen_at, node.rtt_s, None, meta.tags,
                gossip_address=gossip_address, incarnation=node.incarnation,
            )  # fmt: skip
        head, head_at = self._heads.of(node.name, meta.epoch) if meta.role == "agent" else (None, None)
        address = text_of(Endpoint(node.endpoint.ip, meta.mesh_port))
        return Member(
            node.name, meta.role, state, address, meta.epoch, meta.versions[1], node.seen_at, node.rtt_s, head,
            meta.facts, head_at, gossip_address, node.incarnation, meta.public_key,
        )  # fmt: skip


def _first_incarnation(epoch: int) -> int:
    """A start's first incarnation is its epoch in seconds, so it outranks all that was ever said of the starts before,
    by whatever peer. Were the clock set back, the node would have to refute its old self, as in memberlist. 32 bits are
    enough until 2106."""
    return max(1, epoch // 1000 % INCARNATION_MAX)


@dataclass(frozen=True, slots=True)
class _Unreadable(Foreign):
    """A meta that claims to be ours, and is not in order: its member is listed, and nothing more."""


@lru_cache(maxsize=8192)
def _read(meta: bytes) -> Meta | Foreign:
    try:
        return decode_meta(meta)
    except ProtocolError:
        return _Unreadable({})


def _epoch(meta: bytes) -> int | None:
    read = _read(meta)
    return read.epoch if isinstance(read, Meta) else None
