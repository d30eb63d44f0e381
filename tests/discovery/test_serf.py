"""Serf's clock and intents. The bytes are those that a Serf agent (0.8.2) sent and took."""

from __future__ import annotations

import contextlib
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmesh.discovery.serf import (
    JOIN,
    LEAVE,
    Intent,
    SerfSide,
    State,
    Word,
    decode_intent,
    decode_state,
    encode_intent,
    encode_state,
    is_serf,
)
from kvmesh.transport.errors import ProtocolError
from kvmesh.transport.limits import LAMPORT_TIME_MAX, SERF_STATE_BYTES_MAX

JOIN_OF_SERF = b"\x01\x82\xa5LTime\x04\xa4Node\xa4ours"
LEAVE_OF_SERF = b"\x00\x83\xa5LTime\x05\xa4Node\xa4ours\xa5Prune\xc2"


def state_of_serf(lamport: int, left: tuple[str, ...] = ()) -> bytes:
    fields = {
        "LTime": lamport, "StatusLTimes": {"s1": 1}, "LeftMembers": list(left), "EventLTime": 2, "QueryLTime": 1,
        "Events": [None, {"LTime": 1, "Events": [{"Name": "deploy", "Payload": b"\xff\xfe"}]}],
    }  # fmt: skip
    return b"\x02" + msgpack.packb(fields, use_bin_type=False)


def test_intents_are_serfs_bytes():
    assert decode_intent(JOIN_OF_SERF) == Intent(JOIN, 4, "ours")
    assert decode_intent(LEAVE_OF_SERF) == Intent(LEAVE, 5, "ours")
    assert encode_intent(Intent(JOIN, 4, "ours")) == JOIN_OF_SERF
    assert encode_intent(Intent(LEAVE, 5, "ours")) == LEAVE_OF_SERF


def test_our_part_of_a_state_travels_beside_serfs():
    assert decode_state(encode_state(7, b"\xff\0heads")) == State(7, (), b"\xff\0heads")
    fields = msgpack.unpackb(encode_state(7, b"heads")[1:])
    assert list(fields) == ["LTime", "StatusLTimes", "LeftMembers", "EventLTime", "Events", "QueryLTime", "Kvmesh"]
    assert decode_state(state_of_serf(7, ("a", "b"))) == State(7, ("a", "b"), b"")
    assert decode_state(b"") == State(0, (), b"")


def test_the_state_of_many_heads_is_in_the_old_spec():
    own = bytes(48 * 4096)
    assert decode_state(encode_state(1, own)).own == own
    assert encode_state(1, own).endswith(b"\xdb" + len(own).to_bytes(4, "big") + own)


def test_a_leave_is_newer_than_all_that_was_heard():
    side = SerfSide("ours")
    assert decode_intent(side.join().payload) == Intent(JOIN, 1, "ours")
    side.merge(state_of_serf(40))
    assert side.lamport == 40
    side.on_message(encode_intent(Intent(JOIN, 50, "s1")))
    leave = side.leave()
    assert leave.node == "ours"
    assert decode_intent(leave.payload) == Intent(LEAVE, 51, "ours")
    assert side.lamport == 52


def test_an_intent_is_told_on_once():
    side = SerfSide("ours")
    leave = encode_intent(Intent(LEAVE, 9, "s1"))
    assert side.on_message(leave) == [Word("s1", leave)]
    assert side.on_message(leave) == []
    assert side.on_message(encode_intent(Intent(JOIN, 8, "s1"))) == []
    back = encode_intent(Intent(JOIN, 10, "s1"))
    assert side.on_message(back) == [Word("s1", back)]


def test_a_leave_of_us_is_refuted_until_we_leave():
    side = SerfSide("ours")
    side.join()
    (word,) = side.on_message(LEAVE_OF_SERF)
    assert decode_intent(word.payload) == Intent(JOIN, 6, "ours")
    own, (word,) = side.merge(state_of_serf(3, ("ours",)))
    assert (own, decode_intent(word.payload)) == (b"", Intent(JOIN, 7, "ours"))
    leave = side.leave()
    assert side.on_message(leave.payload) == []
    assert side.merge(state_of_serf(3, ("ours",))) == (b"", [])


