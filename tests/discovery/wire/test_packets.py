"""Packets: every way of wrapping comes off again, nothing that was changed does, and one bad message harms no other."""

from __future__ import annotations

import contextlib
import itertools
import random
import struct
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmesh.discovery.wire import (
    COMPOUND_HEADER_BYTES,
    PART_BYTES,
    Ack,
    Alive,
    Cause,
    Keyring,
    Message,
    Nack,
    PacketCodec,
    Ping,
    User,
    WireError,
    compound,
    encode,
    overhead_bytes,
    security,
)
from kvmesh.transport.errors import SettingsError
from kvmesh.transport.limits import PACKET_BYTES_MAX, PACKET_MESSAGES_MAX, WRAPPINGS_MAX

from . import golden
from .support import compressed, packet_messages

KEYS = [bytes([number]) * size for number, size in enumerate((16, 24, 32))]
RINGS = [None, *(Keyring([key]) for key in KEYS)]
LABELS = ["", "mesh", "ä" * 127]
PING = Ping(7, "b", b"\x7f\0\0\1", 7946, "a")


def refused(codec: PacketCodec, packet: bytes) -> Cause:
    with pytest.raises(WireError) as caught:
        codec.open(packet)
    return caught.value.cause


def test_what_a_serf_agent_sent() -> None:
    plain, keyed = PacketCodec(None), PacketCodec(Keyring([golden.KEY]))
    ping = plain.open(golden.PACKET_PING)
    assert ping == [Ping(1, "kv", b"\x7f\0\0\1", 48539, "a")]
    alive = plain.open(golden.PACKET_CRC)
    assert [type(message) for message in alive] == [Alive, Alive]
    assert [type(message) for message in plain.open(golden.PACKET_COMPRESSED)] == [Ack, Alive, Alive]
    assert [type(message) for message in keyed.open(golden.PACKET_ENCRYPTED)] == [Ack, Alive, Alive]
    assert plain.seal(ping, crc=False) == golden.PACKET_PING
    assert plain.seal(alive, crc=True) == golden.PACKET_CRC
    assert not plain.left_out
    assert refused(keyed, golden.PACKET_PING) is Cause.PLAINTEXT
    assert refused(keyed, golden.PACKET_CRC) is Cause.PLAINTEXT
    assert refused(plain, golden.PACKET_ENCRYPTED) is Cause.ENCRYPTED


@given(
    st.lists(packet_messages, min_size=1, max_size=5),
    st.sampled_from(list(itertools.product(RINGS, LABELS, (False, True)))),
)
def test_what_is_sealed_opens(messages: list[Message], way: tuple[Keyring | None, str, bool]) -> None:
    ring, label, crc = way
    codec = PacketCodec(ring, label)
    packet = codec.seal(messages, crc=crc)
    assert codec.open(packet) == messages
    parts = [len(encode(message)) for message in messages]
    many = COMPOUND_HEADER_BYTES + PART_BYTES * len(parts) if len(parts) > 1 else 0
    assert len(packet) == sum(parts) + many + overhead_bytes(ring is not None, label) - (0 if crc else 5)


@pytest.mark.parametrize("label", ["", "mesh"])
@pytest.mark.parametrize("version", [0, 1])
def test_no_byte_of_an_encrypted_packet_can_be_changed(label: str, version: int) -> None:
    ring = Keyring([KEYS[2], KEYS[0]])
    codec = PacketCodec(ring, label)
    header = codec.seal([PING], crc=True)[: len(label) + 2 if label else 0]
    packet = header + security.seal(ring, encode(PING), label.encode(), version)
    assert codec.open(packet) == [PING]
    causes = set()
    for at in range(len(packet)):
        for bit in range(8):
            changed = bytearray(packet)
            changed[at] ^= 1 << bit
            causes.add(refused(codec, bytes(changed)))
    assert causes <= {Cause.UNDECRYPTABLE, Cause.WRONG_LABEL, Cause.PLAINTEXT, Cause.MALFORMED}
    for ends in range(len(packet)):
        refused(codec, packet[:ends])


