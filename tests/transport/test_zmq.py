"""What only the ZeroMQ transport has: a port, connections, and a thread."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import socket
import time
from collections.abc import Iterator

import pytest
import zmq

from kvmesh.transport import zmq_calls, zmq_links, zmq_sockets, zmtp
from kvmesh.transport.assembly import Assembly
from kvmesh.transport.errors import SettingsError, UnreachableError
from kvmesh.transport.limits import (
    KIB,
    MIB,
)
from kvmesh.transport.zmq import ZmqTransport, open_zmq
from kvmesh.transport.zmq_sockets import LoopSocket
from tests.support.waiting import wait_until_async
from tests.transport.ends import LONG_S, Chunks, collect, echo, key, two, wants
from tests.transport.strangers import bulk_links, transport


# --- the port ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org", ""])
def test_only_loopback_is_listened_on(host: str) -> None:
    with pytest.raises(SettingsError, match=r"cannot listen on .*127\.0\.0\.1"):
        asyncio.run(open_zmq(host, 0, None, echo))


def test_a_port_in_use_is_named() -> None:
    async def main() -> None:
        async with transport() as first:
            port = int(first.address.rsplit(":", 1)[1])
            with pytest.raises(SettingsError, match=f"port {port} on 127.0.0.1 is in use"):
                await open_zmq("127.0.0.1", port, None, echo)
        again = await open_zmq("localhost", port, None, echo)  # it is free after the close
        assert again.address == f"127.0.0.1:{port}"
        await again.close()

    asyncio.run(main())


def test_a_port_that_is_none_is_named() -> None:
    with pytest.raises(SettingsError, match="port 70000"):
        asyncio.run(open_zmq("127.0.0.1", 70000, None, echo))


def test_ipv6() -> None:
    async def main() -> None:
        source = Chunks()
        source.fill(2, 300 * KIB)
        holder = await open_zmq("::1", 0, source, echo)
        assert holder.address.startswith("[::1]:")
        async with transport() as reader:
            assert await reader.call(holder.address, b"6", timeout_s=LONG_S) == b"6"
            assert len(await collect(reader.read(holder.address, wants([0, 1], 300 * KIB), deadline_s=LONG_S))) == 2
        await holder.close()

    asyncio.run(main())


@pytest.mark.parametrize("address", ["", "nowhere", "127.0.0.1", "127.0.0.1:99999", "[::1]", "a b:1", "h:1;h:2"])
def test_what_is_no_address_is_unreachable(address: str) -> None:
    async def main() -> None:
        async with transport() as node:
            with pytest.raises(UnreachableError, match=r"address|cannot connect"):
                await node.call(address, b"", timeout_s=LONG_S)
            assert await collect(node.read(address, wants([0], 1), deadline_s=1000)) == {}

    asyncio.run(main())


# --- connections -------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def mute() -> Iterator[str]:
    """A listener that accepts connections (the kernel does) and never says a word of ZeroMQ."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


def test_a_peer_that_never_shakes_hands_is_lost_before_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zmq_sockets, "HANDSHAKE_TIMEOUT_S", 0.05)
    monkeypatch.setattr(zmtp, "HANDSHAKE_TIMEOUT_S", 0.05)

    async def main() -> None:
        with mute() as address:
            async with transport() as node:
                with pytest.raises(UnreachableError, match="nothing answers"):
                    await node.call(address, b"", timeout_s=1000)
                assert await collect(node.read(address, wants([0], 1), deadline_s=1000)) == {}
                assert node.stats().peers_lost == 1

    asyncio.run(main())


@contextlib.contextmanager
def full() -> Iterator[str]:
    """A listener whose queue is full: a further connection gets no answer from the kernel."""
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        stack.enter_context(socket.create_connection(server.getsockname()))
        yield f"127.0.0.1:{server.getsockname()[1]}"


def test_a_connection_that_never_comes_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zmq_calls, "READY_TIMEOUT_S", 0.05)
    monkeypatch.setattr(zmq_links, "CONNECT_TIMEOUT_S", 0.05)

    async def main() -> None:
        with full() as address:
            async with transport() as node:
                with pytest.raises(UnreachableError, match="nothing answers"):
                    await node.call(address, b"", timeout_s=1000)
                assert await collect(node.read(address, wants([0], 1), deadline_s=1000)) == {}
                assert node.stats().peers_lost == 1

    asyncio.run(main())


