"""Inputs for the wire, made from a seed: valid ones that are damaged at some place, and bytes that never were valid.

A damage that comes before the wrapping gets past CRC, encryption and label to what is behind them; one that comes after
it meets those. Nothing here asks the code under test to judge anything; it is used to make what is valid.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from kvmesh.discovery.wire import (
    VERSIONS,
    Ack,
    Alive,
    Dead,
    ErrorReply,
    IndirectPing,
    Keyring,
    Message,
    Nack,
    Ping,
    PushedNode,
    PushPull,
    StreamCodec,
    Suspect,
    User,
    encode,
)
from tests.discovery.wire.support import compressed, lzw, lzw_zeros

LABEL = "mesh-a"


class Target(IntEnum):
    """What an input is for."""

    DECODE = 0
    PACKET = 1
    STREAM = 2
    LZW = 3


@dataclass(frozen=True, slots=True)
class Input:
    """Bytes for a target. Packets and streams are for a node with a key or without, with a label or without."""

    target: Target
    data: bytes
    keyed: bool = False
    labelled: bool = False
    answer: bool = False
    heavy: bool = False
    """Made to take much: its memory is always measured."""

    def __str__(self) -> str:
        return f"{self.target.name} keyed={self.keyed} labelled={self.labelled} answer={self.answer} {self.data.hex()}"


class Inputs:
    """Makes inputs. One object a process: what is valid is made once."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._random = random.Random(seed)
        self.keys = [self._random.randbytes(size) for size in (32, 16)]
        self.keyring = Keyring(self.keys)
        self._ciphers = [AESGCM(key) for key in self.keys]
        self._messages = [encode(message) for message in self._valid_messages(80)]
        self._streams = self._valid_streams(40)
        self._compressed = [compressed(self._compound([*self._messages[i : i + 4]])) for i in range(0, 40, 4)]
        self._compressed += [compressed(stream) for stream in self._streams[:12] if len(stream) < 4000]
        self._packed = [lzw(b"".join(self._messages[i : i + 7])) for i in range(0, 80, 4)]

    def batch(self, number: int, size: int) -> list[Input]:
        """The inputs of batch `number`: always the same for the same seed and size."""
        self._random.seed(f"{self._seed}:{number}")
        return [self._input() for _ in range(size)]

    def _input(self) -> Input:
        choice = self._random.random()
        if choice < 0.30:
            return Input(Target.DECODE, self._message())
        if choice < 0.65:
            return self._packet()
        if choice < 0.90:
            return self._stream()
        return self._lzw()

    # --- what is valid ---

    def _valid_messages(self, count: int) -> list[Message]:
        made: list[Callable[[], Message]] = [
            lambda: Ping(self._uint(), self._name(), self._ip(), self._port(), self._name()),
            lambda: Ping(self._uint(), self._name()),
            lambda: IndirectPing(
                self._uint(), self._ip(), self._port(), self._name(), True, self._ip(), self._port(), self._name()
            ),
            lambda: Ack(self._uint(), self._random.randbytes(self._random.randrange(150))),
            lambda: Nack(self._uint()),
            lambda: Suspect(self._uint(), self._name(), self._name()),
            lambda: Dead(self._uint(), self._name(), self._name()),
            lambda: Alive(self._uint(), self._name(), self._ip(), self._port(), self._meta(), VERSIONS),
            lambda: User(self._meta()),
        ]
        return [made[number % len(made)]() for number in range(count)]

    def _valid_streams(self, count: int) -> list[bytes]:
        plain = StreamCodec(None)
        made: list[Callable[[], Message]] = [
            lambda: PushPull(
                self._random.random() < 0.5,
                tuple(self._pushed_node() for _ in range(self._random.choice((0, 1, 3, 30)))),
                self._meta(),
            ),
            lambda: Ping(self._uint(), self._name(), self._ip(), self._port(), self._name()),
            lambda: Ack(self._uint()),
            lambda: User(self._meta()),
            lambda: ErrorReply("no"),
        ]
        return [plain.seal(made[number % len(made)](), answer=True) for number in range(count)]

    def _pushed_node(self) -> PushedNode:
        state = self._random.randrange(4)
        return PushedNode(self._name(), self._ip(), self._port(), self._meta(), self._uint(), state, VERSIONS)

    def _uint(self) -> int:
        return self._random.getrandbits(self._random.choice((4, 8, 16, 32)))

    def _port(self) -> int:
        return self._random.randrange(1, 1 << 16)

    def _ip(self) -> bytes:
        return self._random.randbytes(self._random.choice((4, 16)))

    def _name(self) -> str:
        return f"node-{self._random.getrandbits(20)}" + "x" * self._random.choice((0, 0, 5, 40))

    def _meta(self) -> bytes:
        return self._random.randbytes(self._random.choice((0, 7, 60, 512)))

    # --- damage ---

    def _damaged(self, data: bytes) -> bytes:
        """`data` with one to four changes."""
        changed = bytearray(data)
        for _ in range(1 + self._random.getrandbits(2)):
            _DAMAGES[int(self._random.random() * len(_DAMAGES))](self._random, changed)
        return bytes(changed)

    def _perhaps_damaged(self, data: bytes, chance: float) -> bytes:
        return self._damaged(data) if self._random.random() < chance else data

    # --- inputs ---

    def _message(self) -> bytes:
        if self._random.random() < 0.15:
            return bytes([self._random.getrandbits(4)]) + self._msgpack(5)
        return self._perhaps_damaged(self._random.choice(self._messages), 0.8)

    def _packet(self) -> Input:
        chance = self._random.random
        if chance() < 0.05:
            return Input(Target.PACKET, self._noise(), chance() < 0.5, chance() < 0.5)
        shape, heavy = chance(), False
        if shape < 0.45:
            data = self._message()
        elif shape < 0.8:
            data = self._compound([self._message() for _ in range(1 + self._random.getrandbits(2))])
        elif shape < 0.97:
            data = self._random.choice(self._compressed)
            if chance() < 0.3:
                data = self._compound([data, self._message()])
        else:
            data, heavy = self._nested(), chance() < 0.1
        data = self._perhaps_damaged(data, 0.3)
        if chance() < 0.3:
            data = b"\x0c" + zlib.crc32(data).to_bytes(4, "big") + data
        keyed, labelled = chance() < 0.4, chance() < 0.3
        label = LABEL.encode() if labelled else b""
        if keyed != (chance() < 0.05):
            data = self._encrypted(data, label)
        if label and chance() < 0.95:
            data = bytes([244, len(label)]) + label + data
        return Input(Target.PACKET, self._perhaps_damaged(data, 0.2), keyed, labelled, heavy=heavy)

    def _stream(self) -> Input:
        chance = self._random.random
        data = self._noise() if chance() < 0.05 else self._perhaps_damaged(self._random.choice(self._streams), 0.7)
        shape, heavy = chance(), False
        if shape < 0.2:
            data = self._perhaps_damaged(self._random.choice(self._compressed), 0.3)
        elif shape < 0.203:
            data, heavy = self._nested(), True
        elif shape < 0.206:
            data, heavy = self._long_stream(), True
        keyed, labelled, answer = chance() < 0.3, chance() < 0.3, chance() < 0.5
        label = LABEL.encode() if labelled else b""
        if keyed != (chance() < 0.05):
            header = b"\x0a" + (len(data) + 29).to_bytes(4, "big")
            data = header + self._encrypted(data, header + label)
        if label and not answer:
            data = bytes([244, len(label)]) + label + data
        return Input(Target.STREAM, self._perhaps_damaged(data, 0.2), keyed, labelled, answer, heavy)

    def _lzw(self) -> Input:
        shape = self._random.random()
        if shape < 0.3:
            return Input(Target.LZW, self._noise())
        if shape < 0.301:
            return Input(Target.LZW, self._bombs[self._random.getrandbits(1)], heavy=True)
        return Input(Target.LZW, self._perhaps_damaged(self._random.choice(self._packed), 0.9))

    def _noise(self) -> bytes:
        return self._random.randbytes(int(self._random.random() ** 3 * 300))

    def _compound(self, parts: list[bytes]) -> bytes:
        lengths = b"".join((len(part) & 0xFFFF).to_bytes(2, "big") for part in parts)
        return bytes([7, len(parts)]) + lengths + b"".join(parts)

    def _encrypted(self, data: bytes, authenticated: bytes) -> bytes:
        """Of either version, with either key."""
        version = self._random.random() < 0.9
        if not version:
            padding = 16 - len(data) % 16
            data += bytes([padding]) * padding
        nonce = self._random.randbytes(12)
        cipher = self._ciphers[self._random.getrandbits(1)]
        return bytes([version]) + nonce + cipher.encrypt(nonce, data, authenticated)

    def _nested(self) -> bytes:
        """Wrappings in wrappings, and what is small and becomes large."""
        shape = self._random.random()
        if shape < 0.2:
            return b"\x09\x82\xa4Algo\x00\xa3Buf\xc5" + len(self._bombs[0]).to_bytes(2, "big") + self._bombs[0]
        if shape < 0.4:
            return self._compound([self._compound([b""] * 255)] * self._random.choice((1, 20, 100)))
        data = self._message()
        for _ in range(1 + self._random.getrandbits(3)):
            small = len(data) < 300 and self._random.random() < 0.3
            data = compressed(data) if small else self._compound([data] * (1 + self._random.getrandbits(1)))
        return data

    def _long_stream(self) -> bytes:
        """A push/pull or a user message that says much more than comes, or holds maps that are too large."""
        shape = self._random.random()
        if shape < 0.3:
            return b"\x06\x83\xa4Join\xc3\xa5Nodes\xcd\x1f\xff\xacUserStateLen\x00" + b"\x81\xa1a\x90" * 4000
        if shape < 0.6:
            return b"\x06\x83\xa4Join\xc3\xa5Nodes\x01\xacUserStateLen\x00" + self._msgpack(8) * 50
        if shape < 0.8:
            return b"\x08\x81\xaaUserMsgLen\xce\x00\x7f\xff\xff" + bytes(60_000)
        return b"\x06" + b"\x81\xa1a" * 3000

    @cached_property
    def _bombs(self) -> list[bytes]:
        """A few KiB that decompress to 14 MiB, and less that decompress to 240 KiB: each is too much for someone."""
        return [lzw_zeros(2 * 3838), lzw_zeros(700)]

    def _msgpack(self, depth: int) -> bytes:
        """A random value, with every type of msgpack, mostly well-formed."""
        choice = self._random.random()
        bits = self._random.getrandbits
        if depth and choice < 0.25:
            count = bits(2)
            return bytes([0x90 | count]) + b"".join(self._msgpack(depth - 1) for _ in range(count))
        if depth and choice < 0.5:
            count = bits(3)
            return bytes([0x80 | count]) + b"".join(
                self._random.choice(_KEYS) + self._msgpack(depth - 1) for _ in range(count)
            )
        if choice < 0.7:
            return bytes([bits(7)])
        if choice < 0.9:
            length = bits(4)
            return bytes([0xA0 | length]) + self._random.randbytes(length)
        return self._random.choice(_VALUES)


