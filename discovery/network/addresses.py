"""Endpoints of gossip, as the socket functions and people want them. An IPv4 address that came in the form of IPv6
("mapped") is the same place as in its own form, and always shown, kept and sent to as that."""

from __future__ import annotations

import errno
import socket
from ipaddress import ip_address
from typing import Final

from kvmesh.discovery.wire.messages import Endpoint, text_of

_MAPPED: Final = bytes(10) + b"\xff\xff"
_PORT_MAX: Final = 65535


def address_of(endpoint: Endpoint, *, is_v6: bool) -> tuple[str, int]:
    """For the functions of an IPv6 socket, which takes both, or of an IPv4 socket. Raises `OSError`."""
    ip = endpoint.ip.removeprefix(_MAPPED) if len(endpoint.ip) == 16 else endpoint.ip
    if len(ip) not in (4, 16) or not 0 < endpoint.port <= _PORT_MAX:
        raise OSError(errno.EINVAL, "not an address")
    if len(ip) == 4:
        return ("::ffff:" if is_v6 else "") + socket.inet_ntop(socket.AF_INET, ip), endpoint.port
    if not is_v6:
        raise OSError(errno.ENETUNREACH, "an IPv6 address, and this node listens on IPv4 alone")
    return socket.inet_ntop(socket.AF_INET6, ip), endpoint.port


def endpoint_of(address: tuple[str, int] | tuple[str, int, int, int]) -> Endpoint:
    """From what the socket functions give: 4 bytes for IPv4, mapped or not, else 16."""
    host = address[0].partition("%")[0]
    if ":" not in host:
        return Endpoint(socket.inet_pton(socket.AF_INET, host), address[1])
    return Endpoint(socket.inet_pton(socket.AF_INET6, host).removeprefix(_MAPPED), address[1])


def parse_ip(text: str) -> bytes:
    """4 or 16 bytes. Raises `ValueError`."""
    return ip_address(text).packed.removeprefix(_MAPPED)


def parse_endpoint(text: str) -> Endpoint:
    """From ``IP:PORT``, an IPv6 address in brackets. Raises `ValueError`."""
    host, _, port = text.rpartition(":")
    if host.startswith("[") != (":" in host):
        raise ValueError(f"{text!r}: an IPv6 address, and no other, stands in brackets")
    return Endpoint(parse_ip(host.removeprefix("[").removesuffix("]")), parse_port(port))


def parse_port(text: str) -> int:
    """1 to 65535. Raises `ValueError`."""
    if not (text.isascii() and text.isdigit() and len(text) <= len(str(_PORT_MAX)) and 0 < int(text) <= _PORT_MAX):
        raise ValueError(f"{text[:16]!r} is not a port from 1 to {_PORT_MAX}")
    return int(text)


def shown(endpoint: Endpoint) -> str:
    """For people: ``IP:PORT``, or what there is of it."""
    try:
        return text_of(endpoint)
    except ValueError:
        return f"an address of {len(endpoint.ip)} bytes"
