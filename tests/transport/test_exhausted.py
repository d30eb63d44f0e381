"""A process without one more descriptor, socket or thread to give: what cannot be opened is a miss, and the next read
is served again."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import resource
import socket
import subprocess
import threading
from collections.abc import Iterator

import pytest

from kvmesh.transport import nixl_process, shm, zmq_links, zmq_sockets
from kvmesh.transport.backends import open_transport
from kvmesh.transport.errors import UnreachableError
from kvmesh.transport.interface import Region
from kvmesh.transport.nixl_process import LENGTH, READ, Keeper
from tests.support.waiting import wait_until_async
from tests.transport.arenas import MappedChunks
from tests.transport.ends import LONG_S, Chunks, collect, echo, wants
from tests.transport.strangers import transport


@contextlib.contextmanager
def no_descriptor(but: int = 0) -> Iterator[None]:
    """Whoever opens something in here gets EMFILE, once `but` descriptors are taken."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = [os.dup(0) for _ in range(but + 1)]
    for descriptor in free:
        os.close(descriptor)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free[-1], before[1]))
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


def test_shared_memory_without_a_descriptor_is_left_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whichever it is that cannot be had: of the connection, at either end, or of the arena."""
    monkeypatch.setattr(shm, "HANDSHAKE_TIMEOUT_S", 0.02)  # a holder that has none tries again for so long

    async def main() -> None:
        source = Chunks()
        source.fill(1, 100)
        async with contextlib.AsyncExitStack() as stack:
            mapped = MappedChunks(source)
            stack.callback(mapped.close)
            holder = await open_transport("127.0.0.1", 0, mapped, echo, transports=("shm", "zmq"))
            stack.push_async_callback(holder.close)
            offer = holder._ends["shm"].offer()
            for spare in range(4):
                reader = await open_transport("127.0.0.1", 0, None, echo, transports=("shm", "zmq"))
                stack.push_async_callback(reader.close)
                with no_descriptor(but=spare), contextlib.suppress(UnreachableError):
                    await (await reader._ends["shm"].mover(offer, holder.address, b"%016d" % spare)).close()

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


@pytest.mark.parametrize("missing", ["socketpair", "pidfd_open", "sense"])
def test_the_keeper_of_nixl_goes_on_without_a_descriptor(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits for the end of its process hears of it, and there is a next process. So it is when what a process says
    makes no sense."""

    def full(*_: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    def start(self: Keeper, theirs: socket.socket) -> subprocess.Popen[bytes]:
        body = b"\x93\x07\x01\xa1\xff"  # `Lost`, for a reason that is no text
        theirs.sendall(LENGTH.pack(len(body)) + body)
        return subprocess.Popen(["sleep", "1000"])  # it lives; but its end of the socket is closed

    async def main() -> None:
        started, ended = 0, 0

        def on_death() -> None:
            nonlocal ended
            ended += 1

        monkeypatch.setattr(Keeper, "_spawn", start)
        keeper = Keeper(READ, Region(-1, 0, 0), "127.0.0.1", lambda _: None, lambda _: None, on_death)
        with monkeypatch.context() as patched:
            if missing != "sense":
                patched.setattr(nixl_process.socket if missing == "socketpair" else nixl_process.os, missing, full)
            keeper.start()
            await asyncio.wait_for(keeper.first.wait(), LONG_S)
            started = ended
        await wait_until_async(lambda: ended > started, LONG_S, "the next process has come and gone")
        await asyncio.wait_for(keeper.close(), LONG_S)

    asyncio.run(main())
