"""Either side of a ZMTP 3.1 connection, without libzmq: bodies go from where they lie to where they belong.

A connection goes through three stages (RFC 37; 23 is version 3.0):

    greeting    64 bytes each way: the signature, version 3, and the name of the one security mechanism
    handshake   commands, as the mechanism wants them; NULL has one each way, READY with the socket's type
    traffic     frames of messages, and commands between any two of them: PING is answered by PONG

A frame is one byte of flags, its size in one byte or in eight, and its body. A message here is a *head*, the first
frame, and some *parts*. Everything but the bodies of parts goes through the stage, a small buffer that the bytes are
received into; of a part only its size is told, and whoever has the socket receives the body past the stage. Every size
is checked before a byte of its frame is waited for.

A mechanism speaks during the handshake alone. One that seals messages as well (CURVE) would open its MESSAGE commands
where `_frame` makes heads and parts of plain frames.

Sans-IO: bytes, times and sizes go in and out. Knows nothing of what the messages say. Used by one thread at a time.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from typing import Final, Literal, NamedTuple, Protocol

from .limits import (
    FRAME_BYTES_MAX,
    HANDSHAKE_TIMEOUT_S,
    HEADER_BYTES_MAX,
    HEARTBEAT_INTERVAL_S,
    HEARTBEAT_TIMEOUT_S,
    KIB,
    PARTS_PER_MESSAGE_MAX,
    STAGE_BYTES,
    UNSENT_BYTES_MAX,
)

Buffer = bytes | bytearray | memoryview

MORE: Final = 1
LONG: Final = 2
COMMAND: Final = 4
SIGNATURE: Final = b"\xff" + bytes(8) + b"\x7f"
GREETING_BYTES: Final = 64
CONTEXT_BYTES_MAX: Final = 16
"""Of a PING, to be returned by its PONG."""
JOINED_BYTES_MAX: Final = 4 * KIB
"""Frames up to this size are copied together with what stands around them: a buffer of its own costs as much."""
_PING: Final = b"\x04PING" + round(10 * HEARTBEAT_TIMEOUT_S).to_bytes(2, "big")


class ZmtpError(Exception):
    """The peer does not speak ZMTP as we do, or fell silent: the connection is of no use any more."""


class Head(NamedTuple):
    """The first frame of a message."""

    data: bytes
    more: bool
    """Parts follow."""


class Part(NamedTuple):
    """A further frame of the message begins: its body comes next."""

    size_bytes: int
    more: bool


class Mechanism(Protocol):
    """One side of a security handshake."""

    name: bytes
    ready: bool
    """The peer has proven what it must: messages may go both ways."""

    def begin(self) -> Iterable[bytes]:
        """The commands to send first."""

    def receive(self, name: bytes, data: memoryview) -> Iterable[bytes]:
        """The answers to one command of the peer's. Raises `ZmtpError`."""


class Null:
    """The mechanism that proves nothing: each side says what socket it has."""

    name = b"NULL"

    def __init__(self, ours: bytes = b"DEALER", theirs: bytes = b"ROUTER") -> None:
        self._ours = ours
        self._theirs = theirs
        self.ready = False

    def begin(self) -> Iterable[bytes]:
        """As `Mechanism.begin`."""
        return [b"\x05READY" + _property(b"Socket-Type", self._ours) + _property(b"Identity", b"")]

    def receive(self, name: bytes, data: memoryview) -> Iterable[bytes]:
        """As `Mechanism.receive`."""
        if name != b"READY":
            raise ZmtpError(f"the command {name!r} in a NULL handshake")
        if _properties(data).get(b"socket-type") != self._theirs:
            raise ZmtpError(f"the peer is no {self._theirs.decode()}")
        self.ready = True
        return ()


class _Stage(enum.Enum):
    GREETING = enum.auto()
    HANDSHAKE = enum.auto()
    TRAFFIC = enum.auto()


