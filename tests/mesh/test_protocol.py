"""The client's protocol: what it says arrives, what does not follow it is refused."""

import contextlib

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmesh import protocol as p
from kvmesh import spaces
from kvmesh.keys import Namespace, TensorSpec
from kvmesh.transport.errors import CallerError, ChunkTooLargeError, KVMeshError, NamespaceError, ProtocolError
from kvmesh.transport.limits import (
    AGENT_FRAME_BYTES_MAX,
    AGENT_PROTOCOL_VERSION,
    CHAIN_CHUNKS_MAX,
    RENEWALS_PER_MESSAGE_MAX,
)

REQUESTS: list[p.Message] = [
    p.Hello(0, 1, 42),
    p.OpenSpace(1, b"{}"),
    p.Reserve(2, b"s" * 16, b"k" * 32),
    p.Commit(3, b"k" * 32, b"c" * 8, True, None),
    p.Commit(3, b"k" * 32, b"c" * 8, False, 1.5),
    p.Abandon(0, b""),
    p.Get(4, b"s" * 16, b"k" * 64, 0.5, 30.0),
    p.Get(4, b"s" * 16, b"k" * 64, 0.5, 30.0, 1000.0, (0, 8, 16, 2)),
    p.Release(0, 4, [1, 2]),
    p.Renew(9, [(0, 4)]),
    p.Suspect(0, b"k" * 32),
    p.Prefetch(5, b"s" * 16, b"", 1.0),
    p.Pin(6, b"", True),
    p.Delete(7, b""),
    p.Query(8, b"x"),
]
REPLIES: list[p.Message] = [
    p.Welcome(0, 1, "n", 9, 4096, 3),
    p.Opened(1, ["note"]),
    p.Reserved(2, [0, -1]),
    p.Counted(3, 4),
    p.Progress(4, [1], b"c" * 8, True, 1, 2, "complete"),
    p.Progress(4, [1], b"c" * 8, False, wholes=[1]),
    p.Renewed(9, [True, False]),
    p.Answer(5, b"{}"),
    p.Failed(6, "CallerError", "no"),
]


@pytest.mark.parametrize("message", REQUESTS)
def test_requests_arrive_as_they_were(message: p.Message) -> None:
    (body,) = p.FrameReader().feed(p.frame(message))
    assert p.decode_request(body) == message


@pytest.mark.parametrize("message", REPLIES)
def test_replies_arrive_as_they_were(message: p.Message) -> None:
    (body,) = p.FrameReader().feed(p.frame(message))
    assert p.decode_reply(body) == message


@given(st.lists(st.integers(1, 40), min_size=1, max_size=30))
def test_frames_come_whole_however_the_stream_is_cut(cuts: list[int]) -> None:
    stream = b"".join(p.frame(message) for message in REQUESTS)
    reader, bodies, at = p.FrameReader(), [], 0
    for cut in [*cuts, len(stream)]:
        bodies += reader.feed(stream[at : at + cut])
        at += cut
    assert [p.decode_request(body) for body in bodies] == REQUESTS


def test_a_frame_beyond_the_bound_is_refused_before_it_is_read() -> None:
    length = AGENT_FRAME_BYTES_MAX + 1
    for body in (b"", bytes(length)):  # the second one has come whole
        with pytest.raises(ProtocolError, match="larger than"):
            list(p.FrameReader().feed(p.LENGTH.pack(length) + body))
    with pytest.raises(CallerError, match="fewer chunks"):
        p.frame(p.OpenSpace(1, bytes(AGENT_FRAME_BYTES_MAX)))


@given(st.binary(max_size=60))
def test_anything_else_is_a_protocol_error(body: bytes) -> None:
    for decode in (p.decode_request, p.decode_reply):
        with contextlib.suppress(ProtocolError):
            decode(body)


