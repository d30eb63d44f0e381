"""How fast an engine stores and reads through its own agent: ``python -m benchmarks.local [--json]``.

Put copies into the arena and takes the checksum; get gives views, and the engine copies from them. The baseline is what
an engine could not do with less: one copy of the same bytes, chunk by chunk, into memory of its own. The arena is full
before the first round, so each put also evicts what it replaces.
"""

from __future__ import annotations

import itertools
import socket
import threading

import torch

from benchmarks.agents import agents, chunks, space
from benchmarks.figures import Figure, in_turns, main, rated

MIB = 1 << 20
CHUNKS = 128
GETS = 64
GET_CHUNKS = 64
TITLE = f"local: {CHUNKS} chunks of 1 MiB through the arena; {GET_CHUNKS} chunks a get"


def figures() -> list[Figure]:
    """Put, get with a copy out, and a get of leased chunks alone."""
    of = space(MIB)
    values = list(chunks(of, CHUNKS).values())
    own = [torch.zeros_like(value) for value in values]
    numbers = itertools.count(1)

    with agents(["a"], memory="512MiB") as (mesh,):

        def put() -> None:
            chain = _chain(next(numbers))
            assert mesh.put(of, dict(zip(chain, values, strict=True))).stored == CHUNKS

        def _chain(number: int) -> list[bytes]:
            start = number * CHUNKS * of.chunk_tokens
            return of.chain(list(range(start, start + CHUNKS * of.chunk_tokens)))

        def copy() -> None:
            for target, value in zip(own, values, strict=True):
                target.copy_(value)

        for _ in range(5):
            put()
        held = _chain(0)
        assert mesh.put(of, dict(zip(held, values, strict=True)), pin=True).stored == CHUNKS

        def get() -> None:
            with mesh.get(of, held) as hit:
                for target, view in zip(own, hit, strict=True):
                    assert isinstance(view, torch.Tensor)
                    target.copy_(view)

        def get_leases() -> None:
            for _ in range(GETS):
                with mesh.get(of, held[:GET_CHUNKS]) as hit:
                    assert hit.count == GET_CHUNKS

        size = CHUNKS * MIB
        rows = [
            rated("put: copy in, checksum, commit", put, "a copy of the same bytes", copy, bytes_moved=size),
            rated("get: lease, copy out, release", get, "a copy of the same bytes", copy, bytes_moved=size),
        ]
        with _Echo() as echo:
            lease_s, echo_s = in_turns(get_leases, echo.round_trips)
        name = f"get of {GET_CHUNKS} chunks, no bytes moved"
        rows.append(Figure(name, lease_s / GETS * 1e6, "µs", "a round trip on a bare unix socket", echo_s / GETS * 1e6))
    return rows


class _Echo:
    """A thread that sends back what it receives over a pair of unix sockets."""

    def __enter__(self) -> _Echo:
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

    def round_trips(self) -> None:
        for _ in range(GETS):
            self._near.sendall(b"x" * 64)
            self._near.recv(4096)


if __name__ == "__main__":
    main(figures, TITLE)
