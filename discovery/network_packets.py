"""The UDP socket of gossip: datagrams in and out, and every way in which that can go wrong counted.

One non-blocking socket with a reader on the loop. A burst is read PACKETS_PER_TURN at a time, so that timers and
streams get their turns. An error of the socket is never more than a count: a full buffer, a network that is gone, or
the word that nothing listens where an earlier packet went (which the kernel reports at the next call, whatever that is)
all look to the protocol like a packet that got lost, and that is what the protocol is for.
"""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Callable
from typing import Final

from kvmesh.transport.limits import PACKET_BYTES_MAX, PACKETS_PER_TURN, RECEIVE_BUFFER_BYTES

from .network_counters import NetworkCounters, Warner
from .swim.events import PacketCame
from .wire.errors import WireError
from .wire.messages import Endpoint, Message
from .wire.packets import PacketCodec

_NO_ROUTE: Final = frozenset({errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN, errno.EADDRNOTAVAIL})


class PacketSocket:
    """Sends and receives packets, until `close`."""

    def __init__(self, sock: socket.socket, codec: PacketCodec, counters: NetworkCounters) -> None:
        self._socket = sock
        self._codec = codec
        self._counters = counters
        self._warner = Warner(counters)
        self._is_v6 = sock.family is socket.AF_INET6
        self._on_event: Callable[[PacketCame], None] | None = None
        sock.setblocking(False)
        # The kernel gives what it may: after a pause of this process the answers of that time wait here.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER_BYTES)

    def start(self, on_event: Callable[[PacketCame], None]) -> None:
        """Receive from now on."""
        self._on_event = on_event
        asyncio.get_running_loop().add_reader(self._socket.fileno(), self._readable)

    def close(self) -> None:
        """A second call does nothing."""
        if self._on_event is not None:
            asyncio.get_running_loop().remove_reader(self._socket.fileno())
            self._on_event = None
        self._socket.close()

    def send(self, target: Endpoint, messages: tuple[Message, ...], *, crc: bool) -> None:
        """One packet, if it can be sent."""
        try:
            data = self._codec.seal(messages, crc=crc)
            sent = self._socket.sendto(data, address_of(target, is_v6=self._is_v6))
        except (BlockingIOError, InterruptedError):
            self._counters.send_buffer_full += 1
        except (OSError, ValueError) as error:
            self._count_send_error(error)
        else:
            self._counters.packets_sent += 1
            self._counters.packet_bytes_sent += sent

    def _count_send_error(self, error: OSError | ValueError) -> None:
        number = error.errno if isinstance(error, OSError) else None
        if number == errno.ENOBUFS:
            self._counters.send_buffer_full += 1
        elif number == errno.ECONNREFUSED:
            self._counters.refused_by_host += 1
        elif number in _NO_ROUTE:
            self._counters.unreachable += 1
        else:
            self._counters.send_errors += 1

    def _readable(self) -> None:
        for _ in range(PACKETS_PER_TURN):
            try:
                # One byte more than any packet: a longer one shows, instead of being cut off unseen.
                data, address = self._socket.recvfrom(PACKET_BYTES_MAX + 1)
            except (BlockingIOError, InterruptedError):
                return
            except ConnectionRefusedError:
                self._counters.refused_by_host += 1
                continue
            except OSError:
                self._counters.receive_errors += 1
                return
            self._take(data, address)
            if self._on_event is None:  # closed by what came
                return

    def _take(self, data: bytes, address: tuple[str, int]) -> None:
        counters = self._counters
        counters.packets_received += 1
        counters.packet_bytes_received += len(data)
        try:
            messages = self._codec.open(data)
        except WireError as error:
            counters.refused[error.cause] += 1
            self._warner.warn(error, f"a packet from {address[0]}:{address[1]}")
            return
        assert self._on_event is not None
        self._on_event(PacketCame(endpoint_of(address), tuple(messages)))


def address_of(endpoint: Endpoint, *, is_v6: bool) -> tuple[str, int]:
    """For the socket functions. An IPv4 address on an IPv6 socket takes its mapped form; and the other way round."""
    ip = endpoint.ip
    if len(ip) == 4:
        return ("::ffff:" if is_v6 else "") + socket.inet_ntop(socket.AF_INET, ip), endpoint.port
    if not is_v6 and ip.startswith(_MAPPED):
        return socket.inet_ntop(socket.AF_INET, ip[len(_MAPPED) :]), endpoint.port
    return socket.inet_ntop(socket.AF_INET6, ip), endpoint.port


def endpoint_of(address: tuple[str, int] | tuple[str, int, int, int]) -> Endpoint:
    """From what the socket functions give: 4 bytes for IPv4, mapped or not, else 16."""
    host = address[0].partition("%")[0]
    if ":" not in host:
        return Endpoint(socket.inet_pton(socket.AF_INET, host), address[1])
    ip = socket.inet_pton(socket.AF_INET6, host)
    return Endpoint(ip.removeprefix(_MAPPED), address[1])


_MAPPED: Final = bytes(10) + b"\xff\xff"
