"""The map: runs, totals, and its bound."""

from __future__ import annotations

from random import Random

from kvmesh.discovery import ClusterMap, Journal, Record
from kvmesh.discovery.packing import TIER_BITS
from tests.discovery.support import OTHER_SPACE, SIZE, SPACE, key

CHAIN = [key(number, first=number * 7) for number in range(5)]


def filled(**runs: int) -> ClusterMap:
    """A map in which each node holds so many chunks of CHAIN, in ram."""
    cluster = ClusterMap(random=Random(1))
    for node, count in runs.items():
        table = cluster.open(node)
        for name in CHAIN[:count]:
            table.admit(name, SPACE, SIZE, TIER_BITS["ram"])
        table.synced = True
    return cluster


def test_the_longest_run_comes_first() -> None:
    """Fault 1 of faults.md: one of three chunks was chosen over three of three."""
    cluster = filled(a=1, b=3, c=2, d=0)
    assert [(run.node, run.run_chunks) for run in cluster.locate(CHAIN)] == [("b", 3), ("c", 2), ("a", 1)]
    assert cluster.locate(CHAIN)[0].size_bytes == 3 * SIZE
    assert cluster.locate([]) == []


def test_a_run_ends_at_the_first_gap_and_may_start_later() -> None:
    cluster = filled(a=5)
    cluster.forget("a", CHAIN[2])
    assert cluster.runs(CHAIN)[0].run_chunks == 2
    assert cluster.runs(CHAIN, 2) == []
    assert cluster.runs(CHAIN, 3)[0].run_chunks == 2
    assert cluster.runs(CHAIN, 3, exclude={"a"}) == []
    assert not cluster.forget("a", CHAIN[2])
    assert not cluster.forget("nobody", CHAIN[2])


def test_a_run_is_as_slow_as_its_slowest_chunk_and_takes_the_fastest_copy_of_each() -> None:
    cluster = filled(a=2, b=2)
    table = cluster.table("a")
    assert table is not None
    table.admit(CHAIN[0], SPACE, SIZE, TIER_BITS["gpu"])
    assert {run.node: run.tier for run in cluster.runs(CHAIN)} == {"a": "ram", "b": "ram"}
    table.admit(CHAIN[1], SPACE, SIZE, TIER_BITS["gpu"])
    table.admit(CHAIN[1], SPACE, SIZE, TIER_BITS["disk"])
    assert [(run.node, run.tier) for run in cluster.locate(CHAIN)] == [("a", "gpu"), ("b", "ram")]


def test_equals_are_in_random_order() -> None:
    """Fault 14 of faults.md: a cold start sent all to the first in the list."""
    cluster = filled(a=2, b=2, c=2)
    assert {cluster.locate(CHAIN)[0].node for _ in range(50)} == {"a", "b", "c"}


def test_who_holds_a_key() -> None:
    cluster = filled(a=1, b=2)
    assert cluster.holders(CHAIN[1]) == {"b": Record(SPACE, SIZE, TIER_BITS["ram"])}
    assert cluster.has("a", CHAIN[0])
    assert not cluster.has("a", CHAIN[1])
    assert not cluster.has("nobody", CHAIN[0])


def test_a_dropped_node_is_gone_with_all_it_had() -> None:
    cluster = filled(a=3, b=1)
    cluster.drop("a")
    cluster.drop("a")
    assert [run.node for run in cluster.locate(CHAIN)] == ["b"]
    assert cluster.entries == 1
    cluster.open("b")
    assert cluster.entries == 0


def test_the_own_journal_is_in_the_map_as_it_is_now() -> None:
    cluster, journal = filled(a=1), Journal("me", 9)
    cluster.attach(journal)
    assert not cluster.has("me", CHAIN[0])
    journal.admit(CHAIN[0], SPACE, SIZE, "ram")
    journal.admit(CHAIN[1], SPACE, SIZE, "ram")
    assert [run.node for run in cluster.locate(CHAIN)] == ["me", "a"]
    assert [run.node for run in cluster.runs(CHAIN, exclude={"me"})] == ["a"]
    assert cluster.entries == 1
    assert [(node.name, node.epoch, node.seq) for node in cluster.summary().nodes] == [("a", 0, 0), ("me", 9, 2)]


def test_the_summary_adds_up_by_node_and_by_namespace() -> None:
    cluster = filled(a=2, b=1)
    table = cluster.table("b")
    assert table is not None
    table.admit(CHAIN[4], OTHER_SPACE, 10, TIER_BITS["disk"])
    table.admit(CHAIN[4], OTHER_SPACE, 10, TIER_BITS["ram"])
    table.descriptions.set(SPACE, b'{"model": "m"}')
    summary = cluster.summary()
    assert summary.complete
    assert summary.entries == 4
    nodes = {node.name: node.totals for node in summary.nodes}
    assert (nodes["a"].chunks, nodes["a"].size_bytes) == (2, 2 * SIZE)
    assert nodes["b"].tiers == {"ram": (2, SIZE + 10), "disk": (1, 10)}
    spaces = {space.namespace_id: space for space in summary.namespaces}
    assert (spaces[SPACE].nodes, spaces[SPACE].totals.chunks, spaces[SPACE].description) == (2, 3, b'{"model": "m"}')
    assert (spaces[OTHER_SPACE].nodes, spaces[OTHER_SPACE].totals.size_bytes) == (1, 10)


def test_a_full_map_refuses_counts_and_says_so() -> None:
    cluster = ClusterMap(random=Random(1), entries_max=3)
    table = cluster.open("a")
    table.synced = True
    for number in range(3):
        table.admit(key(number), SPACE, SIZE, TIER_BITS["ram"])
    assert cluster.complete
    table.admit(key(0), SPACE, SIZE, TIER_BITS["disk"])  # another copy of what is there needs no room
    assert cluster.complete
    table.admit(key(3), SPACE, SIZE, TIER_BITS["ram"])
    assert (cluster.entries, cluster.entries_refused, cluster.complete) == (3, 1, False)
    other = cluster.open("b")
    other.replace(bytes([0]), b"", b"", [(key(9), Record(SPACE, SIZE, 2))])
    assert (cluster.entries, cluster.entries_refused) == (3, 2)
    table.evict(key(0), TIER_BITS["disk"])
    assert cluster.entries == 3
    table.evict(key(0), TIER_BITS["ram"])
    assert cluster.entries == 2
    cluster.drop("a")
    cluster.drop("b")
    assert (cluster.entries, cluster.entries_refused, cluster.complete) == (0, 2, True)


def test_a_replaced_range_leaves_its_neighbours_alone() -> None:
    cluster = ClusterMap(random=Random(1))
    table = cluster.open("a")
    for first in range(3):
        for number in range(4):
            table.admit(key(number, first), SPACE, SIZE, 2)
    record = Record(SPACE, SIZE, 4)
    table.replace(bytes([1]), key(0, 1), key(2, 1), [(key(2, 1), record)])
    assert sorted(name for name, _ in table.holdings.items() if name[0] == 1) == [key(0, 1), key(2, 1), key(3, 1)]
    assert table.holdings.get(key(2, 1)) == record
    assert cluster.entries == len(table.holdings) == 11
    table.replace(bytes([0, 1, 2]), b"", b"", [])
    assert cluster.entries == len(table.holdings) == table.holdings.fingerprint == 0
