"""The public surface on one node: what is put is got, and what cannot be is an ordinary result or a clear error."""

from __future__ import annotations

import gc

import pytest
import torch

import kvmesh
from tests.support.agents import MIB, LocalAgents
from tests.support.chunks import SPACE, chain_of, leases, put, tensor
from tests.support.waiting import wait_until

LARGE = kvmesh.Namespace(model="m", revision="r", dtype="float32", layers=17, kv_heads=8, head_dim=64, chunk_tokens=16)


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
    wait_until(lambda: mesh.stats()["store"]["leases"] == 0, 10, "all leases are back")
    agents.wait_for(lambda: a.store.stats().leases == 0)


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
    wait_until(lambda: mesh.stats()["store"]["leases"] == 1, 10, "two views of one chunk hold one lease")
    mesh.delete(chain)
    put(mesh, SPACE, chain_of(SPACE, 50, first=1000))
    assert torch.equal(part, tensors[1][0, 0])
    del part
    wait_until(lambda: mesh.stats()["store"]["leases"] == 1, 10, "the lease of the view is left")
    del again
    gc.collect()
    wait_until(lambda: mesh.stats()["store"]["leases"] == 0, 10, "all leases are back")
    agents.wait_for(lambda: a.store.stats().leases == 0)


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
    wait_until(lambda: other.stats()["store"]["leases"] == 0, 10, "all leases are back")
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
    wait_until(lambda: mesh.stats()["store"]["leases"] == 0, 10, "all leases are back")


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


def test_what_comes_from_a_peer_while_it_is_put_counts_as_there_already(agents: LocalAgents) -> None:
    a = agents.start("a")
    chain = chain_of(SPACE, 2)

    def land() -> None:
        a.store.add_owner("fetch")
        assert a.store.reserve("fetch", chain[0], SPACE.digest[:16], SPACE.chunk_bytes, beside=True) >= 0
        assert a.store.commit("fetch", chain[0], 0) is not None
        a.store.drop_owner("fetch")

    def fill(view: torch.Tensor) -> None:
        agents.do(land)
        view.fill_(1.0)

    result = agents.mesh("a").put(SPACE, {chain[0]: fill, chain[1]: tensor(SPACE, 1)})
    assert (result.stored, result.existed, result.refused) == (1, 1, 0)
    assert agents.do(a.store.stats).used_bytes == 2 * SPACE.chunk_bytes


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
