"""What two nodes say to each other about who is there and who holds what.

    request                          answer
    Ping       I am X, at head H     Pong, with members that I know
    Leave      X goes                Done
    Follow     entries after seq?    Entries | Stale (another epoch, or seq has left the ring)
    Compare    your fingerprints?    Fingerprints | Stale
    Describe   your namespaces?      Descriptions (a page) | Stale
    Buckets    what do you hold?     Page | Stale | Busy

A message is one version byte, then msgpack of a frozen struct. Types, lengths and counts are checked while decoding,
before anything is built; extension types have no meaning here. Whatever does not fit raises `ProtocolError`. Plain
values: no I/O, no clock.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal, TypeVar

import msgspec

from kvmesh.transport.errors import ProtocolError
from kvmesh.transport.limits import (
    ADDRESS_CHARS_MAX,
    DESCRIPTION_BYTES_MAX,
    DESCRIPTIONS_MAX,
    JOURNAL_BATCH_ENTRIES_MAX,
    JOURNAL_BUCKETS,
    KEY_BYTES,
    MESH_PROTOCOL_VERSION,
    MESSAGE_BYTES_MAX,
    META_CHARS_MAX,
    META_ITEMS_MAX,
    NAME_BYTES_MAX,
    NAMESPACE_ID_BYTES,
    PEERS_TOLD_MAX,
)

from .head import HEAD_BYTES
from .packing import Packed

Name = Annotated[str, msgspec.Meta(max_length=NAME_BYTES_MAX, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*\Z")]
Address = Annotated[str, msgspec.Meta(min_length=1, max_length=ADDRESS_CHARS_MAX, pattern=r"^[!-~]+\Z")]
Number = Annotated[int, msgspec.Meta(ge=0)]
HeadBytes = Annotated[bytes, msgspec.Meta(min_length=HEAD_BYTES, max_length=HEAD_BYTES)]
HeadBytesOrNone = Annotated[bytes, msgspec.Meta(max_length=HEAD_BYTES)]
"""Empty for a process without a journal (a controller)."""
Description = Annotated[bytes, msgspec.Meta(max_length=DESCRIPTION_BYTES_MAX)]
Role = Literal["agent", "controller", "router"]


class _Message(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Fields travel by position: no names on the wire, and no field too many."""


class Identity(_Message, frozen=True):
    """Who a process is. `epoch` grows at each start; `address` is where its transport is reached."""

    name: Name
    role: Role
    epoch: Number
    address: Address
    protocol_version: Number = MESH_PROTOCOL_VERSION
    meta: Annotated[
        dict[
            Annotated[str, msgspec.Meta(max_length=64)],
            Annotated[str, msgspec.Meta(max_length=META_CHARS_MAX)],
        ],
        msgspec.Meta(max_length=META_ITEMS_MAX),
    ] = {}


class Ping(_Message, frozen=True, tag=1):
    """I am here, and this is my head. Who are you?"""

    identity: Identity
    head: HeadBytesOrNone


class Pong(_Message, frozen=True, tag=2):
    """I am here too; `known` are addresses of members that I believe alive."""

    identity: Identity
    head: HeadBytesOrNone
    known: Annotated[list[Address], msgspec.Meta(max_length=PEERS_TOLD_MAX)]


class Leave(_Message, frozen=True, tag=3):
    """I stop now, on purpose."""

    name: Name
    epoch: Number


class Done(_Message, frozen=True, tag=4):
    """Heard."""


class Follow(_Message, frozen=True, tag=5):
    """The entries after `seq`, at most `limit`; held for a while when there are none."""

    follower: Name
    epoch: Number
    seq: Number
    limit: Annotated[int, msgspec.Meta(ge=1, le=JOURNAL_BATCH_ENTRIES_MAX)]


class Entries(_Message, frozen=True, tag=6):
    """Entries `first_seq`, `first_seq + 1`, …; maybe none. A DESCRIBE takes the next of `descriptions`."""

    head: HeadBytes
    first_seq: Number
    packed: Packed
    descriptions: Annotated[list[Description], msgspec.Meta(max_length=JOURNAL_BATCH_ENTRIES_MAX)]


