"""The label: a cluster's name in front of everything that its nodes send, so that two on one network stay apart.

    244 | length u8, not 0 | the label

It goes outermost, in the clear, and is authenticated where there is encryption. It keeps nobody out: a key does.
"""

from __future__ import annotations

from typing import Final

from kvmesh.transport.errors import SettingsError
from kvmesh.transport.limits import LABEL_BYTES_MAX

from .errors import Cause, WireError
from .messages import Kind

HEADER_BYTES: Final = 2


def header(label: str) -> bytes:
    """What goes in front of packets, and of what the one that opens a stream sends. Empty without a label."""
    if not label:
        return b""
    raw = label.encode()
    if len(raw) > LABEL_BYTES_MAX:
        raise SettingsError(f"the label has {len(raw)} bytes: at most {LABEL_BYTES_MAX} are possible")
    return bytes([Kind.LABEL, len(raw)]) + raw


def strip(data: bytes, expected: bytes) -> bytes:
    """The packet behind its label, which must be as `header` gave it."""
    if data[:1] != _FIRST:
        if expected:
            raise WireError(Cause.WRONG_LABEL, "a packet without a label")
        return data
    if not expected or not data.startswith(expected):
        raise WireError(Cause.WRONG_LABEL, "a packet with another label")
    return data[len(expected) :]


def header_bytes(data: bytes | bytearray, expected: bytes) -> int | None:
    """How many bytes the label takes at the begin of a stream; nothing as long as that cannot be said."""
    if not data:
        return None
    if data[:1] != _FIRST and not expected:
        return 0
    if not expected or not data.startswith(expected[: len(data)]):
        raise WireError(Cause.WRONG_LABEL, "a stream with another label than ours")
    return len(expected) if len(data) >= len(expected) else None


_FIRST: Final = bytes([Kind.LABEL])
