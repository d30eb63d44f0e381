"""Discovery as one sans-IO machine: a membership, a follower for each member with a journal, the map, and the own
journal's publisher.

    requests ──▶ membership (Ping, Leave)     publisher (Follow, Compare, Describe, Buckets)
    answers  ──▶ membership                   the follower that asked
    members that come and go, and their heads ──▶ followers start, stop, and learn that they are behind

What runs it (`kvmesh.discovery.driver` on asyncio, tests/sim in virtual time) performs `Call`, `Reply`, `Refuse` and
the actions of gossip, passes `Notify` on, and sends `Ticked` at `wake_at()`. Questions of followers that have all there
is are held here, at most FOLLOWS_HELD_MAX, until the journal changes.
"""

from __future__ import annotations

import heapq
import itertools
from random import Random

from kvmesh.transport.errors import ProtocolError
from kvmesh.transport.limits import (
    FOLLOW_GATHER_ENTRIES,
    FOLLOW_GATHER_S,
    FOLLOW_GATHER_S_MAX,
    FOLLOW_GATHER_S_MIN,
    FOLLOW_WAIT_S,
    FOLLOWS_HELD_MAX,
    KEY_BYTES,
    TICK_RETRY_S,
)

from .actions import (
    Action,
    Answered,
    Ask,
    Call,
    Event,
    Heard,
    JournalChanged,
    Lost,
    Notify,
    Refuse,
    Reply,
    Requested,
    Stopping,
    Ticked,
    Wake,
    Withdrawn,
)
from .following import Follower, FollowerCounters
from .head import Head
from .journal import Journal
from .map import ClusterMap
from .membership import Changed, Failed, HeadTold, Joined, Left, Membership, MemberState
from .messages import Entries, Follow, Leave, Ping
from .publishing import Hold, Publisher, Question

_NEVER = float("inf")


