"""The node's mesh port: it accepts connections, and speaks as a ROUTER does to the DEALERs at their other ends.

These are plain sockets that speak ZMTP (zmtp.py), not a socket of libzmq: so bytes of the arena go out with one system
call for many of them (zmq_sending.py), a peer that is gone is known by name and at once, one that breaks the protocol
can be disconnected, and what a peer may make us hold before it has proven anything is a few KiB and one message.

A message that comes is a header and at most one payload. Who sent it is a connection: nobody can act on another's
requests. Runs on the loop, and never waits.
"""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import itertools
import logging
import socket
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np

from .counters import Counters
from .errors import SettingsError
from .limits import (
    ACCEPT_RETRY_S,
    CONNECTIONS_SERVED_MAX,
    HEARTBEAT_INTERVAL_S,
    MESSAGE_BYTES_MAX,
    SAID_BYTES_MAX,
    SEND_QUEUE_BUFFERS,
)
from .zmq_links import OPTIONS
from .zmq_sending import Outbox, Sender
from .zmtp import Buffer, Connection, Null, Part, ZmtpError, message

log = logging.getLogger(__name__)

TICK_S: Final = HEARTBEAT_INTERVAL_S / 4
"""How often the connections are looked over for heartbeats, and for those that fell silent."""
ACCEPTS_PER_TURN: Final = 64
EVENTS_PER_TURN: Final = 16
"""Frames of one connection that are taken before others, and the loop, get their turn."""
BACKLOG: Final = 512


class FullError(Exception):
    """Too much waits for this peer: not now."""


class GoneError(Exception):
    """There is no such peer any more."""


class _Said(bytes):
    """What ZMTP itself says, to be told from the rest of what waits."""


class _Peer:
    """One connection."""

    __slots__ = ("address", "closed", "connection", "filled", "head", "name", "outbox", "payload", "socket", "waits")

    def __init__(self, name: bytes, accepted: socket.socket, address: tuple[Any, ...]) -> None:
        self.name = name
        self.address = address
        self.socket = accepted
        self.outbox = Outbox(accepted)
        self.connection = Connection(Null(b"ROUTER", b"DEALER"), part_bytes_max=MESSAGE_BYTES_MAX, parts_max=1)
        self.head = b""
        self.payload = memoryview(b"")
        self.filled = 0
        """Bytes of the payload that have come."""
        self.closed = False
        self.waits = False
        """What has left the socket already is taken in the next turn: nothing else would tell of it."""


