"""A static membership with virtual time, and the processes that answer it: what its tests are written with."""

from __future__ import annotations

from random import Random

from kvmesh.discovery import Head, Identity, MemberState, StaticMembership, node_id
from kvmesh.discovery.actions import (
    Action,
    Answered,
    Call,
    Lost,
    Notify,
    Reply,
    Requested,
    Started,
    Ticked,
    Wake,
)
from kvmesh.discovery.membership import HeadTold
from kvmesh.discovery.messages import Ping, Pong
from kvmesh.transport.limits import (
    PING_TIMEOUT_S,
)

ME = Identity("me", "agent", 50, "me:1")


def peer(name: str = "a", epoch: int = 10, address: str | None = None, role: str = "agent") -> Identity:
    return Identity(name, role, epoch, address or f"{name}:1")  # type: ignore[arg-type]


def head(identity: Identity, seq: int = 0) -> bytes:
    return Head(node_id(identity.name), identity.epoch, seq, 0, 0).to_bytes()


class Table:
    """A membership, the processes that answer it (by address), and virtual time."""

    def __init__(self, *seeds: str) -> None:
        self.membership = StaticMembership(ME, seeds, head=lambda: None, random=Random(3))
        self.answering: dict[str, Identity] = {}
        self.known: list[str] = []
        """What those who answer tell of others."""
        self.now = 100.0
        self.calls: list[Call] = []
        """Under way."""
        self.sent_at: dict[object, float] = {}
        self.events: list[object] = []
        self.replies: list[object] = []
        self.pinged: list[str] = []
        self.wake_at = self.now
        self.feed(Started())

    def feed(self, event: object) -> None:
        for action in self.membership.handle(event, self.now):  # type: ignore[arg-type]
            self._perform(action)

    def _perform(self, action: Action) -> None:
        match action:
            case Call():
                self.calls.append(action)
                self.sent_at[action.tag] = self.now
                self.pinged.append(action.address)
            case Notify(event):
                self.events.append(event)
            case Reply(_, message):
                self.replies.append(message)
            case Wake(at):
                self.wake_at = at

    def answer(self, call: Call, identity: Identity) -> None:
        self.calls.remove(call)
        self.feed(Answered(call.tag, Pong(identity, head(identity), self.known)))

    def run(self, seconds: float, *, step_s: float = 0.05) -> None:
        """Time passes: whoever answers does so at once, other pings time out."""
        end = self.now + seconds
        while self.now < end:
            self.now += step_s
            for call in list(self.calls):
                if call.address in self.answering:
                    self.answer(call, self.answering[call.address])
                elif self.now - self.sent_at[call.tag] >= PING_TIMEOUT_S:
                    self.calls.remove(call)
                    self.feed(Lost(call.tag))
            if self.now >= self.wake_at:
                self.feed(Ticked())

    def run_while(self, state: MemberState) -> None:
        """Until the state of "a" is another one."""
        for _ in range(400):
            if self.state() is not state:
                return
            self.run(0.05)
        raise AssertionError(f"still {state}")

    def hear_ping(self, identity: Identity) -> None:
        self.feed(Requested(1, Ping(identity, head(identity))))

    def state(self, name: str = "a") -> MemberState | None:
        member = self.membership.member(name)
        return member.state if member else None

    def kinds(self) -> list[str]:
        """The events since the last call, heads left out."""
        kinds = [type(event).__name__ for event in self.events if not isinstance(event, HeadTold)]
        self.events.clear()
        return kinds
