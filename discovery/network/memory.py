"""The carrier within one process: networks of gossip that find each other in memory, for tests and for what runs
several nodes on one loop. Everything above the carrier is the real thing: codecs, keys, bounds, counters.

`MemoryGossip` adds what a test wants to do to a network. Each node runs on a host, with an address of its own:

| call | as if |
|---|---|
| `stop(host)` | the process was killed: nobody listens there, its streams end, nobody is told |
| `stall(host)`, `resume(host)` | SIGSTOP, SIGCONT: what is sent from or to it waits, nothing is refused |
| `cut(a, b)`, `heal(a, b)` | a partition: packets get lost, streams wait, and neither is told |
| `lose(share)` | that share of all packets gets lost |
| `name_hosts(name, hosts)` | the name service answers with all of them; a host's own name needs no entry |

Given the same calls and the same random source, all happens in the same order: there is no clock but the loop's.
"""

from __future__ import annotations

import asyncio
import errno
import socket
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Final

from kvmesh.discovery.wire.keyring import Keyring
from kvmesh.discovery.wire.messages import Endpoint
from kvmesh.transport.errors import SettingsError
from kvmesh.transport.limits import MEMORY_PACKETS_HELD_MAX, PACKET_BYTES_MAX

from .addresses import address_of, parse_ip
from .carrier import OnError, OnPacket, OnStream
from .memory_streams import MemoryConnection, Pair
from .network import GossipNetwork

PORT: Final = 7951
"""Where nodes gossip when nobody says otherwise."""


class MemoryGossip:
    """Where networks of gossip find each other."""

    def __init__(self, random: Random | None = None) -> None:
        """`random` decides which packets get lost."""
        self._random = random or Random(0)  # noqa: S311 - no secret
        self._ips: dict[str, bytes] = {}
        self._names: dict[str, tuple[str, ...]] = {}
        self._ends: dict[Endpoint, tuple[MemoryCarrier, GossipNetwork]] = {}
        self._stalled: set[str] = set()
        self._cut: set[frozenset[str]] = set()
        self._loss = 0.0
        self._pairs: set[Pair] = set()

    def open(
        self,
        name: str,
        *,
        host: str = "",
        port: int = PORT,
        keyring: Keyring | None = None,
        label: str = "",
        members_file: Path | None = None,
    ) -> GossipNetwork:
        """A network for the node `name`, at (`host`, `port`); its host has its name when none is given. As
        `open_network`; raises `SettingsError` when another one listens there."""
        host = host or name
        endpoint = Endpoint(self.ip(host), port)
        if endpoint in self._ends:
            raise SettingsError(f"--gossip-port: port {port} on {host} is in use")
        carrier = MemoryCarrier(self, host, endpoint)
        network = GossipNetwork(
            carrier, name=name, endpoint=endpoint, keyring=keyring, label=label, members_file=members_file
        )
        self._ends[endpoint] = carrier, network
        return network

    # --- what befalls a network -----------------------------------------------------------------------------------

    async def stop(self, host: str) -> None:
        """Kill what runs on `host`."""
        for carrier, network in list(self._ends.values()):
            if carrier.host == host:
                await network.close()

    def stall(self, host: str) -> None:
        """Let nothing from and to `host` go on until `resume`."""
        self._stalled.add(host)

    def resume(self, host: str) -> None:
        """End `stall`: what waited goes on."""
        self._stalled.discard(host)
        for carrier, _ in list(self._ends.values()):
            if carrier.host == host:
                carrier.go_on()
        self._wake()

    def cut(self, a: str, b: str) -> None:
        """Let nothing pass between the hosts `a` and `b` until `heal`."""
        self._cut.add(frozenset((a, b)))

    def heal(self, a: str, b: str) -> None:
        """End `cut`: streams go on."""
        self._cut.discard(frozenset((a, b)))
        self._wake()

    def lose(self, share: float) -> None:
        """Lose so many of the packets, from 0 to 1."""
        self._loss = share

    def name_hosts(self, name: str, hosts: Sequence[str]) -> None:
        """Let the name service know `name`."""
        self._names[name] = tuple(hosts)

    # --- for the carriers -----------------------------------------------------------------------------------------

    def ip(self, host: str) -> bytes:
        """Each host has one."""
        number = len(self._ips) + 1
        return self._ips.setdefault(host, bytes([10, 0, number >> 8, number & 0xFF]))

    def look_up(self, host: str) -> list[bytes]:
        """The addresses of a name."""
        if host in self._names:
            return [self.ip(one) for one in self._names[host]]
        if host in self._ips:
            return [self.ip(host)]
        try:
            return [parse_ip(host)]
        except ValueError:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known") from None

    def at(self, endpoint: Endpoint) -> MemoryCarrier | None:
        """Who listens there."""
        found = self._ends.get(endpoint)
        return None if found is None else found[0]

    def leave(self, carrier: MemoryCarrier) -> None:
        """It is closed."""
        found = self._ends.get(carrier.endpoint)
        if found is not None and found[0] is carrier:
            del self._ends[carrier.endpoint]
        self._wake()

    def is_stalled(self, host: str) -> bool:
        """Whether it does nothing at the moment."""
        return host in self._stalled

    def is_cut(self, a: str, b: str) -> bool:
        """Whether nothing passes between the two, in either direction."""
        return frozenset((a, b)) in self._cut

    def loses(self) -> bool:
        """Whether the packet that is being sent gets lost."""
        return self._loss > 0 and self._random.random() < self._loss

    def pair(self, a: str, b: str) -> Pair:
        """The two ends of a stream between two hosts."""
        pair = Pair(lambda: self.is_cut(a, b) or not self._stalled.isdisjoint((a, b)), self._pairs.discard)
        self._pairs.add(pair)
        return pair

    def _wake(self) -> None:
        for pair in self._pairs:
            pair.wake()


