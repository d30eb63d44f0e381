"""What stands on the wire, and that nothing else is taken for it."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmesh.transport import frames
from kvmesh.transport.frames import (
    Alive,
    Answer,
    Bulk,
    Call,
    Cancel,
    ForeignVersionError,
    FrameError,
    Grant,
    Item,
    Message,
    Read,
    Refusal,
    encode,
    to_caller,
    to_holder,
    to_reader,
)
from kvmesh.transport.limits import (
    CHAIN_CHUNKS_MAX,
    CHUNK_BYTES_MAX,
    HEADER_BYTES_MAX,
    ITEM_COST_BYTES,
    ITEMS_PER_MESSAGE_MAX,
    MESH_PROTOCOL_VERSION,
    MESSAGE_BYTES_MAX,
    READ_WINDOW_BYTES,
    READ_WINDOW_BYTES_MAX,
    READ_WINDOW_BYTES_MIN,
)
from tests.transport.ends import key, wants

V = MESH_PROTOCOL_VERSION
ONE = frames.encode_wanted(wants([1], 1))
ITEM = Item(CHAIN_CHUNKS_MAX - 1, 0, 2**64 - 1, CHUNK_BYTES_MAX, CHUNK_BYTES_MAX)
pack = msgspec.msgpack.encode
DECODERS = (to_holder, to_caller, to_reader)


@pytest.mark.parametrize(
    ("message", "payload"),
    [
        (Call(V, 2**64 - 1), b"request"),
        (Read(V, 1, READ_WINDOW_BYTES), ONE),
        (Grant(V, 1, 5), None),
        (Cancel(V, 0), None),
        (Answer(V, 3), b""),
        (Refusal(V, 3, "why"), None),
        (Alive(V, 0), None),
    ],
)
def test_each_message_comes_out_as_it_went_in(message: Message, payload: bytes | None) -> None:
    parts = [encode(message)] if payload is None else [encode(message), payload]
    decode = to_holder if isinstance(message, Call | Read | Grant | Cancel) else to_caller
    assert decode(parts) == (message, payload or b"")


def test_the_largest_bulk_header_fits() -> None:
    message = Bulk(V, 2**64 - 1, [ITEM] * ITEMS_PER_MESSAGE_MAX)
    assert len(encode(message)) <= HEADER_BYTES_MAX
    small = Bulk(V, 1, [Item(0, 0, 7, 0, 3), Item(1, 1, 0, 0, 0), Item(2, 0, 9, 0, 2)])
    assert to_reader([encode(small), memoryview(b"abcde")]) == small
    assert frames.cost(small.items) == 5 + 3 * ITEM_COST_BYTES


def test_the_list_of_wanted_chunks() -> None:
    payload = frames.encode_wanted(wants(range(CHAIN_CHUNKS_MAX), 1))
    message, _ = to_holder([encode(Read(V, 1, READ_WINDOW_BYTES)), payload])
    assert message == Read(V, 1, READ_WINDOW_BYTES)
    assert frames.wanted(payload, 77) == (key(77), 1)


READ = encode(Read(V, 1, READ_WINDOW_BYTES))
MALFORMED: dict[str, list[bytes]] = {
    "nothing": [],
    "empty": [b""],
    "not msgpack": [b"\xc1"],
    "a map": [pack({"tag": 1})],
    "an unknown tag": [pack([99, V, 1]), b""],
    "too few fields": [pack([3, V, 1])],
    "too many fields": [pack([1, V, 1, 1]), b""],
    "a negative id": [pack([4, V, -1])],
    "a float for an id": [pack([4, V, 1.0])],
    "an extension for an id": [pack([4, V, msgspec.msgpack.Ext(5, b"x")])],
    "bytes after the message": [pack([4, V, 1]) + b"\x00"],
    "deep nesting": [b"\x91" * 3000 + b"\x01"],
    "deep nesting after a good beginning": [b"\x94\x04\x01\x01" + b"\x91" * 3000 + b"\x01"],
    "a header that is too long": [pack([6, V, 1, "x" * HEADER_BYTES_MAX])],
    "text that is no text": [b"\x94\x06\x01\x01\xa2\xff\xff"],
    "a call without a payload": [encode(Call(V, 1))],
    "a cancel with a payload": [encode(Cancel(V, 1)), b""],
    "a third part": [encode(Call(V, 1)), b"", b""],
    "a request that is too long": [encode(Call(V, 1)), bytes(MESSAGE_BYTES_MAX + 1)],
    "no wanted chunk": [READ, b""],
    "half an entry": [READ, ONE[:-1]],
    "a wrong key length": [READ, ONE + b"x"],
    "too many keys": [READ, ONE * (CHAIN_CHUNKS_MAX + 1)],
    "a chunk of no bytes": [READ, frames.WANTED.pack(key(1), 0)],
    "a chunk that is too large": [READ, ONE + frames.WANTED.pack(key(1), CHUNK_BYTES_MAX + 1)],
    "a chunk of 2^64-1 bytes": [READ, frames.WANTED.pack(key(1), 2**64 - 1)],
    "a window that is too large": [encode(Read(V, 1, READ_WINDOW_BYTES_MAX + 1)), ONE],
    "a window that is too small": [encode(Read(V, 1, READ_WINDOW_BYTES_MIN - 1)), ONE],
    "no credit": [encode(Grant(V, 1, 0))],
    "too much credit": [encode(Grant(V, 1, READ_WINDOW_BYTES_MAX + 1))],
    "a refusal that is too long": [encode(Refusal(V, 1, "x" * 513))],
    "no items": [encode(Bulk(V, 1, []))],
    "too many items": [encode(Bulk(V, 1, [Item(0, 1, 0, 0, 0)] * (ITEMS_PER_MESSAGE_MAX + 1)))],
    "an unknown state": [encode(Bulk(V, 1, [Item(0, 3, 0, 0, 0)]))],
    "an index beyond any read": [encode(Bulk(V, 1, [Item(CHAIN_CHUNKS_MAX, 1, 0, 0, 0)]))],
    "a payload that is too short": [encode(Bulk(V, 1, [Item(0, 0, 0, 0, 3)])), b"ab"],
    "a payload that is missing": [encode(Bulk(V, 1, [Item(0, 0, 0, 0, 3)]))],
    "a payload too many": [encode(Bulk(V, 1, [Item(0, 0, 0, 0, 3)])), b"abc", b"abc"],
}


@pytest.mark.parametrize("parts", MALFORMED.values(), ids=MALFORMED)
def test_malformed_messages_are_told(parts: list[bytes]) -> None:
    for decode in DECODERS:
        with pytest.raises(FrameError):
            decode(parts)


def test_messages_of_the_wrong_direction_are_malformed() -> None:
    for parts in ([encode(Answer(V, 1)), b""], [encode(Alive(V, 1))]):
        with pytest.raises(FrameError):
            to_holder(parts)
    for decode in (to_caller, to_reader):
        with pytest.raises(FrameError):
            decode([encode(Call(V, 1)), b""])
    with pytest.raises(FrameError):
        to_reader([encode(Answer(V, 1)), b""])
    with pytest.raises(FrameError):
        to_caller([encode(Bulk(V, 1, [Item(0, 1, 0, 0, 0)]))])


@pytest.mark.parametrize("rest", [[], [1, 2, "more", {"than": b"we"}], [[[[]]]]])
def test_another_version_is_named(rest: list[Any]) -> None:
    for decode in DECODERS:
        with pytest.raises(
            ForeignVersionError, match=f"protocol {V + 1} and the other {V}: upgrade kvmesh where it is {V}"
        ) as raised:
            decode([pack([1, V + 1, 42, *rest]), b"payload"])
        assert (raised.value.tag, raised.value.version, raised.value.request_id) == (1, V + 1, 42)


parts_of_bytes = st.lists(st.binary(max_size=200), max_size=3)
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=9)
    | st.binary(max_size=9),
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=12,
)
parts_of_msgpack = st.tuples(
    st.integers(0, 9), st.integers(0, 2), st.lists(values, max_size=4), st.binary(max_size=90)
).map(lambda drawn: [pack([drawn[0], drawn[1], *drawn[2]]), drawn[3]])


@given(parts_of_bytes | parts_of_msgpack)
def test_any_bytes_are_a_message_or_malformed(parts: list[bytes]) -> None:
    for decode in DECODERS:
        try:
            decode(parts)
        except FrameError:
            continue


@given(st.data())
def test_a_good_message_with_flipped_bytes(data: st.DataObject) -> None:
    good = data.draw(st.sampled_from([READ, encode(Call(V, 7)), encode(Bulk(V, 1, [Item(0, 0, 2**63, 0, 40)] * 2))]))
    header = bytearray(good)
    for place in data.draw(st.lists(st.integers(0, len(header) - 1), min_size=1, max_size=4)):
        header[place] ^= data.draw(st.integers(1, 255))
    for decode in DECODERS:
        try:
            decode([bytes(header), ONE * 2])
        except FrameError:
            continue
