"""Real processes: agents, a controller, clients that die. What the issue calls the job."""

from __future__ import annotations

import itertools
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import kvmesh
from tests.support.cluster import Cluster, Process
from tests.support.waiting import wait_until

pytestmark = pytest.mark.cluster

MIB = 1 << 20
SPACE = kvmesh.Namespace(model="m", revision="r", dtype="float32", layers=8, kv_heads=2, head_dim=64, chunk_tokens=128)
assert SPACE.chunk_bytes == MIB


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with Cluster(tmp_path) as running:
        yield running


def start(cluster: Cluster, names: str, memory: str = "512MiB") -> list[Process]:
    """Agents that all know each other, as each other sees them."""
    agents: list[Process] = []
    for name in names:
        agents.append(cluster.agent(name, memory=memory, join=[agent.gossip_address for agent in agents]))
    for agent in agents:
        wait_until(lambda agent=agent: alive(agent) == set(names), 20, f"{agent.name} sees {names} alive")
    return agents


def alive(agent: Process) -> set[str]:
    with kvmesh.connect(agent.socket) as mesh:
        return {node["name"] for node in mesh.nodes()["nodes"] if node["state"] == "alive"}


def holders(agent: Process, chain: list[bytes]) -> dict[str, int]:
    with kvmesh.connect(agent.socket) as mesh:
        return {holder["node"]: holder["run_chunks"] for holder in mesh.locate(chain)["holders"]}


def make(count: int, first: int = 0) -> tuple[list[bytes], list[torch.Tensor]]:
    chain = SPACE.chain(list(range(first, first + count * SPACE.chunk_tokens)))
    generator = torch.Generator().manual_seed(first)
    shape = next(iter(SPACE.tensors.values())).shape
    return chain, [torch.randn(shape, generator=generator) for _ in chain]


def fill(agent: Process, chain: list[bytes], tensors: list[torch.Tensor]) -> None:
    with kvmesh.connect(agent.socket) as mesh:
        assert mesh.put(SPACE, dict(zip(chain, tensors, strict=True))).stored == len(chain)


def test_200_chunks_of_a_mebibyte_put_on_a_are_read_on_b_byte_for_byte(cluster: Cluster) -> None:
    a, b, c = start(cluster, "abc")
    chain, tensors = make(200)
    fill(a, chain, tensors)
    wait_until(lambda: holders(b, chain).get("a") == 200, 10, "b knows all that a holds")
    with kvmesh.connect(b.socket) as mesh, mesh.get(SPACE, chain, deadline_s=30) as hit:
        assert (hit.count, hit.fetched, hit.bytes_moved, hit.reason) == (200, 200, 200 * MIB, "complete")
        for got, want in zip(hit, tensors, strict=True):
            assert got.view(torch.uint8).equal(want.view(torch.uint8))
        del got
    wait_until(lambda: holders(c, chain) == {"a": 200, "b": 200}, 10, "c knows that b holds them too")
    with kvmesh.connect(b.socket) as mesh:
        wait_until(lambda: empty(mesh), 10, "leases and reservations are back")
        assert mesh.stats()["store"]["chunks"] == 200


def test_a_holder_killed_in_mid_read_costs_no_more_than_the_deadline(cluster: Cluster) -> None:
    """faults.md, row 1: a prefix and a miss; no partial chunk; nothing left behind."""
    a, b, _ = start(cluster, "abc")
    chain, tensors = make(200)
    fill(a, chain, tensors)
    wait_until(lambda: holders(b, chain).get("a") == 200, 10, "b knows all that a holds")
    deadline_s = 10.0
    with kvmesh.connect(b.socket) as mesh:
        began = time.monotonic()
        with mesh.get(SPACE, chain, deadline_s=deadline_s) as hit:
            landed = iter(hit)
            first = list(itertools.islice(landed, 3))
            a.pause()  # so that it cannot finish between here and its end
            a.kill()
            count, reason = hit.count, hit.reason
            took_s = time.monotonic() - began
            assert count >= 3
            assert reason in ("miss", "deadline", "complete")
            assert took_s <= deadline_s + 1
            everything = [*first, *landed]
            assert len(everything) == count
            assert all(torch.equal(got, want) for got, want in zip(everything, tensors, strict=False))
            del everything, first, landed
        wait_until(lambda: empty(mesh), 2 * deadline_s, "leases and reservations are back")


def empty(mesh: kvmesh.Mesh) -> bool:
    store = mesh.stats()["store"]
    return bool(store["leases"] == 0 and store["reserved_chunks"] == 0)


def test_a_node_restarted_empty_is_believed_to_be_empty(cluster: Cluster) -> None:
    """faults.md, row 10."""
    a, b, c = start(cluster, "abc")
    chain, tensors = make(20)
    fill(a, chain, tensors)
    for agent in (b, c):
        wait_until(lambda agent=agent: holders(agent, chain) == {"a": 20}, 10, f"{agent.name} knows what a holds")
    a.kill()
    again = cluster.agent("a", join=[b.gossip_address, c.gossip_address])
    for agent in (b, c):
        wait_until(lambda agent=agent: holders(agent, chain) == {}, 10, f"{agent.name} does not believe it any more")
        wait_until(lambda agent=agent: "a" in alive(agent), 10, f"{agent.name} sees the new a")
    with kvmesh.connect(b.socket) as mesh, mesh.get(SPACE, chain, deadline_s=2) as hit:
        assert hit.count == 0
    assert again.address != a.address


