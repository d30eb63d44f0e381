"""What agent to agent is measured against: other ways of getting the same bytes from another process on this host.

Each is a context manager that yields a call, which moves everything once; the far ends are processes of their own
(`benchmarks.peers`). Targets are memory that was written before, so no baseline pays for page faults that a warm arena
does not. What is not installed raises `Skip` with what to do: `make bench` installs all of it where it can.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

import numpy as np

from benchmarks.figures import Call, Skip
from benchmarks.peers import pattern

FOLDER = Path(__file__).parent.parent / ".venv" / "bench"
"""Where `make bench` puts the packages of the baselines: beside our own environment, not into it."""
START_TIMEOUT_S = 20.0
REDIS_BUFFER_BYTES = 1 << 20


@contextmanager
def raw_tcp(chunk_bytes: int, count: int) -> Iterator[Call]:
    """One TCP connection, recv_into of one chunk after the other. It checks nothing and keeps nothing."""
    with _far_end("raw", chunk_bytes, count) as (_, facts):
        into = np.ones(chunk_bytes * count, np.uint8).data
        with socket.create_connection(("127.0.0.1", facts["port"])) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

            def receive() -> None:
                connection.sendall(b"x")
                at = 0
                while at < len(into):
                    ends = at - at % chunk_bytes + chunk_bytes
                    at += connection.recv_into(into[at:ends])

            yield receive
        _check(np.frombuffer(into, np.uint8))


@contextmanager
def redis_mget(chunk_bytes: int, count: int) -> Iterator[Call]:
    """A redis-server of our own that keeps nothing on disk, asked by one MGET, whose answer hiredis parses.

    The socket is read a MiB at a time straight into hiredis: faster than redis-py, which reads 64 KiB.
    """
    server = shutil.which("redis-server") or shutil.which("redis-server", path=FOLDER / "debian" / "usr" / "bin")
    if server is None:
        raise Skip("there is no redis-server: make bench unpacks one where apt has it")
    need_package("hiredis")
    hiredis = import_module("hiredis")
    port = free_port()
    command = [server, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
    with _process([*command, "--loglevel", "warning"], stdout=subprocess.DEVNULL) as process:
        connection = _connect(port, process)
        with connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            reader, buffer = hiredis.Reader(), bytearray(REDIS_BUFFER_BYTES)

            def ask(*words: bytes) -> Any:
                connection.sendall(hiredis.pack_command(words))
                while (answer := reader.gets()) is False:
                    read = connection.recv_into(buffer)
                    if not read:
                        raise EOFError("redis-server closed the connection")
                    reader.feed(buffer, 0, read)
                return answer

            keys = [b"%d" % index for index in range(count)]
            value = pattern(chunk_bytes).tobytes()
            for key in keys:
                assert ask(b"SET", key, value) == b"OK"

            def mget() -> None:
                values = ask(b"MGET", *keys)
                assert len(values) == count

            assert ask(b"MGET", *keys)[-1] == value
            yield mget


@contextmanager
def mooncake(chunk_bytes: int, count: int) -> Iterator[Call]:
    """Mooncake's transfer engine over TCP: one batch of one-sided reads, a chunk each, between two processes."""
    need_package("mooncake")
    with _one_sided("mooncake", chunk_bytes, count) as read:
        yield read


@contextmanager
def nixl(chunk_bytes: int, count: int) -> Iterator[Call]:
    """NIXL's own Python API over UCX's tcp: one transfer with a descriptor a chunk, between two processes."""
    need_package("nixl_cu12")
    with _one_sided("nixl", chunk_bytes, count) as read:
        yield read


