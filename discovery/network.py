"""The network of gossip on asyncio: one port number, for UDP and TCP. It performs the actions of `swim.events` and
reports its events, and takes no decision of the protocol.

`open_network` binds; `GossipNetwork` is packets (`network_packets`), streams (`network_streams`), the name service, and
the file of the last known members. Everything runs on the loop of `start`; the file is written in a thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import socket
from collections.abc import Callable
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path

from kvmesh.transport.errors import SettingsError
from kvmesh.transport.limits import (
    PORT_TRIES_MAX,
    RESOLVE_TIMEOUT_S,
    SEED_ADDRESSES_MAX,
    STREAM_BACKLOG,
)

from .actions import Action
from .members_file import read_members_file, remove_members_file, write_members_file
from .network_counters import NetworkCounters
from .network_packets import PacketSocket, endpoint_of
from .network_streams import Streams
from .swim.events import (
    AnswerPull,
    Exchange,
    RefusePull,
    Remember,
    Resolve,
    Resolved,
    SendPacket,
    SendUser,
    StreamPing,
    SwimEvent,
)
from .wire.keyring import Keyring
from .wire.messages import Endpoint
from .wire.packets import PacketCodec, overhead_bytes
from .wire.streams import StreamCodec

__all__ = ["GossipNetwork", "NetworkCounters", "open_network", "read_members_file"]

_log = logging.getLogger("kvmesh.discovery")


class GossipNetwork:
    """See above. Made by `open_network`."""

    def __init__(
        self,
        udp: socket.socket,
        tcp: socket.socket,
        *,
        name: str,
        endpoint: Endpoint,
        keyring: Keyring | None,
        label: str,
        members_file: Path | None,
    ) -> None:
        self.endpoint = endpoint
        """What others are told."""
        self.packet_overhead_bytes = overhead_bytes(keyring is not None, label)
        """What sealing costs of a packet, at most."""
        self._counters = NetworkCounters()
        self._packet_codec = PacketCodec(keyring, label)
        self._stream_codec = StreamCodec(keyring, label)
        self._packets = PacketSocket(udp, self._packet_codec, self._counters)
        self._streams = Streams(tcp, self._stream_codec, self._counters, name)
        self._family = udp.family
        self._members_file = members_file
        self._to_write: Remember | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._on_event: Callable[[SwimEvent], None] | None = None
        self._file_failed = False

    @property
    def address(self) -> str:
        """``HOST:PORT`` that others are told, an IPv6 address in brackets."""
        host = ip_address(self.endpoint.ip)
        return f"[{host}]:{self.endpoint.port}" if host.version == 6 else f"{host}:{self.endpoint.port}"

    @property
    def counters(self) -> NetworkCounters:
        """Since the start."""
        self._counters.left_out = self._packet_codec.left_out + self._stream_codec.left_out
        return self._counters

    def start(self, on_event: Callable[[SwimEvent], None]) -> None:
        """Receive, and report to `on_event`, from now on."""
        self._on_event = on_event
        self._packets.start(on_event)
        self._streams.start(on_event)

    def perform(self, action: Action) -> bool:
        """Do what the protocol wants. False when the action is not one of gossip."""
        match action:
            case SendPacket(target, messages, crc):
                self._packets.send(target, messages, crc=crc)
            case AnswerPull() | RefusePull():
                self._streams.answer(action)
            case Exchange() | StreamPing() | SendUser():
                self._streams.open(action)
            case Resolve(seed):
                self._spawn(self._resolve(seed))
            case Remember():
                self._remember(action)
            case _:
                return False
        return True

    async def close(self) -> None:
        """Stop. A second call does nothing."""
        self._on_event = None
        self._packets.close()
        await self._streams.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _spawn(self, work: asyncio._CoroutineLike[None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # --- names ----------------------------------------------------------------------------------------------------

    async def _resolve(self, seed: str) -> None:
        """All addresses of a name: behind one there may be many nodes, and some of them may be gone."""
        host, _, port = seed.rpartition(":")
        found: list[Endpoint] = []
        error = ""
        try:
            async with asyncio.timeout(RESOLVE_TIMEOUT_S):
                answers = await asyncio.get_running_loop().getaddrinfo(
                    host.strip("[]"), int(port), type=socket.SOCK_DGRAM
                )
            reachable = {socket.AF_INET} if self._family is socket.AF_INET else {socket.AF_INET, socket.AF_INET6}
            found = [endpoint_of(address) for family, *_, address in answers if family in reachable]  # type: ignore[arg-type]
            error = "" if found else "it has no address that this node's --bind can reach"
        except TimeoutError:
            error = f"the name service did not answer within {RESOLVE_TIMEOUT_S:g} s"
        except (OSError, ValueError, UnicodeError) as failure:
            error = str(getattr(failure, "strerror", None) or failure)
        if self._on_event is not None:
            self._on_event(Resolved(seed, tuple(dict.fromkeys(found))[:SEED_ADDRESSES_MAX], error))

    # --- the last known members -----------------------------------------------------------------------------------

    def _remember(self, members: Remember) -> None:
        if self._members_file is not None:
            writing, self._to_write = self._to_write is not None, members
            if not writing:
                self._spawn(self._write(self._members_file))

    async def _write(self, path: Path) -> None:
        """Write until what was written is the newest."""
        while (members := self._to_write) is not None:
            try:
                await asyncio.to_thread(write_members_file, path, members.endpoints)
            except OSError as error:
                self._counters.file_errors += 1
                if not self._file_failed:
                    self._file_failed = True
                    _log.warning("the known members cannot be kept in %s: %s; check --state-dir", path, error)
            if self._to_write is members:
                self._to_write = None

    async def forget_members(self) -> None:
        """This node leaves on purpose: it shall not come back by itself."""
        while self._tasks:
            await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._members_file is not None:
            remove_members_file(self._members_file)


async def open_network(
    host: str,
    port: int,
    *,
    name: str,
    advertise: str | None = None,
    keyring: Keyring | None = None,
    label: str = "",
    members_file: Path | None = None,
) -> GossipNetwork:
    """A network for the node `name` that listens at (`host`, `port`), UDP and TCP; port 0 takes any that is free for
    both. `advertise` is ``IP`` or ``IP:PORT`` that others are told instead. Raises `SettingsError`."""
    udp, tcp = _bind(host, port)
    try:
        bound = udp.getsockname()
        endpoint = _advertised(advertise, bound[0], bound[1])
        return GossipNetwork(
            udp, tcp, name=name, endpoint=endpoint, keyring=keyring, label=label, members_file=members_file
        )
    except BaseException:
        udp.close()
        tcp.close()
        raise


def _bind(host: str, port: int) -> tuple[socket.socket, socket.socket]:
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM, flags=socket.AI_PASSIVE)[0]
    except OSError as error:
        raise SettingsError(f"--bind {host}: {error.strerror or error}") from None
    for tries_left in reversed(range(PORT_TRIES_MAX if port == 0 else 1)):
        with contextlib.ExitStack() as stack:
            udp = stack.enter_context(socket.socket(family, socket.SOCK_DGRAM))
            tcp = stack.enter_context(socket.socket(family, socket.SOCK_STREAM))
            tcp.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                udp.bind(address)
                tcp.bind(udp.getsockname())
                tcp.listen(STREAM_BACKLOG)
            except OSError as error:
                if error.errno == errno.EADDRINUSE and tries_left:
                    continue  # free for UDP, but not for TCP: another one
                raise SettingsError(_cannot_bind(host, port, error)) from None
            tcp.setblocking(False)
            stack.pop_all()
            return udp, tcp
    raise AssertionError("the last try returns or raises")


def _cannot_bind(host: str, port: int, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"--gossip-port: port {port} on {host} is in use; take another one, or 0 for any that is free"
    if error.errno == errno.EADDRNOTAVAIL:
        return f"--bind {host}: this host does not have that address"
    return f"--gossip-port: cannot listen on port {port} of {host}: {error.strerror}"


def _advertised(advertise: str | None, bound_host: str, bound_port: int) -> Endpoint:
    if advertise:
        host, port = _split(advertise, bound_port)
    else:
        host, port = bound_host.partition("%")[0], bound_port
    address = ip_address(host)
    if address.is_unspecified:
        address = _default_route_address(address)
    return Endpoint(address.packed, port)


def _split(text: str, port: int) -> tuple[str, int]:
    if text.startswith("["):
        host, _, rest = text[1:].partition("]")
        return host, int(rest[1:]) if rest else port
    if text.count(":") == 1:
        host, _, given = text.partition(":")
        return host, int(given)
    return text, port


def _default_route_address(unspecified: IPv4Address | IPv6Address) -> IPv4Address | IPv6Address:
    """The address that packets to the world would have. None is sent: a UDP connect only asks the routing table."""
    family, outside = (socket.AF_INET, "192.0.2.1") if unspecified.version == 4 else (socket.AF_INET6, "2001:db8::1")
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((outside, 9))
            return ip_address(probe.getsockname()[0])
        except OSError:
            raise SettingsError(
                "no network leads out of this host, so others cannot be told where it is: give --advertise"
            ) from None
