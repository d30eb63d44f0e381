"""Messages: what goes out comes back; whatever a peer may send instead is one ordinary error."""

from __future__ import annotations

import contextlib

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmesh.discovery import HEAD_BYTES, Head, Identity, node_id
from kvmesh.discovery.messages import (
    Buckets,
    Busy,
    Compare,
    Describe,
    Descriptions,
    Done,
    Entries,
    Fingerprints,
    Follow,
    Leave,
    Page,
    Ping,
    Pong,
    Stale,
    decode_answer,
    decode_request,
    encode,
)
from kvmesh.discovery.packing import (
    ADMIT,
    DESCRIBE,
    EVICT,
    HELD,
    NO_KEY,
    NO_NAMESPACE,
    NOTHING,
    Packed,
    Shape,
    pack,
    unpack,
)
from kvmesh.transport.errors import ProtocolError
from kvmesh.transport.limits import CHUNK_BYTES_MAX, MESH_PROTOCOL_VERSION, PEERS_TOLD_MAX
from tests.discovery.support import SIZE, SPACE, key

HEAD = Head(node_id("a"), 2**64 - 1, 7, 3, 2**63 + 1)
IDENTITY = Identity("a", "agent", 5, "127.0.0.1:7950", meta={"zone": "1"})
PACKED = pack([(Shape(ADMIT, 2, SPACE, SIZE), key(1))])

REQUESTS = [
    Ping(IDENTITY, HEAD.to_bytes()),
    Ping(IDENTITY, b""),
    Leave("a", 5),
    Follow("b", 5, 2**64 - 1, 100),
    Compare("b", 5),
    Describe("b", 5, b"n" * 16),
    Buckets("b", 5, bytes(range(256)), key(1)),
]
ANSWERS = [
    Pong(IDENTITY, HEAD.to_bytes(), ["h:1", "[::1]:2"]),
    Done(),
    Entries(HEAD.to_bytes(), 8, PACKED, []),
    Stale(HEAD.to_bytes()),
    Busy(HEAD.to_bytes(), 500),
    Fingerprints(HEAD.to_bytes(), bytes(2048), 2**64 - 1),
    Descriptions(HEAD.to_bytes(), b"", SPACE, [b"{}"]),
    Page(HEAD.to_bytes(), key(1), PACKED),
]


def test_a_head_is_48_bytes_and_comes_back() -> None:
    assert HEAD_BYTES == 48
    assert Head.from_bytes(HEAD.to_bytes()) == HEAD
    for length in (0, 47, 49):
        with pytest.raises(ProtocolError):
            Head.from_bytes(bytes(length))


@pytest.mark.parametrize("message", REQUESTS, ids=lambda message: type(message).__name__)
def test_a_request_comes_back(message: Ping) -> None:
    assert decode_request(encode(message)) == message
    with pytest.raises(ProtocolError):
        decode_answer(encode(message))


@pytest.mark.parametrize("message", ANSWERS, ids=lambda message: type(message).__name__)
def test_an_answer_comes_back(message: Done) -> None:
    assert decode_answer(encode(message)) == message
    with pytest.raises(ProtocolError):
        decode_request(encode(message))


def raw(*fields: object) -> bytes:
    return bytes([MESH_PROTOCOL_VERSION]) + msgspec.msgpack.encode(list(fields))


