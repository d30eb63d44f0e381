"""The public surface, end to end in one process: real agents, stores and unix sockets over a network in memory."""

from __future__ import annotations

import asyncio
import gc
import socket
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import pytest
import torch

import kvmesh
from kvmesh import aio, protocol
from kvmesh.agent import Agent
from kvmesh.client import Mesh
from kvmesh.spaces import differences
from kvmesh.transport.limits import AGENT_PROTOCOL_VERSION
from tests.support.agents import MIB, LocalAgents

SPACE = kvmesh.Namespace(model="m", revision="r", dtype="float32", layers=2, kv_heads=2, head_dim=16, chunk_tokens=16)
LARGE = kvmesh.Namespace(model="m", revision="r", dtype="float32", layers=17, kv_heads=8, head_dim=64, chunk_tokens=16)


@pytest.fixture
def agents(tmp_path: Path) -> Iterator[LocalAgents]:
    with LocalAgents(tmp_path) as running:
        yield running


def chain_of(space: kvmesh.Namespace, count: int, first: int = 0) -> list[bytes]:
    return space.chain(range_of(first, count * space.chunk_tokens))


def range_of(first: int, count: int) -> list[int]:
    return list(range(first, first + count))


def tensor(space: kvmesh.Namespace, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(next(iter(space.tensors.values())).shape, generator=generator)


def put(mesh: Mesh, space: kvmesh.Namespace, chain: Sequence[bytes]) -> list[torch.Tensor]:
    tensors = [tensor(space, i) for i in range(len(chain))]
    assert mesh.put(space, dict(zip(chain, tensors, strict=True))).stored == len(chain)
    return tensors


def pair(agents: LocalAgents, *, memory: int = 16 * MIB) -> tuple[Agent, Agent]:
    a = agents.start("a", memory=memory)
    b = agents.start("b", memory=memory, join=("a",))
    agents.wait_alive(a, "b")
    agents.wait_alive(b, "a")
    return a, b


def leases(agent: Agent, agents: LocalAgents) -> int:
    return agents.do(agent.store.stats).leases


# --- one node --------------------------------------------------------------------------------------------------------
def test_what_was_put_is_got_without_a_copy(agents: LocalAgents) -> None:
    a = agents.start("a")
    mesh = agents.mesh("a")
    chain = chain_of(SPACE, 3)
    tensors = put(mesh, SPACE, chain)
    with mesh.get(SPACE, chain) as hit:
        assert (hit.count, len(hit), hit.tokens, hit.wanted) == (3, 3, 48, 3)
        assert (hit.fetched, hit.bytes_moved, hit.reason) == (0, 0, "complete")
        assert all(torch.equal(got, want) for got, want in zip(hit, tensors, strict=True))
        assert torch.equal(hit[-1], tensors[2])
        assert leases(a, agents) == 3
        with pytest.raises(IndexError):
            hit[3]
    assert mesh.node == "a"


def test_a_put_of_what_exists_is_a_no_op_that_says_so(agents: LocalAgents) -> None:
    agents.start("a")
    mesh = agents.mesh("a")
    chain = chain_of(SPACE, 2)
    put(mesh, SPACE, chain[:1])
    result = mesh.put(SPACE, {key: torch.zeros_like(tensor(SPACE, 0)) for key in chain})
    assert (result.stored, result.existed, result.refused) == (1, 1, 0)
    assert result.bytes_stored == SPACE.chunk_bytes
    with mesh.get(SPACE, chain) as hit:
        assert torch.equal(hit[0], tensor(SPACE, 0)), "a chunk is immutable"


def test_a_miss_is_a_shorter_hit(agents: LocalAgents) -> None:
    agents.start("a")
    mesh = agents.mesh("a")
    chain = chain_of(SPACE, 4)
    put(mesh, SPACE, chain)
    mesh.delete(chain[2:3])
    with mesh.get(SPACE, chain) as hit:
        assert (hit.count, hit.reason) == (2, "miss")
    with mesh.get(SPACE, chain_of(SPACE, 2, first=500)) as hit:
        assert (hit.count, list(hit)) == (0, [])
    with mesh.get(SPACE, []) as hit:
        assert hit.count == 0


def test_leases_go_back_with_the_hit(agents: LocalAgents) -> None:
    a = agents.start("a")
    mesh = agents.mesh("a")
    chain = chain_of(SPACE, 3)
    put(mesh, SPACE, chain)
    with mesh.get(SPACE, chain) as hit:
        hit.count  # noqa: B018
    assert mesh.stats()["store"]["leases"] == 0
    assert leases(a, agents) == 0


def test_a_view_keeps_its_lease_and_a_released_hit_gives_no_more(agents: LocalAgents) -> None:
    a = agents.start("a")
    mesh = agents.mesh("a")
    chain = chain_of(SPACE, 3)
    tensors = put(mesh, SPACE, chain)
    with mesh.get(SPACE, chain) as hit:
        part = hit[1][0, 0]
        again = hit[1].numpy()
    with pytest.raises(kvmesh.LeaseError, match="inside the `with` block"):
        hit[0]
    assert mesh.stats()["store"]["leases"] == 1, "two views of one chunk hold one lease"
    mesh.delete(chain)
    put(mesh, SPACE, chain_of(SPACE, 50, first=1000))
    assert torch.equal(part, tensors[1][0, 0])
    del part
    assert mesh.stats()["store"]["leases"] == 1
    del again
    gc.collect()
    assert mesh.stats()["store"]["leases"] == 0
    assert leases(a, agents) == 0


def test_a_view_outlives_even_the_mesh(agents: LocalAgents) -> None:
    a = agents.start("a")
    mesh = agents.mesh("a")
    chain = chain_of(SPACE, 1)
    (want,) = put(mesh, SPACE, chain)
    with mesh.get(SPACE, chain) as hit:
        view = hit[0]
    mesh.close()
    agents.do(lambda: a.store.delete(chain[0]))
    other = agents.mesh("a")
    put(other, SPACE, chain_of(SPACE, 100, first=900))
    assert torch.equal(view, want)
    del view
    assert other.stats()["store"]["leases"] == 0
    with pytest.raises(kvmesh.AgentUnavailableError, match="closed"):
        mesh.nodes()


def test_a_forgotten_hit_gives_its_leases_back(agents: LocalAgents) -> None:
    agents.start("a")
    mesh = agents.mesh("a")
    chain = chain_of(SPACE, 1)
    put(mesh, SPACE, chain)
    hit = mesh.get(SPACE, chain)
    assert hit.count == 1
    del hit
    gc.collect()
    assert mesh.stats()["store"]["leases"] == 0


def test_named_tensors_and_fill_functions(agents: LocalAgents) -> None:
    agents.start("a")
    mesh = agents.mesh("a")
    space = kvmesh.Namespace(
        model="m", revision="r", dtype="bfloat16", layers=1, kv_heads=1, head_dim=1, layout="two", chunk_tokens=4,
        tensors={"hidden": kvmesh.TensorSpec("bfloat16", (4, 3)), "ids": kvmesh.TensorSpec("int64", (5,))},
    )  # fmt: skip
    chain = chain_of(space, 2)
    value = {"hidden": torch.ones(4, 3, dtype=torch.bfloat16), "ids": torch.arange(5)}
    calls = []

    def fill(views: dict[str, torch.Tensor]) -> None:
        calls.append(1)
        views["hidden"].fill_(2)
        views["ids"].copy_(torch.arange(5) * 7)

    assert mesh.put(space, {chain[0]: value, chain[1]: fill}).stored == 2
    assert mesh.put(space, {chain[1]: fill}).existed == 1
    assert calls == [1], "a fill function is called only for what is new"
    with mesh.get(space, chain) as hit:
        first, second = hit[0], hit[1]
        assert isinstance(first, dict)
        assert isinstance(second, dict)
        assert torch.equal(first["ids"], torch.arange(5))
        assert second["hidden"].eq(2).all()
        assert torch.equal(second["ids"], torch.arange(5) * 7)


def test_what_a_fill_function_raises_goes_to_the_caller_and_nothing_is_left_behind(agents: LocalAgents) -> None:
    agents.start("a")
    mesh = agents.mesh("a")
    chain = chain_of(SPACE, 3)

    def broken(_view: torch.Tensor) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        mesh.put(SPACE, {chain[0]: tensor(SPACE, 0), chain[1]: broken, chain[2]: tensor(SPACE, 2)})
    store = mesh.stats()["store"]
    assert (store["chunks"], store["reserved_chunks"]) == (1, 0)
    assert mesh.put(SPACE, {chain[1]: tensor(SPACE, 1)}).stored == 1


def test_a_full_arena_refuses_and_then_takes_again(agents: LocalAgents) -> None:
    agents.start("a", memory=4 * 16384)
    mesh = agents.mesh("a")
    space = kvmesh.Namespace(
        model="m", revision="r", dtype="float32", layers=4, kv_heads=2, head_dim=16, chunk_tokens=16
    )
    assert space.chunk_bytes == 16384
    chain = chain_of(space, 6)
    values = {key: tensor(space, i) for i, key in enumerate(chain)}
    result = mesh.put(space, dict(list(values.items())[:4]), pin=True)
    assert result.stored == 4
    result = mesh.put(space, {chain[4]: values[chain[4]]})
    assert (result.stored, result.refused) == (0, 1)
    assert mesh.unpin(chain) == 4
    assert mesh.put(space, {chain[4]: values[chain[4]]}).stored == 1
    assert mesh.pin(chain) == 4
    assert mesh.delete(chain) == 4


def test_chunks_expire(agents: LocalAgents) -> None:
    a = agents.start("a")
    mesh = agents.mesh("a")
    chain = chain_of(SPACE, 1)
    mesh.put(SPACE, {chain[0]: tensor(SPACE, 0)}, ttl_s=1e-9)
    with mesh.get(SPACE, chain) as hit:
        assert hit.count == 0
    assert agents.do(a.store.stats).removed == 1
    with pytest.raises(kvmesh.CallerError, match="ttl_s"):
        mesh.put(SPACE, {chain[0]: tensor(SPACE, 0)}, ttl_s=0)


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (torch.zeros(2, 2, 2, 16, 8), r"shape \(2, 2, 2, 16, 8\); its namespace says \(2, 2, 2, 16, 16\)"),
        (torch.zeros(2, 2, 2, 16, 16, dtype=torch.bfloat16), "dtype torch.bfloat16; its namespace says torch.float32"),
        ({"kv": torch.zeros(2, 2, 2, 16, 16), "x": torch.zeros(1)}, "has the tensors kv; given: kv, x"),
        ([1, 2], "must be a torch tensor, not list"),
    ],
)
def test_a_wrong_tensor_is_refused_before_anything_is_reserved(agents: LocalAgents, value: object, says: str) -> None:
    agents.start("a")
    mesh = agents.mesh("a")
    with pytest.raises(kvmesh.TensorError, match=says):
        mesh.put(SPACE, {chain_of(SPACE, 1)[0]: value})  # type: ignore[dict-item]
    assert mesh.stats()["store"]["admitted"] == 0


