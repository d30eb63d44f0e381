"""Several at once: two holders for one reader, and 32 readers of one holder.

All processes share this machine, so a figure here is of how work is shared out and not of how fast a link is.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack

import kvmesh
from benchmarks.agents import ZMQ_ONLY, agents, chunks, space, wait_until_known
from benchmarks.figures import Figure, Prepared, rated, samples
from benchmarks.proxy import throttled
from benchmarks.wire_baselines import free_port

MIB = 1 << 20
LINK_BYTES_PER_S = 200e6
"""Far below what the machine moves, so that the links are what limits."""
LINK_TOTAL = 64 * MIB
NODES = 4
GETS_PER_NODE = 8
READERS_TOTAL = 1024 * MIB
RATIO_GOAL = 0.9
FAIRNESS_GOAL = 0.7


def two_holders(
    rounds: int, total: int = LINK_TOTAL, link_bytes_per_s: float = LINK_BYTES_PER_S, chunk_bytes: int = MIB
) -> list[Figure]:
    """One reader of two holders behind half a link each, beside one holder behind the whole link.

    The chunks of the one are not those of the two, so that each read has just the holders that it is about.
    """
    of, count = space(chunk_bytes), total // chunk_bytes
    rates = {"half-1": link_bytes_per_s / 2, "half-2": link_bytes_per_s / 2, "whole": link_bytes_per_s}
    with ExitStack() as stack:
        own = {name: free_port() for name in rates}
        ports = {name: (own[name], stack.enter_context(throttled(own[name], rates[name]))) for name in rates}
        names = [*rates, "reader"]
        running = agents(names, memory=_memory(2 * total), transports=ZMQ_ONLY, mesh_ports=ports)
        *holders, reader = stack.enter_context(running)
        split, one = (chunks(of, count, first) for first in (0, 10_000_000))
        for holder, values in zip(holders, (split, split, one), strict=True):
            assert holder.mesh.put(of, values, pin=True).stored == count
        wait_until_known(reader.mesh, list(split), holders=2)
        wait_until_known(reader.mesh, list(one))
        mbps = link_bytes_per_s / 1e6
        return [
            rated(
                f"one reader, two holders with {mbps / 2:g} MB/s each, {total // MIB} MiB",
                _fetch(reader.mesh, of, list(split)),
                f"one holder with the whole link of {mbps:g} MB/s",
                _fetch(reader.mesh, of, list(one)),
                bytes_moved=total,
                goal_ratio=RATIO_GOAL,
                rounds=rounds,
            )
        ]


def readers(
    rounds: int, total: int = READERS_TOTAL, nodes: int = NODES, gets: int = GETS_PER_NODE, chunk_bytes: int = MIB
) -> list[Figure]:
    """Several nodes with several gets each read from one holder at once, each get another chain.

    The baseline is one get of as many bytes. Fairness is of the gets of one round: the rate of the slowest, beside the
    rate of the fastest, each from the common start to its own end.
    """
    of, each = space(chunk_bytes), total // (nodes * gets * chunk_bytes)
    names = ["holder", *(f"reader-{number}" for number in range(nodes))]
    with agents(names, memory=_memory(3 * total), transports=ZMQ_ONLY) as (holder, *reading):
        # What one node has fetched others may fetch from it. So no chunk is read by two nodes: then all come from one.
        shared, whole = (chunks(of, each * nodes * gets, first) for first in (0, 10_000_000))
        for values in (shared, whole):
            assert holder.mesh.put(of, values, pin=True).stored == len(values)
            for agent in reading:
                wait_until_known(agent.mesh, list(values))
        # A chain's chunks need not be one prompt's: keys are keys, and each get has a run of its own.
        keys = list(shared)
        parts = [keys[at : at + each] for at in range(0, len(keys), each)]
        crowd = Crowd(of, [(agent.mesh, part) for agent, part in zip(reading * gets, parts, strict=True)])
        alone = _fetch(reading[0].mesh, of, list(whole))
        ends: list[list[float]] = []

        def forget() -> None:
            for agent in reading:
                agent.mesh.delete(keys)

        def together() -> None:
            ends.append(crowd.read())

        many_s, one_s = samples(Prepared(together, forget), alone, rounds=rounds)
    size = len(whole) * chunk_bytes
    words = f"{nodes * gets} readers of one node ({nodes} nodes, {gets} gets each), {size // MIB} MiB"
    slowest, fastest = (statistics.median(size / nodes / gets / pick(row) for row in ends[1:]) for pick in (max, min))
    return [
        Figure(
            f"{words}: all together", size / statistics.median(many_s) / 1e9, "GB/s", "one reader of as many bytes",
            size / statistics.median(one_s) / 1e9, goal_ratio=RATIO_GOAL,
        ),
        Figure(
            f"{words}: the slowest", slowest / 1e9, "GB/s", "the fastest", fastest / 1e9, goal_ratio=FAIRNESS_GOAL
        ),
    ]  # fmt: skip


class Crowd:
    """Gets that start together, a thread each."""

    def __init__(self, of: kvmesh.Namespace, gets: Sequence[tuple[kvmesh.Mesh, list[bytes]]]) -> None:
        self._of = of
        self._gets = gets

    def read(self) -> list[float]:
        """The seconds that each get took from the common start."""
        start = threading.Barrier(len(self._gets))
        took: list[float] = []
        short: list[str] = []

        def one(mesh: kvmesh.Mesh, chain: list[bytes]) -> None:
            start.wait()
            began = time.perf_counter()
            with mesh.get(self._of, chain, deadline_s=60) as hit:
                if hit.fetched == len(chain):
                    took.append(time.perf_counter() - began)
                else:
                    short.append(f"{hit.fetched} of {len(chain)} ({hit.count} there): {hit.reason}")

        threads = [threading.Thread(target=one, args=get) for get in self._gets]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(took) == len(self._gets), f"{len(self._gets) - len(took)} gets did not get all; {short}"
        return took


def _fetch(mesh: kvmesh.Mesh, of: kvmesh.Namespace, chain: list[bytes]) -> Prepared:
    """A get of all of `chain` from other nodes."""

    def get() -> None:
        with mesh.get(of, chain, deadline_s=60) as hit:
            assert hit.fetched == len(chain), f"{hit.fetched} of {len(chain)} chunks came: {hit.reason}"

    return Prepared(get, lambda: mesh.delete(chain))


def _memory(size: int) -> str:
    return f"{max(size, 64 * MIB) // MIB}MiB"
