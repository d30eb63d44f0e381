"""memberlist's wire protocol, version 5: messages as values, and as the bytes of packets and streams.

Sans-IO, and without state but the keyring and two counters: bytes and `Message`s come in and go out. Everything that a
peer may send instead is a `WireError` with a `Cause` to count by.
"""

from .codec import decode, encode
from .compound import HEADER_BYTES as COMPOUND_HEADER_BYTES
from .compound import PART_BYTES, PARTS_MAX
from .errors import Cause, WireError
from .keyring import Keyring, fingerprint, from_text, generate, to_text
from .messages import (
    VERSIONS,
    Ack,
    Alive,
    Dead,
    Endpoint,
    ErrorReply,
    IndirectPing,
    Kind,
    Message,
    Nack,
    Ping,
    PushedNode,
    PushedState,
    PushPull,
    Suspect,
    User,
)
from .packets import PacketCodec, overhead_bytes
from .streams import StreamCodec, StreamReader

__all__ = [
    "COMPOUND_HEADER_BYTES",
    "PARTS_MAX",
    "PART_BYTES",
    "VERSIONS",
    "Ack",
    "Alive",
    "Cause",
    "Dead",
    "Endpoint",
    "ErrorReply",
    "IndirectPing",
    "Keyring",
    "Kind",
    "Message",
    "Nack",
    "PacketCodec",
    "Ping",
    "PushPull",
    "PushedNode",
    "PushedState",
    "StreamCodec",
    "StreamReader",
    "Suspect",
    "User",
    "WireError",
    "decode",
    "encode",
    "fingerprint",
    "from_text",
    "generate",
    "overhead_bytes",
    "to_text",
]
