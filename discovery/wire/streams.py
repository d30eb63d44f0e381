"""One message over a stream, and all that is wrapped around it.

    [label] | 10 | length u32 big-endian | encrypted(…)        with a keyring
    [label] | …                                                without

where … is the message, maybe compressed: its kind and a map (ping, ack, error); or

    6 | Join Nodes UserStateLen | a map for each node | state      push/pull
    8 | UserMsgLen | payload                                       user

The one that opens a stream says the label; the answer is without one. `StreamCodec` owns both directions of that, and
`StreamReader` reads a message from bytes that come in pieces, each byte once. Counts and lengths are bounded before
anything is taken for them. A node of a push/pull whose values are not accepted is left out, and counted in `left_out`:
the others are worth having. Never compresses. Knows no socket and no clock: whoever reads a stream bounds its time, and
knows what an end before the message means.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator
from typing import Final

from kvmesh.transport.limits import (
    GOSSIP_MAP_BYTES_MAX,
    LABEL_BYTES_MAX,
    PUSHED_NODES_MAX,
    STREAM_BYTES_MAX,
)

from . import codec, compression, label, security
from .errors import Cause, WireError
from .keyring import Keyring
from .messages import Kind, Message, PushedNode, PushPull, User
from .values import Fields, MapReader, flag, pack, uint_or_zero

_ENCRYPT_HEADER_BYTES: Final = 5
_WIRE_BYTES_MAX: Final = STREAM_BYTES_MAX + _ENCRYPT_HEADER_BYTES + label.HEADER_BYTES + LABEL_BYTES_MAX


class StreamCodec:
    """Seals and reads what one node's streams carry. The keyring may change meanwhile."""

    def __init__(self, keyring: Keyring | None, label: str = "") -> None:
        self._keyring = keyring
        self._label = _label_header(label)
        self._authenticated = label.encode()
        self.left_out: Counter[Cause] = Counter()
        """Nodes that were left out of push/pulls whose others were read, by cause."""

    def seal(self, message: Message, *, answer: bool) -> bytes:
        """The message as it goes over a stream: one that we opened, or as the `answer` over one that a peer opened."""
        data = _encode(message)
        if self._keyring is not None:
            header = bytes([Kind.ENCRYPT]) + (len(data) + security.OVERHEAD_BYTES).to_bytes(4, "big")
            data = header + security.seal(self._keyring, data, header + self._authenticated)
        return data if answer else self._label + data

    def reader(self, *, answer: bool) -> StreamReader:
        """Reads what comes over a stream that a peer opened, or the `answer` over one that we opened."""
        return StreamReader(self._keyring, b"" if answer else self._label, self._authenticated, self.left_out)


class StreamReader:
    """Reads one message. What is fed after it, or after an error, is not looked at."""

    def __init__(
        self, keyring: Keyring | None, label_header: bytes, authenticated: bytes, left_out: Counter[Cause]
    ) -> None:
        self._keyring = keyring
        self._label = label_header
        self._authenticated = authenticated
        self._left_out = left_out
        self._fed = 0
        self._came = bytearray()
        """What came and is not understood yet: the begin of a stream, or something of which the length is known."""
        self._message: _MessageReader | None = None
        """Reads a message that is neither encrypted nor compressed."""
        self._wanted = 1
        """How much must have come before it is worth looking again."""
        self._ended = False

    def feed(self, data: bytes) -> Message | None:
        """More bytes. The message, once all of it came. Raises `WireError`."""
        if self._ended:
            return None
        self._ended = True
        message = self._take(data)
        self._ended = message is not None
        return message

    def _take(self, data: bytes) -> Message | None:
        self._fed += len(data)
        if self._message is not None:
            message = self._message.feed(data)
        else:
            self._came += data
            message = self._look() if len(self._came) >= self._wanted else None
        if message is None and self._fed > _WIRE_BYTES_MAX:
            raise WireError(Cause.TOO_LARGE, f"a stream of more than {STREAM_BYTES_MAX} bytes")
        return message

    def _look(self) -> Message | None:
        """The message, if it can be read from what came. Else `_wanted` says how much it takes."""
        came = self._came
        begins = label.header_bytes(came, self._label)
        if begins is None or len(came) <= begins:
            self._wanted = len(came) + 1
            return None
        kind = came[begins]
        if kind == Kind.ENCRYPT:
            return self._look_encrypted(begins)
        if self._keyring is not None:
            raise WireError(Cause.PLAINTEXT, "a stream that is not encrypted, and this node has a key")
        if kind == Kind.COMPRESS:
            return self._look_compressed(begins + 1)
        self._message = _MessageReader(self._left_out)
        rest = bytes(came[begins:])
        came.clear()
        return self._message.feed(rest)

    def _look_encrypted(self, begins: int) -> Message | None:
        if self._keyring is None:
            raise WireError(Cause.ENCRYPTED, "a stream that is encrypted, and this node has no key")
        came = self._came
        payload = begins + _ENCRYPT_HEADER_BYTES
        if len(came) < payload:
            self._wanted = payload
            return None
        header = bytes(came[begins:payload])
        ends = payload + _accepted(int.from_bytes(header[1:], "big"))
        if len(came) < ends:
            self._wanted = ends
            return None
        sealed = bytes(came[payload:ends])
        came.clear()
        plain = security.open_sealed(self._keyring, sealed, header + self._authenticated)
        if plain[:1] == _COMPRESS:
            plain = compression.unwrap(plain[1:], STREAM_BYTES_MAX)
        return _whole(plain, self._left_out)

    def _look_compressed(self, begins: int) -> Message | None:
        came = self._came
        found = compression.header(bytes(came[begins : begins + compression.HEADER_BYTES_MAX]))
        if found is None:
            self._wanted = len(came) + 1
            return None
        ends = begins + found[0] + _accepted(found[1])
        if len(came) < ends:
            self._wanted = ends
            return None
        wrapped = bytes(came[begins:ends])
        came.clear()
        return _whole(compression.unwrap(wrapped, STREAM_BYTES_MAX), self._left_out)


