"""The checksum that travels with every chunk: XXH3-64 of its bytes, taken at put and verified after every transfer.

It guards against faults of memory, disk and wire (2^-64 for one that goes unseen), not against an adversary: peers are
authenticated before their bytes count. xxhash releases the GIL while it works, so a chunk is verified beside the next
one's copy.

On the wire it is *bound* to what it is of: a message names a chunk by its place in a list, and a bit that flips in that
place would else give one chunk the bytes and the checksum of another.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

import xxhash

if TYPE_CHECKING:
    from .interface import Slice

_SLICE: Final = struct.Struct("<4Q")


def checksum(buffer: memoryview | bytes | bytearray) -> int:
    """XXH3-64 of `buffer` (contiguous bytes) as an unsigned 64-bit integer."""
    return xxhash.xxh3_64(buffer).intdigest()


def bound(value: int, key: bytes, part: Slice | None) -> int:
    """The checksum `value` of the chunk `key`, or of a part of it, as it travels; and back again: it is its own
    inverse."""
    name = key
    if part is not None:
        stride_bytes = part.stride_bytes if part.count > 1 else 0
        name += _SLICE.pack(part.offset_bytes, part.run_bytes, stride_bytes, part.count)
    return value ^ xxhash.xxh3_64_intdigest(name)
