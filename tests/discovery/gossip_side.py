"""One membership by gossip, a clock, and the words of others: what its tests share."""

from __future__ import annotations

import itertools
from random import Random

from kvmesh.discovery.actions import (
    Action,
    Event,
    Notify,
    Started,
    Ticked,
    Wake,
)
from kvmesh.discovery.gossip import HEAD_PREFIX, GossipMembership
from kvmesh.discovery.head import Head, node_id
from kvmesh.discovery.messages import Identity
from kvmesh.discovery.meta import Meta
from kvmesh.discovery.swim.events import (
    AnswerPull,
    PacketCame,
    Pulled,
)
from kvmesh.discovery.wire.keyring import Keyring
from kvmesh.discovery.wire.messages import VERSIONS, Ack, Alive, Endpoint, Message, PushPull, User
from kvmesh.discovery.wire.messages import Ping as SwimPing
from tests.discovery.swim.support import of, only, sent

HERE = Endpoint(bytes([10, 0, 0, 1]), 7946)
THERE = Endpoint(bytes([10, 0, 0, 2]), 7946)
ELSEWHERE = Endpoint(bytes([10, 0, 0, 3]), 7946)
IDENTITY = Identity("b", "agent", 5, "10.0.0.2:7000", {})
SERF_META = b"\xff\x82\xa4role\xa3web\xa2dc\xa4east"
KEY, OTHER_KEY = bytes(16), bytes([1]) * 16


def meta(role: str = "agent", epoch: int = 5, mesh_port: int = 7000, facts: dict[str, str] | None = None) -> bytes:
    return Meta(role, mesh_port, epoch, public_key=b"k" * 32, facts=facts or {}).encode()  # type: ignore[arg-type]


def alive(
    name: str = "b", incarnation: int = 1, place: Endpoint = THERE, said: bytes | None = None, *, epoch: int = 5
) -> Alive:
    return Alive(incarnation, name, *place, meta(epoch=epoch) if said is None else said, VERSIONS)


def head(name: str = "b", seq: int = 1, epoch: int = 5) -> Head:
    return Head(node_id(name), epoch, seq, seq, 99)


def told(one: Head) -> User:
    return User(HEAD_PREFIX + one.to_bytes())


class Side:
    """The membership of ``a``, with a clock. The tests play the others."""

    def __init__(self, keys: list[bytes] | None = None, *, journal: bool = True, now: float = 100.0) -> None:
        self.now = now
        self.seq = 0
        self.saved = 0
        self.done: list[Action] = []
        self.wake_at = float("inf")
        self.membership = GossipMembership(
            Identity("a", "agent", 5_000_000, "10.0.0.1:7000", {}),
            HERE,
            head=lambda: Head(node_id("a"), 5_000_000, self.seq, self.seq, 1) if journal else None,
            random=Random(0),
            keyring=Keyring(keys) if keys else None,
            save_keys=self._save,
        )
        self.feed(Started())

    def _save(self) -> None:
        self.saved += 1

    def feed(self, event: Event) -> list[Action]:
        if self.wake_at <= self.now:
            self.wake_at = float("inf")
        actions = self.membership.handle(event, self.now)
        for action in actions:
            if isinstance(action, Wake):
                self.wake_at = action.at
        self.done += actions
        return actions

    def hear(self, *messages: Message, source: Endpoint = THERE) -> list[object]:
        """A packet comes; the events of the membership that it leads to."""
        return events(self.feed(PacketCame(source, messages)))

    def pull(self, state: bytes = b"") -> PushPull:
        """A peer begins a push/pull; the answer."""
        return only(of(self.feed(Pulled(1, THERE, PushPull(False, (), state))), AnswerPull)).state

    def run(self, seconds: float) -> list[Action]:
        until, before = self.now + seconds, len(self.done)
        for rings in itertools.count():
            if self.wake_at > until:
                break
            assert rings < 1000, "alarms without end"
            self.now = max(self.now, self.wake_at)
            for target, ping in sent(self.feed(Ticked()), SwimPing):
                self.hear(Ack(ping.seq), source=target)  # whoever is pinged is there
        self.now = until
        return self.done[before:]

    def heads_gossiped(self, seconds: float = 3.0) -> set[Head]:
        """The heads in the packets of this time."""
        payloads = {word.payload for _, word in sent(self.run(seconds), User)}
        size = len(HEAD_PREFIX)
        return {Head.from_bytes(one[size:]) for one in payloads if one.startswith(HEAD_PREFIX)}


def events(actions: list[Action]) -> list[object]:
    return [action.event for action in of(actions, Notify)]


def kinds(told_events: list[object]) -> list[type]:
    return [type(one) for one in told_events]
