"""Messages as bytes: Go's very bytes, whatever Go of any age may send, and one error for everything else."""

from __future__ import annotations

from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmesh.discovery.wire import (
    VERSIONS,
    Ack,
    Alive,
    Cause,
    Dead,
    ErrorReply,
    IndirectPing,
    Kind,
    Message,
    Nack,
    Ping,
    Suspect,
    User,
    WireError,
    decode,
    encode,
)
from kvmesh.transport.errors import ProtocolError
from kvmesh.transport.limits import ACK_PAYLOAD_BYTES_MAX, GOSSIP_FIELDS_MAX, GOSSIP_MAP_BYTES_MAX, NAME_BYTES_MAX

from .support import packet_messages

IP = b"\x7f\x00\x00\x01"

GOLDEN: list[tuple[Message, bytes]] = [
    (Ping(7, "b"), b"\x00\x82\xa4Node\xa1b\xa5SeqNo\x07"),
    (
        Ping(300, "b", IP, 7946, "a"),
        b"\x00\x85\xa4Node\xa1b\xa5SeqNo\xcd\x01\x2c\xaaSourceAddr\xa4\x7f\0\0\x01\xaaSourceNode\xa1a\xaaSourcePort\xcd\x1f\x0a",
    ),
    (
        IndirectPing(1, IP, 80, "c", nack=True, source_node="a"),
        b"\x01\x86\xa4Nack\xc3\xa4Node\xa1c\xa4PortP\xa5SeqNo\x01\xaaSourceNode\xa1a\xa6Target\xa4\x7f\0\0\x01",
    ),
    (Ack(70_000), b"\x02\x82\xa7Payload\xc0\xa5SeqNo\xce\x00\x01\x11\x70"),
    (Ack(1, b"x" * 40), b"\x02\x82\xa7Payload\xda\x00\x28" + b"x" * 40 + b"\xa5SeqNo\x01"),
    (Nack(255), b"\x0b\x81\xa5SeqNo\xcc\xff"),
    (Suspect(2, "b", "a"), b"\x03\x83\xa4From\xa1a\xabIncarnation\x02\xa4Node\xa1b"),
    (Dead(2, "b", "b"), b"\x05\x83\xa4From\xa1b\xabIncarnation\x02\xa4Node\xa1b"),
    (
        Alive(1, "b", IP, 7946, b"", VERSIONS),
        b"\x04\x86\xa4Addr\xa4\x7f\0\0\x01\xabIncarnation\x01\xa4Meta\xc0\xa4Node\xa1b\xa4Port\xcd\x1f\x0a"
        b"\xa3Vsn\xa6\x01\x05\x05\x02\x05\x05",
    ),
    (User(b"\xff\x00anything"), b"\x08\xff\x00anything"),
    (User(b""), b"\x08"),
]


@pytest.mark.parametrize(("message", "data"), GOLDEN, ids=lambda value: type(value).__name__)
def test_gos_bytes(message: Message, data: bytes) -> None:
    assert encode(message) == data
    assert decode(data) == message


def test_an_error_goes_out_cut_to_its_bound() -> None:
    assert encode(ErrorReply("no")) == b"\x0d\x81\xa5Error\xa2no"
    assert len(encode(ErrorReply("x" * 10_000))) < 600


@given(packet_messages)
def test_what_goes_out_comes_back(message: Message) -> None:
    assert decode(encode(message)) == message


def raw(kind: Kind, **fields: Any) -> bytes:
    return bytes([kind]) + msgpack.packb(fields, use_bin_type=False)


PING: dict[str, Any] = {"SeqNo": 7, "Node": "b"}
ALIVE: dict[str, Any] = {"Incarnation": 1, "Node": "b", "Addr": IP, "Port": 1, "Meta": b"m", "Vsn": VERSIONS}
ALIVE_READ = Alive(1, "b", IP, 1, b"m", VERSIONS)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        pytest.param(bytes([0]) + msgpack.packb(PING), Ping(7, "b"), id="str of today's Go"),
        pytest.param(bytes([4]) + msgpack.packb(ALIVE, use_bin_type=True), ALIVE_READ, id="bin of today's Go"),
        pytest.param(
            b"\x00\x82\xd9\x05SeqNo\xd1\x00\x07\xda\x00\x04Node\xd9\x01b", Ping(7, "b"), id="long forms, signed number"
        ),
        pytest.param(raw(Kind.PING, SeqNo=7), Ping(7, ""), id="ping for whoever is there"),
        pytest.param(raw(Kind.PING, **PING, SourceAddr=None, SourcePort=None), Ping(7, "b"), id="nil"),
        pytest.param(raw(Kind.PING, **PING, SourceAddr=b""), Ping(7, "b"), id="empty address"),
        pytest.param(raw(Kind.PING, **PING, More=[{"x": [1.5, None]}], Other={"a": b"b"}), Ping(7, "b"), id="unknown"),
        pytest.param(
            raw(Kind.INDIRECT_PING, **PING, Target=IP, Port=9), IndirectPing(7, IP, 9, "b"), id="peer without nack"
        ),
        pytest.param(
            raw(Kind.INDIRECT_PING, **PING, Target=IP, Port=9, Nack=None), IndirectPing(7, IP, 9, "b"), id="nil flag"
        ),
        pytest.param(raw(Kind.ALIVE, **ALIVE | {"Vsn": VERSIONS + b"\x07"}), ALIVE_READ, id="more versions"),
        pytest.param(raw(Kind.ALIVE, **ALIVE | {"Vsn": None}), Alive(1, "b", IP, 1, b"m", b""), id="no versions"),
        pytest.param(raw(Kind.DEAD, Incarnation=0, Node="é"), Dead(0, "é", ""), id="nobody accuses"),
    ],
)
def test_what_other_ages_of_go_send(data: bytes, message: Message) -> None:
    assert decode(data) == message


