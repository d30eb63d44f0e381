"""Binding: one port for UDP and TCP, the address that others are told, and what is said when it cannot be."""

from __future__ import annotations

import asyncio
import errno
import socket
from typing import Any

import pytest

from kvmesh.discovery.network import GossipNetwork, open_network, opening
from kvmesh.discovery.wire import Endpoint
from kvmesh.transport.errors import SettingsError
from kvmesh.transport.limits import PORT_TRIES_MAX


def opened(*arguments: Any, **more: Any) -> Endpoint:
    """The endpoint of a network that is opened, and closed again without a start."""

    async def play() -> Endpoint:
        network: GossipNetwork = await open_network(*arguments, name="a", **more)
        await network.close()
        return network.endpoint

    return asyncio.run(play())


def refusal(*arguments: Any, **more: Any) -> str:
    with pytest.raises(SettingsError) as caught:
        opened(*arguments, **more)
    return str(caught.value)


def test_any_free_port_is_the_same_for_udp_and_tcp() -> None:
    async def play() -> None:
        network = await open_network("127.0.0.1", 0, name="a")
        port = network.endpoint.port
        assert network.address == f"127.0.0.1:{port}"
        for kind in (socket.SOCK_DGRAM, socket.SOCK_STREAM):
            with socket.socket(socket.AF_INET, kind) as other, pytest.raises(OSError, match="in use"):
                other.bind(("127.0.0.1", port))
        await network.close()
        again = await open_network("127.0.0.1", port, name="a")
        assert again.endpoint.port == port
        await again.close()

    asyncio.run(play())


@pytest.mark.parametrize("kind", [socket.SOCK_DGRAM, socket.SOCK_STREAM])
def test_a_port_that_is_taken_is_refused_by_the_name_of_the_flag(kind: socket.SocketKind) -> None:
    with socket.socket(socket.AF_INET, kind) as taken:
        taken.bind(("127.0.0.1", 0))
        if kind is socket.SOCK_STREAM:
            taken.listen(1)
        port = taken.getsockname()[1]
        assert refusal("127.0.0.1", port).startswith(f"--gossip-port: port {port} on 127.0.0.1 is in use")


@pytest.mark.parametrize("tries", [1, PORT_TRIES_MAX - 1, PORT_TRIES_MAX])
def test_a_port_that_is_free_for_one_of_both_only_is_passed_over(monkeypatch: pytest.MonkeyPatch, tries: int) -> None:
    left = tries

    class Taken(socket.socket):
        def bind(self, address: Any) -> None:
            nonlocal left
            if self.type is socket.SOCK_STREAM and left:
                left -= 1
                raise OSError(errno.EADDRINUSE, "Address already in use")
            super().bind(address)

    monkeypatch.setattr(opening.socket, "socket", Taken)
    if tries < PORT_TRIES_MAX:
        assert opened("127.0.0.1", 0).port > 0
    else:
        assert refusal("127.0.0.1", 0) == (
            "--gossip-port: no port on 127.0.0.1 was found that is free for both UDP and TCP; name one"
        )


def test_what_cannot_be_bound_is_refused() -> None:
    assert refusal("192.0.2.77", 0) == "--bind 192.0.2.77: this host does not have that address"
    assert refusal("no-such-host.invalid", 0).startswith("--bind no-such-host.invalid: ")
    assert refusal("a" * 300, 0).startswith("--bind aaa")


@pytest.mark.parametrize(
    ("advertise", "ip", "port"),
    [
        ("10.1.2.3", "10.1.2.3", None),
        ("10.1.2.3:99", "10.1.2.3", 99),
        ("2001:db8::7", "2001:db8::7", None),
        ("[2001:db8::7]", "2001:db8::7", None),
        ("[2001:db8::7]:99", "2001:db8::7", 99),
        ("::ffff:10.1.2.3", "10.1.2.3", None),
    ],
)
def test_what_is_advertised_is_told(advertise: str, ip: str, port: int | None) -> None:
    async def play() -> None:
        network = await open_network("127.0.0.1", 0, name="a", advertise=advertise)
        family = socket.AF_INET6 if ":" in ip else socket.AF_INET
        assert network.endpoint.ip == socket.inet_pton(family, ip)
        assert port is None or network.endpoint.port == port
        shown = f"[{ip}]" if ":" in ip else ip
        assert network.address == f"{shown}:{network.endpoint.port}"
        await network.close()

    asyncio.run(play())


@pytest.mark.parametrize(
    "advertise", ["host", "10.1.2.3:", "10.1.2.3:0", "10.1.2.3:70000", "[::1", "[::1]9", "[1.2.3.4]:5", "1.2.3:5"]
)
def test_what_is_no_address_is_not_advertised(advertise: str) -> None:
    assert refusal("127.0.0.1", 0, advertise=advertise).startswith(f"--advertise {advertise!r} is not an address")


V4, V6 = b"\x0a\0\0\7", b"\x20\1" + bytes(14)


@pytest.mark.parametrize(
    ("host", "routes", "told"),
    [
        ("0.0.0.0", {socket.AF_INET: V4, socket.AF_INET6: V6}, V4),
        ("0.0.0.0", {socket.AF_INET6: V6}, None),
        ("::", {socket.AF_INET: V4, socket.AF_INET6: V6}, V6),
        ("::", {socket.AF_INET: V4}, V4),
        ("::", {}, None),
    ],
)
def test_a_wildcard_tells_the_address_of_the_default_route(
    monkeypatch: pytest.MonkeyPatch, host: str, routes: dict[socket.AddressFamily, bytes], told: bytes | None
) -> None:
    if host == "::" and not socket.has_ipv6:
        pytest.skip("this machine has no IPv6")
    monkeypatch.setattr(opening, "_default_route_ip", routes.get)
    if told is None:
        assert refusal(host, 0).endswith("give --advertise")
    else:
        assert opened(host, 0).ip == told


def test_the_routing_table_is_asked() -> None:
    ip = opening._default_route_ip(socket.AF_INET)
    assert ip is None or (len(ip) == 4 and any(ip))
