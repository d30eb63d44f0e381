"""The vocabulary between the sans-IO classes of discovery and whatever runs them: the asyncio driver, or the simulator.

A class gets events and returns actions. It never waits, sends or reads a clock; `now` comes with the event. A call ends
in exactly one `Answered` or `Lost` (a simulator may break that rule, to prove that nothing depends on it). Plain
values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from .messages import Answer, Request
from .swim.events import SwimAction, SwimEvent


class Tag(NamedTuple):
    """Names one call: who made it, and a number that is used once."""

    owner: str
    """The node that is followed; empty for the membership."""
    number: int


# --- events ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Started:
    """The first event."""


@dataclass(frozen=True, slots=True)
class Stopping:
    """The last event but for answers."""


@dataclass(frozen=True, slots=True)
class Ticked:
    """The time of the latest `Wake` has come, or something else woke."""


@dataclass(frozen=True, slots=True)
class JournalChanged:
    """The own journal has a new entry."""


@dataclass(frozen=True, slots=True)
class Requested:
    """A peer asks. The answer is a `Reply` with the same token, now or later."""

    token: int
    message: Request


@dataclass(frozen=True, slots=True)
class Withdrawn:
    """Nobody waits for the answer to this token any more."""

    token: int


@dataclass(frozen=True, slots=True)
class Answered:
    """The answer to a `Call`."""

    tag: Tag
    message: Answer


@dataclass(frozen=True, slots=True)
class Lost:
    """No answer came, or none that could be read."""

    tag: Tag


@dataclass(frozen=True, slots=True)
class Heard:
    """A member proved outside the membership that it lives: it answered its follower."""

    name: str
    epoch: int


@dataclass(frozen=True, slots=True)
class KeysAsked:
    """Somebody on this host wants an operation on the gossip keys of all nodes (`kvmesh.discovery.keying`)."""

    token: int
    operation: Literal["list", "use", "install", "remove"]
    key: bytes


Event = (
    Started
    | Stopping
    | Ticked
    | JournalChanged
    | Requested
    | Withdrawn
    | Answered
    | Lost
    | Heard
    | KeysAsked
    | SwimEvent
)


# --- actions ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Call:
    """Ask the process at `address`; report `Answered` or, at the latest after `timeout_s`, `Lost`."""

    tag: Tag
    address: str
    message: Request
    timeout_s: float


@dataclass(frozen=True, slots=True)
class Ask:
    """As `Call`, to the node that the asking follower follows: whoever performs it knows the address."""

    tag: Tag
    message: Request
    timeout_s: float


@dataclass(frozen=True, slots=True)
class Reply:
    """Answer the request that came with `token`."""

    token: int
    message: Answer


@dataclass(frozen=True, slots=True)
class Refuse:
    """Answer the request that came with `token` with an error."""

    token: int
    reason: str


@dataclass(frozen=True, slots=True)
class Wake:
    """Send `Ticked` at this time. A later `Wake` of the same class replaces it."""

    at: float


@dataclass(frozen=True, slots=True)
class Notify:
    """Something that others may want to know."""

    event: object


Action = Call | Ask | Reply | Refuse | Wake | Notify | SwimAction
