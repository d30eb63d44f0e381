"""The agent: one node of the mesh. It owns the arena, keeps the store, serves engines and peers, and tells what it
holds.

    engines ── unix socket ── sessions ──┐
                                         ├── store ── journal ── discovery ── peers' maps
    peers ── transport ── lender ────────┘     └── fetcher ── transport ── peers

Everything runs on one loop, but for the transport's own threads that move bytes. The order of closing is the reverse of
opening: first leave the mesh, then end the fetches, then the clients, then the transport, then the arena.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
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
from kvmesh.inspection import Inspector
from kvmesh.keys import Namespace
from kvmesh.leases import Grants
from kvmesh.lender import Lender
from kvmesh.listening import Listener
from kvmesh.node import Node, OpenTransport, Ready, epoch_now, live, open_node
from kvmesh.sessions import Desk
from kvmesh.settings import AgentSettings
from kvmesh.spaces import describe, differences
from kvmesh.store import Chunk, Store
from kvmesh.transport import backends
from kvmesh.transport.errors import SettingsError
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
        self.inspector = Inspector(self.store, arena)
        self.grants = Grants(self.store)
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
            "leases": {"open": len(self.grants), "expired": self.grants.expired},
            "inspection": dict(self.inspector.counts),
            "fetch": self.fetcher.stats(),
        }

    async def open(self, stack: AsyncExitStack) -> None:
        """Listen to peers and to clients, and join the mesh."""
        lender = Lender(self.store, self.arena, self.inspector)
        self.node = await open_node(
            stack,
            self.settings,
            "agent",
            lender,
            self.journal,
            self.epoch,
            self.stats,
            self._open_transport,
            lambda: self.fetcher.rates.document(time.monotonic()),
        )
        self.fetcher = Fetcher(
            self.store,
            self.arena,
            self.node.transport,
            self.node.discovery.map,
            self._address_of,
            self.node.discovery.rtt_s,
            node=self.settings.name,
            shuffle=random.shuffle,
        )
        stack.push_async_callback(self.inspector.close)
        desk = Desk(
            node=self.settings.name,
            epoch=self.epoch,
            arena=self.arena,
            store=self.store,
            grants=self.grants,
            inspector=self.inspector,
            fetcher=self.fetcher,
            queries=self.node.queries,
            on_space=self._opened,
            spaces={},
        )
        self.listener = Listener(self.settings.socket, desk)
        stack.push_async_callback(self.listener.close)
        # Before the clients lose their leases: a fetch that went on might write where a living view still looks.
        stack.push_async_callback(self.fetcher.close)
        stack.push_async_callback(self.node.discovery.stop)
        await self.node.discovery.start()
        self.listener.start()

    async def sweep(self) -> None:
        """Remove expired chunks, and take expired leases back, for ever."""
        while True:
            await asyncio.sleep(EXPIRY_SWEEP_S)
            self.grants.expire(time.monotonic())
            self.store.sweep(time.monotonic())

    # --- inside ----------------------------------------------------------------------------------------------------
    def _admitted(self, chunk: Chunk) -> None:
        if not chunk.private:
            self.journal.admit(chunk.key, chunk.space_id, chunk.size_bytes, TIER)

    def _evicted(self, chunk: Chunk) -> None:
        if not chunk.private:
            self.journal.evict(chunk.key, TIER)

    def _opened(self, space: Namespace) -> list[str]:
        self.journal.describe(space.digest[:16], msgspec.json.encode(describe(space)))
        theirs = [known.description for known in self.node.discovery.map.summary().namespaces]
        return differences(space, theirs)

    def _address_of(self, name: str) -> str | None:
        member = self.node.discovery.member(name)
        return member.address if member is not None and member.state is MemberState.ALIVE else None


def run(settings: AgentSettings, on_ready: Ready) -> None:
    """Run an agent until SIGTERM or SIGINT. Raises `SettingsError` for what it cannot listen on or allocate."""

    async def main(stopping: asyncio.Event) -> None:
        async with open_agent(settings) as agent:
            on_ready(agent.facts())
            await stopping.wait()

    live(main)


@contextlib.asynccontextmanager
async def open_agent(settings: AgentSettings, open_transport: OpenTransport | None = None) -> AsyncIterator[Agent]:
    """An agent that runs on this loop until the block ends. `open_transport`: else the backends of the settings."""
    if open_transport is None:
        open_transport = functools.partial(backends.open_transport, transports=settings.transports)
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