@pytest.mark.usefixtures("receiver")
def test_idle_connections_are_closed_and_opened_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zmq_calls, "LINK_IDLE_S", 0.02)
    monkeypatch.setattr(zmq_links, "LINK_IDLE_S", 0.02)
    monkeypatch.setattr(zmq_links, "TICK_S", 0.01)

    async def main() -> None:
        source = Chunks()
        source.fill(1, 10)
        async with transport(source) as holder, transport() as reader:
            for _ in range(2):
                assert await reader.call(holder.address, b"x", timeout_s=LONG_S) == b"x"
                assert len(await collect(reader.read(holder.address, wants([0], 10), deadline_s=LONG_S))) == 1
                await wait_until_async(lambda: not reader._caller._links, LONG_S, "the control connection is closed")
                await wait_until_async(lambda: not bulk_links(reader), LONG_S, "the bulk connection is closed")
            assert reader.stats().peers_lost == 0

    asyncio.run(main())


def test_reads_at_once_spread_over_a_bounded_number_of_connections() -> None:
    async def main() -> None:
        source = Chunks()
        source.fill(8, MIB)
        async with transport(source) as holder, transport() as reader:
            reads = [collect(reader.read(holder.address, wants(range(8), MIB), deadline_s=LONG_S)) for _ in range(5)]
            assert [len(landings) for landings in await asyncio.gather(*reads)] == [8] * 5
            assert len(bulk_links(reader)) == 2

    asyncio.run(main())


def test_a_failure_of_our_own_ends_the_reads(
    receiver: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError

    async def main() -> None:
        source = Chunks()
        source.fill(1, 10)
        async with two("zmq", source) as (holder, reader):
            monkeypatch.setattr(Assembly, "announce", fail)
            assert await collect(reader.read(holder.address, wants([0], 10), deadline_s=1000)) == {}
            assert await collect(reader.read(holder.address, wants([0], 10), deadline_s=1000)) == {}
            assert await reader.call(holder.address, b"calls go on", timeout_s=LONG_S) == b"calls go on"

    asyncio.run(main())
    assert ("the bulk thread failed" if receiver == "thread" else "reads failed by an error of our own") in caplog.text
    caplog.clear()  # its tracebacks refer to buffers


def test_a_message_that_is_gone_again_is_none() -> None:
    """libzmq drops what came when a connection ends: also between the look whether something is there, and the take."""
    heard: list[list[bytes]] = []

    class Promising:
        def get(self, option: int) -> int:
            return zmq.POLLIN

        def recv_multipart(self, flags: int) -> list[bytes]:
            raise zmq.Again

    async def main() -> None:
        with zmq.Context() as context, context.socket(zmq.PAIR) as quiet:
            ends = LoopSocket(quiet, heard.append)
            ends._socket = Promising()  # type: ignore[assignment]
            ends.drain()
            ends.leave()

    asyncio.run(main())
    assert heard == []


def test_opening_and_closing_leaves_nothing() -> None:
    """What is left of threads, descriptors and contexts is for the leak detector to find; here: no object is either."""

    async def main() -> None:
        for _ in range(5):
            source = Chunks()
            source.fill(4, MIB)
            async with transport(source) as holder, transport() as reader:
                await reader.call(holder.address, b"", timeout_s=LONG_S)
                reading = reader.read(holder.address, wants(range(4), MIB), deadline_s=LONG_S)
                await reading.__anext__()
                await reading.close()

    asyncio.run(main())
    gc.collect()
    assert not [thing for thing in gc.get_objects() if isinstance(thing, ZmqTransport)]


def test_the_loop_is_never_held_up_by_a_close() -> None:
    async def main() -> None:
        source = Chunks()
        source.fill(60, MIB)
        async with transport(source) as holder:
            reader = await open_zmq("127.0.0.1", 0, None, echo)
            reading = reader.read(holder.address, wants(range(60), MIB), deadline_s=LONG_S)
            await reading.__anext__()
            began = time.monotonic()
            await reader.close()
            assert time.monotonic() - began < LONG_S / 4
            assert key(0) in source.held

    asyncio.run(main())
