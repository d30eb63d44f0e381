"""One packet: its messages, and all that is wrapped around them.

    out     messages → compound, if there are several → CRC, if the receiver checks it → encrypted → label
    in      label → decrypted → CRC → compounds and compressions, in whatever order → messages

`PacketCodec` owns the order, and what is refused and why: a wrapping that does not come off refuses the packet. A
message that cannot be read is left out, and counted in `left_out`, as long as the packet has others that can: they may
be acks, and one node with a strange name must not make others look dead. Never compresses. Knows no address, no socket
and no clock; runs on the loop that has the socket.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Sequence
from typing import Final

from kvmesh.transport.limits import PACKET_BYTES_MAX, PACKET_MESSAGES_MAX, WRAPPINGS_MAX

from . import codec, compound, compression, label, security
from .errors import Cause, WireError
from .keyring import Keyring
from .messages import Kind, Message

CRC_HEADER_BYTES: Final = 5


def overhead_bytes(encrypted: bool, name: str) -> int:
    """What sealing adds to a message, or to a compound, at most: CRC, encryption and the label `name`."""
    return CRC_HEADER_BYTES + (security.OVERHEAD_BYTES if encrypted else 0) + len(label.header(name))


class PacketCodec:
    """Seals and opens the packets of one node. The keyring may change meanwhile."""

    def __init__(self, keyring: Keyring | None, label: str = "") -> None:
        self._keyring = keyring
        self._label = _label_header(label)
        self._authenticated = label.encode()
        self.left_out: Counter[Cause] = Counter()
        """Messages that were left out of packets whose others were read, by cause."""

    def seal(self, messages: Sequence[Message], *, crc: bool) -> bytes:
        """The packet with these messages: one or more. `crc`: the receiver speaks protocol version 5."""
        parts = [codec.encode(message) for message in messages]
        data = parts[0] if len(parts) == 1 else compound.wrap(parts)
        if crc:
            data = _CRC + zlib.crc32(data).to_bytes(4, "big") + data
        if self._keyring is not None:
            data = security.seal(self._keyring, data, self._authenticated)
        return self._label + data

    def open(self, packet: bytes) -> list[Message]:
        """The messages of a packet, at least one. Raises `WireError` when there is none to be had."""
        if len(packet) > PACKET_BYTES_MAX:
            raise WireError(Cause.TOO_LARGE, f"a packet of {len(packet)} bytes: {PACKET_BYTES_MAX} are accepted")
        data = label.strip(packet, self._label)
        if self._keyring is not None:
            data = self._decrypted(self._keyring, data)
        if data[:1] == _CRC:
            data = _checked(data)
        opening = _Opening()
        try:
            opening.take(data, WRAPPINGS_MAX)
        except WireError as error:
            if self._keyring is None and error.cause is Cause.MALFORMED and _looks_encrypted(data):
                raise WireError(Cause.ENCRYPTED, "it looks encrypted, and this node has no key") from None
            raise
        if not opening.messages:
            raise opening.defect or WireError(Cause.MALFORMED, "a packet without a message")
        self.left_out.update(opening.left_out)
        return opening.messages

    def _decrypted(self, keyring: Keyring, data: bytes) -> bytes:
        try:
            return security.open_sealed(keyring, data, self._authenticated)
        except WireError:
            if _looks_plain(data):
                raise WireError(Cause.PLAINTEXT, "it is not encrypted, and this node has a key") from None
            raise


class _Opening:
    """Takes wrappings off, down to the messages. How many these are, and what decompresses, is bounded for the whole
    packet together."""

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self.left_out: Counter[Cause] = Counter()
        self.defect: WireError | None = None
        """Of the first message that was left out."""
        self._left_messages = PACKET_MESSAGES_MAX
        self._left_bytes = PACKET_BYTES_MAX

    def take(self, data: bytes, wrappings_left: int) -> None:
        """What `data` holds. Raises `WireError` when that is nothing."""
        kind = data[0] if data else None
        if kind != Kind.COMPOUND and kind != Kind.COMPRESS:
            self.messages.append(codec.decode(data))
            return
        if not wrappings_left:
            raise WireError(Cause.TOO_DEEP, f"more than {WRAPPINGS_MAX} wrappings, one in another")
        if kind == Kind.COMPRESS:
            inner = compression.unwrap(data[1:], self._left_bytes)
            self._left_bytes -= len(inner)
            self.take(inner, wrappings_left - 1)
            return
        parts = compound.unwrap(data[1:])
        self._left_messages -= len(parts)
        if self._left_messages < 0:
            raise WireError(Cause.TOO_LARGE, f"a packet of more than {PACKET_MESSAGES_MAX} messages")
        for part in parts:
            try:
                self.take(part, wrappings_left - 1)
            except WireError as error:
                self.left_out[error.cause] += 1
                self.defect = self.defect or error


def _checked(data: bytes) -> bytes:
    if len(data) < CRC_HEADER_BYTES:
        raise WireError(Cause.MALFORMED, "a CRC that is cut short")
    inner = data[CRC_HEADER_BYTES:]
    if zlib.crc32(inner) != int.from_bytes(data[1:CRC_HEADER_BYTES], "big"):
        raise WireError(Cause.BAD_CRC, "the packet is not what its CRC says")
    return inner


def _looks_plain(data: bytes) -> bool:
    """Whether a packet that did not decrypt is none that was encrypted. 0 and 1 are the kinds of pings as well as the
    versions of encryption, but only a ping has its first field's name in it."""
    return bool(data) and (_SEQ_NO in data if data[0] <= security.VERSION else data[0] <= Kind.ERROR)


def _looks_encrypted(data: bytes) -> bool:
    """Whether a packet that could not be read may have been encrypted."""
    return len(data) >= security.OVERHEAD_BYTES and data[0] <= security.VERSION and _SEQ_NO not in data


_CRC: Final = bytes([Kind.CRC])
_SEQ_NO: Final = b"SeqNo"
_label_header: Final = label.header
