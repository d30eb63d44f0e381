"""Why the bytes of a peer were refused: one error, and the causes that whoever reads packets and streams counts by.

cause            what came
malformed        bytes that do not parse: cut short, too many, or no message at all
field            a message with a value that is missing, of a wrong type, or out of its bounds
unknown_kind     a message that has no meaning where it came
too_large        more bytes, nodes or fields than are accepted
too_deep         wrappings in wrappings
compression      bytes that do not decompress
bad_crc          a packet that was damaged on its way
wrong_label      a packet or stream of another cluster on the same network
plaintext        a peer without a key, and this node has one
encrypted        a peer with a key, and this node has none
undecryptable    a peer with a key that this node has not, or bytes that somebody changed
"""

from __future__ import annotations

import enum

from kvmesh.transport.errors import ProtocolError


class Cause(enum.StrEnum):
    """The table above."""

    MALFORMED = "malformed"
    FIELD = "field"
    UNKNOWN_KIND = "unknown_kind"
    TOO_LARGE = "too_large"
    TOO_DEEP = "too_deep"
    COMPRESSION = "compression"
    BAD_CRC = "bad_crc"
    WRONG_LABEL = "wrong_label"
    PLAINTEXT = "plaintext"
    ENCRYPTED = "encrypted"
    UNDECRYPTABLE = "undecryptable"


class WireError(ProtocolError):
    """A packet, a stream, or one message in it was refused. Count it by `cause`, drop it, go on."""

    def __init__(self, cause: Cause, text: str) -> None:
        super().__init__(text)
        self.cause = cause
