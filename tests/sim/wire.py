"""What packets and streams look like as bytes: through the product's own codec, or only counted.

how         packets pass as   what is counted
(no Wire)   values            nothing: the fastest
Counted     values            the bytes that they would have
Encoded     bytes             the bytes that they have; each is decoded where it arrives
"""

from __future__ import annotations

from functools import lru_cache
from typing import Protocol

from kvmesh.discovery.wire import codec, packets
from kvmesh.discovery.wire.keyring import Keyring
from kvmesh.discovery.wire.messages import Message, PushPull
from kvmesh.discovery.wire.packets import CRC_HEADER_BYTES, PacketCodec
from kvmesh.discovery.wire.streams import StreamCodec


class Wire(Protocol):
    """How messages pass. `packet_bytes` is the size of the packet that was made last."""

    packet_bytes: int

    @property
    def left_out(self) -> int:
        """Parts of packets and streams that could not be read."""

    def packet(self, messages: tuple[Message, ...], crc: bool) -> bytes | None:
        """The packet; None when it passes as values."""

    def opened(self, data: bytes) -> tuple[Message, ...]:
        """What is in it."""

    def stream(self, message: Message, *, answer: bool) -> tuple[Message | bytes, int]:
        """What passes over a stream, and its size in bytes."""

    def read(self, content: Message | bytes, *, answer: bool) -> Message:
        """What came over a stream."""


@lru_cache(maxsize=1 << 16)
def message_bytes(message: Message) -> int:
    """The size of a message alone."""
    return len(codec.encode(message))


class Counted:
    """Values pass; their bytes are counted, sealed with a key or not."""

    left_out = 0

    def __init__(self, *, encrypted: bool = False) -> None:
        self.packet_bytes = 0
        self._overhead_bytes = packets.overhead_bytes(encrypted, "") - CRC_HEADER_BYTES
        self._streams = StreamCodec(None)

    def packet(self, messages: tuple[Message, ...], crc: bool) -> None:
        size = sum(map(message_bytes, messages)) + self._overhead_bytes
        if len(messages) > 1:
            size += 2 + 2 * len(messages)
        self.packet_bytes = size + (CRC_HEADER_BYTES if crc else 0)

    def opened(self, data: bytes) -> tuple[Message, ...]:
        raise AssertionError("nothing passes as bytes")

    def stream(self, message: Message, *, answer: bool) -> tuple[Message, int]:
        return message, len(self._streams.seal(message, answer=answer))

    def read(self, content: Message | bytes, *, answer: bool) -> Message:
        assert isinstance(content, Message)
        return content


class Encoded:
    """Bytes pass."""

    def __init__(self, *, key: bytes | None = None, label: str = "") -> None:
        self.packet_bytes = 0
        keyring = None if key is None else Keyring([key])
        self._packets = PacketCodec(keyring, label)
        self._streams = StreamCodec(keyring, label)

    def packet(self, messages: tuple[Message, ...], crc: bool) -> bytes:
        data = self._packets.seal(messages, crc=crc)
        self.packet_bytes = len(data)
        return data

    def opened(self, data: bytes) -> tuple[Message, ...]:
        return tuple(self._packets.open(data))

    @property
    def left_out(self) -> int:
        """Messages and nodes that could not be read."""
        return self._packets.left_out.total() + self._streams.left_out.total()

    def stream(self, message: Message, *, answer: bool) -> tuple[bytes, int]:
        data = self._streams.seal(message, answer=answer)
        return data, len(data)

    def read(self, content: Message | bytes, *, answer: bool) -> Message:
        assert isinstance(content, bytes)
        reader = self._streams.reader(answer=answer)
        half = len(content) // 2
        assert reader.feed(content[:half]) is None, "half a message was taken for one"
        message = reader.feed(content[half:])
        assert message is not None, "a whole message was not recognised"
        return message


def guessed_stream_bytes(message: Message) -> int:
    """Near enough for how long it takes, where nothing is counted."""
    return 100 + (150 * len(message.nodes) + len(message.user_state) if isinstance(message, PushPull) else 0)
