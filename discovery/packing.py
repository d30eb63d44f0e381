"""How entries and holdings travel: columns of bytes, not an object each.

A *shape* is everything about an entry but its key: kind, tiers, namespace, size. A cache has few of them (one a
namespace and tier), so a batch carries each shape once, then one 16-bit index and one 32-byte key an entry: 34 bytes.
The reader gets the shapes as shared objects and needs no Python work per field.

    shapes   kind u8 | tiers u8 | namespace 16 | size u64                 (26 bytes each, little-endian)
    index    u16 an entry, into shapes
    keys     32 bytes an entry

Everything that a peer sent is checked here: lengths first, then values. This module knows nothing of journals or
messages.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import Annotated, Final, NamedTuple

import msgspec
import numpy as np

from kvmesh.transport.errors import ProtocolError
from kvmesh.transport.limits import CHUNK_BYTES_MAX, KEY_BYTES, NAMESPACE_ID_BYTES, SNAPSHOT_PAGE_ENTRIES_MAX

TIERS: Final = ("gpu", "ram", "disk")
"""Fastest first. In a mask of tiers, ``TIERS[i]`` is the bit ``1 << i``."""
TIER_BITS: Final = {tier: 1 << bit for bit, tier in enumerate(TIERS)}
ALL_TIERS: Final = (1 << len(TIERS)) - 1

ADMIT: Final = 1
EVICT: Final = 2
DESCRIBE: Final = 3
HELD: Final = 4
"""In a page of a snapshot: the node holds the key on all the shape's tiers."""

NO_KEY: Final = bytes(KEY_BYTES)
NO_NAMESPACE: Final = bytes(NAMESPACE_ID_BYTES)
_SHAPE: Final = struct.Struct("<BB16sQ")
_ENTRIES_MAX: Final = SNAPSHOT_PAGE_ENTRIES_MAX


class Shape(NamedTuple):
    """What many entries have in common."""

    kind: int
    tiers: int
    namespace_id: bytes
    size_bytes: int


class Entry(NamedTuple):
    """One entry of a journal. `description` belongs to DESCRIBE alone, which has no key."""

    shape: Shape
    key: bytes
    description: bytes = b""


class Packed(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Entries as they travel."""

    shapes: Annotated[bytes, msgspec.Meta(max_length=_SHAPE.size * _ENTRIES_MAX)]
    index: Annotated[bytes, msgspec.Meta(max_length=2 * _ENTRIES_MAX)]
    keys: Annotated[bytes, msgspec.Meta(max_length=KEY_BYTES * _ENTRIES_MAX)]


NOTHING: Final = Packed(b"", b"", b"")


def pack(entries: Iterable[tuple[Shape, bytes]]) -> Packed:
    """Pairs of (shape, key), at most `SNAPSHOT_PAGE_ENTRIES_MAX`, in their order."""
    numbers: dict[Shape, int] = {}
    index: list[int] = []
    keys: list[bytes] = []
    for shape, key in entries:
        index.append(numbers.setdefault(shape, len(numbers)))
        keys.append(key)
    assert len(keys) <= _ENTRIES_MAX
    return Packed(
        b"".join(_SHAPE.pack(*shape) for shape in numbers), np.array(index, dtype="<u2").tobytes(), b"".join(keys)
    )


def unpack(packed: Packed, kinds: frozenset[int]) -> tuple[list[Shape], list[int], list[bytes]]:
    """(shapes, index of each entry, key of each entry). Raises `ProtocolError` unless every field is in order."""
    if len(packed.keys) % KEY_BYTES or len(packed.shapes) % _SHAPE.size:
        raise ProtocolError("packed entries end within an entry")
    count, shape_count = len(packed.keys) // KEY_BYTES, len(packed.shapes) // _SHAPE.size
    if len(packed.index) != 2 * count or shape_count > count:
        raise ProtocolError("packed entries have columns of different lengths")
    shapes = [Shape(*fields) for fields in _SHAPE.iter_unpack(packed.shapes)]
    for shape in shapes:
        _check(shape, kinds)
    index = np.frombuffer(packed.index, dtype="<u2")
    if count and int(index.max()) >= shape_count:
        raise ProtocolError("a packed entry names a shape that is not there")
    blob = packed.keys
    keys = [blob[start : start + KEY_BYTES] for start in range(0, len(blob), KEY_BYTES)]
    return shapes, index.tolist(), keys


def _check(shape: Shape, kinds: frozenset[int]) -> None:
    if shape.kind not in kinds:
        raise ProtocolError(f"an entry of kind {shape.kind} does not belong here")
    if shape.size_bytes > CHUNK_BYTES_MAX:
        raise ProtocolError(f"an entry has {shape.size_bytes} bytes: a chunk has at most {CHUNK_BYTES_MAX}")
    if shape.kind in (ADMIT, EVICT):
        right = shape.tiers in TIER_BITS.values()
    elif shape.kind == HELD:
        right = 0 < shape.tiers <= ALL_TIERS
    else:
        right = shape.tiers == 0
    if not right:
        raise ProtocolError(f"an entry of kind {shape.kind} has the tiers {shape.tiers:#x}")