def _accepted(length: int) -> int:
    if length > STREAM_BYTES_MAX:
        raise WireError(Cause.TOO_LARGE, f"a stream of {length} bytes: {STREAM_BYTES_MAX} are accepted")
    return length


def _whole(data: bytes, left_out: Counter[Cause]) -> Message:
    """The message that `data` is, all of it."""
    reader = _MessageReader(left_out)
    message = reader.feed(data)
    if message is None or reader.behind:
        raise WireError(Cause.MALFORMED, "a message that is shorter or longer than what was wrapped")
    return message


class _MessageReader:
    """Reads one message without a wrapping, from its kind on."""

    def __init__(self, left_out: Counter[Cause]) -> None:
        self._maps = MapReader()
        self._left_out = left_out
        self._reading: Generator[None, None, Message] | None = None
        self.behind = 0
        """Bytes that were fed and are behind the message."""

    def feed(self, data: bytes) -> Message | None:
        """More bytes, passed on in small pieces, as `MapReader` wants them. The message, once all of it came."""
        begins = 0
        if self._reading is None:
            if not data:
                return None
            begins = 1
            self._reading = self._read(data[0])
            next(self._reading)
        for at in range(begins, len(data), GOSSIP_MAP_BYTES_MAX):
            piece = data[at : at + GOSSIP_MAP_BYTES_MAX]
            self._maps.feed(piece)
            try:
                next(self._reading)
            except StopIteration as stop:
                self.behind = self._maps.unread_bytes + len(data) - at - len(piece)
                message: Message = stop.value
                return message
        return None

    def _read(self, kind: int) -> Generator[None, None, Message]:
        """Yields for more bytes, and at once before it has any."""
        if kind == Kind.PUSH_PULL:
            return (yield from self._push_pull())
        if kind == Kind.USER:
            fields = yield from self._map()
            return User((yield from self._raw(uint_or_zero(fields, b"UserMsgLen", STREAM_BYTES_MAX))))
        message_of = codec.STREAM_KINDS.get(kind)
        if message_of is None:
            raise WireError(Cause.UNKNOWN_KIND, f"a message of kind {kind} over a stream")
        return message_of((yield from self._map()))

    def _push_pull(self) -> Generator[None, None, PushPull]:
        fields = yield from self._map()
        count = uint_or_zero(fields, b"Nodes")
        if count > PUSHED_NODES_MAX:
            raise WireError(Cause.TOO_LARGE, f"a push/pull of {count} nodes: {PUSHED_NODES_MAX} are accepted")
        state_bytes = _accepted(uint_or_zero(fields, b"UserStateLen"))
        join = flag(fields, b"Join")
        nodes: list[PushedNode] = []
        for _ in range(count):
            fields = yield from self._map()
            try:
                nodes.append(codec.pushed_node(fields))
            except WireError as error:
                self._left_out[error.cause] += 1
        return PushPull(join, tuple(nodes), (yield from self._raw(state_bytes)))

    def _map(self) -> Generator[None, None, Fields]:
        while (fields := self._maps.map()) is None:
            yield
        return fields

    def _raw(self, count: int) -> Generator[None, None, bytes]:
        data = bytearray()
        while True:
            data += self._maps.raw(count - len(data))
            if len(data) == count:
                return bytes(data)
            yield


def _encode(message: Message) -> bytes:
    """The message as a stream carries it, without any wrapping."""
    if type(message) is PushPull:
        header = {"Join": message.join, "Nodes": len(message.nodes), "UserStateLen": len(message.user_state)}
        nodes = [pack(codec.pushed_node_fields(node)) for node in message.nodes]
        return b"".join([_PUSH_PULL, pack(header), *nodes, message.user_state])
    if type(message) is User:
        return _USER + pack({"UserMsgLen": len(message.payload)}) + message.payload
    return codec.encode(message)


_PUSH_PULL: Final = bytes([Kind.PUSH_PULL])
_USER: Final = bytes([Kind.USER])
_COMPRESS: Final = bytes([Kind.COMPRESS])
_label_header: Final = label.header