@pytest.mark.parametrize(
    "body",
    [
        msgspec.msgpack.encode(["hello", 0, 1, 2, 3]),  # a field too many
        msgspec.msgpack.encode(["nonsense", 0]),
        msgspec.msgpack.encode(["get", 0, b"s", b"k", "soon"]),
        msgspec.msgpack.encode(["pin", 0, msgspec.msgpack.Ext(5, b"x"), True]),
        b"\x91" * 100_000,
    ],
)
def test_closed_types(body: bytes) -> None:
    with pytest.raises(ProtocolError, match="does not follow the protocol"):
        p.decode_request(body)


def test_any_two_versions_can_refuse_each_other() -> None:
    later = msgspec.msgpack.encode(["hello", 0, AGENT_PROTOCOL_VERSION + 7, "new field", {"and": "more"}])
    assert p.hello_version(later) == AGENT_PROTOCOL_VERSION + 7
    assert "where the agent runs" in p.version_refusal(AGENT_PROTOCOL_VERSION + 7, "n")
    assert "where the client runs" in p.version_refusal(AGENT_PROTOCOL_VERSION - 1, "n")
    for body in (b"", b"\xff", msgspec.msgpack.encode(["get", 1, 2]), msgspec.msgpack.encode(["hello", 1])):
        with pytest.raises(ProtocolError, match="hello"):
            p.hello_version(body)


def test_errors_cross_the_socket_as_what_they_are() -> None:
    for error in (NamespaceError("a"), ChunkTooLargeError("b"), CallerError("c"), ProtocolError("d")):
        raised = p.raised(p.failure(1, error))
        assert (type(raised), str(raised)) == (type(error), str(error))
    assert type(p.raised(p.Failed(1, "SystemExit", "x"))) is KVMeshError


def test_keys_and_checksums_as_blobs() -> None:
    keys = [bytes([n]) * 32 for n in range(3)]
    assert p.unpack_keys(p.pack_keys(keys)) == keys
    assert p.unpack_checksums(p.pack_checksums([0, 2**64 - 1]), 2) == [0, 2**64 - 1]
    for wrong in ([b"short"], [b"x" * 31, b"x" * 33]):
        with pytest.raises(CallerError, match="32 bytes"):
            p.pack_keys(wrong)
    with pytest.raises(CallerError, match="too many"):
        p.pack_keys([b"k" * 32] * (CHAIN_CHUNKS_MAX + 1))
    for blob in (b"x" * 33, bytes(32 * (CHAIN_CHUNKS_MAX + 1))):
        with pytest.raises(ProtocolError, match="keys of 32 bytes"):
            p.unpack_keys(blob)
    with pytest.raises(ProtocolError, match="checksums"):
        p.unpack_checksums(b"x" * 8, 2)


def test_a_namespace_crosses_as_json() -> None:
    space = Namespace(
        model="m", revision="r", dtype="bfloat16", layers=2, kv_heads=1, head_dim=8, layout="opaque", chunk_tokens=32,
        shard=(1, 4), tenant="t", tensors={"b": TensorSpec("uint8", (7,)), "a": TensorSpec("float32", (2, 3))},
    )  # fmt: skip
    assert spaces.decode(spaces.encode(space)) == space
    assert spaces.decode(spaces.encode(space)).digest == space.digest


@pytest.mark.parametrize(
    ("document", "named"),
    [
        (b"{}", "model"),
        (b'{"model": 5}', "model"),
        (b'{"modle": "m"}', "modle"),
        (b"[", "not usable"),
        (b'{"model":"m","revision":"","dtype":"float12","layers":1,"kv_heads":1,"head_dim":1}', "float12"),
        (b'{"model":"m","revision":"","dtype":"int8","layers":0,"kv_heads":1,"head_dim":1}', "layers"),
    ],
)
def test_a_wrong_namespace_is_refused_by_the_fields_name(document: bytes, named: str) -> None:
    with pytest.raises(NamespaceError, match=named):
        spaces.decode(document)


def test_one_message_renews_no_more_than_it_may() -> None:
    (body,) = p.FrameReader().feed(p.frame(p.Renew(1, [(0, 0)] * (RENEWALS_PER_MESSAGE_MAX + 1))))
    with pytest.raises(ProtocolError):
        p.decode_request(body)
