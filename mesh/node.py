"""What an agent and a controller have in common: a transport, discovery over it, answers to questions, and a life.

A `Node` is one process's place in the mesh. `live` runs it until SIGTERM or SIGINT and then lets it leave: the others
hear of it at once instead of finding out. Calls from peers are told apart by their first byte: discovery's, or a
question.
"""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import asdict
from typing import Any, Final, Literal

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from kvmesh import discovery, queries
from kvmesh.discovery import Discovery, Gossip, Identity, Journal
from kvmesh.discovery.network import open_network, read_members_file
from kvmesh.discovery.swim.profile import PROFILES
from kvmesh.discovery.wire.keyring import Keyring
from kvmesh.discovery.wire.messages import Endpoint, text_of
from kvmesh.host import host_facts
from kvmesh.settings import NodeSettings
from kvmesh.transport import CallHandler, ChunkSource, Transport, open_zmq
from kvmesh.transport.errors import ProtocolError

Role = Literal["agent", "controller"]
OpenTransport = Callable[[str, int, ChunkSource | None, CallHandler], Awaitable[Transport]]
"""What opens a transport at (host, port): `kvmesh.transport.open_zmq`, or a network in memory."""
Ready = Callable[[dict[str, Any]], None]
GC_THRESHOLDS: Final = (50_000, 20, 20)
"""How many new objects there must be until the collector looks at the young ones, and so on: see `gc.set_threshold`."""


class Node:
    """One process of the mesh, without what its role adds. Made by `open_node`."""

    def __init__(self, name: str, role: str, epoch: int) -> None:
        self.name = name
        self.role = role
        self.epoch = epoch
        self.transport: Transport
        self.gossip: Gossip | None = None
        self.discovery: Discovery
        self.queries: queries.Queries
        self.is_whole = False
        """Discovery and queries are there. The transport listens before, and peers of an earlier start call at once."""

    async def handle(self, request: bytes) -> bytes:
        """Answer a peer's call."""
        if not self.is_whole:
            raise ProtocolError("this node is starting")
        if request.startswith(discovery.CALL_PREFIX):
            return await self.discovery.handle(request[1:])
        if request.startswith(queries.CALL_PREFIX):
            answer = self.queries.answer(request[1:])
            return answer if isinstance(answer, bytes) else await answer()
        raise ProtocolError("a call of an unknown kind: the peer's version of kvmesh differs")

    def facts(self) -> dict[str, Any]:
        """What a process says of itself when it is ready."""
        return {
            "name": self.name,
            "role": self.role,
            "pid": os.getpid(),
            "epoch": self.epoch,
            "mesh_address": self.discovery.identity.address,
        } | ({} if self.gossip is None else {"gossip_address": self.gossip.network.address})

    def stats(self) -> dict[str, Any]:
        """The counters of transport and discovery."""
        return {"transport": asdict(self.transport.stats()), "discovery": asdict(self.discovery.stats())}


def epoch_now() -> int:
    """The epoch of a process that starts now: milliseconds of the wall clock, so that each start has a larger one
    unless the clock was set back."""
    return time.time_ns() // 1_000_000


async def open_node(
    stack: AsyncExitStack,
    settings: NodeSettings,
    role: Role,
    source: ChunkSource | None,
    journal: Journal | None,
    epoch: int,
    stats: Callable[[], dict[str, Any]],
    open_transport: OpenTransport = open_zmq,
    paths: Callable[[], list[dict[str, Any]]] = list,
) -> Node:
    """A node whose transport listens; discovery is not started yet. `stack` closes it. `stats` and `paths`: what the
    role counts, and what it measured towards peers."""
    node = Node(settings.name, role, epoch)
    node.transport = await open_transport(settings.bind, settings.mesh_port, source, node.handle)
    stack.push_async_callback(node.transport.close)
    if settings.membership == "gossip":
        node.gossip = await _open_gossip(settings)
        stack.push_async_callback(node.gossip.network.close)
    identity = Identity(
        name=settings.name,
        role=role,
        epoch=epoch,
        address=_mesh_address(node, settings),
        meta=host_facts().to_meta(),
    )
    node.discovery = Discovery(identity, node.transport.call, journal, settings.join, gossip=node.gossip)
    node.queries = queries.Queries(node.discovery, lambda: node.stats() | stats(), paths)
    node.is_whole = True
    return node


def _mesh_address(node: Node, settings: NodeSettings) -> str:
    """Where others reach the transport: at the advertised address and port, where there are such."""
    host, _, port = node.transport.address.rpartition(":")
    port = str(settings.advertise_mesh_port or port)
    if node.gossip is None or not settings.advertise:
        return f"{host}:{port}"
    return text_of(Endpoint(node.gossip.network.endpoint.ip, int(port)))


async def _open_gossip(settings: NodeSettings) -> Gossip:
    """The network of a membership by gossip, which listens. Raises `SettingsError` for a port that is taken, and for a
    key file that cannot be used."""
    keyring, key_file = None, settings.key_file
    if key_file is not None:
        keyring = Keyring.load(key_file)
    network = await open_network(
        settings.bind,
        settings.gossip_port,
        name=settings.name,
        advertise=settings.advertise or None,
        keyring=keyring,
        label=settings.label,
        members_file=settings.members_file,
    )
    return Gossip(
        network=network,
        profile=PROFILES[settings.profile],
        known=read_members_file(settings.members_file),
        public_key=X25519PrivateKey.generate().public_key().public_bytes_raw(),
        keyring=keyring,
        save_keys=lambda: keyring.save(key_file) if keyring is not None and key_file is not None else None,
    )


def live(main: Callable[[asyncio.Event], Awaitable[None]]) -> None:
    """Run `main(stopping)` on a new loop; SIGTERM and SIGINT set the event, and `main` then returns."""

    async def run() -> None:
        stopping = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stopping.set)
        await main(stopping)

    # A node makes short-lived objects by the hundred thousand, hardly ever in cycles, and keeps as many for long. With
    # the defaults the collector took a fifth of the time of a fetch of small chunks.
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)
    asyncio.run(run())
