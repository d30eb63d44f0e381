"""Bulk from one agent to another, over TCP and over shared memory, beside every way that others have.

A client of the second agent gets what the first one holds. Each round deletes before what the round before it brought,
and no clock runs then. Every chunk that counts was verified against its checksum and can be used: no baseline does so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from benchmarks.agents import ZMQ_ONLY, agents, chunks, space, wait_until_known
from benchmarks.figures import Call, Figure, Prepared, Skip, rated, skipped
from benchmarks.wire_baselines import memcpy, mooncake, nixl, raw_tcp, redis_mget

KIB, MIB = 1 << 10, 1 << 20
TOTAL = 256 * MIB
SHM = "shm"
Baseline = Callable[[int, int], AbstractContextManager[Call]]


def tcp(rounds: int, total: int = TOTAL) -> list[Figure]:
    """Chunks of 1 MiB over TCP, beside a raw connection and beside what others use."""
    against: list[tuple[str, Baseline, float]] = [
        ("one raw TCP connection, recv_into", raw_tcp, 0.9),
        ("redis-server, MGET by hiredis", redis_mget, 4.0),
        ("Mooncake's transfer engine over TCP", mooncake, 1.2),
        ("NIXL's own read, UCX tcp", nixl, 1.2),
    ]
    return _beside(against, "agent to agent over TCP", MIB, total // MIB, ZMQ_ONLY, rounds)


def tcp_small(rounds: int, total: int = TOTAL) -> list[Figure]:
    """Chunks of 64 KiB over TCP: what small models have."""
    against: list[tuple[str, Baseline, float]] = [("one raw TCP connection, recv_into", raw_tcp, 0.5)]
    return _beside(against, "agent to agent over TCP", 64 * KIB, total // (64 * KIB), ZMQ_ONLY, rounds)


def shm(rounds: int, total: int = TOTAL) -> list[Figure]:
    """Chunks of 1 MiB between two agents of one host that may use shared memory."""
    against: list[tuple[str, Baseline, float]] = [("one memcpy of the same bytes", memcpy, 0.85)]
    return _beside(against, "agent to agent by shm", MIB, total // MIB, f"{SHM},{ZMQ_ONLY}", rounds)


@contextmanager
def fetching(chunk_bytes: int, count: int, transports: str) -> Iterator[Prepared]:
    """A get of `count` chunks that another agent holds, prepared by forgetting those of the round before."""
    of = space(chunk_bytes)
    size = chunk_bytes * count
    memory = f"{max(2 * size, 64 * MIB) // MIB}MiB"
    with agents(["a", "b"], memory=memory, transports=transports) as (holder, reader):
        values = chunks(of, count)
        chain = list(values)
        assert holder.mesh.put(of, values, pin=True).stored == count
        wait_until_known(reader.mesh, chain)

        def get() -> None:
            with reader.mesh.get(of, chain, deadline_s=60) as hit:
                assert hit.fetched == count, f"{hit.fetched} of {count} chunks came: {hit.reason}"

        get()
        by_shm = reader.mesh.stats()["transport"]["bytes_read_shm"]
        if by_shm != (size if SHM in transports else 0):
            # The name of a row says by what the bytes went; a figure under the wrong name is worse than none.
            raise Skip(f"with --transports {transports}, {by_shm} of {size} bytes went through shared memory")
        yield Prepared(get, lambda: reader.mesh.delete(chain))


def _beside(
    against: list[tuple[str, Baseline, float]], name: str, chunk_bytes: int, count: int, transports: str, rounds: int
) -> list[Figure]:
    """One row for each baseline, which runs in turns with our own read and with no other baseline."""
    size = chunk_bytes * count
    words = f"{chunk_bytes // MIB} MiB" if chunk_bytes >= MIB else f"{chunk_bytes // KIB} KiB"
    name = f"{name}, {size // MIB} MiB in chunks of {words}"
    rows = []
    try:
        with fetching(chunk_bytes, count, transports) as get:
            for words, baseline, goal in against:
                try:
                    with baseline(chunk_bytes, count) as call:
                        rows.append(rated(name, get, words, call, bytes_moved=size, goal_ratio=goal, rounds=rounds))
                except Skip as reason:
                    rows.append(skipped(name, "GB/s", words, reason, goal_ratio=goal))
    except Skip as reason:
        rows = [skipped(name, "GB/s", words, reason, goal_ratio=goal) for words, _, goal in against]
    return rows
