"""The messages between two nodes as bytes: what may stand on the wire of the `zmq` transport, and what is malformed.

A message is ``[header]`` or ``[header, payload]``; the payload of a `Bulk` may come in several parts. A header is the
msgpack of one of the types below: an array of a tag, the protocol's version, the request's id, and what else there is.
The payload is not parsed by msgpack:

| message | towards | payload | says |
|---|---|---|---|
| `Call` | holder | the request | run the handler; answered by `Answer` or `Refusal` with the same id |
| `Read` | holder | what is wanted, see below | send it; `window_bytes` is the first credit |
| `Grant` | holder | none | that much more credit |
| `Cancel` | holder | none | the call or the read is of no interest any more |
| `Suspect` | holder | a key | the chunk's bytes arrived with a wrong checksum: look at yours |
| `Answer` | reader | the answer | |
| `Refusal` | reader | none | the call failed, or the read has ended; `text` says why |
| `Bulk` | reader | the items' bytes, one after the other | for each item: a piece of a chunk, or why there is none |

The payload of a `Read` has 40 bytes for each wanted chunk: its key, and the size that the whole chunk must have. When
only parts of some are wanted, a table follows, of the slices that differ (32 bytes each; `Read.slices` says how many),
and then two bytes for each wanted chunk: 0 for all of it, or the number of its slice, counted from 1. So whole chunks
cost nothing more, and a slice that 16 Ki chunks share costs little.

The parts that a payload comes in have nothing to do with the items: what counts is their concatenation. A message has
no more than one piece of each chunk.

Tag, version and id stand first in every version of the protocol, so a message of another version is told from a
malformed one and can be refused by name (`ForeignVersionError`). Credit: a message costs `cost(items)`, counted alike
by both ends.

Everything is checked here before it is used: lengths before anything is parsed, types and ranges by msgspec's strict
decoder, which knows no extension types. What only a read's state can tell (is this index wanted? is it this piece's
turn?) is not known here. Pure functions, any thread.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Annotated, Any, Final, TypeAlias, TypeVar

import msgspec
import numpy as np

from .interface import Slice, Want
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
    SERVED_READ_LEASE_S_MAX,
    SLICE_RUNS_MAX,
    SLICES_PER_READ_MAX,
    SMALL_READ_BYTES_MAX,
    SMALL_READ_CHUNKS_MAX,
)

Count: TypeAlias = Annotated[int, msgspec.Meta(ge=0)]
Size: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=CHUNK_BYTES_MAX)]
Window: TypeAlias = Annotated[int, msgspec.Meta(ge=READ_WINDOW_BYTES_MIN, le=READ_WINDOW_BYTES_MAX)]
Credit: TypeAlias = Annotated[int, msgspec.Meta(ge=1, le=READ_WINDOW_BYTES_MAX)]
Index: TypeAlias = Annotated[int, msgspec.Meta(ge=0, lt=CHAIN_CHUNKS_MAX)]
Lease: TypeAlias = Annotated[float, msgspec.Meta(gt=0, le=SERVED_READ_LEASE_S_MAX)]
Slices: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=SLICES_PER_READ_MAX)]
State: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=3)]

HELD: Final = 0
NOT_HELD: Final = 1
WRONG_SIZE: Final = 2
CORRUPT_HERE: Final = 3
"""The holder's own copy does not match the checksum of its put."""

WANTED: Final = struct.Struct(f"<{KEY_BYTES}sQ")
SLICE: Final = struct.Struct("<QQQQ")
SLICE_NUMBER: Final = struct.Struct("<H")


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
    """Send the chunks, and parts of chunks, that the payload lists."""

    window_bytes: Window
    lease_s: Lease
    """The longest time for which the holder keeps this read."""
    slices: Slices
    """Entries of the payload's table of slices."""


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


class Suspect(Message, frozen=True, array_like=True, forbid_unknown_fields=True, tag=9):
    """The payload is the key of a chunk that came from the holder with a wrong checksum."""


class Item(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, gc=False):
    """A piece of what is wanted at `index`, a chunk or a part of one; or (state) why there is none."""

    index: Index
    state: State
    checksum: Count
    """XXH3-64 of all that is wanted at `index`; 0 when there is none."""
    offset: Size
    """Where the piece belongs in it."""
    bytes: Size


class Bulk(Message, frozen=True, array_like=True, forbid_unknown_fields=True, tag=7):
    """Pieces of chunks."""

    items: Annotated[list[Item], msgspec.Meta(min_length=1, max_length=ITEMS_PER_MESSAGE_MAX)]


ToHolder: TypeAlias = Call | Read | Grant | Cancel | Suspect
ToCaller: TypeAlias = Answer | Refusal
ToReader: TypeAlias = Bulk | Refusal
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
    Read: CHAIN_CHUNKS_MAX * (WANTED.size + SLICE_NUMBER.size) + SLICES_PER_READ_MAX * SLICE.size,
    Suspect: KEY_BYTES,
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
        _check_wanted(message, payload)
    elif isinstance(message, Suspect) and len(payload) != KEY_BYTES:
        raise FrameError(f"a key has {KEY_BYTES} bytes, not {len(payload)}")
    return message, payload


