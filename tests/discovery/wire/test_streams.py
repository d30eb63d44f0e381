"""Streams: a message comes whole or in pieces; what is too long, or not of this cluster, is refused early."""

from __future__ import annotations

import itertools

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmesh.discovery.wire import (
    VERSIONS,
    Ack,
    Cause,
    ErrorReply,
    Keyring,
    Message,
    Ping,
    PushedNode,
    PushPull,
    StreamCodec,
    StreamReader,
    User,
    WireError,
    security,
)
from kvmesh.transport.limits import GOSSIP_MAP_BYTES_MAX, PUSHED_NODES_MAX, STREAM_BYTES_MAX

from . import golden
from .support import acks, compressed, pings, push_pulls, users

RING = Keyring([b"k" * 32])
NODE = PushedNode("b", b"\x7f\0\0\1", 7946, b"meta", 3, 0, VERSIONS)
STATE = PushPull(True, (NODE, NODE), b"state")
messages: st.SearchStrategy[Message] = st.one_of(
    push_pulls, pings, acks, users, st.builds(ErrorReply, text=st.text("abc ", max_size=500))
)


def fed(reader: StreamReader, data: bytes, *, piece_bytes: int) -> Message | None:
    """The message, which must not come before the last piece."""
    message = None
    for at in range(0, len(data), piece_bytes):
        assert message is None, "a message came before its last byte"
        message = reader.feed(data[at : at + piece_bytes])
    return message


def refused(codec: StreamCodec, data: bytes, *, answer: bool = True) -> Cause:
    with pytest.raises(WireError) as caught:
        codec.reader(answer=answer).feed(data)
    return caught.value.cause


@pytest.mark.parametrize(
    ("codec", "data"),
    [(StreamCodec(None), golden.STREAM), (StreamCodec(Keyring([golden.KEY])), golden.STREAM_ENCRYPTED)],
    ids=["plain", "encrypted"],
)
@pytest.mark.parametrize("piece_bytes", [1, 7, 1000])
def test_what_a_serf_agent_answered(codec: StreamCodec, data: bytes, piece_bytes: int) -> None:
    state = fed(codec.reader(answer=True), data, piece_bytes=piece_bytes)
    assert isinstance(state, PushPull)
    assert state.join
    assert [(node.name, node.meta, node.state) for node in state.nodes] == [("a", b"\xff\x81\xa4role\xa3web", 0)]
    assert state.user_state[:12] == b"\x02\x86\xaaEventLTim"
    assert not codec.left_out


def test_gos_bytes() -> None:
    plain = StreamCodec(None)
    node = (
        b"\x87\xa4Addr\xa4\x7f\0\0\x01\xabIncarnation\x03\xa4Meta\xa4meta\xa4Name\xa1b\xa4Port\xcd\x1f\x0a\xa5State\x00"
    )
    node += b"\xa3Vsn\xa6\x01\x05\x05\x02\x05\x05"
    header = b"\x06\x83\xa4Join\xc3\xa5Nodes\x02\xacUserStateLen\x05"
    assert plain.seal(STATE, answer=False) == header + node * 2 + b"state"
    assert plain.seal(User(b"abc"), answer=False) == b"\x08\x81\xaaUserMsgLen\x03abc"
    assert plain.seal(ErrorReply("no"), answer=True) == b"\x0d\x81\xa5Error\xa2no"
    assert plain.seal(Ack(1), answer=True) == b"\x02\x82\xa7Payload\xc0\xa5SeqNo\x01"


