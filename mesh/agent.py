"""The agent: one node of the mesh. It owns the arena, keeps the store, serves engines and peers, and tells what it
holds.

    engines ── unix socket ── sessions ──┐
                                         ├── store ── journal ── discovery ── peers' maps
    peers ── transport ── lender ────────┘     └── fetcher ── transport ── peers

Everything runs on one loop, but for the transport's own threads that move bytes. The order of closing is the reverse of
opening: first no new client, then leave the mesh, then end the fetches, then the transport, then the arena.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import asdict
from typing import Any

import msgspec

from kvmesh.arena import Arena
from kvmesh.discovery import Journal, MemberState
from kvmesh.extents import aligned
from kvmesh.fetch import Fetcher
from kvmesh.host import host_facts
from kvmesh.keys import Namespace
from kvmesh.listening import Listener
from kvmesh.node import Node, OpenTransport, Ready, epoch_now, live, open_node
from kvmesh.sessions import Desk
from kvmesh.settings import AgentSettings
from kvmesh.spaces import describe, differences
from kvmesh.store import Chunk, Store
from kvmesh.transport import open_zmq
from kvmesh.transport.errors import SettingsError
from kvmesh.transport.interface import Region
from kvmesh.transport.limits import EXPIRY_SWEEP_S, GIB

TIER = "ram"


class Agent:
    """A node that holds chunks. Use `open_agent`."""

    def __init__(self, settings: AgentSettings, arena: Arena, open_transport: OpenTransport) -> None:
        self.settings = settings
        self._open_transport = open_transport
        self.arena = arena
        self.epoch = epoch_now()
        self.journal = Journal(settings.name, self.epoch)
        self.store = Store(arena.size_bytes, on_admit=self._admitted, on_evict=self._evicted)
        self.lender = Lender(self.store, arena)
        self.node: Node
        self.fetcher: Fetcher
        self.listener: Listener

    def facts(self) -> dict[str, Any]:
        """What the agent says of itself when it is ready."""
        return self.node.facts() | {"socket": str(self.settings.socket), "memory_bytes": self.arena.size_bytes}

    def stats(self) -> dict[str, Any]:
        """The agent's own counters, beside those of its node."""
        return {
            "node": self.settings.name,
            "epoch": self.epoch,
            "clients": self.listener.clients,
            "store": asdict(self.store.stats()),
            "fetch": dict(self.fetcher.counts),
        }

    async def open(self, stack: AsyncExitStack) -> None:
        """Listen to peers and to clients, and join the mesh."""
        self.node = await open_node(
            stack, self.settings, "agent", self.lender, self.journal, self.epoch, self.stats, self._open_transport
        )
        self.fetcher = Fetcher(
            self.store,
            self.arena,
            self.node.transport,
            self.node.discovery.map,
            self._address_of,
            node=self.settings.name,
            shuffle=random.shuffle,
        )
        stack.push_async_callback(self.fetcher.close)
        desk = Desk(
            node=self.settings.name,
            epoch=self.epoch,
            arena=self.arena,
            store=self.store,
            fetcher=self.fetcher,
            queries=self.node.queries,
            on_space=self._opened,
            spaces={},
        )
        self.listener = Listener(self.settings.socket, desk)
        stack.push_async_callback(self.node.discovery.stop)
        stack.push_async_callback(self.listener.close)
        await self.node.discovery.start()
        self.listener.start()

    async def sweep(self) -> None:
        """Remove expired chunks, for ever."""
        while True:
            await asyncio.sleep(EXPIRY_SWEEP_S)
            self.store.sweep(time.monotonic())

    # --- inside ----------------------------------------------------------------------------------------------------
    def _admitted(self, chunk: Chunk) -> None:
        self.journal.admit(chunk.key, chunk.space_id, chunk.size_bytes, TIER)

    def _evicted(self, chunk: Chunk) -> None:
        self.journal.evict(chunk.key, TIER)

    def _opened(self, space: Namespace) -> list[str]:
        self.journal.describe(space.digest[:16], msgspec.json.encode(describe(space)))
        theirs = [known.description for known in self.node.discovery.map.summary().namespaces]
        return differences(space, theirs)

    def _address_of(self, name: str) -> str | None:
        member = self.node.discovery.member(name)
        return member.address if member is not None and member.state is MemberState.ALIVE else None


class Lender:
    """Lends chunks of the store to the transport, for peers to read. Runs on the loop; loans come back from any
    thread."""

    def __init__(self, store: Store, arena: Arena) -> None:
        self._store = store
        self._arena = arena

    @property
    def region(self) -> Region:
        """See `kvmesh.transport.interface.ChunkSource`."""
        return Region(self._arena.fileno(), self._arena.address, self._arena.size_bytes)

    def lend(self, key: bytes) -> Loan | None:
        """See `kvmesh.transport.interface.ChunkSource`."""
        loan = Loan(self._store)
        self._store.add_owner(loan)
        chunk = self._store.lease(loan, key, time.monotonic())
        if chunk is None:
            self._store.drop_owner(loan)
            return None
        loan.buffer = self._arena.view(chunk.offset, chunk.size_bytes)
        loan.offset = chunk.offset
        loan.checksum = chunk.checksum
        return loan


class Loan:
    """One lent chunk: an owner in the store, gone when released."""

    buffer: memoryview
    offset: int
    checksum: int

    def __init__(self, store: Store) -> None:
        self._store = store
        self._loop = asyncio.get_running_loop()

    def release(self) -> None:
        """Give the chunk back, from any thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: so is the store
            self._loop.call_soon_threadsafe(self._store.drop_owner, self)


def run(settings: AgentSettings, on_ready: Ready) -> None:
    """Run an agent until SIGTERM or SIGINT. Raises `SettingsError` for what it cannot listen on or allocate."""

    async def main(stopping: asyncio.Event) -> None:
        async with open_agent(settings) as agent:
            on_ready(agent.facts())
            await stopping.wait()

    live(main)


@contextlib.asynccontextmanager
async def open_agent(settings: AgentSettings, open_transport: OpenTransport = open_zmq) -> AsyncIterator[Agent]:
    """An agent that runs on this loop until the block ends."""
    total_bytes = host_facts().memory_total_bytes
    if settings.memory_bytes > total_bytes:
        # The kernel would promise it all the same, and end the agent when the promise falls due.
        raise SettingsError(
            f"--memory {settings.memory_bytes / GIB:.1f}GiB: this host has {total_bytes / GIB:.1f} GiB in all; "
            "use a smaller --memory"
        )
    async with AsyncExitStack() as stack:
        arena = Arena.create(aligned(settings.memory_bytes))
        stack.callback(arena.close)
        agent = Agent(settings, arena, open_transport)
        await agent.open(stack)
        sweeping = asyncio.create_task(agent.sweep())
        try:
            yield agent
        finally:
            sweeping.cancel()
            await asyncio.gather(sweeping, return_exceptions=True)