@pytest.mark.parametrize(
    ("changes", "kind", "fields"),
    [
        ({"SeqNo": None}, Kind.PING, PING),
        ({"SeqNo": -1}, Kind.PING, PING),
        ({"SeqNo": 1 << 32}, Kind.PING, PING),
        ({"SeqNo": 1.0}, Kind.PING, PING),
        ({"SeqNo": True}, Kind.PING, PING),
        ({"SeqNo": "7"}, Kind.PING, PING),
        ({"Node": 7}, Kind.PING, PING),
        ({"Node": b"\xff"}, Kind.PING, PING),
        ({"Node": "x" * (NAME_BYTES_MAX + 1)}, Kind.PING, PING),
        ({"Node": "a\nb"}, Kind.PING, PING),
        ({"Node": "a\x1b[2J"}, Kind.PING, PING),
        ({"Node": "a\u202eb"}, Kind.PING, PING),
        ({"SourceAddr": b"123"}, Kind.PING, PING),
        ({"SourceAddr": 5}, Kind.PING, PING),
        ({"SourcePort": 1 << 16}, Kind.PING, PING),
        ({"Nack": 1}, Kind.INDIRECT_PING, PING | {"Target": IP, "Port": 1}),
        ({"Target": b""}, Kind.INDIRECT_PING, PING | {"Target": IP, "Port": 1}),
        ({"Port": 0}, Kind.INDIRECT_PING, PING | {"Target": IP, "Port": 1}),
        ({"Payload": b"x" * (ACK_PAYLOAD_BYTES_MAX + 1)}, Kind.ACK, PING),
        ({"Node": ""}, Kind.ALIVE, ALIVE),
        ({"Addr": None}, Kind.ALIVE, ALIVE),
        ({"Addr": b"12345"}, Kind.ALIVE, ALIVE),
        ({"Port": 0}, Kind.ALIVE, ALIVE),
        ({"Port": 1 << 16}, Kind.ALIVE, ALIVE),
        ({"Meta": b"x" * 513}, Kind.ALIVE, ALIVE),
        ({"Meta": [1]}, Kind.ALIVE, ALIVE),
        ({"Vsn": b"12345"}, Kind.ALIVE, ALIVE),
        ({"Vsn": bytes(GOSSIP_FIELDS_MAX + 1)}, Kind.ALIVE, ALIVE),
        ({"Node": None}, Kind.DEAD, {"Incarnation": 1}),
        ({"Incarnation": None}, Kind.SUSPECT, ALIVE),
    ],
)
def test_a_value_out_of_its_bounds(changes: dict[str, Any], kind: Kind, fields: dict[str, Any]) -> None:
    with pytest.raises(WireError) as caught:
        decode(raw(kind, **fields | changes))
    assert caught.value.cause is Cause.FIELD
    assert next(iter(changes)) in str(caught.value)


@pytest.mark.parametrize(
    ("data", "cause"),
    [
        (b"", Cause.MALFORMED),
        (b"\x00", Cause.MALFORMED),
        (b"\x00\xc0", Cause.MALFORMED),
        (b"\x00\x82\xa5SeqNo\x07", Cause.MALFORMED),
        (GOLDEN[0][1] + b"\x00", Cause.MALFORMED),
        (b"\x00\x81\xa5SeqNo\xc1", Cause.MALFORMED),
        (b"\x00\x81\x05\x07", Cause.MALFORMED),
        (b"\x00\x82\xa5SeqNo\x07\xa1x\xd4\x05a", Cause.MALFORMED),
        (b"\x00\x82\xa5SeqNo\x07\xa1x\xc7\x00\xff", Cause.MALFORMED),
        (b"\x00\x82\xa5SeqNo\x07\xa1x\xc7\x00\x05", Cause.MALFORMED),
        (b"\x00\x82\xa5SeqNo\x07\xa1x\xd6\xff\0\0\0\0", Cause.MALFORMED),
        (b"\x00\xdf\xff\xff\xff\xff", Cause.MALFORMED),
        (b"\x00\x81\xa1x\xdd\xff\xff\xff\xff", Cause.MALFORMED),
        (b"\x00\x81\xa1x\xdb\xff\xff\xff\xff", Cause.MALFORMED),
        (b"\x00\x81\xa1x" + b"\x91" * 4000, Cause.MALFORMED),
        (raw(Kind.PING, **{f"x{number}": 1 for number in range(GOSSIP_FIELDS_MAX + 1)}), Cause.MALFORMED),
        (raw(Kind.PING, **PING, x=[b"y" * 1000] * 5), Cause.TOO_LARGE),
        (bytes(GOSSIP_MAP_BYTES_MAX + 2), Cause.TOO_LARGE),
        *((bytes([kind]) + b"\x80", Cause.UNKNOWN_KIND) for kind in (6, 7, 9, 10, 12, 13, 14, 244, 255)),
    ],
    ids=lambda value: value.hex()[:24] if isinstance(value, bytes) else str(value),
)
def test_what_is_no_message(data: bytes, cause: Cause) -> None:
    with pytest.raises(WireError) as caught:
        decode(data)
    assert caught.value.cause is cause
    assert str(caught.value)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_message_or_one_error(data: bytes) -> None:
    try:
        message = decode(data)
    except ProtocolError:
        return
    assert decode(encode(message)) == message