@given(
    messages,
    st.sampled_from(list(itertools.product((None, RING), ("", "mesh"), (False, True)))),
    st.integers(1, 4000),
)
def test_what_is_sealed_is_read(message: Message, way: tuple[Keyring | None, str, bool], piece_bytes: int) -> None:
    ring, label, answer = way
    codec = StreamCodec(ring, label)
    data = codec.seal(message, answer=answer)
    assert fed(codec.reader(answer=answer), data, piece_bytes=max(piece_bytes, len(data) // 50)) == message


@given(messages, st.integers(1, 4000))
def test_what_is_compressed_is_read(message: Message, piece_bytes: int) -> None:
    plain, keyed = StreamCodec(None), StreamCodec(RING)
    data = compressed(plain.seal(message, answer=True))
    assert fed(plain.reader(answer=True), data, piece_bytes=max(piece_bytes, len(data) // 50)) == message
    header = b"\x0a" + (len(data) + security.OVERHEAD_BYTES).to_bytes(4, "big")
    for version in (0, 1):
        sealed = security.seal(RING, data, header, version)
        header = b"\x0a" + len(sealed).to_bytes(4, "big")
        assert keyed.reader(answer=True).feed(header + security.seal(RING, data, header, version)) == message


def test_the_label_goes_one_way() -> None:
    codec, without = StreamCodec(RING, "mesh"), StreamCodec(RING)
    asked, answered = codec.seal(Ack(1), answer=False), codec.seal(Ack(1), answer=True)
    assert asked[:6] == b"\xf4\x04mesh"
    assert answered[:1] == b"\x0a"
    assert refused(codec, answered, answer=False) is Cause.WRONG_LABEL
    assert refused(without, asked, answer=False) is Cause.WRONG_LABEL
    assert refused(without, answered) is Cause.UNDECRYPTABLE, "the answer's label is authenticated all the same"
    assert refused(StreamCodec(RING, "meshes"), asked, answer=False) is Cause.WRONG_LABEL
    assert refused(StreamCodec(RING, "mush"), b"\xf4\x04me", answer=False) is Cause.WRONG_LABEL


def test_keys_must_match() -> None:
    plain, keyed, other = StreamCodec(None), StreamCodec(RING), StreamCodec(Keyring([b"o" * 16]))
    assert refused(keyed, plain.seal(Ack(1), answer=True)) is Cause.PLAINTEXT
    assert refused(plain, keyed.seal(Ack(1), answer=True)) is Cause.ENCRYPTED
    assert refused(other, keyed.seal(Ack(1), answer=True)) is Cause.UNDECRYPTABLE


def test_no_byte_of_an_encrypted_stream_can_be_changed() -> None:
    codec = StreamCodec(RING, "mesh")
    data = codec.seal(Ping(7, "b"), answer=False)
    for at in range(len(data)):
        changed = bytearray(data)
        changed[at] ^= 1
        try:
            assert codec.reader(answer=False).feed(bytes(changed)) is None
        except WireError:
            continue
        assert 7 <= at < 11, "only a longer length makes a reader wait for more"


def header(**fields: object) -> bytes:
    return msgpack.packb(fields, use_bin_type=False)


PLAIN_NODE = StreamCodec(None).seal(PushPull(False, (NODE,)), answer=True)[
    len(b"\x06" + header(Join=False, Nodes=1, UserStateLen=0)) :
]


@pytest.mark.parametrize(
    ("data", "cause"),
    [
        (b"\x06\x80" + bytes(0), None),
        (b"\x06\xc0", Cause.MALFORMED),
        (b"\x06" + header(Nodes=-1), Cause.FIELD),
        (b"\x06" + header(Nodes=1 << 40), Cause.FIELD),
        (b"\x06" + header(Nodes=PUSHED_NODES_MAX + 1), Cause.TOO_LARGE),
        (b"\x06" + header(Nodes=0, UserStateLen=STREAM_BYTES_MAX + 1), Cause.TOO_LARGE),
        (b"\x06" + header(Nodes=0, UserStateLen=b"1"), Cause.FIELD),
        (b"\x06" + header(Nodes=0, Join=1), Cause.FIELD),
        (b"\x06" + header(Nodes=1) + b"\x01", Cause.MALFORMED),
        (b"\x06" + header(Nodes=1) + b"\x81\xa1x\xd4\x05a", Cause.MALFORMED),
        (b"\x06" + header(Nodes=1) + b"\x82\xa1x" + header(y=b"x" * 2000) * 4, Cause.MALFORMED),
        (b"\x06" + header(Nodes=1, x=[b"x" * 1000] * 5), Cause.TOO_LARGE),
        (b"\x06" + b"\x81\xa1a" * 3000, Cause.MALFORMED),
        (b"\x06" + header(Nodes=1) + b"\x81\xa1x\xdc\x00\x20" + b"\xda\x0f\xff" * 2000, Cause.TOO_LARGE),
        (b"\x08" + header(UserMsgLen=STREAM_BYTES_MAX + 1), Cause.FIELD),
        (b"\x08" + header(UserMsgLen=True), Cause.FIELD),
        (b"\x0a" + (STREAM_BYTES_MAX + 1).to_bytes(4, "big"), Cause.ENCRYPTED),
        (b"\x09\x82\xa4Algo\x00\xa3Buf\xdb\xff\xff\xff\xff", Cause.TOO_LARGE),
        (b"\x09\x82\xa4Algo\x07", Cause.COMPRESSION),
        (compressed(b""), Cause.MALFORMED),
        (compressed(b"\x02"), Cause.MALFORMED),
        (compressed(b"\x02" + header(SeqNo=1) + b"x"), Cause.MALFORMED),
        (compressed(compressed(b"\x02" + header(SeqNo=1))), Cause.UNKNOWN_KIND),
        (compressed(bytes(STREAM_BYTES_MAX + 1)), Cause.TOO_LARGE),
        *((bytes([kind]), Cause.UNKNOWN_KIND) for kind in (1, 3, 4, 5, 7, 11, 12, 14, 255)),
    ],
    ids=lambda value: value.hex()[:24] if isinstance(value, bytes) else str(value),
)
def test_what_is_no_stream(data: bytes, cause: Cause | None) -> None:
    if cause is None:
        assert StreamCodec(None).reader(answer=True).feed(data) == PushPull(False, ())
    else:
        assert refused(StreamCodec(None), data) is cause


def test_lengths_are_refused_before_the_bytes_come() -> None:
    assert refused(StreamCodec(RING), b"\x0a" + (STREAM_BYTES_MAX + 1).to_bytes(4, "big")) is Cause.TOO_LARGE


def test_a_map_that_never_ends_is_refused_early() -> None:
    data = b"\x81\xa1x\xdc\x00\x20" + (b"\xda\x03\xe8" + bytes(1000)) * 32
    reader = StreamCodec(None).reader(answer=True)
    reader.feed(b"\x06" + header(Nodes=1))
    for at in range(GOSSIP_MAP_BYTES_MAX):
        assert reader.feed(data[at : at + 1]) is None
    with pytest.raises(WireError) as caught:
        reader.feed(b"\x00")
    assert caught.value.cause is Cause.TOO_LARGE
    assert reader.feed(b"\x00") is None, "there is nothing more to read"


def test_a_strange_node_is_left_out() -> None:
    codec = StreamCodec(None)
    strange = [
        {"Name": "", "Addr": b"\x7f\0\0\1", "Port": 1, "Incarnation": 1},
        {"Name": "x", "Addr": b"\x7f\0\0\1", "Port": 0, "Incarnation": 1},
        {"Name": "x", "Addr": b"\x7f\0\0\1", "Port": 1, "Incarnation": 1, "State": 4},
        {"Name": "x" * 200, "Addr": b"\x7f\0\0\1", "Port": 1, "Incarnation": 1},
    ]
    data = b"\x06" + header(Nodes=5, UserStateLen=2) + PLAIN_NODE + b"".join(header(**node) for node in strange) + b"ab"
    assert codec.reader(answer=True).feed(data) == PushPull(False, (NODE,), b"ab")
    assert codec.left_out == {Cause.FIELD: 4}


def test_words_of_a_peer_are_made_fit_to_be_shown() -> None:
    codec = StreamCodec(None)
    text = b"bad \x1b[2J\n" + b"\xff" + b"x" * 2000
    shown = codec.reader(answer=True).feed(b"\x0d" + header(Error=text))
    assert isinstance(shown, ErrorReply)
    assert shown.text.startswith("bad ?[2J?\ufffdxxx")
    assert len(shown.text) == 512


def test_what_comes_behind_the_message_is_not_looked_at() -> None:
    codec = StreamCodec(RING)
    assert codec.reader(answer=True).feed(codec.seal(STATE, answer=True) + b"more") == STATE
    assert StreamCodec(None).reader(answer=True).feed(StreamCodec(None).seal(STATE, answer=True) + b"more") == STATE


@pytest.mark.slow  # a few MiB, in small pieces
@pytest.mark.parametrize("ring", [None, RING], ids=["plain", "encrypted"])
def test_a_large_state_is_read_once(ring: Keyring | None) -> None:
    nodes = tuple(PushedNode(f"node-{number}", b"\x7f\0\0\1", 1, b"m" * 400, 1, 0, VERSIONS) for number in range(4096))
    state = PushPull(False, nodes, bytes(2 << 20))
    codec = StreamCodec(ring)
    data = codec.seal(state, answer=True)
    assert len(data) > 3 << 20
    assert fed(codec.reader(answer=True), data, piece_bytes=100) == state
