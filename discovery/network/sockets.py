"""The carrier over UDP and TCP: two non-blocking sockets with readers on the loop.

A burst is taken a bounded number at a time, so that timers get their turns. An error of a socket is never more than a
report: a full buffer, a network that is gone, or the word that nothing listens where an earlier packet went (which the
kernel gives at the next call, whatever that is). Out of file descriptors, accepting pauses for a while.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import socket
import threading
from collections.abc import Sequence
from ipaddress import ip_address

from kvmesh.discovery.wire.messages import Endpoint
from kvmesh.transport.limits import (
    ACCEPT_RETRY_S,
    PACKET_BYTES_MAX,
    PACKETS_PER_TURN,
    RECEIVE_BUFFER_BYTES,
    STREAM_BACKLOG,
    STREAM_READ_BYTES,
)

from .addresses import address_of, endpoint_of
from .carrier import OnError, OnPacket, OnStream

_NothingYet = (BlockingIOError, InterruptedError)


class SocketCarrier:
    """`carrier.Carrier` over a UDP socket that is bound and a TCP socket that listens, at the same port."""

    def __init__(self, udp: socket.socket, tcp: socket.socket) -> None:
        self._udp = udp
        self._tcp = tcp
        self._is_v6 = udp.family is socket.AF_INET6
        self._loop: asyncio.AbstractEventLoop | None = None
        self._on_packet: OnPacket
        self._on_stream: OnStream
        self._on_error: OnError
        self._accept_later: asyncio.TimerHandle | None = None
        self._looking_up: dict[tuple[str, int], asyncio.Future[list[Endpoint]]] = {}
        udp.setblocking(False)
        tcp.setblocking(False)
        # The kernel gives what it may: after a pause of this process the answers of that time wait here.
        udp.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER_BYTES)

    def start(self, on_packet: OnPacket, on_stream: OnStream, on_error: OnError) -> None:
        """As `Carrier.start`."""
        self._on_packet, self._on_stream, self._on_error = on_packet, on_stream, on_error
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._udp.fileno(), self._receive)
        self._loop.add_reader(self._tcp.fileno(), self._accept)

    def close(self) -> None:
        """As `Carrier.close`."""
        if self._loop is not None:
            self._loop.remove_reader(self._udp.fileno())
            self._loop.remove_reader(self._tcp.fileno())
            self._loop = None
        if self._accept_later is not None:
            self._accept_later.cancel()
        self._udp.close()
        self._tcp.close()

    # --- packets --------------------------------------------------------------------------------------------------

    def send(self, target: Endpoint, data: bytes) -> None:
        """As `Carrier.send`."""
        self._udp.sendto(data, address_of(target, is_v6=self._is_v6))

    def _receive(self) -> None:
        for _ in range(PACKETS_PER_TURN):
            try:
                # One byte more than any packet: a longer one shows, instead of being cut off unseen.
                data, address = self._udp.recvfrom(PACKET_BYTES_MAX + 1)
            except _NothingYet:
                return
            except OSError as error:  # maybe of a packet that was sent; there may be others to read
                self._on_error(error)
                continue
            self._on_packet(data, endpoint_of(address))
            if self._loop is None:  # closed by what came
                return

    # --- streams --------------------------------------------------------------------------------------------------

    def _accept(self) -> None:
        for _ in range(STREAM_BACKLOG):
            try:
                connection, address = self._tcp.accept()
            except _NothingYet:
                return
            except ConnectionAbortedError:
                continue  # the peer gave up while it waited
            except OSError as error:  # out of file descriptors, most likely: some come back
                self._on_error(error)
                self._pause_accepting()
                return
            connection.setblocking(False)
            self._on_stream(_TcpConnection(connection), endpoint_of(address))
            if self._loop is None:
                return

    def _pause_accepting(self) -> None:
        """The socket stays readable, so the loop must not look at it meanwhile."""
        assert self._loop is not None
        self._loop.remove_reader(self._tcp.fileno())
        resume = functools.partial(self._loop.add_reader, self._tcp.fileno(), self._accept)
        self._accept_later = self._loop.call_later(ACCEPT_RETRY_S, resume)

    async def connect(self, target: Endpoint) -> _TcpConnection:
        """As `Carrier.connect`."""
        address = address_of(target, is_v6=self._is_v6)
        connection = socket.socket(self._tcp.family, socket.SOCK_STREAM)
        try:
            connection.setblocking(False)
            await asyncio.get_running_loop().sock_connect(connection, address)
        except BaseException as error:
            connection.close()
            if isinstance(error, OSError) and error.errno:  # asyncio's own words are the address
                raise OSError(error.errno, os.strerror(error.errno)) from None
            raise
        return _TcpConnection(connection)

    # --- names ----------------------------------------------------------------------------------------------------

    async def look_up(self, host: str, port: int) -> Sequence[Endpoint]:
        """As `Carrier.look_up`. A name service that does not answer holds up a thread of its own: not the others, and
        not the end of the process. Of one name there is never more than one."""
        with contextlib.suppress(ValueError):
            address = ip_address(host)
            return [endpoint_of((str(address), port))] if address.version == 4 or self._is_v6 else []
        asked = self._looking_up.get((host, port))
        if asked is None:
            asked = self._looking_up[host, port] = self._ask(host, port)
            asked.add_done_callback(lambda _: self._looking_up.pop((host, port)))
        await asyncio.wait([asked])  # whoever gives up waiting does not take the answer from others
        return asked.result()

    def _ask(self, host: str, port: int) -> asyncio.Future[list[Endpoint]]:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[list[Endpoint]] = loop.create_future()

        def tell(found: list[Endpoint] | Exception) -> None:
            if isinstance(found, Exception):
                future.set_exception(found)
                future.exception()  # looked at, even when nobody waits any more
            else:
                future.set_result(found)

        def ask() -> None:
            found: list[Endpoint] | Exception
            try:
                found = self._addresses(host, port)
            except (OSError, ValueError) as error:
                found = error
            with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
                loop.call_soon_threadsafe(tell, found)

        threading.Thread(target=ask, name=f"look up {host}", daemon=True).start()
        return future

    def _addresses(self, host: str, port: int) -> list[Endpoint]:
        answers = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)
        families = (socket.AF_INET, socket.AF_INET6) if self._is_v6 else (socket.AF_INET,)
        return [endpoint_of((str(address[0]), port)) for family, *_, address in answers if family in families]


class _TcpConnection:
    """`carrier.Connection`."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock

    async def receive(self) -> bytes:
        return await asyncio.get_running_loop().sock_recv(self._socket, STREAM_READ_BYTES)

    async def send(self, data: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(self._socket, data)

    def end(self) -> None:
        with contextlib.suppress(OSError):  # the peer was faster
            self._socket.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self._socket.close()