def test_a_chunk_larger_than_the_arena_is_a_clear_error(agents: LocalAgents) -> None:
    agents.start("a", memory=MIB)
    mesh = agents.mesh("a")
    for call in (
        lambda: mesh.put(LARGE, {}),
        lambda: mesh.get(LARGE, []),
        lambda: mesh.prefetch(LARGE, []),
    ):
        with pytest.raises(kvmesh.ChunkTooLargeError, match="--memory"):
            call()


def test_bad_arguments_are_named(agents: LocalAgents) -> None:
    agents.start("a")
    mesh = agents.mesh("a")
    for chain in ([b"x"], ["x"], [1], "abc"):
        with pytest.raises(kvmesh.CallerError, match="32 bytes"):
            mesh.locate(chain)  # type: ignore[arg-type]
    with pytest.raises(kvmesh.NamespaceError, match=r"must be a kvmesh\.Namespace, not str"):
        mesh.get("m", [])  # type: ignore[arg-type]


# --- two nodes -------------------------------------------------------------------------------------------------------
def test_what_one_node_has_another_gets(agents: LocalAgents) -> None:
    a, b = pair(agents)
    chain = chain_of(SPACE, 5)
    tensors = put(agents.mesh("a"), SPACE, chain)
    agents.wait(b, lambda: b.node.discovery.map.has("a", chain[-1]))
    mesh = agents.mesh("b")
    with mesh.get(SPACE, chain, deadline_s=5) as hit:
        assert all(torch.equal(got, want) for got, want in zip(hit, tensors, strict=True))
        assert (hit.fetched, hit.bytes_moved) == (5, 5 * SPACE.chunk_bytes)
    with mesh.get(SPACE, chain) as hit:
        assert (hit.count, hit.fetched) == (5, 0), "fetched once, local from then on"
    agents.wait(a, lambda: a.node.discovery.map.has("b", chain[0]))
    assert {h["node"] for h in mesh.locate(chain)["holders"]} == {"a", "b"}


