"""The messages between two nodes as bytes: what may stand on the wire of the `zmq` transport, and what is malformed.

A message is ``[header]`` or ``[header, payload]``. A header is the msgpack of one of the types below: an array of a
tag, the protocol's version, the request's id, and what else there is. The payload is not parsed by msgpack:

| message | towards | payload | says |
|---|---|---|---|
| `Call` | holder | the request | run the handler; answered by `Answer` or `Refusal` with the same id |
| `Read` | holder | 40 bytes a chunk: key, size | send these chunks; `window_bytes` is the first credit |
| `Grant` | holder | none | that much more credit |
| `Cancel` | holder | none | the call or the read is of no interest any more |
| `Answer` | reader | the answer | |
| `Refusal` | reader | none | the call failed, or the read has ended; `text` says why |
| `Bulk` | reader | the items' bytes, one after the other | for each item: a piece of a chunk, or why there is none |
| `Alive` | reader | none | nothing: the holder asks its socket whether the reader is still there |

Tag, version and id stand first in every version of the protocol, so a message of another version is told from a
malformed one and can be refused by name (`ForeignVersionError`). Credit: a message costs `cost(items)`, counted alike
by both ends.

Everything is checked here before it is used: lengths before anything is parsed, types and ranges by msgspec's strict
decoder, which knows no extension types. What only a read's state can tell (is this index wanted? is it this piece's
turn?) is not known here. Pure functions, any thread.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Final, TypeAlias, TypeVar

import msgspec
import numpy as np

from .interface import Want
from .limits import (
    CHAIN_CHUNKS_MAX,
    CHUNK_BYTES_MAX,
    HEADER_BYTES_MAX,
    ITEM_COST_BYTES,
    ITEMS_PER_MESSAGE_MAX,
    KEY_BYTES,
    MESH_PROTOCOL_VERSION,
    MESSAGE_BYTES_MAX,
    READ_WINDOW_BYTES_MAX,
    READ_WINDOW_BYTES_MIN,
    REFUSAL_CHARS_MAX,
)

Count: TypeAlias = Annotated[int, msgspec.Meta(ge=0)]
Size: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=CHUNK_BYTES_MAX)]
Window: TypeAlias = Annotated[int, msgspec.Meta(ge=READ_WINDOW_BYTES_MIN, le=READ_WINDOW_BYTES_MAX)]
Credit: TypeAlias = Annotated[int, msgspec.Meta(ge=1, le=READ_WINDOW_BYTES_MAX)]
Index: TypeAlias = Annotated[int, msgspec.Meta(ge=0, lt=CHAIN_CHUNKS_MAX)]
State: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=2)]

HELD: Final = 0
NOT_HELD: Final = 1
WRONG_SIZE: Final = 2

WANTED: Final = struct.Struct(f"<{KEY_BYTES}sQ")


class FrameError(ValueError):
    """The message does not follow the protocol: count it and drop it."""


class ForeignVersionError(FrameError):
    """The message is of another version of the protocol: refuse it, naming both."""

    def __init__(self, tag: int, version: int, request_id: int) -> None:
        ours, older = MESH_PROTOCOL_VERSION, min(version, MESH_PROTOCOL_VERSION)
        super().__init__(
            f"one side speaks mesh protocol {version} and the other {ours}: upgrade kvmesh where it is {older}"
        )
        self.tag = tag
        self.version = version
        self.request_id = request_id


class Message(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What every message begins with, after its tag."""

    version: Count
    id: Count


class Call(Message, frozen=True, array_like=True, forbid_unknown_fields=True, tag=1):
    """A control message: run the handler on the payload."""


class Read(Message, frozen=True, array_like=True, forbid_unknown_fields=True, tag=2):
    """Send the chunks that the payload lists."""

    window_bytes: Window


class Grant(Message, frozen=True, array_like=True, forbid_unknown_fields=True, tag=3):
    """More credit for a read."""

    credit_bytes: Credit


class Cancel(Message, frozen=True, array_like=True, forbid_unknown_fields=True, tag=4):
    """Nobody waits for this call or this read any more."""


class Answer(Message, frozen=True, array_like=True, forbid_unknown_fields=True, tag=5):
    """The handler's answer is the payload."""


class Refusal(Message, frozen=True, array_like=True, forbid_unknown_fields=True, tag=6):
    """A call failed, or a read has ended before its last chunk."""

    text: Annotated[str, msgspec.Meta(max_length=REFUSAL_CHARS_MAX)]


class Item(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, gc=False):
    """A piece of the chunk `index`, or (state) why there is none."""

    index: Index
    state: State
    checksum: Count
    """XXH3-64 of the whole chunk; 0 when there is none."""
    offset: Size
    bytes: Size


class Bulk(Message, frozen=True, array_like=True, forbid_unknown_fields=True, tag=7):
    """Pieces of chunks."""

    items: Annotated[list[Item], msgspec.Meta(min_length=1, max_length=ITEMS_PER_MESSAGE_MAX)]


