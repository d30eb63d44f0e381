"""LZW as Go's compress/lzw writes it with least significant bits first and 8-bit literals: what memberlist compresses
with. Only the way back: kvmesh sends uncompressed.

Codes begin at 9 bits and grow to 12. 256 clears the table, 257 ends the data. Each code after the first adds an entry:
what the code before stands for, and the first byte of what this one stands for. A full table stays as it is until it is
cleared. What comes out is bounded while it is made, and with it the table: an entry is one byte longer than something
that came out.
"""

from __future__ import annotations

from typing import Final

from .errors import Cause, WireError

_END: Final = 257
_WIDTH: Final = 9
_WIDTH_MAX: Final = 12
_TABLE_MAX: Final = 1 << _WIDTH_MAX
_LITERALS: Final[list[bytes]] = [bytes([value]) for value in range(256)] + [b"", b""]
"""The table as a clear leaves it. The two last stand for nothing: they are the clear and the end."""


def decompress(data: bytes, limit: int) -> bytes:
    """What `data` stands for, at most `limit` bytes. Bytes behind the end are not looked at, as in Go."""
    table = _LITERALS.copy()
    size, width, mask, full_at = _END + 1, _WIDTH, (1 << _WIDTH) - 1, 1 << _WIDTH
    out = bytearray()
    bits = held = 0
    before = b""
    for byte in data:
        bits |= byte << held
        held += 8
        if held < width:
            continue
        code = bits & mask
        bits >>= width
        held -= width
        if code < size:
            piece = table[code]
            if not piece:
                if code == _END:
                    return bytes(out)
                table = _LITERALS.copy()
                size, width, mask, full_at = _END + 1, _WIDTH, (1 << _WIDTH) - 1, 1 << _WIDTH
                before = b""
                continue
            if before and size < _TABLE_MAX:
                table.append(before + piece[:1])
                size += 1
        elif code == size and before:
            piece = before + before[:1]
            table.append(piece)
            size += 1
        else:
            raise WireError(Cause.COMPRESSION, f"code {code} of LZW when there are {size}")
        out += piece
        if len(out) > limit:
            raise WireError(Cause.TOO_LARGE, f"more than {limit} bytes once decompressed")
        before = piece
        if size == full_at and width < _WIDTH_MAX:
            width += 1
            mask = (1 << width) - 1
            full_at = 1 << width
    raise WireError(Cause.COMPRESSION, "compressed bytes without an end")