def test_holes_are_filled_from_peers(agents: LocalAgents) -> None:
    _, b = pair(agents)
    chain = chain_of(SPACE, 6)
    mesh_a, mesh_b = agents.mesh("a"), agents.mesh("b")
    tensors = put(mesh_a, SPACE, chain)
    mesh_b.put(SPACE, {chain[i]: tensors[i] for i in (0, 2, 5)})
    agents.wait(b, lambda: b.node.discovery.map.has("a", chain[-1]))
    with mesh_b.get(SPACE, chain, deadline_s=5) as hit:
        assert (hit.count, hit.fetched) == (6, 3)
        assert all(torch.equal(got, want) for got, want in zip(hit, tensors, strict=True))


def test_the_longest_run_wins_and_the_rest_comes_from_the_next(agents: LocalAgents) -> None:
    """faults.md, defect 1: 1 of 3 chunks chosen over 3 of 3."""
    for name, join in (("a", ()), ("b", ("a",)), ("c", ("a", "b"))):
        agent = agents.start(name, join=join)
    chain = chain_of(SPACE, 6)
    tensors = [tensor(SPACE, i) for i in range(6)]
    agents.mesh("a").put(SPACE, {chain[0]: tensors[0], chain[4]: tensors[4], chain[5]: tensors[5]})
    agents.mesh("b").put(SPACE, {chain[i]: tensors[i] for i in range(4)})
    held = agent.node.discovery.map
    agents.wait(agent, lambda: held.has("a", chain[5]) and held.has("b", chain[0]) and held.has("b", chain[3]))
    with agents.mesh("c").get(SPACE, chain, deadline_s=5) as hit:
        assert (hit.count, hit.fetched) == (6, 6)
        assert all(torch.equal(got, want) for got, want in zip(hit, tensors, strict=True))