def test_a_killed_node_is_failed_and_the_others_share_on(cluster: Cluster) -> None:
    a, b, c = start(cluster, "abc")
    chain, tensors = make(4)
    fill(b, chain, tensors)
    a.kill()
    wait_until(lambda: holders(c, chain) == {"b": 4}, 10, "c knows what b holds")
    with kvmesh.connect(c.socket) as mesh, mesh.get(SPACE, chain, deadline_s=10) as hit:
        assert hit.count == 4
        assert torch.equal(hit[3], tensors[3])
    wait_until(lambda: alive(c) == {"b", "c"}, 20, "c has found out about a")


def test_a_controller_has_the_whole_map_and_its_death_hurts_nobody(cluster: Cluster) -> None:
    a, b = start(cluster, "ab")
    chain, tensors = make(5)
    fill(a, chain, tensors)
    controller = cluster.controller("c", join=[a.gossip_address])  # one address is enough
    keys = [part for key in chain for part in ("--key", key.hex())]

    def located() -> bool:
        found = cluster.command("locate", "--controller", controller.address, "--json", *keys)
        return found.returncode == 0 and json.loads(found.stdout) == {
            "chunks": 5,
            "holders": [{"node": "a", "run_chunks": 5, "tier": "ram"}],
        }

    wait_until(located, 20, "the controller locates the chain")
    document = json.loads(cluster.command("map", "--controller", controller.address, "--json").stdout)
    assert (document["complete"], document["entries"]) == (True, 5)
    names = {
        (node["name"], node["role"])
        for node in json.loads(cluster.command("nodes", "--controller", controller.address, "--json").stdout)["nodes"]
    }
    assert names == {("a", "agent"), ("b", "agent"), ("c", "controller")}
    controller.kill()
    with kvmesh.connect(b.socket) as mesh, mesh.get(SPACE, chain, deadline_s=10) as hit:
        assert hit.count == 5
    gone = cluster.command("nodes", "--controller", controller.address)
    assert gone.returncode == 2
    assert "nothing answers at" in gone.stderr
    assert "Traceback" not in gone.stderr
    for agent in (a, b):
        agent.stop()
        assert not agent.socket.exists()


CLIENT = """
import sys, time, torch, kvmesh
space = kvmesh.Namespace(model="m", revision="r", dtype="float32", layers=8, kv_heads=2, head_dim=64, chunk_tokens=128)
mesh = kvmesh.connect(sys.argv[1])
chain = space.chain(list(range(128 * 4)))
hit = mesh.get(space, chain[:2])
assert hit.count == 2
view = hit[0]
def fill(_view):
    print("in the middle", flush=True)
    time.sleep(600)
mesh.put(space, {chain[3]: fill})
"""


def test_a_client_killed_in_the_middle_of_put_and_get_leaves_nothing(cluster: Cluster) -> None:
    (a,) = start(cluster, "a")
    chain, tensors = make(2)
    fill(a, chain, tensors)
    client = subprocess.Popen([sys.executable, "-c", CLIENT, str(a.socket)], stdout=subprocess.PIPE)
    try:
        assert client.stdout is not None
        assert client.stdout.readline() == b"in the middle\n"
        with kvmesh.connect(a.socket) as mesh:
            store = mesh.stats()["store"]
            assert (store["leases"], store["reserved_chunks"]) == (2, 1)
            client.send_signal(signal.SIGKILL)
            wait_until(lambda: empty(mesh), 1.0, "leases and reservation are gone within a second")
    finally:
        client.kill()
        client.wait()
        if client.stdout is not None:
            client.stdout.close()


def test_what_cannot_be_listened_on_is_one_sentence_that_says_what_to_do(cluster: Cluster, tmp_path: Path) -> None:
    (a,) = start(cluster, "a")
    port = a.address.rpartition(":")[2]
    other = str(tmp_path / "x.sock")
    free = ("--gossip-port", "0", "--state-dir", str(tmp_path))
    cases = {
        ("agent", "--mesh-port", port, *free, "--socket", other): f"port {port} ",
        ("agent", "--mesh-port", "0", *free, "--socket", str(a.socket)): "another agent serves",
        ("agent", "--mesh-port", "0", "--bind", "0.0.0.0", "--socket", other): "loopback only",
        ("agent", "--mesh-port", "0", "--memory", "lots", "--socket", other): "not a size",
        ("agent", "--mesh-port", "0", "--memory", "900000TiB", "--socket", other): "smaller --memory",
        ("nodes", "--agent", str(tmp_path / "nobody.sock")): "start `kvmesh agent`",
    }
    for arguments, says in cases.items():
        result = cluster.command(*arguments)
        assert result.returncode == 2, (arguments, result)
        assert says in result.stderr
        assert "Traceback" not in result.stderr
        assert result.stderr.count("\n") == 1
        assert result.stdout == ""