_KEYS = [
    bytes([0xA0 | len(key)]) + key
    for key in b"SeqNo Node SourceAddr Incarnation From Addr Port Meta Vsn Name State Nodes Payload Error x".split()
] + [b"\xa0", b"\x01", b"\xd9\x04Node", b"\xc4\x04Node", b"\xc0"]
_VALUES_HEX = """
    c0 c1 c2 c3 c40161 c5000161 c60000000161 c700ff c7010561 c800010561 ca7f800000 cbffffffffffffffff ccff cdffff
    ceffffffff cfffffffffffffffff d080 d18000 d280000000 d38000000000000000 d40561 d6ff00000000 d7ffffffffffffffffff
    d90161 da000161 db0000000161 dc0000 ddffffffff de0000 dfffffffff dbffffffff c6ffffffff e0 ff a3fffefd
"""
_VALUES = [bytes.fromhex(value) for value in _VALUES_HEX.split()]
"""One of each kind of value, and some that are cut short or none."""
_INTERESTING = bytes([0, 1, 7, 9, 10, 12, 0x7F, 0x80, 0x8F, 0x90, 0xA0, 0xBF, *range(0xC0, 0xE0), 244, 255])


def _flip_bit(rng: random.Random, data: bytearray) -> None:
    if data:
        data[int(rng.random() * len(data))] ^= 1 << rng.getrandbits(3)