@contextmanager
def _one_sided(kind: str, chunk_bytes: int, count: int) -> Iterator[Call]:
    """A process that reads what another one has registered, each time that it is told to."""
    with (
        _far_end(f"{kind}-serve", chunk_bytes, count) as (_, facts),
        _far_end(f"{kind}-read", chunk_bytes, count) as (reader, _),
    ):
        stdin, stdout = _pipes(reader)
        stdin.write(json.dumps(facts) + "\n")
        stdin.flush()

        def read() -> dict[str, Any]:
            stdin.write("read\n")
            stdin.flush()
            answer = _line(stdout, f"{kind}-read")
            assert not answer["failed"], f"{kind}'s read failed with {answer['failed']}"
            return answer

        size = chunk_bytes * count
        assert read()["sample"] == pattern(size)[:: max(1, size // 64)].tolist(), f"{kind} delivered other bytes"
        yield read


@contextmanager
def memcpy(chunk_bytes: int, count: int) -> Iterator[Call]:
    """One copy of the bytes, chunk by chunk, from memory to memory, both written before."""
    source, target = pattern(chunk_bytes * count), np.ones(chunk_bytes * count, np.uint8)

    def copy() -> None:
        for at in range(0, chunk_bytes * count, chunk_bytes):
            np.copyto(target[at : at + chunk_bytes], source[at : at + chunk_bytes])

    yield copy


@contextmanager
def zmq_round_trip(size: int) -> Iterator[Call]:
    """A DEALER that asks a ROUTER of another process, which answers with one frame of `size` bytes."""
    import zmq

    with _far_end("zmq", size, 1) as (_, facts), zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.linger = 0
        dealer.connect(f"tcp://127.0.0.1:{facts['port']}")

        def ask() -> None:
            dealer.send(b"x" * 64)
            assert len(dealer.recv(copy=False)) == size

        yield ask
        dealer.linger = 1000
        dealer.send(b"")


@contextmanager
def _far_end(kind: str, chunk_bytes: int, count: int) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """A process of `benchmarks.peers`, and what it said when it was ready. What it logs is shown only if it fails."""
    command = [sys.executable, "-m", "benchmarks.peers", kind, str(chunk_bytes), str(count), str(FOLDER)]
    with _process(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        yield process, _line(_pipes(process)[1], kind)


@contextmanager
def _process(command: Sequence[str], **pipes: Any) -> Iterator[subprocess.Popen[str]]:
    """A process that is ended with the block."""
    libraries = [os.environ.get("LD_LIBRARY_PATH", ""), *map(str, (FOLDER / "debian").glob("**/*-linux-gnu"))]
    environment = os.environ | {"LD_LIBRARY_PATH": ":".join(filter(None, libraries))}
    with subprocess.Popen(command, text=True, stderr=subprocess.DEVNULL, env=environment, **pipes) as process:
        try:
            yield process
        finally:
            process.terminate()


def _pipes(process: subprocess.Popen[str]) -> tuple[IO[str], IO[str]]:
    assert process.stdin is not None
    assert process.stdout is not None
    return process.stdin, process.stdout


def _line(stdout: IO[str], kind: str) -> dict[str, Any]:
    """The next JSON line; a library may print others between."""
    for line in stdout:
        if line.startswith("{"):
            document: dict[str, Any] = json.loads(line)
            return document
    raise Skip(f"{kind} ended: python -m benchmarks.peers {kind} 65536 4 {FOLDER} says why")


def need_package(name: str) -> None:
    """A package of the baselines is there, and can be imported. It is looked for last: nothing of it stands before our
    own. Whether it is imported here is the caller's to say: Mooncake starts threads when it is."""
    if str(FOLDER) not in sys.path:
        sys.path.append(str(FOLDER))
    if find_spec(name) is None:
        raise Skip(f"the package {name} is not installed, nor in {FOLDER}: make bench does what can be done")


def free_port() -> int:
    """A port that nothing listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


def _connect(port: int, process: subprocess.Popen[str]) -> socket.socket:
    """A connection to a server that has just been started."""
    ends = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port))
        except ConnectionRefusedError:
            if process.poll() is not None or time.monotonic() > ends:
                raise Skip(f"redis-server does not answer on port {port}") from None
            time.sleep(0.02)


def _check(received: np.ndarray[Any, Any]) -> None:
    assert np.array_equal(received, pattern(received.nbytes)), "other bytes came than were sent"