def test_many_readers_of_one_chunk_make_one_fetch(agents: LocalAgents) -> None:
    """faults.md, row 12: single flight."""
    a, b = pair(agents)
    chain = chain_of(SPACE, 3)
    tensors = put(agents.mesh("a"), SPACE, chain)
    agents.wait(b, lambda: b.node.discovery.map.has("a", chain[-1]))
    mesh = agents.mesh("b")
    together = threading.Barrier(12)
    right = []

    def read() -> None:
        together.wait()
        with mesh.get(SPACE, chain, deadline_s=10) as hit:
            right.append(all(torch.equal(got, want) for got, want in zip(hit, tensors, strict=True)))

    threads = [threading.Thread(target=read) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert right == [True] * 12
    assert a.node.transport.stats().chunks_served == 3
    assert leases(b, agents) == 0


def test_evicted_between_locate_and_read_corrects_the_map(agents: LocalAgents) -> None:
    """faults.md, row 8."""
    a, b = pair(agents)
    chain = chain_of(SPACE, 3)
    put(agents.mesh("a"), SPACE, chain)
    agents.wait(b, lambda: b.node.discovery.map.has("a", chain[-1]))

    def evict_unheard() -> None:
        a.journal.on_change.clear()  # nobody hears of it, so b's map is stale when it reads
        a.store.delete(chain[1])

    agents.do(evict_unheard)
    with agents.mesh("b").get(SPACE, chain, deadline_s=5) as hit:
        assert (hit.count, hit.reason) == (1, "miss")
    assert not agents.do(lambda: b.node.discovery.map.has("a", chain[1]))
    assert agents.do(b.store.stats).reserved_chunks == 0

    def listen_again() -> None:
        a.journal.on_change.append(a.node.discovery._journal_changed)

    agents.do(listen_again)


def test_a_stalled_holder_costs_the_deadline_and_leaves_nothing_behind(agents: LocalAgents) -> None:
    _, b = pair(agents)
    chain = chain_of(SPACE, 3)
    put(agents.mesh("a"), SPACE, chain)
    agents.wait(b, lambda: b.node.discovery.map.has("a", chain[-1]))
    agents.do(lambda: agents.network.stall("a"))
    mesh = agents.mesh("b")
    mesh.put(SPACE, {chain[0]: tensor(SPACE, 0)})
    with mesh.get(SPACE, chain, deadline_s=0.05) as hit:
        assert (hit.count, hit.reason) == (1, "deadline")
    agents.wait_for(lambda: b.store.stats().reserved_chunks == 0)
    agents.do(lambda: agents.network.resume("a"))


def test_a_hit_that_is_left_early_gives_everything_back(agents: LocalAgents) -> None:
    _, b = pair(agents)
    chain = chain_of(SPACE, 3)
    put(agents.mesh("a"), SPACE, chain)
    agents.wait(b, lambda: b.node.discovery.map.has("a", chain[-1]))
    agents.do(lambda: agents.network.stall("a"))
    mesh = agents.mesh("b")
    with mesh.get(SPACE, chain, deadline_s=30):
        pass
    agents.do(lambda: agents.network.resume("a"))
    assert mesh.stats()["store"]["leases"] == 0


def test_prefetch_brings_chunks_without_a_lease(agents: LocalAgents) -> None:
    _, b = pair(agents)
    chain = chain_of(SPACE, 4)
    put(agents.mesh("a"), SPACE, chain)
    agents.wait(b, lambda: b.node.discovery.map.has("a", chain[-1]))
    mesh = agents.mesh("b")
    assert mesh.prefetch(SPACE, chain) == 4
    agents.wait_for(lambda: b.store.run(chain) == 4)
    assert mesh.prefetch(SPACE, chain) == 0
    assert mesh.stats()["store"]["leases"] == 0


def test_a_fetch_into_a_full_arena_gives_what_fits(agents: LocalAgents) -> None:
    agents.start("a")
    b = agents.start("b", memory=4 * SPACE.chunk_bytes, join=("a",))
    agents.wait_alive(b, "a")
    chain = chain_of(SPACE, 4)
    put(agents.mesh("a"), SPACE, chain)
    mesh = agents.mesh("b")
    other = chain_of(SPACE, 2, first=700)
    mesh.put(SPACE, {key: tensor(SPACE, 9) for key in other}, pin=True)
    agents.wait(b, lambda: b.node.discovery.map.has("a", chain[-1]))
    with mesh.get(SPACE, chain, deadline_s=5) as hit:
        assert (hit.count, hit.reason) == (2, "arena full")


def test_a_node_that_starts_again_empty_is_believed_to_be_empty(agents: LocalAgents) -> None:
    """faults.md, row 10."""
    _, b = pair(agents)
    chain = chain_of(SPACE, 2)
    put(agents.mesh("a"), SPACE, chain)
    agents.wait(b, lambda: b.node.discovery.map.has("a", chain[-1]))
    agents.stop("a")
    again = agents.start("a", join=("b",))
    agents.wait_alive(again, "b")
    agents.wait(b, lambda: not b.node.discovery.map.has("a", chain[-1]))
    with agents.mesh("b").get(SPACE, chain, deadline_s=5) as hit:
        assert hit.count == 0
    assert agents.mesh("b").locate(chain) == {"chunks": 2, "holders": []}


def test_nodes_and_map_are_the_documents_of_the_design(agents: LocalAgents) -> None:
    _, b = pair(agents)
    chain = chain_of(SPACE, 2)
    put(agents.mesh("a"), SPACE, chain)
    agents.wait(b, lambda: b.node.discovery.map.has("a", chain[-1]))
    mesh = agents.mesh("b")
    nodes = {node["name"]: node for node in mesh.nodes()["nodes"]}
    assert set(nodes) == {"a", "b"}
    assert nodes["a"]["state"] == "alive"
    assert (nodes["a"]["chunks"], nodes["a"]["bytes"]) == (2, 2 * SPACE.chunk_bytes)
    assert {"role", "address", "epoch", "seq", "rtt_s"} <= set(nodes["a"])
    document = mesh.map()
    assert document["complete"]
    assert document["entries"] == 2
    (space,) = document["namespaces"]
    assert (space["id"], space["model"], space["chunks"]) == (SPACE.id, "m", 2)
    held = {node["name"]: node["tiers"] for node in document["nodes"]}
    assert held["a"] == {"ram": {"chunks": 2, "bytes": 2 * SPACE.chunk_bytes}}


# --- connections -----------------------------------------------------------------------------------------------------
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
    assert leases(a, agents) == 0
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
    assert leases(a, agents) == 0
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


def test_an_agent_that_goes_away_under_a_waiting_hit(agents: LocalAgents) -> None:
    _, b = pair(agents)
    chain = chain_of(SPACE, 1)
    put(agents.mesh("a"), SPACE, chain)
    agents.wait(b, lambda: b.node.discovery.map.has("a", chain[-1]))
    agents.do(lambda: agents.network.stall("a"))
    hit = agents.mesh("b").get(SPACE, chain, deadline_s=30)
    agents.stop("b")
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
            msgspec.msgpack.encode(["get", 2, b"s" * 16, b"", 0.1]),
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
        raw.say(msgspec.msgpack.encode(["get", 1, SPACE.digest[:16], b"".join(chain), 1.0]))
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
