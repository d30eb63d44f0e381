"""Gossip keys, changed on all nodes at once while the cluster runs: `kvmesh keys`.

    asker                                      every member that is alive and ours
    Question(id, operation, key, endpoint) ──▶ applies it to its keyring, saves its key file
                                           ◀── Answer(id, name, error, fingerprints)

Both are user messages over streams: sealed with a gossip key, so only who holds one can ask. To *use* a key that some
node lacks, or to *remove* one that some node still uses, would cut the cluster in two. So these two take a first round,
a question for the lists, and change nothing unless all answers allow it. The asker changes its own keyring last, when
no question is left to seal. A round ends when all have answered, at the latest after `KEYS_ROUND_S`.

Two changes that two nodes ask for at once may each be fine, and together cut the cluster. So a node that asks for a
change answers no other asker meanwhile: at most one of the two gets past its first round.

A question that comes a second time (among the last KEYS_REMEMBERED_MAX) is refused, and so is an answer that nobody
waits for; both are counted. Not promised: a node that has started again has forgotten which questions it saw. Keys are
never told, only fingerprints.

Sans-IO: time, numbers, random ids and the saving of the file come from whoever runs it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Final, Literal, get_args

import msgspec

from kvmesh.transport.errors import ProtocolError, SettingsError
from kvmesh.transport.limits import (
    KEYS_ERROR_CHARS_MAX,
    KEYS_PER_RING_MAX,
    KEYS_REMEMBERED_MAX,
    KEYS_ROUND_S,
    MESH_PROTOCOL_VERSION,
    NAME_BYTES_MAX,
)

from .actions import Action, Notify
from .swim.events import SendUser
from .wire.keyring import FINGERPRINT_BYTES, Keyring, fingerprint
from .wire.messages import Endpoint

PAYLOAD_PREFIX: Final = b"KK"
"""The first bytes of a user message that belongs here."""
Operation = Literal["list", "use", "install", "remove"]
OPERATIONS: Final[tuple[Operation, ...]] = get_args(Operation)
ID_BYTES: Final = 8
ROUNDS_MAX: Final = 2
"""What one operation takes at most, each of `KEYS_ROUND_S`."""
NO_KEYRING: Final = "it runs without gossip keys: start it with --key-file"
_NEVER: Final = float("inf")
_VERSION: Final = bytes([MESH_PROTOCOL_VERSION])


@dataclass(frozen=True, slots=True)
class NodeKeys:
    """What one node did, or said."""

    name: str
    status: Literal["ok", "failed", "silent"]
    error: str = ""
    fingerprints: tuple[str, ...] = ()
    """Of its keys, the primary first, as they are after the operation."""


@dataclass(frozen=True, slots=True)
class KeysResult:
    """How an operation went, on the asker first."""

    operation: Operation
    fingerprint: str
    """Of the key that it was about; empty for a list."""
    nodes: tuple[NodeKeys, ...]
    error: str = ""
    """Why nothing was changed anywhere, and what to do."""

    @property
    def is_done(self) -> bool:
        """All nodes did it."""
        return not self.error and all(node.status == "ok" for node in self.nodes)


@dataclass(frozen=True, slots=True)
class KeysAnswered:
    """The operation that was asked with `token` is over."""

    token: int
    result: KeysResult


@dataclass(slots=True)
class KeyCounters:
    """Since the start."""

    questions: int = 0
    """Of other nodes, that were answered."""
    refused: int = 0
    """Of these, those that this node could not do."""
    replayed: int = 0
    """Questions that had come before."""
    unexpected: int = 0
    """Answers that nobody waits for."""
    malformed: int = 0


class _Message(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """By position, like all messages between nodes."""


_Id = Annotated[bytes, msgspec.Meta(min_length=ID_BYTES, max_length=ID_BYTES)]
_Fingerprint = Annotated[bytes, msgspec.Meta(min_length=FINGERPRINT_BYTES, max_length=FINGERPRINT_BYTES)]


class _Question(_Message, frozen=True, tag=1):
    id: _Id
    operation: Operation
    key: Annotated[bytes, msgspec.Meta(max_length=32)]
    ip: Annotated[bytes, msgspec.Meta(min_length=4, max_length=16)]
    port: Annotated[int, msgspec.Meta(ge=1, le=65535)]


class _Answer(_Message, frozen=True, tag=2):
    id: _Id
    name: Annotated[str, msgspec.Meta(max_length=NAME_BYTES_MAX)]
    error: Annotated[str, msgspec.Meta(max_length=KEYS_ERROR_CHARS_MAX)]
    fingerprints: Annotated[list[_Fingerprint], msgspec.Meta(max_length=KEYS_PER_RING_MAX)]


_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[_Question | _Answer] = msgspec.msgpack.Decoder(_Question | _Answer)


@dataclass(slots=True)
class _Round:
    """One operation of ours that is under way, and the question that is out."""

    token: int
    operation: Operation
    key: bytes
    members: Sequence[tuple[str, Endpoint]]
    checking: bool
    """The first of two rounds: the question is *list*."""
    id: bytes = b""
    ends: float = _NEVER
    waiting: dict[str, int] = field(default_factory=dict)
    """Members that have not answered, and the numbers of their streams."""
    answers: dict[str, NodeKeys] = field(default_factory=dict)


class KeyManager:
    """Asks the others for an operation, one at a time, and does what others ask."""

    def __init__(
        self,
        name: str,
        keyring: Keyring | None,
        *,
        endpoint: Callable[[], Endpoint],
        numbers: Callable[[], int],
        new_id: Callable[[], bytes],
        save: Callable[[], None],
    ) -> None:
        """`endpoint` is where others reach this node's gossip; `save` writes the key file, if there is one, and may
        raise `SettingsError`."""
        self.counters = KeyCounters()
        self._name = name
        self._keyring = keyring
        self._endpoint = endpoint
        self._numbers = numbers
        self._new_id = new_id
        self._save = save
        self._round: _Round | None = None
        self._seen: dict[bytes, None] = {}
        """Ids of questions, oldest first."""

    # --- asking --------------------------------------------------------------------------------------------------

    def ask(
        self, token: int, operation: Operation, key: bytes, members: Sequence[tuple[str, Endpoint]], now: float
    ) -> list[Action]:
        """Do it here and on `members`: all that are alive and ours. Ends in one `KeysAnswered` with `token`."""
        if self._round is not None:
            error = "another change of keys is under way: wait some seconds and try again"
        elif self._keyring is None:
            error = f"{self._name}: {NO_KEYRING}"
        else:
            error = _change(Keyring(self._keyring.keys), operation, key)  # a copy: the own turn is the last
        if error:
            return [_answered(token, operation, key, (), error)]
        self._round = _Round(token, operation, key, members, checking=operation in ("use", "remove"))
        return self._send(self._round, now)

    def on_failed(self, number: int, now: float) -> list[Action]:
        """The stream with this number did not work out."""
        if (current := self._round) is not None:
            for name, other in current.waiting.items():
                if other == number:
                    return self._heard(current, NodeKeys(name, "silent", "it cannot be reached"), now)
        return []

    def wake_at(self) -> float:
        """When the next `tick` is due."""
        return _NEVER if self._round is None else self._round.ends

    def tick(self, now: float) -> list[Action]:
        """The time of a round may be over."""
        current = self._round
        if current is None or now < current.ends:
            return []
        for name in current.waiting:
            current.answers[name] = NodeKeys(name, "silent", f"it did not answer within {KEYS_ROUND_S:g} s")
        current.waiting.clear()
        return self._next(current, now)

    def _send(self, current: _Round, now: float) -> list[Action]:
        current.id, current.ends = self._new_id(), now + KEYS_ROUND_S
        ip, port = self._endpoint()
        question = _Question(current.id, current.operation, current.key, ip, port)
        if current.checking:
            question = _Question(current.id, "list", b"", ip, port)
        payload = _pack(question)
        actions: list[Action] = []
        for name, endpoint in current.members:
            current.waiting[name] = self._numbers()
            actions.append(SendUser(current.waiting[name], endpoint, payload, KEYS_ROUND_S))
        return actions or self._next(current, now)

    def _heard(self, current: _Round, answer: NodeKeys, now: float) -> list[Action]:
        del current.waiting[answer.name]
        current.answers[answer.name] = answer
        return [] if current.waiting else self._next(current, now)

    def _next(self, current: _Round, now: float) -> list[Action]:
        """A round is over: the second one, or the result."""
        assert self._keyring is not None
        answers = [current.answers[name] for name, _ in current.members]
        if current.checking:
            key, known = fingerprint(current.key), set(_fingerprints(self._keyring))
            answers = [_check(answer, current.operation, key) for answer in answers]
            if all(answer.status == "ok" for answer in answers):
                if current.operation == "remove" and key not in known.union(*(one.fingerprints for one in answers)):
                    self._round = None
                    error = f"no node has the key {key}: nothing was removed; see `kvmesh keys list`"
                    return [_answered(current.token, current.operation, current.key, answers, error)]
                current.checking = False
                return self._send(current, now)
            self._round = None
            return [_answered(current.token, current.operation, current.key, answers, _advice(current.operation))]
        self._round = None
        error = self._apply(self._keyring, current.operation, current.key)
        own = NodeKeys(self._name, "failed" if error else "ok", error, _fingerprints(self._keyring))
        return [_answered(current.token, current.operation, current.key, [own, *answers], "")]

    # --- being asked ---------------------------------------------------------------------------------------------

    def on_payload(self, payload: bytes, now: float) -> list[Action]:
        """Take a user message that begins with `PAYLOAD_PREFIX` and came over a stream."""
        try:
            message = _unpack(payload)
        except ProtocolError:
            self.counters.malformed += 1
            return []
        if isinstance(message, _Question):
            return self._on_question(message)
        current = self._round
        if current is None or message.id != current.id or message.name not in current.waiting:
            self.counters.unexpected += 1
            return []
        shown = tuple(one.hex() for one in message.fingerprints)
        status: Literal["ok", "failed"] = "failed" if message.error else "ok"
        return self._heard(current, NodeKeys(message.name, status, message.error, shown), now)

    def _on_question(self, question: _Question) -> list[Action]:
        if question.id in self._seen:
            self.counters.replayed += 1
            return []
        if len(self._seen) >= KEYS_REMEMBERED_MAX:
            del self._seen[next(iter(self._seen))]
        self._seen[question.id] = None
        self.counters.questions += 1
        if self._keyring is None:
            # Who may ask has a key, and seals. This is somebody else, who shall not choose where this node calls.
            self.counters.refused += 1
            return []
        if self._round is not None and self._round.operation != "list":
            error = "it asks for a change of keys itself: wait some seconds and try again"
        else:
            error = self._apply(self._keyring, question.operation, question.key)
        self.counters.refused += bool(error)
        shown = [bytes.fromhex(one) for one in _fingerprints(self._keyring)]
        answer = _pack(_Answer(question.id, self._name, error[:KEYS_ERROR_CHARS_MAX], shown))
        return [SendUser(self._numbers(), Endpoint(question.ip, question.port), answer, KEYS_ROUND_S)]

    def _apply(self, keyring: Keyring, operation: Operation, key: bytes) -> str:
        """Do it here. What went wrong; empty when nothing did."""
        if operation == "list":
            return ""
        error = _change(keyring, operation, key)
        if not error:
            try:
                self._save()
            except SettingsError as failure:
                error = f"it did, but a restart undoes it: {failure}"
        return error


def _change(keyring: Keyring, operation: Operation, key: bytes) -> str:
    """Change the keyring. Why it cannot be; empty when it is done."""
    try:
        match operation:
            case "use":
                keyring.use(key)
            case "install":
                keyring.install(key)
            case "remove":
                keyring.remove(key)
            case "list":
                pass
    except SettingsError as error:
        return str(error)
    return ""


def _fingerprints(keyring: Keyring) -> tuple[str, ...]:
    return tuple(fingerprint(key) for key in keyring.keys)


def _check(answer: NodeKeys, operation: Operation, key: str) -> NodeKeys:
    """Whether a node that has these keys is ready for the operation."""
    if answer.status != "ok":
        return answer
    if operation == "use" and key not in answer.fingerprints:
        return NodeKeys(answer.name, "failed", "it does not have this key", answer.fingerprints)
    if operation == "remove" and answer.fingerprints[:1] == (key,):
        return NodeKeys(answer.name, "failed", "it still uses this key", answer.fingerprints)
    return answer


def _advice(operation: Operation) -> str:
    first = "install it" if operation == "use" else "use another key"
    return f"nothing was changed, since some nodes would be cut off: {first} on all of them, or stop those, then repeat"


def _answered(token: int, operation: Operation, key: bytes, nodes: Sequence[NodeKeys], error: str) -> Notify:
    shown = "" if operation == "list" else fingerprint(key)
    return Notify(KeysAnswered(token, KeysResult(operation, shown, tuple(nodes), error)))


def _pack(message: _Question | _Answer) -> bytes:
    return PAYLOAD_PREFIX + _VERSION + _encoder.encode(message)


def _unpack(payload: bytes) -> _Question | _Answer:
    head = len(PAYLOAD_PREFIX)
    if payload[head : head + 1] != _VERSION:
        raise ProtocolError("a message about keys has another version: upgrade the older node")
    try:
        message = _decoder.decode(payload[head + 1 :])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"not a message about keys: {error}") from None
    if isinstance(message, _Question) and len(message.ip) not in (4, 16):
        raise ProtocolError("a question about keys names no address")
    return message
