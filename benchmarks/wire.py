"""How fast chunks come from another node: ``python -m benchmarks.wire [--json]``.

Two agent processes on loopback; a client of the second one gets what the first one holds, and deletes it again between
rounds. The baseline is one raw TCP connection between two processes: one sends the same bytes in chunks of the same
size, the other does recv_into a buffer that is there already. It checks nothing and keeps nothing: the least that
moving these bytes costs.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from benchmarks.agents import agents, chunks, space
from benchmarks.figures import Figure, main, rated

KIB, MIB = 1 << 10, 1 << 20
TITLE = "wire: agent to agent over zmq on loopback"
SENDER = """
import socket, sys
chunk, count = int(sys.argv[1]), int(sys.argv[2])
payload = memoryview(bytearray(chunk * count))
with socket.create_server(("127.0.0.1", 0)) as server:
    print(server.getsockname()[1], flush=True)
    connection, _ = server.accept()
    with connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while connection.recv(1):
            for at in range(0, chunk * count, chunk):
                connection.sendall(payload[at : at + chunk])
"""


def figures() -> list[Figure]:
    """One figure a chunk size."""
    return [_figure(MIB, 256), _figure(64 * KIB, 1024)]


def _figure(chunk_bytes: int, count: int) -> Figure:
    of = space(chunk_bytes)
    size = chunk_bytes * count
    with agents(["a", "b"], memory=f"{2 * size // MIB}MiB") as (a, b), _raw(chunk_bytes, count) as raw:
        values = chunks(of, count)
        chain = list(values)
        assert a.put(of, values, pin=True).stored == count
        while (found := b.locate(chain)["holders"]) == [] or found[0]["run_chunks"] < count:
            time.sleep(0.02)

        def get() -> None:
            with b.get(of, chain, deadline_s=60) as hit:
                assert hit.fetched == count, hit.reason
            b.delete(chain)

        name = f"{size // MIB} MiB in chunks of {chunk_bytes // KIB} KiB"
        return rated(name, get, "one raw TCP connection", raw, bytes_moved=size)


@contextmanager
def _raw(chunk_bytes: int, count: int) -> Iterator[Callable[[], None]]:
    """A call that moves the bytes over one TCP connection."""
    command = [sys.executable, "-c", SENDER, str(chunk_bytes), str(count)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        port = int(process.stdout.readline())
        into = memoryview(bytearray(chunk_bytes * count))
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

            def receive() -> None:
                connection.sendall(b"x")
                at = 0
                while at < len(into):
                    at += connection.recv_into(into[at : at + chunk_bytes])

            yield receive


if __name__ == "__main__":
    main(figures, TITLE)