def to_caller(parts: Sequence[bytes]) -> tuple[ToCaller, bytes]:
    """The message and payload that came back on a control connection. Raises `FrameError`."""
    message = _decode(_to_caller, parts)
    return message, _payload(message, parts)


def to_reader(header: Buffer) -> ToReader:
    """The message on a bulk connection whose header has come; the bytes after it are not here yet, and are held against
    its items as they come (zmq_reads.py). Raises `FrameError`."""
    message: ToReader = _decode(_to_reader, [header])
    return message


def encode_read(read_id: int, window_bytes: int, lease_s: float, wants: Sequence[Want]) -> list[bytes]:
    """The header and payload of a `Read`. `lease_s` above the bound is as good as the bound."""
    numbers: dict[Slice, int] = {}
    listed = b"".join(WANTED.pack(want.key, want.whole_bytes) for want in wants)
    numbered = [0 if want.part is None else numbers.setdefault(want.part, len(numbers) + 1) for want in wants]
    header = encode(
        Read(MESH_PROTOCOL_VERSION, read_id, window_bytes, min(lease_s, SERVED_READ_LEASE_S_MAX), len(numbers))
    )
    if not numbers:
        return [header, listed]
    table = b"".join(SLICE.pack(s.offset_bytes, s.run_bytes, s.stride_bytes, s.count) for s in numbers)
    return [header, listed + table + np.array(numbered, "<u2").tobytes()]


class Wanted:
    """What a `Read` asks for. An entry is taken apart when its turn comes: a list may have 16 Ki of them."""

    __slots__ = ("_numbers_at", "_payload", "_slices", "count")

    def __init__(self, message: Read, payload: bytes) -> None:
        """`payload` came with `message` out of `to_holder`."""
        self._payload = payload
        self.count = wanted_count(message.slices, len(payload))
        table = payload[self.count * WANTED.size : self.count * WANTED.size + message.slices * SLICE.size]
        self._slices = [None, *(Slice(*fields) for fields in SLICE.iter_unpack(table))]
        self._numbers_at = self.count * WANTED.size + len(table) if message.slices else -1

    def __getitem__(self, index: int) -> tuple[bytes, int, Slice | None]:
        """Its key, the size that the whole chunk must have, and the part that is wanted of it."""
        key, chunk_bytes = WANTED.unpack_from(self._payload, index * WANTED.size)
        if self._numbers_at < 0:
            return key, chunk_bytes, None
        (number,) = SLICE_NUMBER.unpack_from(self._payload, self._numbers_at + index * SLICE_NUMBER.size)
        return key, chunk_bytes, self._slices[number]

    @property
    def is_small(self) -> bool:
        """A few chunks, of few bytes together: what a reader reads on its loop as well."""
        if self.count > SMALL_READ_CHUNKS_MAX:
            return False
        bytes_: int = sum(WANTED.unpack_from(self._payload, index * WANTED.size)[1] for index in range(self.count))
        return bytes_ <= SMALL_READ_BYTES_MAX


def wanted_count(slices: int, payload_bytes: int) -> int:
    """How many chunks a `Read` lists whose payload has this size."""
    entry_bytes = WANTED.size + (SLICE_NUMBER.size if slices else 0)
    count, rest = divmod(payload_bytes - slices * SLICE.size, entry_bytes)
    if count < 1 or rest or count > CHAIN_CHUNKS_MAX:
        raise FrameError(f"a list of wanted chunks has 1 to {CHAIN_CHUNKS_MAX} entries, all of them whole")
    return count


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


def _check_wanted(message: Read, payload: bytes) -> None:
    count = wanted_count(message.slices, len(payload))
    listed_bytes = count * WANTED.size
    if not message.slices and count <= SMALL_READ_CHUNKS_MAX:
        if all(1 <= size <= CHUNK_BYTES_MAX for _, size in WANTED.iter_unpack(payload)):
            return
        raise FrameError(f"a wanted chunk has 1 to {CHUNK_BYTES_MAX} bytes")
    sizes = np.frombuffer(payload, "<u8", listed_bytes // 8).reshape(-1, WANTED.size // 8)[:, -1]
    if sizes.min() < 1 or sizes.max() > CHUNK_BYTES_MAX:
        raise FrameError(f"a wanted chunk has 1 to {CHUNK_BYTES_MAX} bytes")
    if not message.slices:
        return
    table = np.frombuffer(payload, "<u8", message.slices * SLICE.size // 8, listed_bytes).reshape(-1, SLICE.size // 8)
    offsets, runs, strides, counts = table.T
    if table.max() > CHUNK_BYTES_MAX or runs.min() < 1 or counts.min() < 1 or counts.max() > SLICE_RUNS_MAX:
        raise FrameError(f"a slice has 1 to {SLICE_RUNS_MAX} runs, of at least a byte and inside a chunk")
    if ((strides < runs) & (counts > 1)).any():
        raise FrameError("the runs of a slice do not overlap")
    ends = np.concatenate([np.zeros(1, np.uint64), offsets + strides * (counts - 1) + runs])  # below 2^47: no overflow
    numbers = np.frombuffer(payload, "<u2", offset=listed_bytes + table.nbytes)
    if numbers.max() > message.slices or (ends[numbers] > sizes).any():
        raise FrameError("a slice that is not in the table, or that ends beyond its chunk")
