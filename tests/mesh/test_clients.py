"""Clients: threads, asyncio, agents that go away, other versions, and clients that break the protocol."""

from __future__ import annotations

import asyncio
import socket
import threading
from pathlib import Path

import msgspec
import pytest
import torch

import kvmesh
from kvmesh import aio, protocol
from kvmesh.spaces import differences
from kvmesh.transport.limits import AGENT_PROTOCOL_VERSION
from tests.support.agents import LocalAgents
from tests.support.chunks import SPACE, chain_of, leases, pair, put, tensor


def test_the_mesh_is_thread_safe(agents: LocalAgents) -> None:
    a = agents.start("a")
    mesh = agents.mesh("a")
    wrong = []

    def work(number: int) -> None:
        chain = chain_of(SPACE, 4, first=number * 100)
        for _ in range(10):
            mesh.put(SPACE, {key: tensor(SPACE, number * 10 + i) for i, key in enumerate(chain)})
            with mesh.get(SPACE, chain) as hit:
                if not all(torch.equal(got, tensor(SPACE, number * 10 + i)) for i, got in enumerate(hit)):
                    wrong.append(number)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert agents.do(a.store.stats).chunks == 96
    agents.wait_for(lambda: a.store.stats().leases == 0)
    assert a.listener.clients <= 16


def test_the_asyncio_client_does_the_same(agents: LocalAgents) -> None:
    a, b = pair(agents)
    chain = chain_of(SPACE, 3)

    async def use() -> None:
        async with await aio.connect(agents.directory / "a.sock") as mesh:
            values = {key: tensor(SPACE, i) for i, key in enumerate(chain)}
            assert (await mesh.put(SPACE, values)).stored == 3
            async with mesh.get(SPACE, chain) as hit:
                assert [torch.equal(view, values[key]) for view, key in zip(hit, chain, strict=True)] == [True] * 3
            assert await mesh.pin(chain) == 3
            assert await mesh.unpin(chain) == 3
            assert await mesh.prefetch(SPACE, chain) == 0
            assert (await mesh.locate(chain))["chunks"] == 3
            assert len((await mesh.nodes())["nodes"]) == 2
            assert (await mesh.map())["entries"] >= 3
            assert (await mesh.stats())["node"] == "a"
            assert await mesh.delete(chain) == 3
        with pytest.raises(kvmesh.AgentUnavailableError):
            await aio.connect(agents.directory / "nobody.sock")

    asyncio.run(use())
    agents.wait_for(lambda: a.store.stats().leases == 0)
    del b


def test_a_cancelled_asyncio_get_keeps_no_lease(agents: LocalAgents) -> None:
    _, b = pair(agents)
    chain = chain_of(SPACE, 3)
    put(agents.mesh("a"), SPACE, chain)
    agents.wait(b, lambda: b.node.discovery.map.has("a", chain[-1]))
    agents.do(lambda: agents.network.stall("a"))

    async def use() -> None:
        async with await aio.connect(agents.directory / "b.sock") as mesh:

            async def get() -> None:
                async with mesh.get(SPACE, chain, deadline_s=0.2):
                    raise AssertionError("the holder is stalled")

            task = asyncio.create_task(get())
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(use())
    agents.do(lambda: agents.network.resume("a"))
    agents.wait_for(lambda: b.store.stats().leases == 0 and b.store.stats().reserved_chunks == 0)


def test_there_is_no_agent(tmp_path: Path) -> None:
    with pytest.raises(kvmesh.AgentUnavailableError, match=r"no agent socket at .*start `kvmesh agent`"):
        kvmesh.connect(tmp_path / "nobody.sock")
    (tmp_path / "file").write_text("x")
    with pytest.raises(kvmesh.AgentUnavailableError, match="no agent answers"):
        kvmesh.connect(tmp_path / "file")


def test_an_agent_that_goes_away_and_comes_back(agents: LocalAgents) -> None:
    agents.start("a")
    mesh = agents.mesh("a")
    chain = chain_of(SPACE, 1)
    put(mesh, SPACE, chain)
    agents.stop("a")
    with pytest.raises(kvmesh.AgentUnavailableError, match="kvmesh agent"):
        mesh.get(SPACE, chain)
    agents.start("a")
    with mesh.get(SPACE, chain) as hit:
        assert hit.count == 0
    put(mesh, SPACE, chain)
    with mesh.get(SPACE, chain) as hit:
        assert torch.equal(hit[0], tensor(SPACE, 0))


