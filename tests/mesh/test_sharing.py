"""Two and three nodes: chunks are fetched from the best holder, once, and a peer that fails costs hits and no more."""

from __future__ import annotations

import threading

import torch

from tests.support.agents import LocalAgents
from tests.support.chunks import SPACE, chain_of, pair, put, tensor
from tests.support.waiting import wait_until


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
    agents.wait_for(lambda: b.store.stats().leases == 0)


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
    wait_until(lambda: mesh.stats()["store"]["leases"] == 0, 10, "all leases are back")


def test_prefetch_brings_chunks_without_a_lease(agents: LocalAgents) -> None:
    _, b = pair(agents)
    chain = chain_of(SPACE, 4)
    put(agents.mesh("a"), SPACE, chain)
    agents.wait(b, lambda: b.node.discovery.map.has("a", chain[-1]))
    mesh = agents.mesh("b")
    assert mesh.prefetch(SPACE, chain) == 4
    agents.wait_for(lambda: b.store.run(chain) == 4)
    assert mesh.prefetch(SPACE, chain) == 0
    wait_until(lambda: mesh.stats()["store"]["leases"] == 0, 10, "all leases are back")


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
