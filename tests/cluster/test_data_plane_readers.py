"""Row 12 of the fault table: many readers of one chunk, a reader that never reads, and no room to receive."""

from __future__ import annotations

import statistics
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import kvmesh
from tests.support import content
from tests.support.content import MIB, chain_of, space_of
from tests.support.plane import LATE_S, Plane, beside
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.slow]  # real processes

SPACE = space_of(MIB)
D = 4.0


@pytest.fixture
def plane(tmp_path: Path) -> Iterator[Plane]:
    with Plane(tmp_path) as running:
        yield running


def test_64_readers_of_one_chunk_are_one_fetch(plane: Plane) -> None:
    a, c = plane.agents("ac")
    chain = a.put(SPACE, chain_of(SPACE, 1, 1))
    plane.wait_known(chain, {"a": 1})
    a.proxy.down.bytes_per_s = 4 * MIB  # long enough for all of them to come meanwhile
    readers = 64
    together = threading.Barrier(readers)

    def read(_: int) -> int:
        with kvmesh.connect(c.process.socket) as mesh:
            together.wait()
            return content.get(mesh, SPACE, chain, D)[0]

    with ThreadPoolExecutor(readers) as pool:
        assert sum(pool.map(read, range(readers))) == readers
    a.proxy.down.bytes_per_s = None
    assert a.stats("transport")["chunks_served"] == 1
    assert c.stats("transport")["chunks_read"] == 1
    for node in (a, c):
        node.wait_quiet(2 * D)


def test_a_reader_that_never_reads_costs_others_nothing_and_is_dropped(plane: Plane) -> None:
    a, stuck, c = plane.agents("abc", memory="192MiB")
    count = 64
    wanted = a.put(SPACE, chain_of(SPACE, 1, count))
    chains = [a.put(SPACE, chain_of(SPACE, seed, 4)) for seed in range(2, 22)]
    plane.wait_known(wanted, {"a": count})
    plane.wait_known(chains[-1], {"a": 4})
    alone = [c.get(SPACE, chain, D) for chain in chains[:10]]
    before, others = a.proxy.down.bytes, a.proxy.accepted
    a.proxy.down.bytes_per_s = 100 * MIB
    with beside(stuck.get, SPACE, wanted, D) as getting:
        wait_until(lambda: a.proxy.down.bytes - before > 4 * MIB, D, "the reader has begun")
        a.proxy.pause(first=others, new=False)  # from here on its connections take nothing
        a.proxy.down.bytes_per_s = None
        leased = a.stats("store")["leases"]  # now: on a busy machine its deadline may be over after what follows
        assert 0 < leased < count, f"{leased} chunks are kept for the one who reads nothing"
        together = [c.get(SPACE, chain, D) for chain in chains[10:]]
        assert [got.count for got in together] == [4] * 10
        leased = a.stats("store")["leases"]
        assert leased < count, f"{leased} chunks are kept for the one who reads nothing"
        assert getting.result().count < count
    # Its own deadline, and what a holder gives beyond it: then its leases are back, and nobody has told the holder.
    wait_until(lambda: a.stats("store")["leases"] == 0, 2 * D + LATE_S, "the reader was dropped")
    slow_s, fast_s = (statistics.median(got.took_s for got in part) for part in (together, alone))
    assert slow_s < max(3 * fast_s, 0.1), f"others took {slow_s:.3f} s instead of {fast_s:.3f} s"
    stuck.wait_quiet(2 * D)
    a.proxy.resume()
    wait_until(lambda: stuck.get(SPACE, wanted, D).count == count, 30, "it reads again")


def test_what_finds_no_room_is_a_shorter_hit_and_frees_all_that_it_took(plane: Plane) -> None:
    (a,) = plane.agents("a", memory="64MiB")
    c = plane.start("c", memory="16MiB")
    plane.wait_alive()
    chain = a.put(SPACE, chain_of(SPACE, 1, 32))
    plane.wait_known(chain, {"a": 32})
    own = c.put(SPACE, chain_of(SPACE, 2, 10))
    with c.mesh.get(SPACE, own) as hit:  # leased: no room but for 6 more
        assert hit.count == 10
        got = c.get(SPACE, chain, D)
        assert got.count <= 6
        assert got.reason == "arena full"
        assert got.took_s < D / 2, "it waits for room that does not come"
        assert c.get(SPACE, own, D).count == 10
    c.wait_quiet(2 * D)
    assert c.get(SPACE, chain[:16], D).count == 16
    store = c.stats("store")
    assert store["used_bytes"] <= store["capacity_bytes"]
    for node in (a, c):
        node.wait_quiet(2 * D)
