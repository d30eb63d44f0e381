"""The table, the order of probing, and drawing at random."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest

from kvmesh.discovery.swim.nodes import ALIVE, DEAD, LEFT, SUSPECT, Node, NodeTable
from kvmesh.discovery.swim.suspicion import Suspicion
from kvmesh.discovery.wire.messages import VERSIONS, PushedNode, PushedState
from kvmesh.transport.limits import FAILED_FORGOTTEN_S
from tests.discovery.swim.support import alive, at, only


def node(number: int, state: PushedState = ALIVE, *, changed_at: float = 0.0) -> Node:
    return Node(f"n{number}", at(number), b"1", VERSIONS, 1, state, changed_at, changed_at)


def table_of(*nodes: Node, nodes_max: int = 1000, seed: int = 0) -> NodeTable:
    table = NodeTable(Random(seed), nodes_max)
    for one in nodes:
        assert table.add(one)
    return table


def names_of_a_round(table: NodeTable, own: Node, count: int) -> list[str]:
    found = [table.next_to_probe(own, 0.0) for _ in range(count)]
    return [one.name for one in found if one is not None]


def test_everyone_is_probed_once_a_round_and_never_this_node():
    nodes = [node(number) for number in range(1, 12)]
    table = table_of(*nodes)
    names_of_a_round(table, nodes[0], 10)  # the first round begins in the order of joining
    orders = [names_of_a_round(table, nodes[0], 10) for _ in range(5)]
    for order in orders:
        assert sorted(order) == sorted(one.name for one in nodes[1:])
    assert len(set(map(tuple, orders))) == 5, "each round has an order of its own"


def test_suspects_are_probed_and_the_gone_are_not():
    own, suspect = node(1), node(2, SUSPECT)
    table = table_of(own, suspect, node(3, DEAD), node(4, LEFT))
    assert names_of_a_round(table, own, 5) == ["n2"] * 5
    table.set_state(suspect, DEAD, 1.0)
    assert table.next_to_probe(own, 1.0) is None


def test_nobody_is_there_to_be_probed():
    own = node(1)
    assert table_of(own).next_to_probe(own, 0.0) is None
    assert NodeTable(Random(0), 10).next_to_probe(own, 0.0) is None


def test_a_new_node_comes_at_a_random_place_of_the_order():
    """At the end, its crash would be seen only after all others were probed."""
    places = Counter[int]()
    for seed in range(600):
        table = table_of(*(node(number) for number in range(1, 6)), seed=seed)
        table.add(node(6))
        places[[one.name for one in table].index("n6")] += 1
    assert set(places) == {0, 1, 2, 3, 4, 5}
    assert all(60 <= count <= 140 for count in places.values()), places


def test_at_its_bound_it_takes_nobody_unless_somebody_is_gone():
    table = table_of(node(1), node(2), node(3), nodes_max=3)
    assert not table.add(node(4))
    assert len(table) == table.there == 3
    assert table.get("n4") is None
    table.set_state(table.get("n2") or node(2), LEFT, 20.0)
    table.set_state(table.get("n3") or node(3), DEAD, 10.0)
    assert table.add(node(4))
    assert sorted(one.name for one in table) == ["n1", "n2", "n4"], "who is gone longest makes room"
    assert (len(table), table.there, table.get("n3")) == (3, 2, None)


def test_there_counts_those_that_are_not_gone():
    table = table_of(node(1), node(2, DEAD))
    other = table.get("n2")
    assert other is not None
    for state, there in [(DEAD, 1), (ALIVE, 2), (SUSPECT, 2), (LEFT, 1), (DEAD, 1), (SUSPECT, 2), (ALIVE, 2)]:
        table.set_state(other, state, 5.0)
        assert (table.there, other.state, other.changed_at) == (there, state, 5.0)


def test_only_a_suspect_is_suspected():
    table, suspect = table_of(node(1)), node(2, SUSPECT)
    table.add(suspect)
    for state in (ALIVE, DEAD, LEFT):
        suspect.suspicion = Suspicion("n3", wanted=0, min_s=1.0, max_s=6.0, now=0.0)
        table.set_state(suspect, state, 0.0)
        assert suspect.suspicion is None
    suspect.suspicion = Suspicion("n3", wanted=0, min_s=1.0, max_s=6.0, now=0.0)
    table.set_state(suspect, SUSPECT, 0.0)
    assert suspect.suspicion is not None


def test_the_gone_are_forgotten_after_a_day():
    own = node(1)
    table = table_of(own, node(2), node(3, DEAD, changed_at=10.0), node(4, LEFT, changed_at=20.0))
    for now, names in [
        (10.0 + FAILED_FORGOTTEN_S - 1, ["n1", "n2", "n3", "n4"]),
        (10.0 + FAILED_FORGOTTEN_S, ["n1", "n2", "n4"]),
        (20.0 + FAILED_FORGOTTEN_S, ["n1", "n2"]),
    ]:
        for _ in range(3):  # they are looked at where a round ends
            assert (found := table.next_to_probe(own, now)) is not None
            assert found.name == "n2"
        assert sorted(one.name for one in table) == names
    assert table.get("n3") is None


@pytest.mark.parametrize("size", [1, 2, 5, 9, 10, 63, 200])
@pytest.mark.parametrize("count", [1, 3, 64])
def test_some_are_drawn_at_random_each_once(size: int, count: int):
    table = table_of(*(node(number) for number in range(size)))
    drawn = Counter[str]()
    for _ in range(20):
        found = table.some(count, lambda one: one.name != "n0")
        names = [one.name for one in found]
        assert len(set(names)) == len(names) == min(count, size - 1)
        assert "n0" not in names
        drawn.update(names)
    if size > 1:
        assert len(drawn) >= min(size - 1, 5), "they are not always the same ones"


def test_the_one_among_many_is_found():
    table = table_of(*(node(number) for number in range(500)))
    assert [one.name for one in table.some(3, lambda one: one.name == "n321")] == ["n321"]
    assert table.some(3, lambda one: False) == []


def test_all_are_drawn_equally_often():
    table = table_of(*(node(number) for number in range(20)))
    drawn = Counter(only(table.some(1, lambda one: True)).name for _ in range(4000))
    assert len(drawn) == 20
    assert all(120 <= count <= 290 for count in drawn.values()), drawn


def test_what_versions_say_a_node_can_do():
    assert (node(1).reads_crc, node(1).sends_nack) == (True, True)
    old = node(2)
    old.versions = bytes([1, 3, 3, 2, 5, 5])
    assert (old.reads_crc, old.sends_nack) == (False, False)
    old.versions = bytes([1, 4, 4, 2, 5, 5])
    assert (old.reads_crc, old.sends_nack) == (False, True)
    old.versions = b""
    assert (old.reads_crc, old.sends_nack) == (False, False)


def test_a_round_trip_is_smoothed():
    one = node(1)
    one.measured(0.1)
    assert one.rtt_s == 0.1
    one.measured(0.2)
    assert one.rtt_s == pytest.approx(0.12)


def test_what_is_told_of_it():
    one = node(5, SUSPECT)
    assert one.alive() == alive("n5")
    assert one.pushed() == PushedNode("n5", at(5).ip, at(5).port, b"1", 1, SUSPECT, VERSIONS)
