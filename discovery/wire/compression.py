"""The wrapping *compress*: a map of Algo and Buf. Taken off, never put on.

Go writes the two fields in this order whatever its age, so the map is read as the fixed bytes that it begins with: a
stream's may be long, and is read without being parsed twice.
"""

from __future__ import annotations

from typing import Final

from .errors import Cause, WireError
from .lzw import decompress

_BEGIN: Final = b"\x82\xa4Algo"
_BUF: Final = b"\xa3Buf"
_LZW: Final = 0
_TAG_AT: Final = len(_BEGIN) + 1 + len(_BUF)
_LENGTH_BYTES: Final = {0xC4: 1, 0xC5: 2, 0xC6: 4, 0xD9: 1, 0xDA: 2, 0xDB: 4}
"""How many bytes say the length behind a tag: bin, str, and raw, which has two of str's."""
HEADER_BYTES_MAX: Final = _TAG_AT + 1 + 4


def header(data: bytes | bytearray) -> tuple[int, int] | None:
    """Where the compressed bytes begin in `data`, and how many they are; nothing when it is too short to say."""
    if not data.startswith(_BEGIN[: len(data)]):
        raise WireError(Cause.MALFORMED, "a compressed message without its algorithm")
    if len(data) > len(_BEGIN) and data[len(_BEGIN)] != _LZW:
        raise WireError(Cause.COMPRESSION, f"compression algorithm {data[len(_BEGIN)]}")
    if len(data) <= _TAG_AT:
        return None
    if not data.startswith(_BUF, len(_BEGIN) + 1):
        raise WireError(Cause.MALFORMED, "a compressed message without its bytes")
    tag = data[_TAG_AT]
    if 0xA0 <= tag <= 0xBF:
        return _TAG_AT + 1, tag & 0x1F
    length_bytes = _LENGTH_BYTES.get(tag)
    if length_bytes is None:
        raise WireError(Cause.MALFORMED, "a compressed message whose bytes are something else")
    begins = _TAG_AT + 1 + length_bytes
    if len(data) < begins:
        return None
    return begins, int.from_bytes(data[_TAG_AT + 1 : begins], "big")


def unwrap(data: bytes, limit: int) -> bytes:
    """What was compressed: at most `limit` bytes. `data` has no kind any more."""
    found = header(data)
    if found is None:
        raise WireError(Cause.MALFORMED, "a compressed message that is cut short")
    begins, length = found
    if len(data) != begins + length:
        raise WireError(Cause.MALFORMED, f"a compressed message of {len(data) - begins} bytes that says {length}")
    return decompress(data[begins:], limit)
