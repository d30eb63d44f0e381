"""What a Serf agent expects of those that share its gossip, beside memberlist's protocol: a logical clock and intents.

    type  message       what it means                  what is done about it here
    0     leave intent  that node is going to leave    told on once; about us while we stay: refuted by a join intent
    1     join intent   that node is there on purpose  told on once
    2     push/pull     the application's state        our clock follows its clock; what we add to it is ours
    3…9   events, queries, relays                      nothing: they have clocks and queues of their own

Serf calls a dead member *left* when it heard a leave intent of it that is newer than its last one, else *failed*. So a
graceful leave tells the intent before memberlist's dead message, at a time past all that was heard. Serf counts on each
member to pass intents on, so ours do too: otherwise a Serf agent that leaves among many of ours would look failed to
the next one. Our own state rides in Serf's push/pull message as one more field, which Serf's decoder passes over.

Facts: hashicorp/serf, delegate.go, serf.go, lamport.go. Sans-IO; one `SerfSide` for each process.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import msgpack

from kvmesh.transport.errors import ProtocolError
from kvmesh.transport.limits import LAMPORT_TIME_MAX, NAME_BYTES_MAX, SERF_NAMES_MAX, SERF_STATE_BYTES_MAX

LEAVE: Final = 0
JOIN: Final = 1
PUSH_PULL: Final = 2
TYPES_MAX: Final = 9
"""The last of Serf's message types; the first byte of a user message of ours is larger."""
_OWN_FIELD: Final = "Kvmesh"
_INTENT_BYTES_MAX: Final = NAME_BYTES_MAX + 128


class Word(NamedTuple):
    """A user message to gossip. A later one about the same node replaces it."""

    node: str
    payload: bytes


class Intent(NamedTuple):
    """A node's, to join or to leave."""

    kind: int
    """`LEAVE` or `JOIN`."""
    lamport: int
    node: str


class State(NamedTuple):
    """What is used of a push/pull's application state."""

    lamport: int
    left: tuple[str, ...]
    """Members that the sender holds for left."""
    own: bytes
    """What one of our nodes put in; empty from a Serf agent."""


class SerfSide:
    """This process's clock, and the newest intent of each node."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._lamport = 1
        self._newest: dict[str, int] = {}
        """By node, the latest heard last."""
        self._leaving = False

    @property
    def lamport(self) -> int:
        """The logical time of what is said next."""
        return self._lamport

    def join(self) -> Word:
        """To be gossiped once this process has joined: an older leave of its name no longer counts."""
        return self._say(JOIN)

    def leave(self) -> Word:
        """To be told, to Serf agents above all, before memberlist's message that this node is dead."""
        self._leaving = True
        return self._say(LEAVE)

    def state(self, own: bytes) -> bytes:
        """The application's state of a push/pull, with `own` in it."""
        return encode_state(self._lamport, own)

    def merge(self, data: bytes) -> tuple[bytes, list[Word]]:
        """Take the state of a peer: what it holds of ours, and what is to be gossiped. Raises `ProtocolError`."""
        state = decode_state(data)
        if state.lamport:
            self._witness(state.lamport - 1)  # it has said nothing yet at this time
        refuted = self._name in state.left and not self._leaving
        return state.own, [self.join()] if refuted else []

    def on_message(self, payload: bytes) -> list[Word]:
        """Take a user message whose first byte is one of Serf's: what is to be gossiped. Raises `ProtocolError`."""
        intent = decode_intent(payload)
        if intent is None:
            return []
        self._witness(intent.lamport)
        if not self._remember(intent):
            return []
        if intent.node == self._name and intent.kind == LEAVE and not self._leaving:
            return [self.join()]
        return [Word(intent.node, payload)]

    def _say(self, kind: int) -> Word:
        intent = Intent(kind, self._lamport, self._name)
        self._remember(intent)
        self._witness(intent.lamport)
        return Word(self._name, encode_intent(intent))

    def _witness(self, lamport: int) -> None:
        self._lamport = min(max(self._lamport, lamport + 1), LAMPORT_TIME_MAX)

    def _remember(self, intent: Intent) -> bool:
        """Whether it is newer than what was heard of that node."""
        if intent.lamport <= self._newest.get(intent.node, 0):
            return False
        self._newest.pop(intent.node, None)
        if len(self._newest) >= SERF_NAMES_MAX:
            del self._newest[next(iter(self._newest))]
        self._newest[intent.node] = intent.lamport
        return True


