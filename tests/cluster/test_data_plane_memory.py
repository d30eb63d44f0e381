"""Row 7 of the fault table in memory: bits that flip in a holder's arena. No reader gets them; the copy is taken out.

The flips are made as bad memory makes them: in the pages themselves, through the arena's file in /proc, behind the back
of the agent and of every client.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.soak.flips import flip_in_arena
from tests.support.content import MIB, chain_of, space_of
from tests.support.plane import Plane
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.slow]  # real processes

SPACE = space_of(MIB)
COUNT = 12
D = 4.0


@pytest.fixture(params=["zmq", "shm"])
def plane(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Plane]:
    with Plane(tmp_path, transports=request.param) as running:
        yield running


def test_a_chunk_that_changed_in_its_holders_memory_is_not_delivered_and_taken_out(
    plane: Plane, rng: random.Random
) -> None:
    a, c = plane.agents("ac")
    chain = a.put(SPACE, chain_of(SPACE, 1, COUNT))
    plane.wait_known(chain, {"a": COUNT})
    broken = chain[5]
    flip_in_arena(a, SPACE, broken, rng)
    assert c.get(SPACE, chain, D).count == 5  # every one of them right
    wait_until(lambda: a.stats("store")["corrupt"] == 1, D, "the holder looked at its copy, and took it out")
    store = a.stats("store")
    assert (store["chunks"], store["quarantined_bytes"]) == (COUNT - 1, SPACE.chunk_bytes)
    wait_until(lambda: c.holders([broken]) == {}, 15, "c knows that nobody has it")
    assert c.get(SPACE, chain[6:], D).count == COUNT - 6
    a.put(SPACE, chain)  # computed again, somewhere else
    wait_until(lambda: c.holders(chain).get("a") == COUNT, 15, "c knows that a has them all again")
    wait_until(lambda: c.get(SPACE, chain, D).count == COUNT, 15, "the chain is whole again")
    for node in (a, c):
        node.wait_quiet(2 * D)


def test_another_holder_serves_what_changed_at_the_first(plane: Plane, rng: random.Random) -> None:
    a, b, c = plane.agents("abc")
    chain = a.put(SPACE, chain_of(SPACE, 1, COUNT))
    b.put(SPACE, chain)
    plane.wait_known(chain, {"a": COUNT, "b": COUNT})
    flip_in_arena(a, SPACE, chain[2], rng)
    flip_in_arena(b, SPACE, chain[7], rng)
    got = c.get(SPACE, chain, D)
    assert got.count == COUNT, got
    for node in (a, b, c):
        node.wait_quiet(2 * D)


def test_a_node_that_serves_its_own_client_a_changed_chunk_finds_it_when_a_peer_reads(
    plane: Plane, rng: random.Random
) -> None:
    """Many bits in many chunks: none is delivered to a peer, and every one is counted."""
    a, c = plane.agents("ac")
    chain = a.put(SPACE, chain_of(SPACE, 1, COUNT))
    plane.wait_known(chain, {"a": COUNT})
    for key in chain[1::2]:
        flip_in_arena(a, SPACE, key, rng, 1000)
    for key in chain:
        assert c.get(SPACE, [key], D).count == (key in chain[::2])
    changed = len(chain[1::2])
    wait_until(lambda: a.stats("store")["corrupt"] == changed, D, "all of them are out")
    assert a.stats("store")["chunks"] == COUNT - changed
    # What is out of use has a bound: the arena must not shrink for ever.
    assert a.stats("store")["quarantined_bytes"] <= max(SPACE.chunk_bytes, (64 * MIB) // 16)