@pytest.mark.parametrize("ends", ["in order", "at once"])
def test_an_agent_that_goes_away_under_a_waiting_hit(agents: LocalAgents, ends: str) -> None:
    _, b = pair(agents)
    chain = chain_of(SPACE, 1)
    put(agents.mesh("a"), SPACE, chain)
    agents.wait(b, lambda: b.node.discovery.map.has("a", chain[-1]))
    agents.do(lambda: agents.network.stall("a"))
    hit = agents.mesh("b").get(SPACE, chain, deadline_s=30)
    if ends == "in order":
        agents.wait_for(lambda: b.fetcher.stats()["flights"] == 1)
        agents.stop("b")
        assert (hit.count, hit.reason) == (0, "miss"), "its fetches end before its clients do"
    else:
        agents.wait_for(lambda: b.listener.clients > 0)
        agents.do(lambda: [session.close() for session in list(b.listener._sessions)])
        for _ in range(2):
            with pytest.raises(kvmesh.AgentUnavailableError):
                hit.count  # noqa: B018
    hit.close()
    agents.do(lambda: agents.network.resume("a"))


class Raw:
    """A client that says whatever it likes."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(10)
        self.socket.connect(str(path))

    def say(self, body: bytes) -> None:
        self.socket.sendall(protocol.LENGTH.pack(len(body)) + body)

    def hear(self) -> list[protocol.Reply]:
        """All that comes until the agent closes."""
        data, reader, found = b"x", protocol.FrameReader(), []
        while data:
            data, fds, _, _ = socket.recv_fds(self.socket, 1 << 16, 1)
            for fd in fds:
                socket.close(fd)
            found += [protocol.decode_reply(body) for body in reader.feed(data)]
        return found

    def __enter__(self) -> Raw:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()


def hello(version: int = AGENT_PROTOCOL_VERSION) -> bytes:
    return msgspec.msgpack.encode(["hello", 0, version, 1])


def test_a_client_of_another_version_is_told_which_side_to_upgrade(agents: LocalAgents) -> None:
    agents.start("a")
    with Raw(agents.directory / "a.sock") as raw:
        raw.say(hello(AGENT_PROTOCOL_VERSION + 1))
        (answer,) = raw.hear()
    assert isinstance(answer, protocol.Failed)
    assert "upgrade kvmesh where the agent runs" in answer.message


def test_an_agent_of_another_version_is_refused_by_the_client(tmp_path: Path) -> None:
    path = tmp_path / "old.sock"
    refusal = protocol.frame(
        protocol.failure(0, kvmesh.ProtocolError(protocol.version_refusal(AGENT_PROTOCOL_VERSION, "old")))
    )
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen()

        def serve() -> None:
            for answer in (refusal, b"\x05\x00\x00\x00HTTP!", b""):
                connection, _ = listening.accept()
                connection.recv(1000)
                connection.sendall(answer)
                connection.close()

        thread = threading.Thread(target=serve)
        thread.start()
        for kind in (kvmesh.VersionMismatchError, kvmesh.VersionMismatchError, kvmesh.AgentUnavailableError):
            with pytest.raises(kind):
                kvmesh.connect(path)
        thread.join()


@pytest.mark.parametrize(
    "body",
    [
        b"\xff\xff",
        msgspec.msgpack.encode(["get", 1]),
        msgspec.msgpack.encode(["hello", 0, AGENT_PROTOCOL_VERSION, 1]),
        msgspec.msgpack.encode(["release", 0, [4096]]),
        msgspec.msgpack.encode(["pin", 0, b"x" * 33, True]),
        msgspec.msgpack.encode(["query", 0, b"nonsense"]),
    ],
)
def test_a_client_that_breaks_the_protocol_is_disconnected_and_the_others_live_on(
    agents: LocalAgents, body: bytes
) -> None:
    agents.start("a")
    mesh = agents.mesh("a")
    with Raw(agents.directory / "a.sock") as raw:
        raw.say(hello())
        raw.say(body)
        answers = raw.hear()
    assert isinstance(answers[-1], protocol.Failed)
    put(mesh, SPACE, chain_of(SPACE, 1))


def test_an_unknown_namespace_is_an_ordinary_error(agents: LocalAgents) -> None:
    agents.start("a")
    with Raw(agents.directory / "a.sock") as raw:
        raw.say(hello())
        for body in (
            msgspec.msgpack.encode(["reserve", 1, b"s" * 16, b""]),
            msgspec.msgpack.encode(["get", 2, b"s" * 16, b"", 0.1, 30.0]),
            msgspec.msgpack.encode(["open", 3, b'{"model": "m"}']),
        ):
            raw.say(body)
        raw.say(b"\xff")
        answers = raw.hear()
    failed = [answer for answer in answers if isinstance(answer, protocol.Failed)]
    assert [answer.error for answer in failed] == ["NamespaceError"] * 3 + ["ProtocolError"]
    assert "unknown namespace" in failed[0].message
    assert "revision" in failed[2].message


def test_a_client_that_goes_away_in_the_middle_leaves_no_lease_and_no_reservation(agents: LocalAgents) -> None:
    a = agents.start("a")
    mesh = agents.mesh("a")
    chain = chain_of(SPACE, 2)
    put(mesh, SPACE, chain)
    with Raw(agents.directory / "a.sock") as raw:
        raw.say(hello())
        raw.say(msgspec.msgpack.encode(["get", 1, SPACE.digest[:16], b"".join(chain), 1.0, 30.0]))
        raw.say(msgspec.msgpack.encode(["reserve", 2, SPACE.digest[:16], b"k" * 32]))
        agents.wait_for(lambda: (s := a.store.stats()).leases == 2 and s.reserved_chunks == 1)
    agents.wait_for(lambda: (s := a.store.stats()).leases == 0 and s.reserved_chunks == 0)


def test_peers_with_another_dtype_are_named(agents: LocalAgents) -> None:
    """faults.md, defect 10: a hit rate of zero must not be the only sign."""
    _, b = pair(agents)
    put(agents.mesh("a"), SPACE, chain_of(SPACE, 1))
    agents.wait(b, lambda: b.node.discovery.map.has("a", chain_of(SPACE, 1)[0]))
    other = kvmesh.Namespace(
        model="m", revision="r", dtype="bfloat16", layers=2, kv_heads=2, head_dim=16, chunk_tokens=16
    )
    notes = agents.do(lambda: b._opened(other))
    assert notes == [
        "model 'm': dtype is 'bfloat16' here and 'float32' on a peer: these two share no chunks",
    ]
    assert agents.do(lambda: b._opened(SPACE)) == []


@pytest.mark.parametrize("description", [b'{"a":' + b"[" * 2000, b'{"model": "\xff"}', b"[]"])
def test_what_a_peer_says_of_a_namespace_may_be_anything(description: bytes) -> None:
    assert differences(SPACE, [description]) == []


def test_the_end_of_a_get_does_not_end_another_one_that_took_its_number(agents: LocalAgents) -> None:
    _, b = pair(agents)
    chain = chain_of(SPACE, 2)
    put(agents.mesh("a"), SPACE, chain)
    agents.mesh("b").put(SPACE, {chain[0]: tensor(SPACE, 0)})
    agents.wait(b, lambda: b.node.discovery.map.has("a", chain[-1]))
    agents.do(lambda: agents.network.stall("a"))
    with Raw(agents.directory / "b.sock") as raw:
        raw.say(hello())
        for keys, deadline_s in [(chain[1:], 0.1), (chain[:1], 0.1)]:
            blob = b"".join(keys)
            raw.say(msgspec.msgpack.encode(["get", 7, SPACE.digest[:16], blob, deadline_s, 30.0]))
        agents.wait_for(lambda: (s := b.fetcher.stats())["reads"] == 1 and s["flights"] == 0)
        assert leases(b, agents) == 1
    agents.do(lambda: agents.network.resume("a"))
    agents.wait_for(lambda: b.store.stats().leases == 0 and b.store.stats().reserved_chunks == 0)