def test_keys_and_labels_must_match() -> None:
    ours = PacketCodec(Keyring([KEYS[0]]), "mesh")
    for other, cause in [
        (PacketCodec(Keyring([KEYS[1]]), "mesh"), Cause.UNDECRYPTABLE),
        (PacketCodec(Keyring([KEYS[0]]), "mess"), Cause.WRONG_LABEL),
        (PacketCodec(Keyring([KEYS[0]]), "mesh-a"), Cause.WRONG_LABEL),
        (PacketCodec(Keyring([KEYS[0]])), Cause.WRONG_LABEL),
        (PacketCodec(None, "mesh"), Cause.PLAINTEXT),
    ]:
        assert refused(ours, other.seal([PING], crc=False)) is cause
        assert refused(other, ours.seal([PING], crc=False)) in {cause, Cause.ENCRYPTED}
    assert refused(PacketCodec(None), ours.seal([PING], crc=False)) is Cause.WRONG_LABEL
    with pytest.raises(SettingsError, match="label"):
        PacketCodec(None, "x" * 256)


def test_the_label_is_authenticated() -> None:
    ring = Keyring([KEYS[0]])
    moved = PacketCodec(ring, "mesh").seal([PING], crc=False)[6:]
    assert refused(PacketCodec(ring), moved) is Cause.UNDECRYPTABLE


@pytest.mark.parametrize("number", range(50))
def test_a_node_without_a_key_says_that_others_have_one(number: int) -> None:
    """By chance some ciphertexts begin as a map does."""
    sealed = PacketCodec(Keyring([KEYS[0]])).seal([PING], crc=False)
    sealed = sealed[:1] + bytes([0x80 + number]) + sealed[2:]
    assert refused(PacketCodec(None), sealed) is Cause.ENCRYPTED


def test_a_broken_ping_does_not_look_encrypted() -> None:
    data = encode(PING)
    assert refused(PacketCodec(None), data[:-1]) is Cause.MALFORMED


def test_an_old_key_opens_until_it_is_removed() -> None:
    ours, theirs = Keyring([KEYS[0]]), Keyring([KEYS[0]])
    us, them = PacketCodec(ours), PacketCodec(theirs)
    ours.install(KEYS[2])
    theirs.install(KEYS[2])
    theirs.use(KEYS[2])
    assert us.open(them.seal([PING], crc=False)) == [PING]
    assert them.open(us.seal([PING], crc=False)) == [PING]
    ours.use(KEYS[2])
    theirs.remove(KEYS[0])
    assert them.open(us.seal([PING], crc=False)) == [PING]
    ours.use(KEYS[0])
    assert refused(them, us.seal([PING], crc=False)) is Cause.UNDECRYPTABLE


def test_crc() -> None:
    codec = PacketCodec(None)
    packet = codec.seal([PING], crc=True)
    assert packet[:1] == b"\x0c"
    assert packet[1:5] == struct.pack(">I", zlib.crc32(encode(PING)))
    assert refused(codec, packet[:-1]) is Cause.BAD_CRC
    assert refused(codec, packet[:4]) is Cause.MALFORMED
    assert refused(codec, b"\x0c" + struct.pack(">I", zlib.crc32(packet)) + packet) is Cause.UNKNOWN_KIND
    assert refused(codec, compound.wrap([packet, packet])) is Cause.UNKNOWN_KIND


