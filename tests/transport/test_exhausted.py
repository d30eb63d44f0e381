"""A process without one more descriptor, socket or thread to give: what cannot be opened is a miss, and the next read is
served again."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import socket
import threading
from collections.abc import Iterator

import pytest

from kvmesh.transport import zmq_links, zmq_sockets
from kvmesh.transport.errors import UnreachableError
from tests.transport.ends import LONG_S, Chunks, collect, wants
from tests.transport.strangers import transport


@contextlib.contextmanager
def no_descriptor() -> Iterator[None]:
    """Whoever opens something in here gets EMFILE."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.dup(0)
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_a_read_without_a_descriptor_is_a_miss_and_the_next_one_is_not(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(zmq_links, "numeric", lambda host, port: (socket.AF_INET, (host, port)))  # glibc opens one, too

    async def main() -> None:
        source = Chunks()
        source.fill(1, 100)
        async with transport(source) as holder, transport() as reader:
            with no_descriptor():
                async with asyncio.timeout(LONG_S):
                    assert await collect(reader.read(holder.address, wants([0], 100), deadline_s=1.0)) == {}
            assert reader.stats().peers_lost == 1
            assert len(await collect(reader.read(holder.address, wants([0], 100), deadline_s=LONG_S))) == 1

    asyncio.run(main())
    assert not caplog.records


def test_a_name_without_a_thread_to_look_it_up_is_a_miss(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    async def main() -> None:
        source = Chunks()
        source.fill(1, 100)
        async with transport(source) as holder, transport() as reader:
            with monkeypatch.context() as patched:
                patched.setattr(threading.Thread, "start", fails)
                async with asyncio.timeout(LONG_S):
                    assert await collect(reader.read("some.host:80", wants([0], 100), deadline_s=1.0)) == {}
            assert len(await collect(reader.read(holder.address, wants([0], 100), deadline_s=LONG_S))) == 1

    asyncio.run(main())


def test_a_call_without_a_socket_is_unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with transport() as holder:
            for sockets in range(3, 7):  # a transport has a ROUTER and its monitor; each call's link has as many
                with monkeypatch.context() as patched:
                    patched.setattr(zmq_sockets, "SOCKETS_PER_PEER", sockets)
                    patched.setattr(zmq_sockets, "PEERS_MAX", 1)
                    async with transport() as caller:
                        with contextlib.suppress(UnreachableError):
                            assert await caller.call(holder.address, b"heard", timeout_s=LONG_S) == b"heard"

    asyncio.run(main())
