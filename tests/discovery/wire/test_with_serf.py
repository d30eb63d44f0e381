"""The wire against a real ``serf agent``: it reads what we write, and we read what it writes, compressed and encrypted.

Sockets are handled by hand here, so that nothing but the wire is tested. `tests/interop` has whole nodes.
"""

from __future__ import annotations

import random
import socket
from pathlib import Path

import pytest

from kvmesh.discovery.wire import (
    VERSIONS,
    Ack,
    Alive,
    Cause,
    Keyring,
    Message,
    PacketCodec,
    Ping,
    PushedNode,
    PushPull,
    StreamCodec,
    WireError,
    generate,
    to_text,
)
from tests.support.serf import SerfAgent, installed
from tests.support.waiting import wait_until

pytestmark = [
    pytest.mark.skipif(not installed(), reason="serf is not installed"),
    pytest.mark.slow,  # starts an agent of Serf, and waits for it
    pytest.mark.cluster,
]
HOST = "127.0.0.1"
IP = socket.inet_aton(HOST)
TIMEOUT_S = 10.0
NODES = 150
"""With incompressible metas: their state fills the table of LZW several times over."""


def exchanged(serf: SerfAgent, codec: StreamCodec, state: PushPull) -> Message | None:
    """What it answers to our state; nothing when it closes the stream."""
    host, port = serf.address.split(":")
    with socket.create_connection((host, int(port)), TIMEOUT_S) as stream:
        stream.sendall(codec.seal(state, answer=False))
        reader = codec.reader(answer=True)
        while data := stream.recv(1000):
            if (message := reader.feed(data)) is not None:
                return message
    return None


def pushed(name: str, port: int, meta: bytes = b"") -> PushedNode:
    return PushedNode(name, IP, port, meta, 1, 0, VERSIONS)


@pytest.mark.parametrize("encrypted", [False, True], ids=["plain", "encrypted"])
def test_a_serf_agent_understands_and_is_understood(encrypted: bool, tmp_path: Path) -> None:
    ring = Keyring([generate()]) if encrypted else None
    packets, streams = PacketCodec(ring), StreamCodec(ring)
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as ours,
        SerfAgent("a", tmp_path, key="" if ring is None else to_text(ring.primary)) as serf,
    ):
        ours.bind((HOST, 0))
        ours.settimeout(TIMEOUT_S)
        port = ours.getsockname()[1]

        answer = exchanged(serf, streams, PushPull(True, (pushed("kv", port),)))
        assert isinstance(answer, PushPull)
        assert [node.name for node in answer.nodes] == ["a"]
        assert answer.user_state
        wait_until(lambda: serf.states() == {"a": "alive", "kv": "alive"}, TIMEOUT_S, "serf lists us")

        ours.sendto(packets.seal([Ping(77, "a", IP, port, "kv")], crc=True), (HOST, int(serf.address.split(":")[1])))
        came: list[Message] = []
        while not any(isinstance(message, Ack) and message.seq == 77 for message in came):
            came += packets.open(ours.recv(65_536))
        assert any(isinstance(message, Alive) and message.node == "kv" for message in came)

        rng = random.Random(1)
        many = {f"node-{number}": rng.randbytes(400) for number in range(NODES)}
        exchanged(serf, streams, PushPull(False, tuple(pushed(name, port, meta) for name, meta in many.items())))
        wait_until(lambda: len(serf.states()) == NODES + 2, TIMEOUT_S, "serf lists them all")
        answer = exchanged(serf, streams, PushPull(False, (pushed("kv", port),)))
        assert isinstance(answer, PushPull)
        assert {node.name: node.meta for node in answer.nodes if node.name in many} == many

        assert not packets.left_out
        assert not streams.left_out


def test_a_serf_agent_with_another_key(tmp_path: Path) -> None:
    with SerfAgent("a", tmp_path, key=to_text(generate())) as serf:
        for ring, cause in ((Keyring([generate()]), Cause.UNDECRYPTABLE), (None, Cause.ENCRYPTED)):
            with pytest.raises(WireError) as caught:
                exchanged(serf, StreamCodec(ring), PushPull(True, (pushed("kv", 1),)))
            assert caught.value.cause is cause
        assert list(serf.states()) == ["a"]
        assert serf.says("failed to receive") == 2