IDENTITY_FIELDS = ["a", "agent", 5, "h:1", 1, {}]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        bytes([MESH_PROTOCOL_VERSION]),
        raw(99),
        raw(3, "a"),  # a field too few
        raw(3, "a", 5, 5),  # a field too many
        raw(3, "a", -1),
        raw(3, "a", 2.0),
        raw(3, "a", True),
        raw(3, b"a", 5),
        raw(3, "../a", 5),
        raw(3, "a\n", 5),
        raw(3, "a" * 129, 5),
        raw(5, "b", 5, 0, 0),  # a limit of none
        raw(5, "b", 5, 0, 10**9),
        raw(13, "b", 5, b"", b""),
        raw(13, "b", 5, bytes(257), b""),
        raw(1, IDENTITY_FIELDS, bytes(49)),
        raw(1, ["a", "king", 5, "h:1", 1, {}], b""),
        raw(1, ["a", "agent", 5, "h 1", 1, {}], b""),
        raw(1, ["a", "agent", 5, "h:1", 1, {str(n): "" for n in range(33)}], b""),
        raw(1, ["a", "agent", 5, "h:1", 1, {"k": 1}], b""),
        raw(1, msgspec.msgpack.Ext(1, b"x"), b""),
        bytes([MESH_PROTOCOL_VERSION]) + b"\x91" * 100_000,
        b"\x01" * (4 * 1024 * 1024 + 1),
    ],
    ids=lambda data: repr(data[:24]),
)
def test_what_is_no_request_is_a_protocol_error(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode_request(data)


def test_another_version_is_named() -> None:
    data = bytes([MESH_PROTOCOL_VERSION + 1]) + encode(Done())[1:]
    with pytest.raises(ProtocolError, match=f"version {MESH_PROTOCOL_VERSION + 1}, this node {MESH_PROTOCOL_VERSION}"):
        decode_answer(data)


def test_no_more_addresses_than_allowed() -> None:
    with pytest.raises(ProtocolError):
        decode_answer(encode(Pong(IDENTITY, b"", ["h:1"] * (PEERS_TOLD_MAX + 1))))


@given(st.binary(max_size=200))
def test_random_bytes_are_a_protocol_error_or_a_message(data: bytes) -> None:
    for decode in (decode_request, decode_answer):
        with contextlib.suppress(ProtocolError):
            decode(bytes([MESH_PROTOCOL_VERSION]) + data)


# --- packing -----------------------------------------------------------------------------------------------------

ENTRIES = st.lists(
    st.tuples(
        st.sampled_from([Shape(ADMIT, 1, SPACE, SIZE), Shape(EVICT, 4, NO_NAMESPACE, 0), Shape(DESCRIBE, 0, SPACE, 0)]),
        st.binary(min_size=32, max_size=32),
    ),
    max_size=50,
)


@given(ENTRIES)
def test_packed_entries_come_back(entries: list[tuple[Shape, bytes]]) -> None:
    packed = pack(entries)
    shapes, index, keys = unpack(packed, frozenset({ADMIT, EVICT, DESCRIBE}))
    assert [(shapes[number], key) for number, key in zip(index, keys, strict=True)] == entries
    assert len(shapes) == len({shape for shape, _ in entries})


def test_nothing_packs_to_nothing() -> None:
    assert pack([]) == NOTHING
    assert unpack(NOTHING, frozenset({ADMIT})) == ([], [], [])


def shape_bytes(kind: int, tiers: int, size_bytes: int = SIZE) -> bytes:
    return pack([(Shape(kind, tiers, SPACE, size_bytes), NO_KEY)]).shapes


@pytest.mark.parametrize(
    "packed",
    [
        Packed(PACKED.shapes, PACKED.index, PACKED.keys[:-1]),
        Packed(PACKED.shapes[:-1], PACKED.index, PACKED.keys),
        Packed(PACKED.shapes, b"", PACKED.keys),
        Packed(PACKED.shapes, PACKED.index, b""),
        Packed(PACKED.shapes, b"\x01\x00", PACKED.keys),
        Packed(PACKED.shapes * 2, PACKED.index, PACKED.keys),
        Packed(shape_bytes(ADMIT, 3), PACKED.index, PACKED.keys),
        Packed(shape_bytes(ADMIT, 0), PACKED.index, PACKED.keys),
        Packed(shape_bytes(EVICT, 8), PACKED.index, PACKED.keys),
        Packed(shape_bytes(DESCRIBE, 1), PACKED.index, PACKED.keys),
        Packed(shape_bytes(HELD, 1), PACKED.index, PACKED.keys),
        Packed(shape_bytes(9, 1), PACKED.index, PACKED.keys),
        Packed(shape_bytes(ADMIT, 1, CHUNK_BYTES_MAX + 1), PACKED.index, PACKED.keys),
    ],
)
def test_packed_nonsense_is_a_protocol_error(packed: Packed) -> None:
    with pytest.raises(ProtocolError):
        unpack(packed, frozenset({ADMIT, EVICT, DESCRIBE}))


@pytest.mark.parametrize("tiers", [0, 8])
def test_a_page_names_tiers_that_exist(tiers: int) -> None:
    with pytest.raises(ProtocolError):
        unpack(Packed(shape_bytes(HELD, tiers), PACKED.index, PACKED.keys), frozenset({HELD}))
