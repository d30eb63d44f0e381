"""The choice of backend: what is learned of a peer and when, what happens when one fails, and that nothing leaks."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence

import pytest

from kvmesh.transport import backends, nixl, peers, shm, taking
from kvmesh.transport.backends import MeshTransport, open_transport
from kvmesh.transport.copying import CopyMove
from kvmesh.transport.errors import ProtocolError, SettingsError, UnreachableError
from kvmesh.transport.interface import CallHandler, Outcome, Region
from kvmesh.transport.lending_messages import Ask, encode_request
from kvmesh.transport.lending_serve import LendingServer
from kvmesh.transport.limits import (
    BACKEND_RETRY_S,
    KIB,
    MESH_PROTOCOL_VERSION,
    MIB,
    OFFER_WAIT_BYTES_MIN,
)
from kvmesh.transport.zmq import open_zmq
from tests.support.waiting import wait_until_async
from tests.transport.arenas import MappedChunks
from tests.transport.ends import LONG_S, Chunks, collect, echo, key, outcomes, wants
from tests.transport.movers import FakeEnd

SHM = ("shm", "zmq")


class Nodes:
    """Transports on loopback, closed at the end."""

    def __init__(self, stack: contextlib.AsyncExitStack) -> None:
        self._stack = stack

    async def open(
        self,
        source: Chunks | MappedChunks | None = None,
        transports: Sequence[str] = SHM,
        port: int = 0,
        handler: CallHandler = echo,
    ) -> MeshTransport:
        if isinstance(source, Chunks):
            source = MappedChunks(source)
            self._stack.callback(source.close)
        transport = await open_transport("127.0.0.1", port, source, handler, transports=transports)
        self._stack.push_async_callback(transport.close)
        return transport

    async def two(self, source: Chunks) -> tuple[MeshTransport, MeshTransport]:
        return await self.open(source), await self.open()


@contextlib.asynccontextmanager
async def nodes() -> AsyncIterator[Nodes]:
    async with contextlib.AsyncExitStack() as stack:
        yield Nodes(stack)


def chunks(count: int = 4, size_bytes: int = 100) -> Chunks:
    source = Chunks()
    source.fill(count, size_bytes)
    return source


async def read(reader: MeshTransport, holder: MeshTransport, source: Chunks, *numbers: int) -> None:
    """All of them land, and are right."""
    wanted = wants(numbers, [len(source.held[key(number)]) for number in numbers])
    landings = await collect(reader.read(holder.address, wanted, deadline_s=LONG_S))
    assert outcomes(landings) == dict.fromkeys(range(len(numbers)), Outcome.LANDED)
    assert all(want.into == source.held[want.key] for want in wanted)


async def settled(reader: MeshTransport, holder: MeshTransport) -> str:
    """The backend, once the peer has answered."""
    await reader.peers.wait_for_link(holder.address, LONG_S)
    return reader.backend(holder.address)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The calls about lending that holders answered, by their tags."""
    seen: list[bytes] = []
    real = LendingServer.handle

    async def handle(self: LendingServer, request: bytes) -> bytes:
        seen.append(request[:4])
        return await real(self, request)

    monkeypatch.setattr(LendingServer, "handle", handle)
    return seen


# --- what is learned -------------------------------------------------------------------------------------------------
def test_a_small_first_read_does_not_wait_and_the_next_one_is_shared_memory() -> None:
    async def main() -> None:
        source = chunks()
        async with nodes() as opened:
            holder, reader = await opened.two(source)
            assert reader.backend(holder.address) == "zmq"
            await read(reader, holder, source, 0)
            assert reader.stats().bytes_read_shm == 0
            assert await settled(reader, holder) == "shm"
            await read(reader, holder, source, 1, 2)
            stats = reader.stats()
            assert (stats.bytes_read, stats.chunks_read, stats.bytes_read_shm) == (300, 3, 200)
            assert (holder.stats().bytes_served, holder.stats().chunks_served) == (300, 3)
            await wait_until_async(lambda: source.out == 0, LONG_S, "every lease is back")

    asyncio.run(main())