class MemoryCarrier:
    """`carrier.Carrier` on a `MemoryGossip`."""

    def __init__(self, gossip: MemoryGossip, host: str, endpoint: Endpoint) -> None:
        self.host = host
        self.endpoint = endpoint
        self._gossip = gossip
        self._on_packet: OnPacket | None = None
        self._on_stream: OnStream | None = None
        self._closed = False
        self._to_send: deque[tuple[Endpoint, bytes]] = deque()
        """What this host would have sent while it was stalled."""
        self._to_take: deque[tuple[bytes, Endpoint]] = deque()
        """What came before the start, or while this host was stalled."""
        self._backlog: deque[tuple[MemoryConnection, Endpoint]] = deque()

    def start(self, on_packet: OnPacket, on_stream: OnStream, _on_error: OnError) -> None:
        """As `Carrier.start`."""
        self._on_packet, self._on_stream = on_packet, on_stream
        self.go_on()

    def send(self, target: Endpoint, data: bytes) -> None:
        """As `Carrier.send`."""
        if self._closed:
            raise OSError(errno.EBADF, "this network is closed")
        address_of(target, is_v6=True)  # raises, for what is no address
        if len(data) > PACKET_BYTES_MAX:
            raise OSError(errno.EMSGSIZE, "Message too long")
        if not self._gossip.is_stalled(self.host):
            asyncio.get_running_loop().call_soon(self._pass_on, target, data)
        elif len(self._to_send) < MEMORY_PACKETS_HELD_MAX:
            self._to_send.append((target, data))

    def _pass_on(self, target: Endpoint, data: bytes) -> None:
        peer = self._gossip.at(target)
        if peer is not None and not self._gossip.is_cut(self.host, peer.host) and not self._gossip.loses():
            peer.take(data, self.endpoint)

    def take(self, data: bytes, source: Endpoint) -> None:
        """A packet comes. For the other end's use."""
        if len(self._to_take) < MEMORY_PACKETS_HELD_MAX:
            self._to_take.append((data, source))
            self._look()

    def go_on(self) -> None:
        """It was started, or is not stalled any more."""
        while self._to_send:
            asyncio.get_running_loop().call_soon(self._pass_on, *self._to_send.popleft())
        self._look()

    def _look(self) -> None:
        """Take what came, if that is possible."""
        while self._on_packet is not None and self._to_take and not self._gossip.is_stalled(self.host):
            self._on_packet(*self._to_take.popleft())
        while self._on_stream is not None and self._backlog and not self._gossip.is_stalled(self.host):
            self._on_stream(*self._backlog.popleft())

    async def connect(self, target: Endpoint) -> MemoryConnection:
        """As `Carrier.connect`."""
        address_of(target, is_v6=True)
        peer = self._gossip.at(target)
        if peer is None:
            raise ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")
        pair = self._gossip.pair(self.host, peer.host)
        try:
            await pair.passable()
            if (peer := self._gossip.at(target)) is None:
                raise ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")
        except BaseException:
            pair.forget(pair)
            raise
        asyncio.get_running_loop().call_soon(peer.accept, pair.ends[1], self.endpoint)
        return pair.ends[0]

    def accept(self, connection: MemoryConnection, source: Endpoint) -> None:
        """A stream comes. For the other end's use."""
        if self._closed:
            connection.close()
            return
        self._backlog.append((connection, source))
        self._look()

    async def look_up(self, host: str, port: int) -> Sequence[Endpoint]:
        """As `Carrier.look_up`."""
        return [Endpoint(ip, port) for ip in self._gossip.look_up(host)]

    def close(self) -> None:
        """As `Carrier.close`."""
        self._closed, self._on_packet, self._on_stream = True, None, None
        self._gossip.leave(self)
        while self._backlog:
            self._backlog.popleft()[0].close()