class Alive(Message, frozen=True, array_like=True, forbid_unknown_fields=True, tag=8):
    """Nothing to say."""


ToHolder: TypeAlias = Call | Read | Grant | Cancel
ToCaller: TypeAlias = Answer | Refusal | Alive
ToReader: TypeAlias = Bulk | Refusal | Alive
Buffer: TypeAlias = bytes | memoryview


class _Envelope(msgspec.Struct, frozen=True, array_like=True):
    """The part of a message that no version changes. What follows is skipped."""

    tag: Count
    version: Count
    id: Count


_encoder = msgspec.msgpack.Encoder()
_envelope = msgspec.msgpack.Decoder(_Envelope)
_to_holder = msgspec.msgpack.Decoder(ToHolder)
_to_caller = msgspec.msgpack.Decoder(ToCaller)
_to_reader = msgspec.msgpack.Decoder(ToReader)
_PAYLOAD_BYTES_MAX: Final[dict[type[Message], int]] = {
    Call: MESSAGE_BYTES_MAX,
    Answer: MESSAGE_BYTES_MAX,
    Read: CHAIN_CHUNKS_MAX * WANTED.size,
}
M = TypeVar("M", bound=Message)


def encode(message: Message) -> bytes:
    """The header's bytes."""
    return _encoder.encode(message)


def to_holder(parts: Sequence[bytes]) -> tuple[ToHolder, bytes]:
    """The message and payload that a reader sent to a holder. Raises `FrameError`."""
    message = _decode(_to_holder, parts)
    payload = _payload(message, parts)
    if isinstance(message, Read):
        _check_wanted(payload)
    return message, payload


def to_caller(parts: Sequence[bytes]) -> tuple[ToCaller, bytes]:
    """The message and payload that came back on a control connection. Raises `FrameError`."""
    message = _decode(_to_caller, parts)
    return message, _payload(message, parts)


def to_reader(parts: Sequence[Buffer]) -> ToReader:
    """The message that came on a bulk connection. A `Bulk` has a payload of the size that its items add up to."""
    message: ToReader = _decode(_to_reader, parts)
    if isinstance(message, Bulk):
        if len(parts) > 2 or sum(item.bytes for item in message.items) != (len(parts[1]) if len(parts) == 2 else 0):
            raise FrameError("the payload is not of the size that the items add up to")
    elif len(parts) != 1:
        raise FrameError(f"{len(parts)} parts for a {type(message).__name__}")
    return message


def encode_wanted(wants: Iterable[Want]) -> bytes:
    """The payload of a `Read`."""
    return b"".join(WANTED.pack(want.key, want.into.nbytes) for want in wants)


def wanted(payload: bytes, index: int) -> tuple[bytes, int]:
    """Key and size of one wanted chunk."""
    key, size_bytes = WANTED.unpack_from(payload, index * WANTED.size)
    return key, size_bytes


def cost(items: Sequence[Item]) -> int:
    """What a message with these items costs of the reader's credit."""
    return sum(item.bytes for item in items) + ITEM_COST_BYTES * len(items)


def _decode(decoder: msgspec.msgpack.Decoder[Any], parts: Sequence[Buffer]) -> Any:
    if not parts or len(parts[0]) > HEADER_BYTES_MAX:
        raise FrameError("no header, or one that is too long")
    try:
        message: Message = decoder.decode(parts[0])
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        _refuse_other_version(parts[0])
        raise FrameError(f"not a message of this protocol: {error}") from None
    if message.version != MESH_PROTOCOL_VERSION:
        _refuse_other_version(parts[0])
    return message


def _refuse_other_version(header: Buffer) -> None:
    try:
        envelope = _envelope.decode(header)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
        return
    if envelope.version != MESH_PROTOCOL_VERSION:
        raise ForeignVersionError(envelope.tag, envelope.version, envelope.id)


def _payload(message: Message, parts: Sequence[bytes]) -> bytes:
    bound = _PAYLOAD_BYTES_MAX.get(type(message))
    if len(parts) != (1 if bound is None else 2):
        raise FrameError(f"{len(parts)} parts for a {type(message).__name__}")
    if bound is None:
        return b""
    if len(parts[1]) > bound:
        raise FrameError(f"{len(parts[1])} bytes for a {type(message).__name__}: at most {bound}")
    return parts[1]


def _check_wanted(payload: bytes) -> None:
    if not payload or len(payload) % WANTED.size:
        raise FrameError("a list of wanted chunks has whole entries, and at least one")
    sizes = np.frombuffer(payload, "<u8").reshape(-1, WANTED.size // 8)[:, -1]
    if sizes.min() < 1 or sizes.max() > CHUNK_BYTES_MAX:
        raise FrameError(f"a wanted chunk has 1 to {CHUNK_BYTES_MAX} bytes")
