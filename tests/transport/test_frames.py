"""What stands on the wire, and that nothing else is taken for it."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmesh.transport import frames
from kvmesh.transport.frames import (
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
    Suspect,
    Wanted,
    encode,
    encode_read,
    to_caller,
    to_holder,
    to_reader,
)
from kvmesh.transport.interface import Slice, Want
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
    SERVED_READ_LEASE_S_MAX,
    SLICE_RUNS_MAX,
    SLICES_PER_READ_MAX,
)
from tests.transport.ends import key, part_of, wants

V = MESH_PROTOCOL_VERSION
ONE = encode_read(1, READ_WINDOW_BYTES, 1.0, wants([1], 1))[1]
ITEM = Item(CHAIN_CHUNKS_MAX - 1, 0, 2**64 - 1, CHUNK_BYTES_MAX, CHUNK_BYTES_MAX)
pack = msgspec.msgpack.encode
DECODERS = (to_holder, to_caller, lambda parts: to_reader(parts[0] if parts else b""))


@pytest.mark.parametrize(
    ("message", "payload"),
    [
        (Call(V, 2**64 - 1), b"request"),
        (Read(V, 1, READ_WINDOW_BYTES, 2.5, 0), ONE),
        (Suspect(V, 0), key(1)),
        (Grant(V, 1, 5), None),
        (Cancel(V, 0), None),
        (Answer(V, 3), b""),
        (Refusal(V, 3, "why"), None),
    ],
)
def test_each_message_comes_out_as_it_went_in(message: Message, payload: bytes | None) -> None:
    parts = [encode(message)] if payload is None else [encode(message), payload]
    decode = to_holder if isinstance(message, Call | Read | Grant | Cancel | Suspect) else to_caller
    assert decode(parts) == (message, payload or b"")


def test_the_largest_bulk_header_fits() -> None:
    message = Bulk(V, 2**64 - 1, [ITEM] * ITEMS_PER_MESSAGE_MAX)
    assert len(encode(message)) <= HEADER_BYTES_MAX


def test_a_bulk_message_is_told_by_its_header_and_costs_its_bytes_and_items() -> None:
    message = Bulk(V, 1, [Item(0, 0, 7, 0, 3), Item(1, 1, 0, 0, 0), Item(2, 0, 9, 0, 2)])
    assert frames.cost(message.items) == 5 + 3 * ITEM_COST_BYTES
    assert to_reader(encode(message)) == message
    nothing = Bulk(V, 1, [Item(1, 3, 0, 0, 0)])
    assert to_reader(encode(nothing)) == nothing


def test_the_list_of_wanted_chunks_costs_40_bytes_each() -> None:
    header, payload = encode_read(1, READ_WINDOW_BYTES, 5, wants(range(CHAIN_CHUNKS_MAX), 1))
    message, same = to_holder([header, payload])
    assert (message, len(payload)) == (Read(V, 1, READ_WINDOW_BYTES, 5.0, 0), 40 * CHAIN_CHUNKS_MAX)
    assert isinstance(message, Read)
    listed = Wanted(message, same)
    assert (listed.count, listed[77]) == (CHAIN_CHUNKS_MAX, (key(77), 1, None))
    forever, _ = to_holder(encode_read(1, READ_WINDOW_BYTES, 1e9, wants([1], 1)))
    assert isinstance(forever, Read)
    assert forever.lease_s == SERVED_READ_LEASE_S_MAX


def test_a_slice_that_many_chunks_share_is_told_once() -> None:
    head, other = Slice(8, 4, 16, 5), Slice(0, 3)
    listed = [part_of(number, 100, head) for number in range(1000)]
    listed += [*wants([7], 9), part_of(8, 50, other), part_of(9, 1 << 20, Slice(8, 4, 16, 5))]
    header, payload = encode_read(1, READ_WINDOW_BYTES, 5, listed)
    assert len(payload) == 1003 * 42 + 2 * 32
    message, payload = to_holder([header, payload])
    assert isinstance(message, Read)
    found = Wanted(message, payload)
    assert found.count == 1003
    assert [found[index] for index in (0, 999, 1000, 1001, 1002)] == [
        (key(0), 100, head),
        (key(999), 100, head),
        (key(7), 9, None),
        (key(8), 50, other),
        (key(9), 1 << 20, head),
    ]


@given(
    st.lists(
        st.tuples(
            st.integers(0, 2**30), st.integers(1, 2**20), st.integers(0, 2**20), st.integers(1, 1000), st.booleans()
        ),
        min_size=1,
        max_size=20,
    )
)
def test_lists_of_parts_come_out_as_they_went_in(drawn: list[tuple[int, int, int, int, bool]]) -> None:
    listed = []
    for number, (offset, run, gap, count, whole) in enumerate(drawn):
        part = Slice(offset, run, run + gap if count > 1 else gap, count)
        into = memoryview(bytearray(1))
        listed.append(Want(key(number), into, None if whole else part, part.end))
    header, payload = encode_read(1, READ_WINDOW_BYTES, 5, listed)
    fits = all(want.part is None or want.part.end <= CHUNK_BYTES_MAX for want in listed)
    if not fits:
        with pytest.raises(FrameError):
            to_holder([header, payload])
        return
    message, payload = to_holder([header, payload])
    assert isinstance(message, Read)
    found = Wanted(message, payload)
    assert [found[index] for index in range(found.count)] == [
        (want.key, want.whole_bytes, want.part) for want in listed
    ]


def parts_list(*fields: int, chunk_bytes: int = 100, number: int = 1, slices: int = 1) -> list[bytes]:
    """A read of one chunk with a table of `slices` equal slices."""
    table = frames.SLICE.pack(*fields) * slices
    listed = frames.WANTED.pack(key(1), chunk_bytes)
    return [encode(Read(V, 1, READ_WINDOW_BYTES, 1.0, slices)), listed + table + frames.SLICE_NUMBER.pack(number)]


def test_the_largest_slice_is_a_slice() -> None:
    runs = SLICE_RUNS_MAX
    most = parts_list(0, CHUNK_BYTES_MAX // runs, CHUNK_BYTES_MAX // runs, runs, chunk_bytes=CHUNK_BYTES_MAX)
    for good in (most, parts_list(99, 1, 0, 1), parts_list(0, 1, 99, 2), parts_list(0, 1, 0, 1, slices=1024, number=0)):
        assert isinstance(to_holder(good)[0], Read)


READ = encode(Read(V, 1, READ_WINDOW_BYTES, 1.0, 0))
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
    "deep nesting after a good beginning": [b"\x94\x04\x02\x01" + b"\x91" * 3000 + b"\x01"],
    "a header that is too long": [pack([6, V, 1, "x" * HEADER_BYTES_MAX])],
    "text that is no text": [b"\x94\x06\x02\x01\xa2\xff\xff"],
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
    "a window that is too large": [encode(Read(V, 1, READ_WINDOW_BYTES_MAX + 1, 1.0, 0)), ONE],
    "a window that is too small": [encode(Read(V, 1, READ_WINDOW_BYTES_MIN - 1, 1.0, 0)), ONE],
    "a lease of no time": [encode(Read(V, 1, READ_WINDOW_BYTES, 0.0, 0)), ONE],
    "a lease that is not a number": [encode(Read(V, 1, READ_WINDOW_BYTES, math.nan, 0)), ONE],
    "a lease that is too long": [encode(Read(V, 1, READ_WINDOW_BYTES, SERVED_READ_LEASE_S_MAX + 1, 0)), ONE],
    "too many slices": parts_list(0, 1, 0, 1, slices=SLICES_PER_READ_MAX + 1),
    "a slice that is not there": [encode(Read(V, 1, READ_WINDOW_BYTES, 1.0, 1)), ONE],
    "a slice that is not announced": [READ, parts_list(0, 1, 0, 1)[1]],
    "half a table": [*parts_list(0, 1, 0, 1)[:1], parts_list(0, 1, 0, 1)[1][:-8]],
    "a slice that is not in the table": parts_list(0, 1, 0, 1, number=2),
    "a slice without runs": parts_list(0, 1, 0, 0),
    "a slice of empty runs": parts_list(0, 0, 0, 1),
    "a slice of too many runs": parts_list(0, 1, 1, SLICE_RUNS_MAX + 1, chunk_bytes=CHUNK_BYTES_MAX),
    "a slice whose runs overlap": parts_list(0, 4, 3, 2),
    "a slice whose runs go backwards": parts_list(50, 4, 2**64 - 8, 2),
    "a slice that ends beyond its chunk": parts_list(97, 4, 0, 1),
    "a slice whose last run ends beyond its chunk": parts_list(0, 4, 33, 4),
    "a slice of 2^64-1 bytes": parts_list(0, 2**64 - 1, 0, 1),
    "a slice that begins at 2^64-1": parts_list(2**64 - 1, 1, 0, 1),
    "a slice that overflows": parts_list(0, 1, 2**63, 3),
    "half a key": [encode(Suspect(V, 1)), key(1)[1:]],
    "two keys": [encode(Suspect(V, 1)), key(1) + key(2)],
    "a read without a lease": [pack([2, V, 1, READ_WINDOW_BYTES]), ONE],
    "no credit": [encode(Grant(V, 1, 0))],
    "too much credit": [encode(Grant(V, 1, READ_WINDOW_BYTES_MAX + 1))],
    "a refusal that is too long": [encode(Refusal(V, 1, "x" * 513))],
    "no items": [encode(Bulk(V, 1, []))],
    "too many items": [encode(Bulk(V, 1, [Item(0, 1, 0, 0, 0)] * (ITEMS_PER_MESSAGE_MAX + 1)))],
    "an unknown state": [encode(Bulk(V, 1, [Item(0, 4, 0, 0, 0)]))],
    "an index beyond any read": [encode(Bulk(V, 1, [Item(CHAIN_CHUNKS_MAX, 1, 0, 0, 0)]))],
}


@pytest.mark.parametrize("parts", MALFORMED.values(), ids=MALFORMED)
def test_malformed_messages_are_told(parts: list[bytes]) -> None:
    for decode in DECODERS:
        with pytest.raises(FrameError):
            decode(parts)


def test_messages_of_the_wrong_direction_are_malformed() -> None:
    for parts in ([encode(Answer(V, 1)), b""], [encode(Refusal(V, 1, "no"))]):
        with pytest.raises(FrameError):
            to_holder(parts)
    with pytest.raises(FrameError):
        to_caller([encode(Call(V, 1)), b""])
    with pytest.raises(FrameError):
        to_reader(encode(Call(V, 1)))
    with pytest.raises(FrameError):
        to_reader(encode(Answer(V, 1)))
    with pytest.raises(FrameError):
        to_caller([encode(Refusal(V, 1, "why")), b""])
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
    st.integers(0, 10), st.integers(1, 3), st.lists(values, max_size=4), st.binary(max_size=90)
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
    table = encode(Read(V, 1, READ_WINDOW_BYTES, 1.5, 1))
    good = data.draw(
        st.sampled_from([READ, table, encode(Call(V, 7)), encode(Bulk(V, 1, [Item(0, 0, 2**63, 0, 40)] * 2))])
    )
    header = bytearray(good)
    for place in data.draw(st.lists(st.integers(0, len(header) - 1), min_size=1, max_size=4)):
        header[place] ^= data.draw(st.integers(1, 255))
    for decode in DECODERS:
        try:
            decode([bytes(header), ONE * 2])
        except FrameError:
            continue


@given(st.data())
def test_a_table_of_slices_with_flipped_bytes_keeps_to_its_chunks(data: st.DataObject) -> None:
    listed = [part_of(1, 100, Slice(8, 4, 16, 5)), *wants([2], 30), part_of(3, 64, Slice(0, 64))]
    header, payload = encode_read(1, READ_WINDOW_BYTES, 5, listed)
    flipped = bytearray(payload)
    for place in data.draw(st.lists(st.integers(0, len(flipped) - 1), min_size=1, max_size=4)):
        flipped[place] ^= data.draw(st.integers(1, 255))
    try:
        message, payload = to_holder([header, bytes(flipped)])
    except FrameError:
        return
    assert isinstance(message, Read)
    found = Wanted(message, payload)
    for index in range(found.count):
        _, chunk_bytes, part = found[index]
        assert 1 <= chunk_bytes <= CHUNK_BYTES_MAX
        assert part is None or (part.bytes >= 1 and part.offset_bytes >= 0 and part.end <= chunk_bytes)