def test_what_is_none_of_ours_to_handle_is_passed_over():
    side = SerfSide("ours")
    for kind in range(2, 10):
        assert side.on_message(bytes([kind]) + b"\x81\xa5LTime\x63") == []
    assert side.lamport == 1
    assert is_serf(b"\x09x")
    assert not is_serf(b"Kx")
    assert not is_serf(b"")


def test_the_names_that_are_remembered_are_bounded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("kvmesh.discovery.serf.SERF_NAMES_MAX", 2)
    side = SerfSide("ours")
    words = [encode_intent(Intent(JOIN, 5, name)) for name in "abc"]
    assert all(side.on_message(word) for word in words)
    assert side.on_message(words[2]) == side.on_message(words[1]) == []
    assert side.on_message(words[0])  # forgotten, so told on once more


def test_a_clock_does_not_overflow():
    side = SerfSide("ours")
    side.on_message(encode_intent(Intent(JOIN, LAMPORT_TIME_MAX, "s1")))
    assert side.lamport == LAMPORT_TIME_MAX
    with pytest.raises(ProtocolError, match="logical time"):
        side.on_message(encode_intent(Intent(JOIN, LAMPORT_TIME_MAX + 1, "s1")))


def packed(fields: Any) -> bytes:
    return msgpack.packb(fields, use_bin_type=False)


@pytest.mark.parametrize(
    "payload",
    [
        b"\x00",
        b"\x01\xc1",
        b"\x01" + packed([1, 2]),
        b"\x01" + packed({"LTime": 1}),
        b"\x01" + packed({"LTime": 1, "Node": ""}),
        b"\x01" + packed({"LTime": 1, "Node": 7}),
        b"\x01" + packed({"LTime": 1, "Node": "n" * 129}),
        b"\x01" + packed({"LTime": 1, "Node": b"\xff"}),
        b"\x01" + packed({"LTime": True, "Node": "n"}),
        b"\x01" + packed({"LTime": -1, "Node": "n"}),
        b"\x01" + packed({"LTime": "1", "Node": "n"}),
        b"\x01" + packed({"Node": "n"}),
        b"\x01" + packed({"LTime": 1, "Node": "n", "More": "m" * 300}),
    ],
)
def test_a_malformed_intent_is_an_error(payload: bytes):
    with pytest.raises(ProtocolError):
        decode_intent(payload)


@pytest.mark.parametrize(
    "data",
    [
        b"\x07" + packed({"LTime": 1}),
        b"\x02",
        b"\x02" + packed({}),
        b"\x02" + packed({"LTime": 1, "Kvmesh": 7}),
        b"\x02" + packed(["LTime", 1]),
        b"\x02" + b"\x91" * 2000,
        bytes([2]) * (SERF_STATE_BYTES_MAX + 1),
    ],
)
def test_a_malformed_state_is_an_error(data: bytes):
    with pytest.raises(ProtocolError):
        decode_state(data)


def test_what_is_not_used_of_a_state_may_be_anything():
    data = b"\x02" + packed(
        {"LTime": 1, "LeftMembers": [1, None, "x", "n" * 999], "Events": "no list", "New": {"a": 1}}
    )
    assert decode_state(data) == State(1, ("x",), b"")
    assert decode_state(b"\x02" + packed({"LTime": 1, "LeftMembers": 4})) == State(1, (), b"")


@given(st.binary(max_size=200).map(lambda data: bytes([data[0] % 4]) + data[1:] if data else data))
def test_any_bytes_are_read_or_one_error(data: bytes):
    side = SerfSide("ours")
    for take in (side.on_message, side.merge):
        with contextlib.suppress(ProtocolError):
            take(data)