def test_a_large_first_read_waits_to_be_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "OFFER_WAIT_S", LONG_S)

    async def main() -> None:
        source = chunks(2, OFFER_WAIT_BYTES_MIN // 2)
        async with nodes() as opened:
            holder, reader = await opened.two(source)
            await read(reader, holder, source, 0, 1)
            assert reader.stats().bytes_read_shm == OFFER_WAIT_BYTES_MIN
            await wait_until_async(lambda: source.out == 0, LONG_S, "every lease is back")

    asyncio.run(main())


def test_a_large_first_read_does_not_wait_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        source = chunks(1, OFFER_WAIT_BYTES_MIN)
        answer = asyncio.Event()
        real = LendingServer.handle

        async def handle(self: LendingServer, request: bytes) -> bytes:
            await answer.wait()
            return await real(self, request)

        monkeypatch.setattr(LendingServer, "handle", handle)
        async with nodes() as opened:
            holder, reader = await opened.two(source)
            await read(reader, holder, source, 0)
            assert (reader.stats().bytes_read_shm, reader.backend(holder.address)) == (0, "zmq")
            answer.set()
            assert await settled(reader, holder) == "shm"

    asyncio.run(main())


def test_a_peer_is_asked_once_however_many_reads_there_are(asked: list[bytes]) -> None:
    async def main() -> None:
        source = chunks(8)
        async with nodes() as opened:
            holder, reader = await opened.two(source)
            await asyncio.gather(*(read(reader, holder, source, number) for number in range(8)))
            await settled(reader, holder)
            await asyncio.gather(*(read(reader, holder, source, number) for number in range(8)))
            assert asked.count(encode_request(Ask())) == 1
            await wait_until_async(lambda: source.out == 0, LONG_S, "every lease is back")

    asyncio.run(main())


@pytest.mark.parametrize("why", ["reader", "holder", "host", "container", "arena"])
def test_without_shared_memory_reads_go_by_the_network(monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    async def main() -> None:
        source = chunks(1, OFFER_WAIT_BYTES_MIN)
        async with nodes() as opened:
            if why == "arena":
                source.region = None
                holder = await open_transport("127.0.0.1", 0, source, echo, transports=SHM)
            else:
                holder = await opened.open(source, ("zmq",) if why == "holder" else SHM)
            if why == "host":
                monkeypatch.setattr(shm, "boot_id", lambda: "another")
            if why == "container":  # a network namespace of its own: no such name there
                monkeypatch.setattr(shm, "_SOCKET", shm._SOCKET | (1 << 20))
            reader = await opened.open(transports=("zmq",) if why == "reader" else SHM)
            await read(reader, holder, source, 0)
            assert await settled(reader, holder) == "zmq"
            await read(reader, holder, source, 0)
            assert (reader.stats().bytes_read_shm, reader.stats().fallbacks) == (0, 0)
            await holder.close()

    asyncio.run(main())


def test_a_peer_that_has_no_such_thing_as_offers_is_read_by_the_network() -> None:
    async def main() -> None:
        source, calls = chunks(), 0

        async def handler(_: bytes) -> bytes:
            nonlocal calls
            calls += 1
            raise ProtocolError("a call of an unknown kind")

        holder = await open_zmq("127.0.0.1", 0, source, handler)
        async with nodes() as opened:
            reader = await opened.open()
            wanted = wants(range(4), 100)
            for _ in range(3):
                assert len(await collect(reader.read(holder.address, wanted, deadline_s=LONG_S))) == 4
                await reader.peers.wait_for_link(holder.address, LONG_S)
            assert calls == 1, "not asked again so soon"
        await holder.close()

    asyncio.run(main())


def test_without_the_network_only_shared_memory_is_read() -> None:
    async def main() -> None:
        source = chunks()
        async with nodes() as opened:
            holder, other = await opened.open(source), await opened.open()
            reader = await opened.open(transports=("shm",))
            await read(reader, holder, source, 0, 1)
            assert reader.stats().bytes_read_shm == 200
            assert await collect(reader.read(other.address, wants([0], 100), deadline_s=LONG_S)) == {}
            assert reader.stats().peers_lost == 1
            assert await reader.call(other.address, b"calls go through", timeout_s=LONG_S) == b"calls go through"
            await wait_until_async(lambda: source.out == 0, LONG_S, "every lease is back")

    asyncio.run(main())


# --- what changes ----------------------------------------------------------------------------------------------------
def test_a_backend_that_fails_in_mid_read_is_left_out_and_the_read_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        count, size, batch_bytes = 24, 256 * KIB, MIB
        monkeypatch.setattr(taking, "LEND_BATCH_BYTES_MIN", batch_bytes)
        monkeypatch.setattr(taking, "LEND_BATCH_BYTES_MAX", batch_bytes)
        source = chunks(count, size)
        real, moved = CopyMove.wait, 0

        async def wait(self: CopyMove) -> None:
            nonlocal moved
            moved += 1
            if moved > 2:
                await wait_until_async(
                    lambda: reader.stats().bytes_read_shm == 2 * batch_bytes, LONG_S, "two batches have landed"
                )
                raise UnreachableError("the path is gone")
            await real(self)

        async with nodes() as opened:
            holder, reader = await opened.two(source)
            assert await settled(reader, holder) == "shm"
            monkeypatch.setattr(CopyMove, "wait", wait)
            await read(reader, holder, source, *range(count))
            stats = reader.stats()
            assert (stats.bytes_read_shm, stats.bytes_read) == (2 * batch_bytes, 6 * batch_bytes)
            assert stats.fallbacks == 1
            assert await settled(reader, holder) == "zmq"
            monkeypatch.setattr(CopyMove, "wait", real)
            later_s = reader.peers._loop.time() + BACKEND_RETRY_S
            monkeypatch.setattr(reader.peers._loop, "time", lambda: later_s)
            assert await settled(reader, holder) == "shm", "after a while it is tried again"
            monkeypatch.undo()
            await wait_until_async(lambda: source.out == 0, LONG_S, "every lease is back")

    asyncio.run(main())


def test_a_holder_that_restarts_at_its_port_is_met_anew() -> None:
    async def main() -> None:
        source, other = chunks(), Chunks()
        other.add(0, bytes(100))
        async with nodes() as opened:
            holder, reader = await opened.two(source)
            port = int(holder.address.split(":")[1])
            assert await settled(reader, holder) == "shm"
            await read(reader, holder, source, 0, 1)
            await holder.close()
            await wait_until_async(lambda: reader.backend(holder.address) == "zmq", LONG_S, "the reader hears of it")
            holder = await opened.open(other, port=port)
            await read(reader, holder, other, 0)
            assert await settled(reader, holder) == "shm"
            await read(reader, holder, other, 0)
            assert reader.stats().bytes_read_shm == 300

    asyncio.run(main())


def test_a_call_that_fails_makes_what_is_known_stale(asked: list[bytes]) -> None:
    async def main() -> None:
        source = chunks()
        stuck = asyncio.Event()

        async def handler(_: bytes) -> bytes:
            await stuck.wait()
            return b""

        async with nodes() as opened:
            holder, reader = await opened.open(source, handler=handler), await opened.open()
            assert await settled(reader, holder) == "shm"
            with pytest.raises(UnreachableError):
                await reader.call(holder.address, b"?", timeout_s=0.01)
            await read(reader, holder, source, 0)
            assert reader.stats().bytes_read_shm == 100, "the link is still good: it is only asked again"
            await settled(reader, holder)
            assert asked.count(encode_request(Ask())) == 2
            assert reader.backend(holder.address) == "shm"
            await wait_until_async(lambda: source.out == 0, LONG_S, "every lease is back")

    asyncio.run(main())


def test_a_link_that_nobody_uses_is_closed_and_opened_again(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        source = chunks()
        async with nodes() as opened:
            holder, reader = await opened.two(source)
            await settled(reader, holder)
            reader.peers._sweep()
            assert reader.peers.link(holder.address)[0] is not None, "it was used just now"
            monkeypatch.setattr(peers, "LINK_IDLE_S", 0.0)
            reader.peers._sweeper.cancel()
            reader.peers._sweep()
            monkeypatch.undo()
            assert reader.backend(holder.address) == "shm", "that is what a read would go by"
            await read(reader, holder, source, 0)
            assert reader.stats().bytes_read_shm == 0, "a small read does not wait for the link"
            await settled(reader, holder)
            await read(reader, holder, source, 0)
            assert reader.stats().bytes_read_shm == 100
            await wait_until_async(lambda: source.out == 0, LONG_S, "every lease is back")

    asyncio.run(main())


def test_what_is_known_of_peers_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "OFFERS_KEPT_MAX", 2)

    async def main() -> None:
        source = chunks()
        async with nodes() as opened:
            holders = [await opened.open(source) for _ in range(4)]
            reader = await opened.open()
            for holder in holders:
                assert await settled(reader, holder) == "shm"
            assert [reader.backend(holder.address) for holder in holders] == ["zmq", "zmq", "shm", "shm"]

    asyncio.run(main())


def test_a_new_peer_is_never_the_one_that_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """All others are being asked, or read."""
    monkeypatch.setattr(peers, "OFFERS_KEPT_MAX", 1)

    async def main() -> None:
        source = chunks()
        async with nodes() as opened:
            holder, reader = await opened.open(source), await opened.open()
            reader.peers.link("127.0.0.1:1")
            assert await settled(reader, holder) == "shm"

    asyncio.run(main())


# --- nixl ------------------------------------------------------------------------------------------------------------
def test_without_its_package_nixl_is_not_offered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvmesh.transport.nixl.installed", lambda: None)

    async def main() -> None:
        source = chunks()
        async with nodes() as opened:
            holder = await opened.open(source, ("nixl", "zmq"))
            reader = await opened.open(source, ("nixl", "zmq"))
            assert await settled(reader, holder) == "zmq"
            await read(reader, holder, source, 0)

    asyncio.run(main())


def test_nixl_is_the_second_choice_and_takes_over(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        source = chunks()
        mapped = MappedChunks(source)
        fake = FakeEnd(mapped)

        async def open_nixl(region: Region, host: str) -> FakeEnd:
            assert host == "127.0.0.1"
            return fake

        monkeypatch.setattr(nixl, "open_nixl", open_nixl)
        async with nodes() as opened:
            holder = await opened.open(mapped, ("shm", "nixl", "zmq"))
            near = await opened.open(source, ("shm", "nixl", "zmq"))
            far = await opened.open(source, ("nixl", "zmq"))
            assert await settled(near, holder) == "shm"
            assert await settled(far, holder) == "nixl"
            await read(near, holder, source, 0)
            await read(far, holder, source, 0, 1)
            assert (near.stats().bytes_read_shm, near.stats().bytes_read_nixl) == (100, 0)
            assert (far.stats().bytes_read_shm, far.stats().bytes_read_nixl) == (0, 200)
            await wait_until_async(lambda: source.out == 0, LONG_S, "every lease is back")
        assert all(mover.closed for mover in fake.movers)
        mapped.close()

    asyncio.run(main())


# --- opening and closing ---------------------------------------------------------------------------------------------
def test_an_address_or_a_backend_that_cannot_be_is_an_error_of_the_caller() -> None:
    async def main() -> None:
        async with nodes() as opened:
            transport = await opened.open()
            with pytest.raises(SettingsError, match="in use"):
                await opened.open(port=int(transport.address.split(":")[1]))
            for wrong in ((), ("rdma",), ("shm", "tcp")):
                with pytest.raises(SettingsError, match="shm, nixl, zmq"):
                    await opened.open(transports=wrong)

    asyncio.run(main())


def test_calls_about_lending_never_reach_the_handler() -> None:
    async def main() -> None:
        async def handler(request: bytes) -> bytes:
            raise AssertionError(request)

        async with nodes() as opened:
            node = await opened.open(handler=handler)
            for request in (b"T", b"T\x00", b"T" + bytes([MESH_PROTOCOL_VERSION]) + b"\xc1"):
                with pytest.raises(ProtocolError):
                    await node.call(node.address, request, timeout_s=LONG_S)
            assert node.stats().malformed == 3

    asyncio.run(main())


@pytest.mark.parametrize("closing", ["holder", "reader"])
def test_closing_in_mid_read_leaves_nothing(closing: str) -> None:
    async def main() -> None:
        source = chunks(24, MIB)
        async with nodes() as opened:
            holder, reader = await opened.two(source)
            await settled(reader, holder)
            wanted = wants(range(24), MIB)
            reading = reader.read(holder.address, wanted, deadline_s=1000)
            for first in await reading.__anext__():  # any of them: several batches are on their way (interface.py)
                assert first.outcome is Outcome.LANDED
                assert wanted[first.index].into == source.held[key(first.index)]
            await {"holder": holder, "reader": reader}[closing].close()
            async with asyncio.timeout(LONG_S):
                async for landings in reading:
                    for landing in landings:
                        assert wanted[landing.index].into == source.held[key(landing.index)]
                await reading.close()
            await wait_until_async(lambda: source.out == 0, LONG_S, "every lease is back")
            for want in wanted:
                want.into.release()

    asyncio.run(main())


def test_a_transport_closes_while_a_peer_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        never = asyncio.Event()

        async def handle(self: LendingServer, request: bytes) -> bytes:
            await never.wait()
            return b""

        monkeypatch.setattr(LendingServer, "handle", handle)
        source = chunks(1, 64 * KIB)
        async with nodes() as opened:
            holder, reader = await opened.two(source)
            await read(reader, holder, source, 0)
            await asyncio.wait_for(reader.close(), LONG_S)
            await reader.close()

    asyncio.run(main())