class Port:
    """All connections to one mesh port."""

    def __init__(
        self,
        listening: socket.socket,
        on_message: Callable[[bytes, list[bytes]], None],
        on_gone: Callable[[bytes], None],
        counters: Counters,
    ) -> None:
        """`on_message(peer, parts)`; `on_gone(peer)`, once, of each peer that was told of."""
        self._loop = asyncio.get_running_loop()
        self._listening = listening
        self._on_message = on_message
        self._on_gone = on_gone
        self._counters = counters
        self._sender = Sender()
        self._names = itertools.count(1)
        self._peers: dict[bytes, _Peer] = {}
        self._retry: asyncio.TimerHandle | None = None
        self._ticker = self._loop.call_later(TICK_S, self._tick)
        self._loop.add_reader(listening, self._accept)

    def send(self, name: bytes, parts: Sequence[Buffer]) -> None:
        """Send one message; large parts go without a copy, and are let go of when they are sent. Raises `FullError`
        and `GoneError`."""
        peer = self._peers.get(name)
        if peer is None:
            raise GoneError
        if peer.outbox.waiting >= SEND_QUEUE_BUFFERS:
            raise FullError
        self._sender.send(peer.outbox, message(parts))

    async def close(self) -> None:
        """End every connection, and free the port."""
        self._ticker.cancel()
        if self._retry is not None:
            self._retry.cancel()
        self._loop.remove_reader(self._listening)
        self._listening.close()
        for peer in list(self._peers.values()):
            self._lose(peer)
        await self._sender.stop()

    # --- connections -------------------------------------------------------------------------------------------------
    def _accept(self) -> None:
        for _ in range(ACCEPTS_PER_TURN):
            try:
                accepted, address = self._listening.accept()
            except BlockingIOError:
                return
            except (ConnectionError, InterruptedError):
                continue
            except OSError:  # no descriptor is free: it would be tried for ever
                self._loop.remove_reader(self._listening)
                self._retry = self._loop.call_later(ACCEPT_RETRY_S, self._accept_again)
                return
            if len(self._peers) >= CONNECTIONS_SERVED_MAX:
                self._counters.refused += 1
                accepted.close()
            else:
                self._welcome(accepted, address)

    def _accept_again(self) -> None:
        self._retry = None
        self._loop.add_reader(self._listening, self._accept)

    def _welcome(self, accepted: socket.socket, address: tuple[Any, ...]) -> None:
        accepted.setblocking(False)
        try:
            for level, option, value in OPTIONS:
                accepted.setsockopt(level, option, value)
        except OSError:  # it is gone already
            accepted.close()
            return
        peer = _Peer(next(self._names).to_bytes(8, "big"), accepted, address)
        self._peers[peer.name] = peer
        peer.connection.open(time.monotonic())
        self._loop.add_reader(accepted, self._receive, peer)
        self._flush(peer)

    def _lose(self, peer: _Peer) -> None:
        if peer.closed:
            return
        peer.closed = True
        self._loop.remove_reader(peer.socket)
        del self._peers[peer.name]
        self._sender.close(peer.outbox)
        self._on_gone(peer.name)

    def _tick(self) -> None:
        self._ticker = self._loop.call_later(TICK_S, self._tick)
        now = time.monotonic()
        for peer in list(self._peers.values()):
            if now >= peer.connection.due_s:
                try:
                    peer.connection.tick(now)
                    self._flush(peer)
                except ZmtpError:
                    self._lose(peer)

    # --- what comes --------------------------------------------------------------------------------------------------
    def _receive(self, peer: _Peer) -> None:
        if not peer.waits:
            self._guarded(peer, self._receive_some)

    def _guarded(self, peer: _Peer, act: Callable[[_Peer], None]) -> None:
        try:
            act(peer)
        except BlockingIOError:
            pass
        except ZmtpError as error:
            self._counters.malformed += 1
            # Whoever scans the port says it as often as it likes: that is counted, and not for every log.
            log.debug("a connection to the mesh port from %s is closed: %s", peer.address, error)
            self._lose(peer)
        except OSError:
            self._lose(peer)

    def _receive_some(self, peer: _Peer) -> None:
        """Take in what one system call brings."""
        connection = peer.connection
        room = peer.payload[peer.filled :] if connection.left else connection.room()
        count = peer.socket.recv_into(room)
        if not count:
            self._lose(peer)
            return
        connection.heard_s = time.monotonic()
        if not connection.left:
            connection.received(count)
        else:
            connection.passed(count)
            peer.filled += count
            if connection.left:
                return
            self._deliver(peer, [peer.head, bytes(peer.payload)])
        self._take(peer)

    def _go_on(self, peer: _Peer) -> None:
        peer.waits = False
        if not peer.closed:
            self._guarded(peer, self._take)

    def _take(self, peer: _Peer) -> None:
        """Take what the stage has."""
        connection = peer.connection
        for _ in range(EVENTS_PER_TURN):
            if peer.closed:
                return
            event = connection.next()
            if event is None:
                self._flush(peer)
                return
            if isinstance(event, Part):
                if event.more:
                    raise ZmtpError("a message of more than a header and a payload")
                staged = connection.take(event.size_bytes)
                if len(staged) == event.size_bytes:
                    self._deliver(peer, [peer.head, bytes(staged)])
                    continue
                peer.payload = np.empty(event.size_bytes, np.uint8).data  # pages that are not touched cost nothing
                peer.filled = len(staged)
                peer.payload[: peer.filled] = staged
                self._flush(peer)
                return
            if event.more:
                peer.head = event.data
            else:
                self._deliver(peer, [event.data])
        self._flush(peer)
        peer.waits = True
        self._loop.call_soon(self._go_on, peer)

    def _deliver(self, peer: _Peer, parts: list[bytes]) -> None:
        peer.payload = memoryview(b"")
        self._flush(peer)  # before any answer: the handshake may have ended with the same bytes
        self._on_message(peer.name, parts)

    def _flush(self, peer: _Peer) -> None:
        """Send what ZMTP itself has to say."""
        outgoing = peer.connection.outgoing
        if not outgoing or peer.closed:
            return
        said = _Said(outgoing)
        # All at once, as far as the thread is concerned: it takes from the other end.
        waiting = sum(len(one) for one in list(peer.outbox.queue) if type(one) is _Said)
        if waiting + len(said) > SAID_BYTES_MAX or peer.outbox.waiting >= SEND_QUEUE_BUFFERS:
            raise ZmtpError("the peer asks and does not read")
        self._sender.send(peer.outbox, [said])
        outgoing.clear()


def listen(host: str, port: int) -> tuple[socket.socket, str]:
    """A socket that listens on `port` of `host` (0: any free one), and its ``HOST:PORT``. Raises `SettingsError`."""
    address = _loopback(host)
    if not 0 <= port < 1 << 16:
        raise SettingsError(f"cannot listen on port {port}: use one from 1 to 65535, or 0 for any free one")
    family = socket.AF_INET6 if address.version == 6 else socket.AF_INET
    try:
        listening = socket.create_server((str(address), port), family=family, backlog=BACKLOG)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            what = f"--mesh-port: port {port} on {host} is in use; take another one, or 0 for any that is free"
        else:
            what = f"cannot listen on port {port} of {host}: {error.strerror}"
        raise SettingsError(what) from None
    listening.setblocking(False)
    place = f"[{address}]" if address.version == 6 else str(address)
    return listening, f"{place}:{listening.getsockname()[1]}"


def _loopback(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """The address to bind. Peers are not authenticated yet, so nothing but loopback is allowed."""
    try:
        address = ipaddress.ip_address("127.0.0.1" if host == "localhost" else host)
    except ValueError:
        raise SettingsError(f"cannot listen on {host!r}: it is not an IP address; use 127.0.0.1") from None
    if not address.is_loopback:
        raise SettingsError(
            f"cannot listen on {host}: only loopback is allowed, since peers are not authenticated yet; use 127.0.0.1"
        )
    return address
