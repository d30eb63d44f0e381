"""What the tests of the protocol core share: an application that writes everything down, and one machine with a clock.

Metas are a start's number as text (``b"3"``), so that the application can compare starts; any other meta says nothing
of a start, as those of other applications do.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from random import Random
from typing import TypeVar

from kvmesh.discovery.actions import Action, Event, Notify, Started, Stopping, Ticked, Wake
from kvmesh.discovery.swim.base import Change
from kvmesh.discovery.swim.events import (
    AnswerPull,
    Exchange,
    Exchanged,
    PacketCame,
    Pulled,
    RefusePull,
    SendPacket,
    StreamPing,
)
from kvmesh.discovery.swim.machine import Swim
from kvmesh.discovery.swim.nodes import Node
from kvmesh.discovery.swim.profile import LAN, Profile
from kvmesh.discovery.swim.timers import NEVER
from kvmesh.discovery.wire.messages import (
    VERSIONS,
    Ack,
    Alive,
    Dead,
    Endpoint,
    Message,
    Ping,
    PushedNode,
    PushedState,
    PushPull,
    Suspect,
)

Chosen = TypeVar("Chosen")
PORT = 7946
ME = Endpoint(bytes([10, 0, 0, 1]), PORT)
STRANGER = Endpoint(bytes([10, 9, 9, 9]), PORT)
WRONG_VERSIONS = bytes([1, 5, 5, 2, 4, 4])
"""Of a node whose application speaks another protocol."""


def at(number: int) -> Endpoint:
    """The address of the node ``n<number>``."""
    return Endpoint(bytes([10, 0, number // 256, number % 256]), PORT)


def alive(
    name: str, incarnation: int = 1, place: Endpoint | None = None, meta: bytes = b"1", versions: bytes = VERSIONS
) -> Alive:
    """What the node says of itself; its address follows from its name, ``n5``."""
    place = place or at(int(name[1:]))
    return Alive(incarnation, name, place.ip, place.port, meta, versions)


def pushed(
    name: str,
    incarnation: int = 1,
    state: int = PushedState.ALIVE,
    place: Endpoint | None = None,
    meta: bytes = b"1",
    versions: bytes = VERSIONS,
) -> PushedNode:
    """The same in a push/pull."""
    place = place or at(int(name[1:]))
    return PushedNode(name, place.ip, place.port, meta, incarnation, state, versions)


class App:
    """An `Application` that writes down what it is told."""

    def __init__(self) -> None:
        self.changes: list[tuple[str, Change]] = []
        self.conflicts: list[tuple[str, Endpoint, Endpoint]] = []
        self.users: list[bytes] = []
        self.states: list[bytes] = []
        self.own_state = b"of n1"

    def compare_starts(self, known: bytes, told: bytes) -> int | None:
        return int(told) - int(known) if known.isdigit() and told.isdigit() else None

    def on_change(self, node: Node, change: Change, now: float) -> None:
        self.changes.append((node.name, change))

    def on_conflict(self, node: Node, other: Endpoint, now: float) -> None:
        self.conflicts.append((node.name, node.endpoint, other))

    def on_user(self, payload: bytes, source: Endpoint, now: float) -> None:
        self.users.append(payload)

    def state(self) -> bytes:
        return self.own_state

    def on_state(self, state: bytes, now: float) -> None:
        self.states.append(state)


class Lone:
    """The machine of ``n1``, a clock, and everything that it wanted done, with its time. Nobody is at the other end:
    tests play the others."""

    def __init__(
        self,
        profile: Profile = LAN,
        *,
        seeds: Sequence[str] = (),
        known: Sequence[Endpoint] = (),
        others: int = 0,
        seed: int = 0,
        overhead_bytes: int = 0,
        meta: bytes = b"1",
    ) -> None:
        self.app = App()
        self.swim = Swim(
            Alive(1, "n1", ME.ip, ME.port, meta, VERSIONS),
            self.app,
            profile=profile,
            random=Random(seed),
            seeds=seeds,
            known=known,
            packet_overhead_bytes=overhead_bytes,
        )
        self.profile = profile
        self.now = 100.0
        self.wake_at = NEVER
        self.done: list[tuple[float, Action]] = []
        self.feed(Started())
        if others:
            self.hear(*(alive(f"n{number}") for number in range(2, 2 + others)))
            self.quiet()

    # --- feeding --------------------------------------------------------------------------------------------------

    def feed(self, event: Event) -> list[Action]:
        """One event; what it led to, but for wakes."""
        if self.wake_at <= self.now:
            self.wake_at = NEVER  # the alarm rang
        actions = self.swim.handle(event, self.now)
        for action in actions:
            if isinstance(action, Wake):
                self.wake_at = action.at
        assert self.wake_at == self.swim._shared.timers.next_at(), "the next timer has no alarm"
        wanted = [action for action in actions if not isinstance(action, Wake)]
        self.done += [(self.now, action) for action in wanted]
        return wanted

    def hear(self, *messages: Message, source: Endpoint = STRANGER) -> list[Action]:
        """One packet comes."""
        return self.feed(PacketCame(source, messages))

    def pull(self, *nodes: PushedNode, join: bool = False, state: bytes = b"", token: int = 7) -> list[Action]:
        """A peer begins a push/pull."""
        return self.feed(Pulled(token, STRANGER, PushPull(join, nodes, state)))

    def exchanged(self, exchange: Exchange, *nodes: PushedNode, state: bytes = b"") -> list[Action]:
        """The peer answers an exchange of ours."""
        return self.feed(Exchanged(exchange.number, PushPull(False, nodes, state)))

    def stop(self) -> list[Action]:
        return self.feed(Stopping())

    def run(self, seconds: float, *, silent: Collection[str] | None = None) -> list[Action]:
        """Time passes, and each alarm rings when it is due; what was done meanwhile. Nobody answers a ping; or, where
        it is said who is silent, everybody else."""
        until, before = self.now + seconds, len(self.done)
        rings = 0
        while self.wake_at <= until:
            rings, self.now = (rings + 1 if self.wake_at <= self.now else 0), max(self.now, self.wake_at)
            assert rings < 100, "an alarm that rings for ever in one moment"
            for action in self.feed(Ticked()):
                if silent is not None:
                    self.answer(action, silent)
        self.now = until
        return [action for _, action in self.done[before:]]

    def sleep(self, seconds: float) -> list[Action]:
        """The process does not run for so long, whatever alarm rings."""
        self.now += seconds
        return self.feed(Ticked())

    def quiet(self) -> None:
        """Run until all rumours are told, and forget what was done. Whoever is probed meanwhile answers."""
        while self.swim.rumours:
            self.run(0.1, silent=())
        self.done.clear()

    def answer(self, action: Action, silent: Collection[str] = ()) -> None:
        """The node that is pinged here answers."""
        if isinstance(action, SendPacket):
            for message in action.messages:
                if isinstance(message, Ping) and message.node not in silent:
                    self.hear(Ack(message.seq), source=action.target)

    # --- looking --------------------------------------------------------------------------------------------------

    def view(self, name: str) -> tuple[int, str] | None:
        """What is believed of a node: incarnation and state."""
        node = self.swim.table.get(name)
        return None if node is None else (node.incarnation, node.state.name)

    def node(self, name: str) -> Node:
        node = self.swim.table.get(name)
        assert node is not None
        return node

    def ring(self) -> list[Action]:
        """On to the next alarm, and no further; what was done then."""
        assert self.wake_at < NEVER
        self.now = max(self.now, self.wake_at)
        return self.feed(Ticked())

    def ring_until(self, seen: Callable[[], bool], *, within_s: float = 100.0) -> None:
        """From alarm to alarm, until it is so."""
        until = self.now + within_s
        while not seen():
            self.ring()
            assert self.now <= until, "it did not come to that"

    def next_ping(self, name: str = "") -> Ping:
        """On to the moment in which a node is probed: that one, or any. Others that are probed before answer."""
        for _ in range(1000):
            for action in self.ring():
                for message in action.messages if isinstance(action, SendPacket) else ():
                    if isinstance(message, Ping) and (not name or message.node == name):
                        return message
                self.answer(action)
        raise AssertionError(f"{name or 'nobody'} was never probed")


def of(actions: Sequence[Action], kind: type[Chosen]) -> list[Chosen]:
    """The actions of one kind."""
    return [action for action in actions if isinstance(action, kind)]


def sent(actions: Sequence[Action], kind: type[Chosen]) -> list[tuple[Endpoint, Chosen]]:
    """The messages of one kind, with where they go."""
    return [
        (action.target, message)
        for action in of(actions, SendPacket)
        for message in action.messages
        if isinstance(message, kind)
    ]


def only(found: Sequence[Chosen]) -> Chosen:
    """The one that there is."""
    assert len(found) == 1, f"one was expected: {found}"
    return found[0]


def notices(actions: Sequence[Action]) -> list[object]:
    return [action.event for action in of(actions, Notify)]


def accusation(name: str, incarnation: int = 1, accuser: str = "n2") -> Suspect:
    return Suspect(incarnation, name, accuser)


def death(name: str, incarnation: int = 1, accuser: str = "n2") -> Dead:
    assert accuser != name, "that would be a departure"
    return Dead(incarnation, name, accuser)


def departure(name: str, incarnation: int = 1) -> Dead:
    return Dead(incarnation, name, name)


__all__ = [
    "AnswerPull",
    "App",
    "Exchange",
    "Lone",
    "RefusePull",
    "SendPacket",
    "StreamPing",
    "accusation",
    "alive",
    "at",
    "death",
    "departure",
    "notices",
    "of",
    "only",
    "pushed",
    "sent",
]