class Connection:
    """One connection. A part has at most `part_bytes_max` bytes, and a message `parts_max` of them."""

    def __init__(
        self, mechanism: Mechanism, *, part_bytes_max: int = FRAME_BYTES_MAX, parts_max: int = PARTS_PER_MESSAGE_MAX
    ) -> None:
        self._mechanism = mechanism
        self._part_bytes_max = part_bytes_max
        self._parts_max = parts_max
        self._at = _Stage.GREETING
        self._began_s = self._pinged_s = self.heard_s = 0.0
        """When something came last. Whoever receives says so."""
        self._staged = memoryview(bytearray(STAGE_BYTES))
        self._low = self._high = 0
        self._parts = 0
        self._more = False
        """The message goes on: the next frame is a part."""
        self.frames = 0
        """How many came, of every kind."""
        self.left = 0
        """Bytes of the part that have not been taken yet."""
        self.outgoing = bytearray(
            SIGNATURE + b"\x03\x01" + mechanism.name.ljust(20, b"\0") + bytes(GREETING_BYTES - 32)
        )
        """What is to be sent now. Whoever sends takes it from the front."""
        self._held = bytearray()

    def open(self, now: float) -> None:
        """TCP has the connection: the time for the handshake runs."""
        self._began_s = self._pinged_s = self.heard_s = now

    # --- what comes ------------------------------------------------------------------------------------------------
    @property
    def ready(self) -> bool:
        """The handshake is over."""
        return self._at is _Stage.TRAFFIC

    def room(self) -> memoryview:
        """Where the next bytes go that do not belong to a part."""
        return self._staged[self._high :]

    def received(self, count: int) -> None:
        """So many bytes were put into `room()`."""
        self._high += count

    def take(self, most: int) -> memoryview:
        """At most so many bytes of the part, if there are any in the stage: to be copied before anything else."""
        low = self._low
        self._low = min(low + most, low + self.left, self._high)
        self.left -= self._low - low
        taken = self._staged[low : self._low]
        if self._low == self._high:
            self._low = self._high = 0
        return taken

    def passed(self, count: int) -> None:
        """So many bytes of the part were received past the stage, which is empty."""
        self.left -= count

    def next(self) -> Head | Part | None:
        """The next head, or the beginning of the next part; None when more bytes are needed first.

        Not to be called before the last part was taken. Raises `ZmtpError`.
        """
        while True:
            got = self._greeting() if self._at is _Stage.GREETING else self._frame()
            if got is None:
                rest = self._high - self._low
                self._staged[:rest] = self._staged[self._low : self._high]
                self._low, self._high = 0, rest
                return None
            if got is not True:
                return got

    def _greeting(self) -> Literal[True] | None:
        if not SIGNATURE.startswith(bytes(self._staged[: min(self._high, 1)])):
            raise ZmtpError("the peer speaks another protocol")
        if self._high < GREETING_BYTES:
            return None
        greeting = bytes(self._staged[:GREETING_BYTES])
        if greeting[9] != SIGNATURE[9] or greeting[10] < 3:  # what stands between has no meaning
            raise ZmtpError("the peer speaks another protocol, or ZMTP before version 3")
        name = greeting[12:32].rstrip(b"\0")
        if name != self._mechanism.name:
            raise ZmtpError(f"the peer wants the mechanism {name!r}, not {self._mechanism.name!r}")
        self._low = GREETING_BYTES
        self._at = _Stage.HANDSHAKE
        for command in self._mechanism.begin():
            self._command(command)
        return True

    def _frame(self) -> Head | Part | Literal[True] | None:
        low, high, staged = self._low, self._high, self._staged
        if high - low < 2:
            return None
        flags = staged[low]
        if flags & LONG:
            if high - low < 9:
                return None
            size, body = int.from_bytes(staged[low + 1 : low + 9], "big"), low + 9
        else:
            size, body = staged[low + 1], low + 2
        is_part = self._more and not flags & COMMAND
        self._check(flags, size, self._part_bytes_max if is_part else HEADER_BYTES_MAX)
        more = bool(flags & MORE)
        if not is_part and high - body < size:
            return None
        self.frames += 1
        if is_part:
            self._parts += 1
            if self._parts > self._parts_max:
                raise ZmtpError(f"a message of more parts than {self._parts_max}")
            self._low, self._more, self.left = body, more, size
            return Part(size, more)
        self._low = body + size
        if flags & COMMAND:
            self._commanded(staged[body : self._low])
            return True
        self._parts, self._more = 0, more
        return Head(bytes(staged[body : self._low]), more)

    def _check(self, flags: int, size: int, most: int) -> None:
        if flags & ~(MORE | LONG | COMMAND) or flags & (MORE | COMMAND) == MORE | COMMAND:
            raise ZmtpError(f"a frame with the flags {flags:#x}")
        if self._at is _Stage.HANDSHAKE and not flags & COMMAND:
            raise ZmtpError("a message before the handshake is over")
        if size > most:
            raise ZmtpError(f"a frame of {size} bytes where {most} are the most")

    def _commanded(self, body: memoryview) -> None:
        if not body or not 0 < body[0] < len(body):
            raise ZmtpError("a command without a name")
        name, data = bytes(body[1 : 1 + body[0]]), body[1 + body[0] :]
        if name == b"ERROR":
            raise ZmtpError(f"the peer refused the connection: {bytes(data[1:])!r}")
        if self._at is _Stage.HANDSHAKE:
            for answer in self._mechanism.receive(name, data):
                self._command(answer)
            if self._mechanism.ready:
                self._at = _Stage.TRAFFIC
                self.outgoing += self._held
                self._held = bytearray()
        elif name == b"PING":
            if not 2 <= len(data) <= 2 + CONTEXT_BYTES_MAX:
                raise ZmtpError(f"a PING with {len(data)} bytes")
            self._command(b"\x04PONG" + data[2:])
        # PONG has done its work by coming; what a later version may command is not for us

    # --- what goes -------------------------------------------------------------------------------------------------
    def send(self, *frames: Buffer) -> bool:
        """Queue one message; it waits for the end of the handshake. False when too much waits already."""
        queue = self.outgoing if self._at is _Stage.TRAFFIC else self._held
        if len(queue) + sum(map(len, frames)) > UNSENT_BYTES_MAX:
            return False
        last = len(frames) - 1
        for index, frame in enumerate(frames):
            _put(queue, MORE if index < last else 0, frame)
        return True

    def _command(self, body: bytes) -> None:
        if len(self.outgoing) > UNSENT_BYTES_MAX:
            raise ZmtpError("the peer asks and does not read")
        _put(self.outgoing, COMMAND, body)

    # --- time ------------------------------------------------------------------------------------------------------
    @property
    def due_s(self) -> float:
        """When `tick` has something to do next, if nothing comes until then."""
        if self._at is not _Stage.TRAFFIC:
            return self._began_s + HANDSHAKE_TIMEOUT_S
        return min(self._pinged_s + HEARTBEAT_INTERVAL_S, self.heard_s + HEARTBEAT_TIMEOUT_S)

    def tick(self, now: float) -> None:
        """Ask the peer whether it is there. Raises `ZmtpError` when it has been silent for too long.

        A peer that talks is asked as well, since that tells it that we live: its own PING may stand behind megabytes
        that a slow path has not carried yet, and what we grant comes once in many of them.
        """
        if self._at is not _Stage.TRAFFIC:
            if now - self._began_s >= HANDSHAKE_TIMEOUT_S:
                raise ZmtpError("the handshake takes too long")
        elif now - self.heard_s >= HEARTBEAT_TIMEOUT_S:
            raise ZmtpError(f"silent for {HEARTBEAT_TIMEOUT_S:g} s")
        elif now - self._pinged_s >= HEARTBEAT_INTERVAL_S:
            self._pinged_s = now
            self._command(_PING)


