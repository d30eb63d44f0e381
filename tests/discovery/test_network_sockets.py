"""The carrier over UDP and TCP: whatever a kernel may say, it goes on."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from kvmesh.discovery.network import GossipNetwork, open_network
from kvmesh.discovery.network import sockets as sockets_module
from kvmesh.discovery.network.addresses import address_of, endpoint_of
from kvmesh.discovery.network.sockets import SocketCarrier
from kvmesh.discovery.swim.events import Exchanged, PacketCame, Resolve, Resolved, SendPacket, StreamPing, StreamPinged
from kvmesh.discovery.wire import Ack, Endpoint, Ping
from kvmesh.transport.limits import PACKETS_PER_TURN, STREAM_BACKLOG
from tests.discovery.network_support import WAIT_S, Side, state_of
from tests.support.waiting import wait_until_async


class Moody(socket.socket):
    """A real socket that first raises what it was told to raise."""

    errors: list[int]

    def _moan(self) -> None:
        if self.errors:
            number = self.errors.pop(0)
            raise OSError(number, os.strerror(number))

    def sendto(self, *arguments: Any) -> int:
        self._moan()
        return super().sendto(*arguments)

    def recvfrom(self, *arguments: Any) -> tuple[bytes, Any]:
        self._moan()
        return super().recvfrom(*arguments)

    def accept(self) -> tuple[socket.socket, Any]:
        self._moan()
        return super().accept()


def moody_side() -> tuple[Side, Moody, Moody]:
    """A network on loopback whose sockets can be told to fail."""
    udp, tcp = Moody(socket.AF_INET, socket.SOCK_DGRAM), Moody(socket.AF_INET, socket.SOCK_STREAM)
    udp.errors, tcp.errors = [], []
    udp.bind(("127.0.0.1", 0))
    tcp.bind(("127.0.0.1", 0))
    tcp.listen(STREAM_BACKLOG)
    network = GossipNetwork(SocketCarrier(udp, tcp), name="a", endpoint=endpoint_of(udp.getsockname()))
    return Side(network, state_of("a")), udp, tcp


def run(scene: Callable[[], Awaitable[None]]) -> None:
    async def play() -> None:
        await scene()

    asyncio.run(play())


SENDING = {
    errno.EAGAIN: "send_buffer_full",
    errno.EINTR: "send_buffer_full",
    errno.ENOBUFS: "send_buffer_full",
    errno.ENETUNREACH: "unreachable",
    errno.EHOSTUNREACH: "unreachable",
    errno.ENETDOWN: "unreachable",
    errno.ECONNREFUSED: "refused_by_host",
    errno.EMSGSIZE: "send_errors",
    errno.EPERM: "send_errors",
    errno.EINVAL: "send_errors",
}


def test_a_packet_that_cannot_be_sent_is_counted_by_its_cause_and_the_next_one_is_sent() -> None:
    async def scene() -> None:
        a, udp, _ = moody_side()
        a.start()
        for number, counter in SENDING.items():
            before = getattr(a.network.counters, counter)
            udp.errors[:] = [number]
            a.do(SendPacket(a.endpoint, (Ack(1),)))
            assert getattr(a.network.counters, counter) == before + 1
        assert a.network.counters.packets_sent == 0
        a.do(SendPacket(a.endpoint, (Ack(1),)))
        await a.hears(PacketCame)
        assert a.network.counters.packets_sent == 1
        await a.network.close()

    run(scene)


def test_errors_of_receiving_end_nothing_and_hide_no_packet() -> None:
    async def scene() -> None:
        a, udp, _ = moody_side()
        a.start()
        udp.errors[:] = [errno.ECONNREFUSED, errno.EHOSTUNREACH, errno.ENOMEM, errno.EINTR, errno.ECONNREFUSED]
        socket.socket.sendto(udp, b"\x02\x81\xa5SeqNo\x07", udp.getsockname())
        assert (await a.hears(PacketCame))[0].messages == (Ack(7),)
        counters = a.network.counters
        assert (counters.refused_by_host, counters.unreachable, counters.receive_errors) == (2, 1, 1)
        await a.network.close()

    run(scene)


def test_an_answer_of_icmp_on_a_connected_socket_is_counted() -> None:
    async def scene() -> None:
        a, udp, _ = moody_side()
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as gone:
            gone.bind(("127.0.0.1", 0))
            udp.connect(gone.getsockname())  # only then Linux tells an unconnected sender what ICMP said
            target = endpoint_of(gone.getsockname())
        a.start()
        a.do(SendPacket(target, (Ack(1),)))
        await wait_until_async(lambda: a.network.counters.refused_by_host, WAIT_S, "the host said so")
        a.do(SendPacket(target, (Ack(1),)))
        await wait_until_async(lambda: a.network.counters.refused_by_host == 2, WAIT_S, "the host said so again")
        await a.network.close()

    run(scene)


def test_a_burst_is_taken_in_turns() -> None:
    async def scene() -> None:
        a, _, _ = moody_side()
        a.network.start(lambda event: a.events.append(event))
        burst = 2 * PACKETS_PER_TURN + 1
        for number in range(burst):
            a.do(SendPacket(a.endpoint, (Ack(number),)))
        seen: list[int] = []
        while len(a.events) < burst:
            await asyncio.sleep(0)
            seen.append(len(a.events))
        assert max(after - before for before, after in zip([0, *seen], seen, strict=False)) == PACKETS_PER_TURN
        await a.network.close()

    run(scene)


def test_without_file_descriptors_accepting_pauses_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sockets_module, "ACCEPT_RETRY_S", 0.01)

    async def scene() -> None:
        a, udp, tcp = moody_side()
        a.start()
        tcp.errors[:] = [errno.EMFILE, errno.ENFILE, errno.ECONNABORTED, errno.ENOBUFS]
        target = Endpoint(a.endpoint.ip, tcp.getsockname()[1])
        a.do(StreamPing(1, target, Ping(1, "a"), WAIT_S))
        await a.hears(StreamPinged)
        assert a.network.counters.receive_errors == 3
        assert udp.errors == []
        tcp.errors[:] = [errno.EMFILE]
        a.do(StreamPing(2, target, Ping(2, "a"), WAIT_S))
        await wait_until_async(lambda: not tcp.errors, WAIT_S, "accepting failed")
        await a.network.close()  # while it pauses

    run(scene)


def test_a_v6_wildcard_takes_v4_and_v4_addresses_stay_four_bytes() -> None:
    if not has_v6():
        pytest.skip("this machine has no IPv6")

    async def scene() -> None:
        both = Side(await open_network("::", 0, name="both", advertise="127.0.0.1"), state_of("both"))
        v4 = Side(await open_network("127.0.0.1", 0, name="v4"), state_of("v4"))
        v6 = Side(await open_network("::1", 0, name="v6"), state_of("v6"))
        for side in (both, v4, v6):
            side.start()
        assert both.endpoint.ip == b"\x7f\0\0\1"
        port = both.endpoint.port
        for side, ip in ((v4, b"\x7f\0\0\1"), (v6, bytes(15) + b"\1")):
            side.do(SendPacket(Endpoint(ip, port), (Ack(1),)))
            (came,) = await both.hears(PacketCame)
            assert came.source == side.endpoint
            both.do(SendPacket(came.source, (Ack(2),)))
            await side.hears(PacketCame)
            both.do(StreamPing(1, came.source, Ping(1, ""), WAIT_S))
            await both.hears(StreamPinged)
            both.events.clear()
        v4.do(SendPacket(v6.endpoint, (Ack(1),)))
        assert v4.network.counters.unreachable == 1
        v4.do(Resolve("[::1]:7000"))
        assert (await v4.hears(Resolved))[0].error == "it has no address that this node's --bind can reach"
        v6.do(Resolve("[::1]:7000"))
        assert (await v6.hears(Resolved))[0].endpoints == (Endpoint(bytes(15) + b"\1", 7000),)
        for side in (both, v4, v6):
            await side.network.close()

    run(scene)


def has_v6() -> bool:
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


@pytest.mark.parametrize(
    ("address", "endpoint"),
    [
        (("10.1.2.3", 7), Endpoint(b"\x0a\1\2\3", 7)),
        (("::ffff:10.1.2.3", 7, 0, 0), Endpoint(b"\x0a\1\2\3", 7)),
        (("fe80::1%eth0", 7, 0, 2), Endpoint(b"\xfe\x80" + bytes(13) + b"\1", 7)),
        (("::1", 7, 0, 0), Endpoint(bytes(15) + b"\1", 7)),
    ],
)
def test_addresses_become_endpoints_and_back(address: Any, endpoint: Endpoint) -> None:
    assert endpoint_of(address) == endpoint
    is_v6 = len(endpoint.ip) == 16
    assert endpoint_of(address_of(endpoint, is_v6=True)) == endpoint
    if is_v6:
        with pytest.raises(OSError, match="IPv6"):
            address_of(endpoint, is_v6=False)
    else:
        assert address_of(endpoint, is_v6=False) == ("10.1.2.3", 7)
        assert address_of(Endpoint(bytes(10) + b"\xff\xff" + endpoint.ip, 7), is_v6=False) == ("10.1.2.3", 7)


def test_all_addresses_of_a_name_are_found_once_and_one_that_hangs_holds_up_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[str] = []
    release = threading.Event()

    def getaddrinfo(host: str, port: int, **_: Any) -> list[Any]:
        asked.append(host)
        if host == "slow":
            release.wait(WAIT_S)
        if host == "broken":
            raise UnicodeError("label too long")
        four = [(socket.AF_INET, 0, 0, "", (f"10.0.0.{number}", port)) for number in (1, 2, 1)]
        return [*four, (socket.AF_INET6, 0, 0, "", ("::5", port, 0, 0))]

    monkeypatch.setattr("kvmesh.discovery.network.network.RESOLVE_TIMEOUT_S", 0.03)

    async def scene() -> None:
        a, _, _ = moody_side()
        a.start()
        monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
        a.do(Resolve("slow:7"))
        (late,) = await a.hears(Resolved)
        assert late.error == "the name service did not answer within 0.03 s"
        a.do(Resolve("slow:7"))
        await a.hears(Resolved, 2)
        assert asked == ["slow"]  # nobody asks again while the first question hangs
        monkeypatch.setattr("kvmesh.discovery.network.network.RESOLVE_TIMEOUT_S", WAIT_S)
        a.events.clear()
        a.do(Resolve("quick:7"))
        found = (Endpoint(b"\x0a\0\0\1", 7), Endpoint(b"\x0a\0\0\2", 7))
        assert await a.hears(Resolved) == [Resolved("quick:7", found)]
        a.events.clear()
        a.do(Resolve("broken:7"))
        assert (await a.hears(Resolved))[0].error == "it is not HOST:PORT: label too long"
        a.events.clear()
        release.set()
        a.do(Resolve("slow:7"))
        assert (await a.hears(Resolved))[0].endpoints == found
        release.clear()
        a.do(Resolve("slow:8"))
        await asyncio.sleep(0)
        await a.network.close()

    run(scene)
    release.set()  # the loop has ended: nobody is told


def test_streams_of_a_closed_network_end() -> None:
    async def scene() -> None:
        a, _, tcp = moody_side()
        a.start()
        a.on_pulled = lambda _: None
        with socket.create_connection(tcp.getsockname()) as waits, socket.create_connection(tcp.getsockname()) as says:
            says.sendall(b"\x06")
            await wait_until_async(lambda: a.network.counters.streams_served == 2, WAIT_S, "both are served")
            late = socket.create_connection(tcp.getsockname())  # accepted in the same turn in which it is closed
            await a.network.close()
            late.close()
            waits.settimeout(WAIT_S)
            assert waits.recv(1) == b""
            says.settimeout(WAIT_S)
            assert says.recv(1) == b""
        assert a.told(Exchanged) == []

    run(scene)