@pytest.mark.parametrize(
    ("packet", "cause"),
    [
        (b"", Cause.MALFORMED),
        (b"\x07", Cause.MALFORMED),
        (b"\x07\x00", Cause.MALFORMED),
        (b"\x07\x01\x00", Cause.MALFORMED),
        (b"\x07\x01\x00\x02\x08", Cause.MALFORMED),
        (b"\x07\x01\x00\x01\x08\x08", Cause.MALFORMED),
        (b"\x07\x01\x00\x00", Cause.MALFORMED),
        (b"\xf4", Cause.WRONG_LABEL),
        (b"\xf4\x00\x08", Cause.WRONG_LABEL),
        (b"\x0a" + bytes(40), Cause.UNKNOWN_KIND),
        (b"\x09" + bytes(40), Cause.MALFORMED),
        (compressed(b""), Cause.MALFORMED),
        (compressed(b"\x09" + bytes(40)), Cause.MALFORMED),
        (compressed(b"\x08" + bytes(PACKET_BYTES_MAX)), Cause.TOO_LARGE),
        (b"\x08" + bytes(PACKET_BYTES_MAX), Cause.TOO_LARGE),
        (compound.wrap([compound.wrap([b"\x08"] * 128)] * 2), Cause.TOO_LARGE),
    ],
    ids=lambda value: value.hex()[:24] if isinstance(value, bytes) else str(value),
)
def test_what_is_no_packet(packet: bytes, cause: Cause) -> None:
    codec = PacketCodec(None)
    if cause is Cause.TOO_LARGE and packet[0] == 7:
        assert len(codec.open(packet)) == 128
        assert codec.left_out == {cause: 1}
    else:
        assert refused(codec, packet) is cause


def test_wrappings_in_wrappings() -> None:
    codec = PacketCodec(None)
    packet = encode(PING)
    for depth in range(WRAPPINGS_MAX + 1):
        assert codec.open(packet) == [PING], depth
        packet = compressed(packet) if depth % 2 else compound.wrap([packet])
    assert refused(codec, packet) is Cause.TOO_DEEP


def test_what_decompresses_is_bounded_for_the_packet_together() -> None:
    codec = PacketCodec(None)
    third = compressed(encode(User(bytes(PACKET_BYTES_MAX // 3))))
    assert len(codec.open(compound.wrap([third] * 2))) == 2
    assert len(codec.open(compound.wrap([third] * 200))) == 2
    assert codec.left_out == {Cause.TOO_LARGE: 198}


def test_one_bad_message_harms_no_other() -> None:
    codec = PacketCodec(None)
    nameless = encode(Alive(1, "", b"\x7f\0\0\1", 1, b"", b""))
    assert codec.open(compound.wrap([nameless, encode(PING), b"\x63", b"", encode(Nack(1))])) == [PING, Nack(1)]
    assert codec.left_out == {Cause.FIELD: 1, Cause.UNKNOWN_KIND: 1, Cause.MALFORMED: 1}
    assert refused(codec, compound.wrap([nameless, b"\x63"])) is Cause.FIELD
    assert sum(codec.left_out.values()) == 3, "what is refused as a whole is the caller's to count"


def test_a_compound_of_as_many_as_one_can_hold() -> None:
    codec = PacketCodec(None)
    messages: list[Message] = [User(b"")] * PACKET_MESSAGES_MAX
    assert codec.open(codec.seal(messages, crc=True)) == messages


def test_padding() -> None:
    ring = Keyring([KEYS[0]])
    for length in range(33):
        sealed = security.seal(ring, bytes(length), b"", security.VERSION_PADDED)
        assert security.open_sealed(ring, sealed, b"") == bytes(length)
        assert (len(sealed) - security.OVERHEAD_BYTES) % 16 == 0
    for plain in (b"", b"\x00" * 16, b"\x11" * 16, b"\x01" * 15, b"\x01" * 14 + b"\x03\x02"):
        sealed = b"\x00" + security.seal(ring, plain, b"")[1:]
        with pytest.raises(WireError, match="padding"):
            security.open_sealed(ring, sealed, b"")


@given(st.binary(max_size=300), st.sampled_from(RINGS), st.sampled_from(LABELS))
def test_any_bytes_are_messages_or_one_error(packet: bytes, ring: Keyring | None, label: str) -> None:
    codec = PacketCodec(ring, label)
    with contextlib.suppress(WireError):
        assert codec.open(packet)


def test_nonces_do_not_repeat() -> None:
    codec = PacketCodec(Keyring([KEYS[0]]))
    rng = random.Random(1)
    assert len({codec.seal([User(rng.randbytes(1))], crc=False)[1:13] for _ in range(1000)}) == 1000
