"""How fast an engine stores and reads through its own agent: ``python -m benchmarks.local [--json]``.

Put copies into the arena and takes the checksum; get gives views, and the engine copies from them. The baseline is what
an engine could not do with less: one copy of the same bytes, chunk by chunk, into memory of its own. The arena is full
before the first round, so each put also evicts what it replaces.
"""

from __future__ import annotations

import itertools
import socket
import statistics
import threading

import torch

import kvmesh
from benchmarks.agents import agents, chunks, range_of, space
from benchmarks.figures import Figure, main, percentile, rated, samples

MIB = 1 << 20
GETS_A_ROUND = 64
MEDIAN_GOAL_US = 200.0
P99_GOAL_US = 1000.0
TITLE = "local: an engine and its own agent; 128 chunks of 1 MiB through the arena, 64 chunks a get"


def copies(rounds: int, count: int = 128) -> list[Figure]:
    """Put, and get with a copy out."""
    of = space(MIB)
    values = list(chunks(of, count).values())
    own = [torch.zeros_like(value) for value in values]
    numbers = itertools.count(1)
    with agents(["a"], memory=f"{4 * count}MiB") as (agent,):
        mesh = agent.mesh

        def put() -> None:
            chain = _chain(of, next(numbers), count)
            assert mesh.put(of, dict(zip(chain, values, strict=True))).stored == count

        def copy() -> None:
            for target, value in zip(own, values, strict=True):
                target.copy_(value)

        for _ in range(5):
            put()
        held = _chain(of, 0, count)
        assert mesh.put(of, dict(zip(held, values, strict=True)), pin=True).stored == count

        def get() -> None:
            with mesh.get(of, held) as hit:
                for target, view in zip(own, hit, strict=True):
                    assert isinstance(view, torch.Tensor)
                    target.copy_(view)

        size, against = count * MIB, "a copy of the same bytes"
        return [
            rated("put: copy in, checksum, commit", put, against, copy, bytes_moved=size, rounds=rounds),
            rated("get: lease, copy out, release", get, against, copy, bytes_moved=size, rounds=rounds),
        ]


def leases(rounds: int, count: int = 64) -> list[Figure]:
    """How long a get of chunks that are here takes, at the median and at the 99th percentile of all gets."""
    of = space(4096)
    values = chunks(of, count)
    chain = list(values)
    with agents(["a"], memory="64MiB") as (agent,), Echo() as echo:
        mesh = agent.mesh
        assert mesh.put(of, values, pin=True).stored == count

        def get() -> None:
            with mesh.get(of, chain) as hit:
                assert hit.count == count

        got, echoed = samples(get, echo.round_trip, rounds=rounds * GETS_A_ROUND)
    against = "a round trip on a bare unix socket"
    name = f"get of {count} local chunks, no bytes moved"
    return [
        Figure(
            f"{name}, median", statistics.median(got) * 1e6, "µs", against, statistics.median(echoed) * 1e6,
            goal=MEDIAN_GOAL_US,
        ),
        Figure(
            f"{name}, p99", percentile(got, 0.99) * 1e6, "µs", against, percentile(echoed, 0.99) * 1e6,
            goal=P99_GOAL_US,
        ),
    ]  # fmt: skip


class Echo:
    """A thread that sends back what it receives over a pair of unix sockets."""

    def __enter__(self) -> Echo:
        self._near, self._far = socket.socketpair()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._near.close()
        self._thread.join()
        self._far.close()

    def _serve(self) -> None:
        while data := self._far.recv(4096):
            self._far.sendall(data)

    def round_trip(self) -> None:
        """Send a few bytes and wait until they are back."""
        self._near.sendall(b"x" * 64)
        self._near.recv(4096)


def _chain(of: kvmesh.Namespace, number: int, count: int) -> list[bytes]:
    return of.chain(range_of(number * count * of.chunk_tokens, count * of.chunk_tokens))


if __name__ == "__main__":
    main({"copies": copies, "leases": leases}, TITLE)
