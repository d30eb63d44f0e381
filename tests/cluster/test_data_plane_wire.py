"""Row 7 of the fault table on the wire, row 13's torn frames, and defect 16: what networks and kernels do to a read."""

from __future__ import annotations

import contextlib
import itertools
import resource
import socket
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

import kvmesh
from tests.support.content import KIB, MIB, chain_of, space_of
from tests.support.plane import Node, Plane
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.slow]  # real processes

D = 4.0


@pytest.fixture
def plane(tmp_path: Path) -> Iterator[Plane]:
    with Plane(tmp_path) as running:
        yield running


# --- row 7 -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chunk_bytes", "count", "flip_every_bytes"),
    [
        # A tenth of the bytes are headers; chunks that are copied into one message; chunks of several pieces.
        (256, 512, 10_000),
        (16 * KIB, 64, 300_000),
        (3 * MIB, 6, 8_000_000),
    ],
    ids=["tiny", "small", "large"],
)
def test_no_flipped_bit_reaches_a_client(plane: Plane, chunk_bytes: int, count: int, flip_every_bytes: float) -> None:
    a, c = plane.agents("ac", memory="128MiB")
    space = space_of(chunk_bytes)
    chain = a.put(space, chain_of(space, 1, count))
    plane.wait_known(chain, {"a": count})
    a.proxy.down.flip_every_bytes = flip_every_bytes
    a.proxy.up.flip_every_bytes = 10 * flip_every_bytes
    delivered = 0
    for _ in range(25):
        delivered += flipped_get(c, space, chain)
    flips = a.proxy.down.flips + a.proxy.up.flips
    a.proxy.down.flip_every_bytes = a.proxy.up.flip_every_bytes = None
    transport = c.stats("transport")
    assert flips >= 25, flips
    assert delivered, "nothing came at all: the flips prove nothing"
    assert transport["corrupt"] > 0, transport
    # The holder's copies are right, whatever a reader says of them: all of them are still there.
    a.proxy.cut()
    wait_until(lambda: c.holders(chain) == {"a": count}, 30, "c knows again what a holds")
    wait_until(lambda: c.get(space, chain, D).count == count, 30, "all comes right")
    store = a.stats("store")
    assert (store["chunks"], store["corrupt"], store["quarantined_bytes"]) == (count, 0, 0)
    for node in (a, c):
        node.wait_quiet(2 * D)


def flipped_get(node: Node, space: kvmesh.Namespace, chain: list[bytes]) -> int:
    """Get a chain through flips, and forget it again. Every chunk that comes is looked at."""
    count = node.get(space, chain, 0.5).count
    node.mesh.delete(chain)
    return count


# --- row 13: torn frames ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", ["down", "up"])
def test_a_connection_torn_at_any_byte_is_a_miss_and_no_more(plane: Plane, direction: str) -> None:
    """In the greeting, in the handshake, in a header, in a body, between frames."""
    a, c = plane.agents("ac")
    space, count = space_of(256 * KIB), 8
    chain = a.put(space, chain_of(space, 1, count))
    plane.wait_known(chain, {"a": count})
    faults = a.proxy.down if direction == "down" else a.proxy.up
    at_bytes = [0, 1, 9, 10, 11, 63, 64, 65, 66, 80, 100, 130, 150, 151, 160, 180, 200, 300]
    if direction == "down":
        at_bytes += [1000, 256 * KIB, 256 * KIB + 250, 1 * MIB, 2 * MIB]
    found = Counter[int]()
    for turn, cut_at in enumerate(at_bytes):
        faults.cut_after_bytes, faults.cut_resets = cut_at, turn % 2 == 0
        a.proxy.cut()
        got = c.get(space, chain, 1.0)
        assert whole(c, space, chain) == got.count
        found[got.count] += 1
        c.wait_quiet(2 * D)
        faults.cut_after_bytes = None
        c.mesh.delete(chain)
    assert found[0], f"no cut was seen: {found}"
    wait_until(lambda: c.holders(chain) == {"a": count}, 20, "c follows a again")
    wait_until(lambda: c.get(space, chain, D).count == count, 20, "all comes")
    a.wait_quiet(2 * D)


