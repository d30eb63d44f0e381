"""Finding the mesh, and finding it again: real agents with fixed ports on hosts of their own."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvmesh.transport.limits import JOIN_RETRY_S_MAX
from tests.cluster.views import get, holders, nodes, put, states, wait_alive
from tests.support.hosts import GOSSIP_PORT, HostCluster
from tests.support.namespaces import Network, why_not
from tests.support.waiting import wait_until

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.slow,  # real processes
    pytest.mark.skipif(bool(why_not()), reason=f"a network of its own: {why_not()}"),
]


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[HostCluster]:
    with Network() as network, HostCluster(tmp_path, network) as running:
        yield running


def test_a_node_that_moved_is_not_looked_for_at_its_old_address(cluster: HostCluster) -> None:
    """faults.md, the first list, 4."""
    a = cluster.start("a", 2)
    b, c = (cluster.start(name, host, join=[cluster.seed(2)]) for name, host in (("b", 3), ("c", 4)))
    wait_alive([a, b, c])
    old = put(b, 1, 3)
    for agent in (a, c):
        wait_until(lambda agent=agent: holders(agent, old) == {"b": 3}, 10, f"{agent.name} knows what b holds")
    assert get(a, 1, 3, 1.0) == 3  # so that a has a connection to where b was
    b.kill()
    b = cluster.start("b", 9, join=[cluster.seed(4)])
    wait_alive([a, b, c])
    for agent in (a, c):
        wait_until(
            lambda agent=agent: nodes(agent)["b"]["address"] == b.address == "127.0.0.9:7950", 10, "b's new address"
        )
        wait_until(lambda agent=agent: "b" not in holders(agent, old), 10, f"{agent.name} knows that b lost all")
    chain = put(b, 2, 3)
    for agent in (a, c):
        wait_until(lambda agent=agent: holders(agent, chain) == {"b": 3}, 10, f"{agent.name} knows what b holds")
    for agent in (a, c):
        assert get(agent, 2, 3, 1.0) == 3
    cluster.network.count_packets_to(3)
    cluster.network.count_packets_to(9)
    wait_until(lambda: cluster.network.packets_to(9) > 100, 30, "b is spoken to at its new address")
    assert cluster.network.packets_to(3) == 0


def test_nodes_find_the_mesh_again_by_the_members_of_their_last_run(cluster: HostCluster) -> None:
    a = cluster.start("a", 2)
    b, c = (cluster.start(name, host, join=[cluster.seed(2)]) for name, host in (("b", 3), ("c", 4)))
    wait_alive([a, b, c])
    wait_until(
        lambda: remembered(cluster, "b") == {cluster.seed(2), cluster.seed(4)}, 5, "b has written down the others"
    )
    b.kill()
    b = cluster.start("b", 3)  # and nobody to join is given
    wait_alive([a, b, c], 10)
    for name in "abc":
        wait_until(lambda name=name: len(remembered(cluster, name)) == 2, 5, f"{name} wrote down the others")
    for agent in (a, b, c):
        agent.kill()
    a, b, c = (cluster.start(name, host) for name, host in (("a", 2), ("b", 3), ("c", 4)))
    wait_alive([a, b, c], JOIN_RETRY_S_MAX)


def remembered(cluster: HostCluster, name: str) -> set[str]:
    """The addresses in a node's file of last known members."""
    path = cluster.folder / f"{name}.state" / f"{name}.members"
    lines = path.read_text().splitlines() if path.exists() else []
    return {line for line in lines if not line.startswith("#")}


def test_a_node_that_starts_before_its_seed_says_so_and_joins_when_it_is_there(cluster: HostCluster) -> None:
    b = cluster.start("b", 3, join=[cluster.seed(2)])
    wait_until(lambda: re.search(rf"WARNING.*127\.0\.0\.2:{GOSSIP_PORT}", b.log), 10, "b says that nobody is there")
    assert states(b) == {"b": "alive"}
    a = cluster.start("a", 2)
    wait_alive([a, b], JOIN_RETRY_S_MAX + 5)


def test_a_seed_may_be_a_name_with_several_addresses_some_dead_and_is_looked_up_again(cluster: HostCluster) -> None:
    seed = f"seed.mesh:{GOSSIP_PORT}"
    a = cluster.start("a", 4)
    cluster.network.name_hosts([("seed.mesh", 2), ("seed.mesh", 3), ("seed.mesh", 4)])
    b = cluster.start("b", 5, join=[seed])
    wait_alive([a, b])
    cluster.network.name_hosts([("seed.mesh", 2)])
    c = cluster.start("c", 6, join=[seed])
    wait_until(lambda: cluster.seed(2) in c.log, 10, "c says that nobody is there")
    cluster.network.name_hosts([("seed.mesh", 3), ("seed.mesh", 5)])
    wait_alive([a, b, c], JOIN_RETRY_S_MAX + 5)
