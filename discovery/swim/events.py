"""The vocabulary between the membership protocol and whatever runs it: the asyncio driver, or the simulator.

    event            comes from                        action         goes to
    PacketCame       a packet, opened and decoded      SendPacket     a packet
    Pulled           a peer that opened a push/pull    AnswerPull     the same stream
    Exchanged        the answer to an `Exchange`       Exchange       a push/pull of ours, over a stream
    StreamPinged     the end of a `StreamPing`         StreamPing     a ping over a stream
    StreamFailed     a stream that did not work out    SendUser       a user message over a stream
    Resolved         the end of a `Resolve`            Resolve        the name service
    UserCame         a user message over a stream

Streams are named by numbers that are used once. Every action with a number ends in exactly one event with that number
(a simulator may break that rule, to prove that nothing depends on it), but for `SendUser`, whose failure alone is told.
Plain values: no socket, no clock.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvmesh.discovery.wire.messages import Endpoint, Message, Ping, PushPull

# --- events ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PacketCame:
    """The messages of one packet, in their order."""

    source: Endpoint
    messages: tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class Pulled:
    """A peer sent its state over a stream and waits for ours: `AnswerPull` with the same token."""

    token: int
    source: Endpoint
    state: PushPull


@dataclass(frozen=True, slots=True)
class Exchanged:
    """The peer's state, in answer to `Exchange`."""

    number: int
    state: PushPull


@dataclass(frozen=True, slots=True)
class StreamPinged:
    """The node that a `StreamPing` went to answered it."""

    number: int


@dataclass(frozen=True, slots=True)
class StreamFailed:
    """No stream was opened, or no answer came, or none that could be read."""

    number: int
    reason: str


@dataclass(frozen=True, slots=True)
class Resolved:
    """Where the seed is reached: nowhere, when the name service does not know it (`error` says why)."""

    seed: str
    endpoints: tuple[Endpoint, ...]
    error: str = ""


@dataclass(frozen=True, slots=True)
class UserCame:
    """A user message that came over a stream."""

    source: Endpoint
    payload: bytes


# --- actions ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SendPacket:
    """One packet with these messages: a compound when there are several. With `crc`: the receiver checks one."""

    target: Endpoint
    messages: tuple[Message, ...]
    crc: bool = False


@dataclass(frozen=True, slots=True)
class Exchange:
    """Send this state over a stream, and report the peer's."""

    number: int
    target: Endpoint
    state: PushPull
    timeout_s: float


@dataclass(frozen=True, slots=True)
class AnswerPull:
    """Our state, for the peer whose stream has this token; and close the stream."""

    token: int
    state: PushPull


@dataclass(frozen=True, slots=True)
class RefusePull:
    """No state for the peer whose stream has this token, and why; close the stream."""

    token: int
    reason: str


@dataclass(frozen=True, slots=True)
class StreamPing:
    """Ping over a stream: a node whose packets get lost is not dead."""

    number: int
    target: Endpoint
    ping: Ping
    timeout_s: float


@dataclass(frozen=True, slots=True)
class SendUser:
    """A user message over a stream, for what must not get lost."""

    number: int
    target: Endpoint
    payload: bytes
    timeout_s: float


@dataclass(frozen=True, slots=True)
class Resolve:
    """Look up all addresses of a seed, ``HOST:PORT``."""

    seed: str


@dataclass(frozen=True, slots=True)
class Remember:
    """Where others are reached that are alive: to be kept in a file, for the next start."""

    endpoints: tuple[Endpoint, ...]


@dataclass(frozen=True, slots=True)
class Departed:
    """The leave has been told: this process may stop."""


SwimEvent = PacketCame | Pulled | Exchanged | StreamPinged | StreamFailed | Resolved | UserCame
SwimAction = SendPacket | Exchange | AnswerPull | RefusePull | StreamPing | SendUser | Resolve | Remember | Departed