def whole(node: Node, space: kvmesh.Namespace, chain: list[bytes]) -> int:
    """How much of a chain the node has itself; all of it is looked at."""
    run = node.holders(chain).get(node.name, 0)
    assert node.get(space, chain[:run], D).count == run
    return run


# --- out of descriptors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a", "c"])
def test_an_agent_without_file_descriptors_stays_up(plane: Plane, name: str) -> None:
    """`a` is read from, `c` reads: for either a new connection is impossible for a while."""
    a, c = plane.agents("ac")
    space, count = space_of(64 * KIB), 4
    chains = [a.put(space, chain_of(space, seed, count)) for seed in range(1, 4)]
    for chain in chains:
        plane.wait_known(chain, {"a": count})
    starved = plane.nodes[name]
    limits = resource.prlimit(starved.process.pid, resource.RLIMIT_NOFILE)
    a.proxy.cut()  # so that new connections are needed
    resource.prlimit(starved.process.pid, resource.RLIMIT_NOFILE, (starved.descriptors(), limits[1]))
    try:
        with contextlib.ExitStack() as stack:
            for _ in range(40):  # each takes one, or is not accepted
                stack.enter_context(socket.create_connection(("127.0.0.1", a.port)))
            for chain in chains[:2]:
                assert c.get(space, chain, 1.0).count <= count
            assert a.process.alive
            assert c.process.alive
    finally:
        resource.prlimit(starved.process.pid, resource.RLIMIT_NOFILE, limits)
    for node in (a, c):
        assert node.stats("node") == node.name
        node.wait_quiet(2 * D)
    wait_until(lambda: c.get(space, chains[2], D).count == count, 30, "c reads from a again")


# --- defect 16 --------------------------------------------------------------------------------------------------------


def test_a_connection_that_died_while_idle_is_found_out_and_replaced(plane: Plane) -> None:
    """As a firewall does it: packets are dropped, and nobody is told."""
    a, c = plane.agents("ac")
    space, count = space_of(64 * KIB), 4
    chains = [a.put(space, chain_of(space, seed, count)) for seed in range(1, 40)]
    plane.wait_known(chains[-1], {"a": count})
    assert c.get(space, chains[0], D).count == count
    a.proxy.swallow()
    rest = itertools.cycle(chains[1:])  # none of them can be had before it is replaced
    assert c.get(space, next(rest), 1.0).count <= count  # and no longer than that
    wait_until(lambda: c.get(space, next(rest), 1.0).count == count, 20, "c reads from a over a new connection")
    for node in (a, c):
        node.wait_quiet(2 * D)
    chain = a.put(space, chain_of(space, 99, count))
    plane.wait_known(chain, {"a": count})  # and follows its journal


def test_many_reads_from_several_peers_use_few_connections(plane: Plane) -> None:
    *holders, c = plane.agents("abdefc", memory="32MiB")
    space = space_of(4 * KIB)
    chains = [holders[turn % 5].put(space, chain_of(space, turn, 2)) for turn in range(200)]
    plane.wait_known(chains[-1], {holders[199 % 5].name: 2}, to="c")
    before = sockets(c)
    accepted = sum(holder.proxy.accepted for holder in holders)
    for chain in chains:
        wait_until(lambda chain=chain: c.get(space, chain, D).count == 2, 10, "c has read the chain")
    after = sockets(c)
    # Up to two for bulk to each peer, beside those that the followers have.
    assert after["open"] - before["open"] <= 2 * len(holders) + 2, (before, after)
    assert after["ending"] - before["ending"] <= 5, (before, after)
    assert sum(holder.proxy.accepted for holder in holders) - accepted <= 2 * len(holders) + 2


def sockets(node: Node) -> Counter[str]:
    """TCP sockets of an agent, and those of its mesh ports' peers that wait to be forgotten."""
    ports = {peer.laddr.port for peer in psutil.Process(node.process.pid).net_connections("tcp")}
    found = Counter[str]()
    for one in psutil.net_connections("tcp"):
        if one.pid == node.process.pid:
            found["open"] += one.status == psutil.CONN_ESTABLISHED
        elif one.pid is None and one.laddr.port in ports:
            found["ending"] += 1
    return found