def message(parts: Sequence[Buffer]) -> list[Buffer]:
    """One message as the bytes to send: large parts as they are, what stands between them joined."""
    out: list[Buffer] = []
    joined = bytearray()
    last = len(parts) - 1
    for index, part in enumerate(parts):
        if len(part) <= JOINED_BYTES_MAX:
            _put(joined, MORE if index < last else 0, part)
        else:
            joined += _opening(MORE if index < last else 0, len(part))
            out += (joined, part)
            joined = bytearray()
    if joined:
        out.append(joined)
    return out


def _put(queue: bytearray, flags: int, body: Buffer) -> None:
    queue += _opening(flags, len(body))
    queue += body


def _opening(flags: int, size_bytes: int) -> bytes:
    if size_bytes < 256:
        return bytes((flags, size_bytes))
    return bytes((flags | LONG,)) + size_bytes.to_bytes(8, "big")


def _property(name: bytes, value: bytes) -> bytes:
    return bytes((len(name),)) + name + len(value).to_bytes(4, "big") + value


def _properties(data: memoryview) -> dict[bytes, bytes]:
    """The metadata of a READY: names in lower case, as their case has no meaning."""
    found: dict[bytes, bytes] = {}
    at = 0
    while at < len(data):
        value_at = at + 1 + data[at] + 4
        end = value_at + int.from_bytes(data[value_at - 4 : value_at], "big")
        if not data[at] or end > len(data):
            raise ZmtpError("metadata that end in the middle")
        found[bytes(data[at + 1 : value_at - 4]).lower()] = bytes(data[value_at:end])
        at = end
    return found
