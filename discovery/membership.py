"""Who is there: what a member is, and what every kind of membership offers.

`static` (a list of peers, pinged) and gossip are two kinds. What stands above sees members, and the events below; how
they came about is the membership's own business. Both are sans-IO: `handle(event, now) -> actions`, with the vocabulary
of `kvmesh.discovery.actions`.

    state     means
    alive     it answered, or spoke, just now
    suspect   it missed a ping, and is silent; it still counts as there
    failed    it stayed silent: its holdings are dropped. It is alive again when it speaks
    left      it said that it stops. Only a new start (a larger epoch) brings it back
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from kvmesh.transport.limits import CONFLICTS_MAX

from .actions import Action, Event
from .head import Head

_RTT_SMOOTHING = 0.2


class MemberState(enum.StrEnum):
    """See the table above."""

    ALIVE = "alive"
    SUSPECT = "suspect"
    FAILED = "failed"
    LEFT = "left"


@dataclass(frozen=True, slots=True)
class Member:
    """One process of the mesh, as this one sees it."""

    name: str
    role: str
    """"agent", "controller" or "router"; for a member of another application that shares the gossip, what it calls
    itself."""
    state: MemberState
    address: str
    """Where its transport is reached from here."""
    epoch: int
    protocol_version: int
    last_seen: float
    """On the clock of this process: seconds, monotonic."""
    rtt_s: float | None
    """A smoothed round trip; None before the first answer."""
    head: Head | None
    """The newest that it told of its journal; None when it has none."""
    meta: Mapping[str, str]
    head_at: float | None = None
    """When that head was told, on the clock of this process. None: it never was."""
    gossip_address: str = ""
    """Where gossip reaches it; empty in a static membership."""
    incarnation: int = 0
    """How often it spoke up for itself; always 0 in a static membership."""
    public_key: bytes = b""


@dataclass(frozen=True, slots=True)
class Joined:
    """A member is there that was not: new, or back from failed or left."""

    member: Member


@dataclass(frozen=True, slots=True)
class Changed:
    """A member that is there has another state, epoch, address or meta."""

    member: Member


@dataclass(frozen=True, slots=True)
class Failed:
    """A member stayed silent."""

    member: Member


@dataclass(frozen=True, slots=True)
class Left:
    """A member said that it stops."""

    member: Member


@dataclass(frozen=True, slots=True)
class HeadTold:
    """A member told the head of its journal."""

    name: str
    head: Head


@dataclass(frozen=True, slots=True)
class Conflict:
    """Two processes use one name at the same time. The newer start counts; the older one must get another name."""

    name: str
    address: str
    """Of the one that counts."""
    other_address: str


MembershipEvent = Joined | Changed | Failed | Left | HeadTold | Conflict


class ConflictTable:
    """The names that two processes were seen to use. Bounded: the oldest goes."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, str, str], Conflict] = {}

    def add(self, name: str, address: str, other_address: str) -> Conflict | None:
        """Two addresses of one name. The conflict, when it is news."""
        place = (name, address, other_address)
        if place in self._found:
            return None
        if len(self._found) >= CONFLICTS_MAX:
            del self._found[next(iter(self._found))]
        self._found[place] = Conflict(*place)
        return self._found[place]

    def all(self) -> list[Conflict]:
        """The oldest first."""
        return list(self._found.values())


def smoothed_s(before_s: float | None, measured_s: float) -> float:
    """A smoothed round trip, after one that took `measured_s`."""
    return measured_s if before_s is None else before_s + _RTT_SMOOTHING * (measured_s - before_s)


class Membership(Protocol):
    """What every kind of membership offers to what stands above it."""

    def members(self) -> Sequence[Member]:
        """Everyone but this process, failed and left ones included."""

    def member(self, name: str) -> Member | None:
        """One of them."""

    def conflicts(self) -> Sequence[Conflict]:
        """Names that two processes use."""

    def handle(self, event: Event, now: float) -> list[Action]:
        """Take one event; the actions are to be performed in order. `Notify` carries a `MembershipEvent`."""
