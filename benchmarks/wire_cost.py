"""What a read costs beside its bytes: the time of one small chunk, and the memory of a large read."""

from __future__ import annotations

import statistics
import threading
from pathlib import Path

from benchmarks.agents import ZMQ_ONLY, agents, chunks, space, wait_until_known
from benchmarks.figures import Figure, percentile, samples
from benchmarks.wire_baselines import zmq_round_trip
from benchmarks.wire_bulk import fetching

KIB, MIB = 1 << 10, 1 << 20
LATENCY_CHUNK = 64 * KIB
GETS_A_ROUND = 32
LATENCY_RATIO_GOAL = 0.5
MEMORY_GOAL_MIB = 64.0
MEMORY_TOTALS = (256 * MIB, 1024 * MIB)
MEMORY_READS = 3
LOOK_INTERVAL_S = 0.001


def latency(rounds: int, chunk_bytes: int = LATENCY_CHUNK) -> list[Figure]:
    """A get of one chunk from another node, from the engine's call to the verified view, beside ZeroMQ alone."""
    with fetching(chunk_bytes, 1, ZMQ_ONLY) as get, zmq_round_trip(chunk_bytes) as ask:
        got, asked = samples(get, ask, rounds=rounds * GETS_A_ROUND)
    name, against = f"get of one remote chunk of {chunk_bytes // KIB} KiB", "a bare ZeroMQ round trip of the same bytes"
    return [
        Figure(
            f"{name}, median", statistics.median(got) * 1e6, "µs", against, statistics.median(asked) * 1e6,
            goal_ratio=LATENCY_RATIO_GOAL,
        ),
        Figure(f"{name}, p99", percentile(got, 0.99) * 1e6, "µs", against, percentile(asked, 0.99) * 1e6),
    ]  # fmt: skip


def memory(rounds: int, totals: tuple[int, ...] = MEMORY_TOTALS) -> list[Figure]:
    """The memory beyond the arena that reads of each size need: holder and reader together, in new processes."""
    return [_memory_of(total, min(rounds, MEMORY_READS)) for total in totals]


def _memory_of(total: int, reads: int) -> Figure:
    """The peak of both agents over some reads, above what they had before the first."""
    of, count = space(MIB), total // MIB
    with agents(["a", "b"], memory=f"{total // MIB + 64}MiB", transports=ZMQ_ONLY) as (holder, reader):
        values = chunks(of, count)
        chain = list(values)
        assert holder.mesh.put(of, values, pin=True).stored == count
        del values
        wait_until_known(reader.mesh, chain)
        with Watch([holder.pid, reader.pid]) as watch:
            for _ in range(reads):
                with reader.mesh.get(of, chain, deadline_s=60) as hit:
                    assert hit.fetched == count, f"{hit.fetched} of {count} chunks came: {hit.reason}"
                reader.mesh.delete(chain)
    name = f"memory beyond the arena, both ends, of a read of {total // MIB} MiB"
    return Figure(name, watch.grown_bytes / MIB, "MiB", goal=MEMORY_GOAL_MIB)


class Watch:
    """A thread that looks at what processes have beside shared memory, as often as it can."""

    def __init__(self, pids: list[int]) -> None:
        self._pids = pids
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._before = self._peak = 0

    @property
    def grown_bytes(self) -> int:
        """The peak, less what was there before."""
        return self._peak - self._before

    def __enter__(self) -> Watch:
        self._before = self._peak = self._now()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._done.wait(LOOK_INTERVAL_S):
            self._peak = max(self._peak, self._now())

    def _now(self) -> int:
        return sum(private_bytes(pid) for pid in self._pids)


def private_bytes(pid: int) -> int:
    """What a process has in RAM beside shared memory, which is where its arena is.

    The kernel keeps these counters, so looking costs the process nothing; smaps_rollup walks all its pages.
    """
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    kib = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines) if "kB" in rest}
    return (kib["RssAnon"] + kib["RssFile"]) * KIB