class _Alarms:
    """When each part wants its next tick: a heap whose outdated places are passed over."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, str]] = []
        self._at: dict[str, float] = {}

    def set(self, owner: str, at: float) -> None:
        if at == _NEVER:
            self._at.pop(owner, None)  # whoever is gone shall leave nothing behind
        elif self._at.get(owner) != at:
            self._at[owner] = at
            heapq.heappush(self._heap, (at, owner))

    def next_at(self) -> float:
        while self._heap and self._at.get(self._heap[0][1]) != self._heap[0][0]:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else _NEVER

    def due(self, now: float) -> list[str]:
        owners = []
        while self.next_at() <= now:
            owner = heapq.heappop(self._heap)[1]
            del self._at[owner]
            owners.append(owner)
        return owners


class Core:
    """See above. `membership` is any kind; its name in alarms and tags is the empty string."""

    def __init__(
        self, own_name: str, membership: Membership, cluster: ClusterMap, journal: Journal | None, random: Random
    ) -> None:
        self.membership = membership
        self.map = cluster
        self.publisher = None if journal is None else Publisher(journal)
        self.follower_counters = FollowerCounters()
        self._own_name = own_name
        self._random = random
        self._followers: dict[str, Follower] = {}
        self._numbers = itertools.count(1)
        self._alarms = _Alarms()
        self._held: dict[int, tuple[Follow, float]] = {}
        """By token, oldest first: the question, and until when it is held."""
        self._gather_until = _NEVER
        self._answered_at = -_NEVER
        """When followers were last told something new."""
        self._stopping = False
        if journal is not None:
            cluster.attach(journal)

    @property
    def followers(self) -> int:
        """Nodes that are followed."""
        return len(self._followers)

    def wake_at(self) -> float:
        """When the next `Ticked` is due."""
        held_until = next(iter(self._held.values()))[1] if self._held else _NEVER
        return min(self._alarms.next_at(), held_until, self._gather_until)

    def handle(self, event: Event, now: float) -> list[Action]:
        """Take one event. The actions are `Call`, `Reply`, `Refuse`, `Notify`, and those of gossip."""
        match event:
            case JournalChanged():
                self._gather(now)
                return self._member_event(event, now)
            case Ticked():
                return self._tick(now)
            case Withdrawn(token):
                self._held.pop(token, None)
                return []
            case Requested(token, message):
                return self._requested(event, token, message, now)
            case Answered(tag, _) | Lost(tag):
                return self._member_event(event, now) if not tag.owner else self._follower_event(event, now)
            case Stopping():
                self._stopping = True
                return self._answer_held(now, everyone=True) + self._member_event(event, now)
            case _:
                return self._member_event(event, now)

    def _tick(self, now: float) -> list[Action]:
        actions: list[Action] = []
        if now >= self._gather_until:
            self._gather_until = _NEVER
            self._answered_at = now
            actions += self._answer_held(now, everyone=True)
        else:
            actions += self._answer_held(now, everyone=False)
        owners = self._alarms.due(now)
        owner = ""
        try:
            while owners:
                owner = owners.pop(0)
                if not owner:
                    actions += self._member_event(Ticked(), now)
                elif (follower := self._followers.get(owner)) is not None:
                    actions += self._perform(owner, follower.handle(Ticked(), now), now)
        except Exception:
            # The others are not to miss their tick for it, and this one not its next.
            self._alarms.set(owner, now + TICK_RETRY_S)
            for other in owners:
                self._alarms.set(other, now)
            raise
        return actions

    # --- the own journal -----------------------------------------------------------------------------------------

    def _requested(self, event: Requested, token: int, message: object, now: float) -> list[Action]:
        if self._stopping:
            return [Refuse(token, "this node is stopping")]
        if isinstance(message, (Ping, Leave)):
            return self._member_event(event, now)
        assert isinstance(message, Question)
        if self.publisher is None:
            return [Refuse(token, "this process has no journal")]
        try:
            answer = self.publisher.answer(message, now)
        except ProtocolError as error:
            return [Refuse(token, str(error))]
        next_s = self._answered_at + FOLLOW_GATHER_S_MIN
        few = isinstance(answer, Entries) and len(answer.packed.keys) < FOLLOW_GATHER_ENTRIES * KEY_BYTES
        if few and now < next_s and len(self._held) < FOLLOWS_HELD_MAX:
            assert isinstance(message, Follow)
            self._held[token] = (message, now + FOLLOW_WAIT_S)
            self._gather_until = min(self._gather_until, next_s)
            return []
        if not isinstance(answer, Hold):
            self._answered_at = now
            return [Reply(token, answer)]
        assert isinstance(message, Follow)
        if len(self._held) >= FOLLOWS_HELD_MAX:
            return [Reply(token, self.publisher.nothing_new())]
        self._held[token] = (message, now + FOLLOW_WAIT_S)
        return []

    def _gather(self, now: float) -> None:
        """The first change after a quiet time is told soon; while changes go on, so many times a second."""
        if self._held and self._gather_until == _NEVER:
            self._gather_until = max(
                now + min(FOLLOW_GATHER_S * len(self._held), FOLLOW_GATHER_S_MAX),
                self._answered_at + FOLLOW_GATHER_S_MIN,
            )

    def _answer_held(self, now: float, *, everyone: bool) -> list[Action]:
        """Answer the questions whose time is over, or all of them."""
        actions: list[Action] = []
        while self._held and self.publisher is not None:
            token, (question, until) = next(iter(self._held.items()))
            if not everyone and until > now:
                break
            del self._held[token]
            answer = self.publisher.answer(question, now)
            actions.append(Reply(token, self.publisher.nothing_new() if isinstance(answer, Hold) else answer))
        return actions

    # --- members and followers -----------------------------------------------------------------------------------

    def _member_event(self, event: Event, now: float) -> list[Action]:
        return self._perform("", self.membership.handle(event, now), now)

    def _follower_event(self, event: Answered | Lost, now: float) -> list[Action]:
        name = event.tag.owner
        follower = self._followers.get(name)
        if follower is None:
            return []
        actions = self._perform(name, follower.handle(event, now), now)
        table = self.map.table(name)
        if isinstance(event, Answered) and follower.heard_at == now and table is not None:
            actions += self._member_event(Heard(name, table.epoch), now)
        return actions

    def _perform(self, owner: str, wanted: list[Action], now: float) -> list[Action]:
        """Keep alarms, give questions their address, start and stop followers; the rest is for whoever runs this."""
        actions: list[Action] = []
        for action in wanted:
            match action:
                case Wake(at):
                    self._alarms.set(owner, at)
                case Ask(tag, message, timeout_s):
                    member = self.membership.member(owner)
                    if member is not None:
                        actions.append(Call(tag, member.address, message, timeout_s))
                case Notify(event):
                    actions.append(action)
                    actions += self._on_member(event, now)
                case _:
                    actions.append(action)
        return actions

    def _on_member(self, event: object, now: float) -> list[Action]:
        match event:
            case Failed(member) | Left(member):
                self._unfollow(member.name)
            case Joined(member) | Changed(member) if member.head is None:
                self._unfollow(member.name)
            case HeadTold(name, head):
                return self._follow(name, head, now)
        return []

    def _follow(self, name: str, head: Head, now: float) -> list[Action]:
        member = self.membership.member(name)
        if member is None or member.state not in (MemberState.ALIVE, MemberState.SUSPECT) or self._stopping:
            return []
        follower = self._followers.get(name)
        if follower is not None and head.epoch < follower.told_epoch:
            # The membership has believed another start, and its clock was set back. A follower takes nothing of an
            # earlier epoch, so it would keep the chunks of the old start for ever.
            self._unfollow(name)
            follower = None
        if follower is None:
            follower = self._followers[name] = Follower(
                name,
                self._own_name,
                self.map.open(name),
                numbers=self._numbers,
                random=self._random.random,
                counters=self.follower_counters,
            )
        return self._perform(name, follower.handle(HeadTold(name, head), now), now)

    def _unfollow(self, name: str) -> None:
        if self._followers.pop(name, None) is not None:
            self._alarms.set(name, _NEVER)
            self.map.drop(name)