def _set_byte(rng: random.Random, data: bytearray) -> None:
    if data:
        data[int(rng.random() * len(data))] = _INTERESTING[int(rng.random() * len(_INTERESTING))]


def _cut(rng: random.Random, data: bytearray) -> None:
    del data[int(rng.random() * len(data)) :]


def _remove(rng: random.Random, data: bytearray) -> None:
    at = int(rng.random() * len(data))
    del data[at : at + 1 + rng.getrandbits(3)]


def _repeat(rng: random.Random, data: bytearray) -> None:
    at = int(rng.random() * len(data))
    data[at:at] = data[at : at + rng.getrandbits(5)]


def _insert(rng: random.Random, data: bytearray) -> None:
    at = int(rng.random() * (len(data) + 1))
    data[at:at] = _VALUES[int(rng.random() * len(_VALUES))]


def _lengthen(rng: random.Random, data: bytearray) -> None:
    """Make a length say more: of the first map, or of some raw."""
    at = int(rng.random() * len(data))
    data[at : at + 1] = (b"\xdf\x00\x01\x00\x00", b"\xdb\x00\xff\xff\xff", b"\xda\xff\xff", b"\xdd\x0f\xff\xff\xff")[
        rng.getrandbits(2)
    ]


_DAMAGES = [_flip_bit, _flip_bit, _set_byte, _set_byte, _cut, _remove, _repeat, _insert, _lengthen]
