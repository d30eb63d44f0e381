"""What a memory network can have happen to it."""

from __future__ import annotations

import asyncio

import pytest

from kvmesh.transport import memory
from kvmesh.transport.errors import ProtocolError, SettingsError, UnreachableError
from kvmesh.transport.interface import Outcome
from kvmesh.transport.limits import MIB
from kvmesh.transport.memory import MemoryNetwork
from tests.support.waiting import wait_until_async
from tests.transport.ends import LONG_S, Chunks, collect, echo, outcomes, wants


def test_a_cut_delays_until_it_heals_and_touches_nobody_else() -> None:
    async def main() -> None:
        network, source = MemoryNetwork(), Chunks()
        source.fill(2, 100)
        a, b, c = (network.open(name, source, echo) for name in "abc")
        network.cut("a", "b")
        with pytest.raises(UnreachableError, match="did not answer"):
            await a.call(b.address, b"", timeout_s=0.01)
        assert await collect(b.read(a.address, wants([0], 100), deadline_s=0.01)) == {}
        assert await c.call(b.address, b"x", timeout_s=LONG_S) == b"x"
        waiting = asyncio.create_task(a.call(b.address, b"y", timeout_s=LONG_S))
        await asyncio.sleep(0)
        network.heal("a", "b")
        assert await waiting == b"y"
        for end in (a, b, c):
            await end.close()

    asyncio.run(main())


def test_a_stalled_node_goes_on_where_it_was() -> None:
    async def main() -> None:
        network, source = MemoryNetwork(), Chunks()
        source.fill(4, 9 * MIB)
        holder, reader = network.open("holder", source, echo), network.open("reader", None, echo)
        wanted = wants(range(4), 9 * MIB)
        reading = reader.read(holder.address, wanted, deadline_s=LONG_S)
        await reading.__anext__()
        network.stall("holder")
        next_landing = asyncio.ensure_future(reading.__anext__())
        for _ in range(20):
            await asyncio.sleep(0)
        assert not next_landing.done()
        network.resume("holder")
        assert {landing.outcome for landing in await next_landing} == {Outcome.LANDED}
        assert len(await collect(reading)) == 2
        assert all(want.into == source.held[want.key] for want in wanted)
        for end in (holder, reader):
            await end.close()

    asyncio.run(main())


def test_a_stopped_node_is_gone_and_may_come_back() -> None:
    async def main() -> None:
        network, source = MemoryNetwork(), Chunks()
        source.fill(40, MIB)
        holder, reader = network.open("holder", source, echo), network.open("reader", None, echo)
        with pytest.raises(SettingsError, match="in use"):
            network.open("holder", source, echo)
        reading = reader.read(holder.address, wants(range(40), MIB), deadline_s=LONG_S)
        await reading.__anext__()
        await network.stop("holder")
        assert len(await collect(reading)) < 40
        assert (source.out, reader.stats().peers_lost) == (0, 1)
        with pytest.raises(UnreachableError, match="nothing listens"):
            await reader.call(holder.address, b"", timeout_s=LONG_S)
        again = network.open("holder", source, echo)
        assert again.address == holder.address
        await holder.close()  # the old one's end takes nothing from the new one
        assert len(await collect(reader.read(again.address, wants(range(2), MIB), deadline_s=LONG_S))) == 2
        for end in (again, reader):
            await end.close()

    asyncio.run(main())


def test_bounds_are_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "CALLS_SERVED_MAX", 1)
    monkeypatch.setattr(memory, "READS_SERVED_MAX", 1)

    async def main() -> None:
        entered, release = asyncio.Event(), asyncio.Event()

        async def handler(_: bytes) -> bytes:
            entered.set()
            await release.wait()
            return b""

        network, source = MemoryNetwork(), Chunks()
        source.fill(1, 10)
        holder, reader = network.open("holder", source, handler), network.open("reader", None, echo)
        first = asyncio.create_task(reader.call(holder.address, b"", timeout_s=LONG_S))
        await entered.wait()
        with pytest.raises(ProtocolError, match="too many"):
            await reader.call(holder.address, b"", timeout_s=LONG_S)
        release.set()
        await first
        reads = [collect(reader.read(holder.address, wants([0], 10), deadline_s=LONG_S)) for _ in range(2)]
        results = await asyncio.gather(*reads)
        assert [outcomes(result) for result in results] == [{0: Outcome.LANDED}, {}]
        await wait_until_async(lambda: holder.stats().refused == 2, LONG_S, "both are counted")
        for end in (holder, reader):
            await end.close()

    asyncio.run(main())
