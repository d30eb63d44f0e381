"""The calls by which a reader that takes bytes itself learns how, and leases what it takes.

A call is ``T``, a byte with the protocol's version, and the msgpack of one of the types below; an answer is the same
without the ``T``. They travel as ordinary calls between two transports, which keep them for themselves.

| call | answer | says |
|---|---|---|
| `Ask` | `Offers` | who are you, and by which backends can your arena be read? |
| `Lend` | `Lent` | lease these chunks and say where they are; with the wanted list of a `frames.Read` |
| `Renew` | `Done` | the lease lasts so much longer from now |
| `GiveBack` | `Done` | these leases are not needed any more; these of their chunks arrived with a wrong checksum |

A reader names itself and its leases: so it can give back what it was lent by an answer that it never saw. Its name is
random and known to the holder alone. Lengths and counts are checked while decoding. Pure functions, any thread.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Final, NamedTuple, TypeAlias, TypeVar

import msgspec

from .errors import ProtocolError
from .frames import CORRUPT_HERE, HELD, Buffer, FrameError, Read, Wanted, encode_read, to_holder
from .interface import Want
from .limits import (
    HEADER_BYTES_MAX,
    INSTANCE_BYTES,
    LEASES_PER_READER_MAX,
    LEND_BATCH_CHUNKS_MAX,
    LEND_LEASE_S,
    MESH_PROTOCOL_VERSION,
    OFFER_BYTES_MAX,
    OFFERS_PER_PEER_MAX,
    READ_WINDOW_BYTES_MIN,
)

CALL_PREFIX: Final = b"T"
ITEM: Final = struct.Struct("<BQQ")

Instance: TypeAlias = Annotated[bytes, msgspec.Meta(min_length=INSTANCE_BYTES, max_length=INSTANCE_BYTES)]
Number: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
Lease: TypeAlias = Annotated[float, msgspec.Meta(gt=0, le=LEND_LEASE_S)]
Name: TypeAlias = Annotated[str, msgspec.Meta(min_length=1, max_length=16)]
Offer: TypeAlias = Annotated[bytes, msgspec.Meta(max_length=OFFER_BYTES_MAX)]


class _Message(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    pass


class Ask(_Message, frozen=True, tag=1):
    """Who are you, and how can you be read?"""


class Lend(_Message, frozen=True, tag=2):
    """Lease chunks. `header` is that of a `frames.Read` whose id names the lease; `wanted` is its payload."""

    instance: Instance
    """The holder that the reader believes to talk to."""
    reader: Instance
    header: Annotated[bytes, msgspec.Meta(max_length=HEADER_BYTES_MAX)]
    wanted: bytes


class Renew(_Message, frozen=True, tag=3):
    """Keep a lease, from now on for so long."""

    reader: Instance
    lease: Number
    lease_s: Lease


class Returned(_Message, frozen=True):
    """A lease that is not needed any more."""

    lease: Number
    corrupt: Annotated[list[Number], msgspec.Meta(max_length=LEND_BATCH_CHUNKS_MAX)]
    """Which of its chunks, counted in the order of `Lend`, do not match their checksum."""


class GiveBack(_Message, frozen=True, tag=4):
    """End some leases."""

    reader: Instance
    leases: Annotated[list[Returned], msgspec.Meta(min_length=1, max_length=LEASES_PER_READER_MAX)]


class Offers(_Message, frozen=True, tag=5):
    """The answer to `Ask`."""

    instance: Instance
    arena_bytes: Number
    by_backend: Annotated[dict[Name, Offer], msgspec.Meta(max_length=OFFERS_PER_PEER_MAX)]


class Lent(_Message, frozen=True, tag=6):
    """The answer to `Lend`: an item for each wanted chunk."""

    items: Annotated[bytes, msgspec.Meta(max_length=ITEM.size * LEND_BATCH_CHUNKS_MAX)]


class Done(_Message, frozen=True, tag=7):
    """The answer where there is little to say. `known` is false when a lease was not there (any more)."""

    known: bool


class LentItem(NamedTuple):
    """Where one wanted chunk is, or (`frames.NOT_HELD` and so on) why it is not lent."""

    state: int
    checksum: int
    """Of the chunk, or of the part that is wanted of it."""
    offset: int
    """Where in the arena the whole chunk begins."""


class Batch(NamedTuple):
    """A `Lend`, taken apart."""

    lease: int
    lease_s: float
    wanted: Wanted


Request: TypeAlias = Ask | Lend | Renew | GiveBack
Answer: TypeAlias = Offers | Lent | Done
A = TypeVar("A", Offers, Lent, Done)
_encoder = msgspec.msgpack.Encoder()
_requests = msgspec.msgpack.Decoder(Request)
_answers: dict[type[_Message], msgspec.msgpack.Decoder[Any]] = {
    kind: msgspec.msgpack.Decoder(kind) for kind in (Offers, Lent, Done)
}
_VERSION: Final = bytes([MESH_PROTOCOL_VERSION])


def encode_request(request: Request) -> bytes:
    """As a call."""
    return CALL_PREFIX + _VERSION + _encoder.encode(request)


def encode_answer(answer: Answer) -> bytes:
    """As the answer to a call."""
    return _VERSION + _encoder.encode(answer)


def decode_request(data: bytes) -> Request:
    """A call, with its ``T``. Raises `ProtocolError`."""
    request: Request = _decode(_requests, memoryview(data)[len(CALL_PREFIX) :])
    return request


def decode_answer(kind: type[A], data: bytes) -> A:
    """The answer, which must be of this kind. Raises `ProtocolError`."""
    answer: A = _decode(_answers[kind], memoryview(data))
    return answer


def lend_request(instance: bytes, reader: bytes, lease: int, lease_s: float, wants: Sequence[Want]) -> Lend:
    """Ask for chunks and parts of chunks."""
    return Lend(instance, reader, *encode_read(lease, READ_WINDOW_BYTES_MIN, lease_s, wants))


def batch_of(message: Lend) -> Batch:
    """What a `Lend` wants. Raises `ProtocolError`."""
    try:
        read, payload = to_holder([message.header, message.wanted])
    except FrameError as error:
        raise ProtocolError(f"a list of chunks to lend is malformed: {error}") from None
    if not isinstance(read, Read) or read.id >= 1 << 63 or read.lease_s > LEND_LEASE_S:
        raise ProtocolError("a list of chunks to lend is malformed")
    wanted = Wanted(read, payload)
    if wanted.count > LEND_BATCH_CHUNKS_MAX:
        raise ProtocolError(f"{wanted.count} chunks to lend at once: at most {LEND_BATCH_CHUNKS_MAX}")
    return Batch(read.id, read.lease_s, wanted)


def pack_items(items: Iterable[LentItem]) -> bytes:
    """For `Lent`."""
    return b"".join(ITEM.pack(*item) for item in items)


def unpack_items(packed: bytes, wants: Sequence[Want], arena_bytes: int) -> list[LentItem]:
    """Of `Lent`: an item for each of `wants`, all of it inside the arena. Raises `ProtocolError`."""
    if len(packed) != ITEM.size * len(wants):
        raise ProtocolError(f"{len(packed)} bytes for {len(wants)} chunks that were lent")
    items = [LentItem(*fields) for fields in ITEM.iter_unpack(packed)]
    for item, want in zip(items, wants, strict=True):
        if item.state > CORRUPT_HERE:
            raise ProtocolError(f"a chunk in a state {item.state} that there is not")
        if item.state == HELD and item.offset > arena_bytes - want.whole_bytes:
            raise ProtocolError("a chunk was lent that is not inside the arena")
    return items


def _decode(decoder: msgspec.msgpack.Decoder[Any], data: Buffer) -> Any:
    if len(data) < 1 or data[0] != MESH_PROTOCOL_VERSION:
        theirs = data[0] if len(data) else "none"
        raise ProtocolError(
            f"the peer speaks mesh protocol version {theirs}, this node {MESH_PROTOCOL_VERSION}: upgrade the older one"
        )
    try:
        return decoder.decode(data[1:])
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise ProtocolError(f"not a message about lending: {error}") from None
