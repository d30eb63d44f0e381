"""Whole processes of discovery by gossip for tests: several in one loop, in memory or on loopback."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from random import Random

from kvmesh.discovery import CALL_PREFIX, Discovery, Gossip, Identity, Journal, Member
from kvmesh.discovery.network import GossipNetwork, MemoryGossip, open_network
from kvmesh.discovery.swim.profile import KVMESH_LAN, Profile
from kvmesh.discovery.wire import Endpoint, Keyring
from kvmesh.discovery.wire.messages import text_of
from kvmesh.transport.memory import MemoryNetwork, MemoryTransport
from tests.discovery.support import SIZE, SPACE, key

WAIT_S = 20.0
"""A bound for what takes milliseconds on a quiet machine."""
FAST = replace(
    KVMESH_LAN, probe_interval_s=0.05, probe_timeout_s=0.03, ping_interval_s=0.01, gossip_interval_s=0.02,
    insist_interval_s=0.02, reconnect_interval_s=0.1, push_pull_interval_s=0.5, stream_timeout_s=1.0,
)  # fmt: skip
"""For tests that wait for a crash to be seen."""


class Node:
    """A transport, a network of gossip, a journal and a `Discovery`, wired as an agent wires them."""

    def __init__(self, network: GossipNetwork, mesh: MemoryNetwork, identity: Identity, peers: Sequence[str]) -> None:
        ip, _, port = identity.address.rpartition(":")
        self.network = network
        self.identity = identity
        self.peers = peers
        self.transport: MemoryTransport = mesh.open(ip, None, self._on_call, port=int(port))
        self.journal = Journal(identity.name, identity.epoch) if identity.role == "agent" else None
        self.ahead_s = 0.0
        self.discovery: Discovery

    def discover(self, gossip: Gossip) -> None:
        self.discovery = Discovery(
            self.identity, self.transport.call, self.journal, self.peers, gossip=gossip, clock=self.clock,
            random=Random(self.identity.name),
        )  # fmt: skip

    def clock(self) -> float:
        return time.monotonic() + self.ahead_s

    async def _on_call(self, request: bytes) -> bytes:
        assert request[:1] == CALL_PREFIX
        return await self.discovery.handle(request[1:])

    async def kill(self) -> None:
        """It says goodbye to nobody."""
        await self.network.close()
        await self.transport.close()

    def admit(self, number: int) -> None:
        assert self.journal is not None
        self.journal.admit(key(number), SPACE, SIZE, "ram")

    def sees(self, name: str) -> Member:
        member = self.discovery.member(name)
        assert member is not None
        return member

    def states(self) -> dict[str, str]:
        return {member.name: str(member.state) for member in self.discovery.members()}

    async def until(self, seen: Callable[[], bool]) -> None:
        assert await self.discovery.wait_for(seen, timeout_s=WAIT_S), self.states()

    async def until_holds(self, name: str, number: int) -> None:
        await self.until(lambda: self.discovery.map.has(name, key(number)))

    async def until_sees(self, **states: str) -> None:
        await self.until(lambda: self.states() == {self.identity.name: "alive", **states})


class World:
    """All nodes of a test, in memory or on loopback; those that are left end with it."""

    def __init__(self, kind: str = "memory") -> None:
        self.gossip = MemoryGossip() if kind == "memory" else None
        self.mesh = MemoryNetwork()
        self.nodes: list[Node] = []

    async def start(
        self,
        name: str,
        *join: Node | str,
        host: str = "",
        role: str = "agent",
        epoch: int = 1000,
        profile: Profile = KVMESH_LAN,
        keyring: Keyring | None = None,
        key_file: Path | None = None,
        members_file: Path | None = None,
        known: Sequence[Endpoint] = (),
    ) -> Node:
        """A node that runs."""
        if self.gossip is not None:
            network = self.gossip.open(name, host=host, keyring=keyring, members_file=members_file)
        else:
            network = await open_network("127.0.0.1", 0, name=name, keyring=keyring, members_file=members_file)
        address = text_of(Endpoint(network.endpoint.ip, len(self.nodes) + 1))
        identity = Identity(name, role, epoch, address)  # type: ignore[arg-type]
        seeds = [peer if isinstance(peer, str) else peer.network.address for peer in join]
        node = Node(network, self.mesh, identity, seeds)
        gossip = Gossip(network, profile=profile, known=known, keyring=keyring)
        if keyring is not None and key_file is not None:
            gossip = replace(gossip, save_keys=lambda: keyring.save(key_file))
        node.discover(gossip)
        self.nodes.append(node)
        await node.discovery.start()
        return node

    async def end(self) -> None:
        await asyncio.gather(*(node.discovery.stop() for node in self.nodes))
        for node in self.nodes:
            await node.network.close()
            await node.transport.close()


@asynccontextmanager
async def world(kind: str) -> AsyncIterator[World]:
    here = World(kind)
    try:
        yield here
    finally:
        await here.end()


def play(scene: Callable[[World], Awaitable[None]], kind: str = "memory") -> None:
    async def run() -> None:
        async with world(kind) as here:
            await scene(here)

    asyncio.run(run())
