"""Opens the network of gossip at a port: the same one for UDP and TCP, and the address that others are told."""

from __future__ import annotations

import contextlib
import errno
import socket
from ipaddress import ip_address
from pathlib import Path
from typing import Final

from kvmesh.discovery.wire.keyring import Keyring
from kvmesh.discovery.wire.messages import Endpoint
from kvmesh.transport.errors import SettingsError
from kvmesh.transport.limits import PORT_TRIES_MAX, STREAM_BACKLOG

from .addresses import endpoint_of, parse_endpoint, parse_ip
from .network import GossipNetwork
from .sockets import SocketCarrier

_OUTSIDE: Final = {socket.AF_INET: "192.0.2.1", socket.AF_INET6: "2001:db8::1"}
"""Addresses of nobody, for examples in documents: the default route leads there."""


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
    both. An IPv6 wildcard takes IPv4 as well. `advertise` is ``IP`` or ``IP:PORT`` (``[IPv6]:PORT``) that others are
    told instead. Raises `SettingsError`, naming the flag."""
    udp, tcp = _bind(host, port)
    try:
        endpoint = _advertised(advertise, endpoint_of(udp.getsockname()), udp.family)
        carrier = SocketCarrier(udp, tcp)
        return GossipNetwork(
            carrier, name=name, endpoint=endpoint, keyring=keyring, label=label, members_file=members_file
        )
    except BaseException:
        udp.close()
        tcp.close()
        raise


def _bind(host: str, port: int) -> tuple[socket.socket, socket.socket]:
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM, flags=socket.AI_PASSIVE)[0]
    except (OSError, UnicodeError) as error:
        raise SettingsError(f"--bind {host}: {getattr(error, 'strerror', None) or error}") from None
    for tries_left in reversed(range(PORT_TRIES_MAX if port == 0 else 1)):
        with contextlib.ExitStack() as stack:
            try:
                udp = stack.enter_context(socket.socket(family, socket.SOCK_DGRAM))
                tcp = stack.enter_context(socket.socket(family, socket.SOCK_STREAM))
                if family is socket.AF_INET6:
                    udp.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
                    tcp.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
                # For a restart at the same port, while streams of the last run linger. Two that listen still collide.
                tcp.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                udp.bind(address)
                tcp.bind(udp.getsockname())
                tcp.listen(STREAM_BACKLOG)
            except OSError as error:
                if error.errno == errno.EADDRINUSE and tries_left:
                    continue  # free for UDP, but not for TCP: another one
                raise SettingsError(_cannot_bind(host, port, error)) from None
            stack.pop_all()
            return udp, tcp
    raise AssertionError("the last try returns or raises")


def _cannot_bind(host: str, port: int, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE and port:
        return f"--gossip-port: port {port} on {host} is in use; take another one, or 0 for any that is free"
    if error.errno == errno.EADDRINUSE:
        return f"--gossip-port: no port on {host} was found that is free for both UDP and TCP; name one"
    if error.errno == errno.EADDRNOTAVAIL:
        return f"--bind {host}: this host does not have that address"
    return f"--gossip-port: cannot listen on port {port} of {host}: {error.strerror}"


def _advertised(advertise: str | None, bound: Endpoint, family: socket.AddressFamily) -> Endpoint:
    endpoint = _parse_advertise(advertise, bound.port) if advertise else bound
    if not ip_address(endpoint.ip).is_unspecified:
        return endpoint
    families = (socket.AF_INET6, socket.AF_INET) if family is socket.AF_INET6 else (socket.AF_INET,)
    for one in families:
        if (ip := _default_route_ip(one)) is not None:
            return Endpoint(ip, endpoint.port)
    raise SettingsError("no network leads out of this host, so others cannot be told where it is: give --advertise")


def _parse_advertise(text: str, port: int) -> Endpoint:
    try:
        if text.startswith("[") and text.endswith("]"):
            return Endpoint(parse_ip(text[1:-1]), port)
        is_ip_alone = text.count(":") != 1 and not text.startswith("[")
        return Endpoint(parse_ip(text), port) if is_ip_alone else parse_endpoint(text)
    except ValueError:
        raise SettingsError(
            f"--advertise {text!r} is not an address: write IP or IP:PORT, for example 10.0.0.5:7951"
        ) from None


def _default_route_ip(family: socket.AddressFamily) -> bytes | None:
    """The address that packets to the world would have. None is sent: a UDP connect only asks the routing table."""
    with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((_OUTSIDE[family], 9))
        return endpoint_of(probe.getsockname()).ip
    return None