def is_serf(payload: bytes) -> bool:
    """Whether a user message is one of Serf's types."""
    return bool(payload) and payload[0] <= TYPES_MAX


def encode_intent(intent: Intent) -> bytes:
    """An intent as Serf sends it."""
    fields: dict[str, Any] = {"LTime": intent.lamport, "Node": intent.node}
    if intent.kind == LEAVE:
        fields["Prune"] = False
    return bytes([intent.kind]) + _pack(fields)


def decode_intent(payload: bytes) -> Intent | None:
    """The intent in a message of Serf; None for its other types. Raises `ProtocolError` for one that is malformed."""
    if not payload or payload[0] not in (LEAVE, JOIN):
        return None
    if len(payload) > _INTENT_BYTES_MAX:
        raise ProtocolError(f"an intent of {len(payload)} bytes: {_INTENT_BYTES_MAX} are allowed")
    fields = _unpack(payload[1:])
    node = _text(fields.get(b"Node"))
    if not node:
        raise ProtocolError("an intent names no node")
    return Intent(payload[0], _lamport(fields), node)


def encode_state(lamport: int, own: bytes) -> bytes:
    """Serf's push/pull message, without members and events, and with `own` as a field that Serf passes over."""
    fields = {
        "LTime": lamport,
        "StatusLTimes": {},
        "LeftMembers": [],
        "EventLTime": 0,
        "Events": [],
        "QueryLTime": 0,
        _OWN_FIELD: own,
    }
    return bytes([PUSH_PULL]) + _pack(fields)


def decode_state(data: bytes) -> State:
    """What is used of a peer's state; nothing from one that has none. Raises `ProtocolError` when it cannot be read."""
    if not data:
        return State(0, (), b"")
    if len(data) > SERF_STATE_BYTES_MAX:
        raise ProtocolError(f"a state of {len(data)} bytes: {SERF_STATE_BYTES_MAX} are allowed")
    if data[0] != PUSH_PULL:
        raise ProtocolError(f"a state of type {data[0]} is not Serf's: another application's gossip")
    fields = _unpack(data[1:])
    own = fields.get(_OWN_FIELD.encode(), b"")
    if not isinstance(own, bytes):
        raise ProtocolError("a state's part of ours is not bytes")
    left = fields.get(b"LeftMembers")
    names = left if isinstance(left, list) else []
    return State(_lamport(fields), tuple(filter(None, map(_text, names))), own)


def _lamport(fields: dict[Any, Any]) -> int:
    lamport = fields.get(b"LTime")
    if type(lamport) is not int or not 0 <= lamport <= LAMPORT_TIME_MAX:
        raise ProtocolError("a message of Serf has no usable logical time")
    return lamport


def _text(value: object) -> str:
    """A node's name; empty when it is none."""
    if not isinstance(value, bytes) or len(value) > NAME_BYTES_MAX:
        return ""
    try:
        return value.decode()
    except UnicodeDecodeError:
        return ""


def _pack(fields: dict[str, Any]) -> bytes:
    packed: bytes = msgpack.packb(fields, use_bin_type=False)
    return packed


def _unpack(data: bytes) -> dict[Any, Any]:
    try:
        fields = msgpack.unpackb(data, raw=True, strict_map_key=True)
    except (ValueError, TypeError, OverflowError, RecursionError) as error:  # its errors have no common root
        raise ProtocolError(f"a message of Serf cannot be read: {error}") from None
    if not isinstance(fields, dict):
        raise ProtocolError("a message of Serf is no map")
    return fields
