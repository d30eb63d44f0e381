"""The wrapping *compound*: several messages in one packet.

7 | count u8 | length u16 big-endian, for each | the messages
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Final

from .errors import Cause, WireError
from .messages import Kind

HEADER_BYTES: Final = 2
PART_BYTES: Final = 2
"""What each message in a compound costs beside its own bytes."""
PARTS_MAX: Final = 255


def wrap(parts: Sequence[bytes]) -> bytes:
    """The compound of 1 to 255 messages."""
    assert 0 < len(parts) <= PARTS_MAX
    return struct.pack(f">BB{len(parts)}H", Kind.COMPOUND, len(parts), *map(len, parts)) + b"".join(parts)


def unwrap(data: bytes) -> list[bytes]:
    """The messages of a compound. `data` has no kind any more; all of it must be accounted for."""
    if not data:
        raise WireError(Cause.MALFORMED, "a compound without a count")
    count = data[0]
    begins = 1 + PART_BYTES * count
    if len(data) < begins:
        raise WireError(Cause.MALFORMED, f"a compound of {len(data)} bytes that says {count} messages")
    parts = []
    for length in struct.unpack_from(f">{count}H", data, 1):
        parts.append(data[begins : begins + length])
        begins += length
    if begins != len(data):
        raise WireError(Cause.MALFORMED, f"a compound of {len(data)} bytes whose messages have {begins}")
    return parts