class Stale(_Message, frozen=True, tag=7):
    """Your epoch is not mine, or what you ask for has left the ring: compare."""

    head: HeadBytes


class Busy(_Message, frozen=True, tag=8):
    """Others are being served: ask again later."""

    head: HeadBytes
    retry_after_ms: Annotated[int, msgspec.Meta(ge=0, le=60_000)]


class Compare(_Message, frozen=True, tag=9):
    """The fingerprints of your buckets?"""

    follower: Name
    epoch: Number


class Fingerprints(_Message, frozen=True, tag=10):
    """256 of them, 8 bytes each, as of the head's seq; and one over the descriptions."""

    head: HeadBytes
    buckets: Annotated[bytes, msgspec.Meta(min_length=8 * JOURNAL_BUCKETS, max_length=8 * JOURNAL_BUCKETS)]
    descriptions: Number


class Describe(_Message, frozen=True, tag=11):
    """Your descriptions, by namespace id, from the first one past `after`?"""

    follower: Name
    epoch: Number
    after: Annotated[bytes, msgspec.Meta(max_length=NAMESPACE_ID_BYTES)]


class Descriptions(_Message, frozen=True, tag=12):
    """A page of descriptions. The last page has no `upto`."""

    head: HeadBytes
    upto: Annotated[bytes, msgspec.Meta(max_length=NAMESPACE_ID_BYTES)]
    namespace_ids: Annotated[bytes, msgspec.Meta(max_length=NAMESPACE_ID_BYTES * DESCRIPTIONS_MAX)]
    texts: Annotated[list[Description], msgspec.Meta(max_length=DESCRIPTIONS_MAX)]


class Buckets(_Message, frozen=True, tag=13):
    """What you hold in these buckets (ascending), in the order of the keys, from the first one past `after`?"""

    follower: Name
    epoch: Number
    buckets: Annotated[bytes, msgspec.Meta(min_length=1, max_length=JOURNAL_BUCKETS)]
    after: Annotated[bytes, msgspec.Meta(max_length=KEY_BYTES)]


class Page(_Message, frozen=True, tag=14):
    """All that is held past `after`, up to and with the key `upto`, as of the head. The last page has no `upto`."""

    head: HeadBytes
    upto: Annotated[bytes, msgspec.Meta(max_length=KEY_BYTES)]
    packed: Packed


Request = Ping | Leave | Follow | Compare | Describe | Buckets
Answer = Pong | Done | Entries | Stale | Busy | Fingerprints | Descriptions | Page

T = TypeVar("T")

_VERSION: Final = bytes([MESH_PROTOCOL_VERSION])
_encoder = msgspec.msgpack.Encoder()
_requests: msgspec.msgpack.Decoder[Request] = msgspec.msgpack.Decoder(Request)
_answers: msgspec.msgpack.Decoder[Answer] = msgspec.msgpack.Decoder(Answer)


def encode(message: Request | Answer) -> bytes:
    """The message as it travels."""
    data = _VERSION + _encoder.encode(message)
    assert len(data) <= MESSAGE_BYTES_MAX
    return data


def decode_request(data: bytes) -> Request:
    """The request in `data`. Raises `ProtocolError` for anything else."""
    return _decode(_requests, data)


def decode_answer(data: bytes) -> Answer:
    """The answer in `data`. Raises `ProtocolError` for anything else."""
    return _decode(_answers, data)


def _decode(decoder: msgspec.msgpack.Decoder[T], data: bytes) -> T:
    if not data or len(data) > MESSAGE_BYTES_MAX:
        raise ProtocolError(f"a discovery message of {len(data)} bytes: 1 to {MESSAGE_BYTES_MAX} are allowed")
    if data[0] != MESH_PROTOCOL_VERSION:
        raise ProtocolError(
            f"the peer speaks mesh protocol version {data[0]}, this node {MESH_PROTOCOL_VERSION}: upgrade the older one"
        )
    try:
        return decoder.decode(memoryview(data)[1:])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"not a discovery message: {error}") from None
