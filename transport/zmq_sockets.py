"""ZeroMQ sockets as the `zmq` transport wants them: every option with its reason, and sockets on the asyncio loop.

The connections on which this node calls others are libzmq's. The options that all of them share: bounded queues
(`SNDHWM`, `RCVHWM`), no lingering, a bound on a frame's size, heartbeats by libzmq's threads, TCP keepalive, a bound on
the handshake. `TCP_MAXRT` ends a connection whose other end takes no byte for `SERVED_READ_IDLE_S`: heartbeats alone do
not see a peer that talks and never reads.

libzmq never reconnects here (`RECONNECT_IVL` -1). A lost connection ends what hangs on it at once, and the next call
or read opens a new one: so a refused connection is an answer rather than a silence, and there is no backoff to bound.
The socket's monitor tells of both.

Only `Sockets` makes sockets. They live on the loop; bulk is received over sockets of its own (zmq_links.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Callable, Sequence
from typing import Final, cast

import zmq
from zmq.utils.monitor import parse_monitor_message

from .errors import UnreachableError
from .frames import Buffer
from .limits import (
    CONNECT_TIMEOUT_S,
    HANDSHAKE_TIMEOUT_S,
    HEARTBEAT_INTERVAL_S,
    HEARTBEAT_TIMEOUT_S,
    IO_THREADS,
    KIB,
    MESSAGE_BYTES_MAX,
    PEERS_MAX,
    RECEIVE_QUEUE_MESSAGES,
    SEND_QUEUE_MESSAGES,
    SERVED_READ_IDLE_S,
)

CONTROL_FRAME_BYTES_MAX: Final = MESSAGE_BYTES_MAX + 64 * KIB
"""Somewhat more than a message may have: one just over the bound is counted, one far over it costs the connection."""
SOCKETS_PER_PEER: Final = 4
"""Control, with the two ends of its monitor, and one to spare."""
ZERO_COPY_BYTES_MIN: Final = 16 * KIB
"""A part below this is cheaper copied than kept track of."""
MESSAGES_PER_TURN: Final = 64
"""Messages of one socket that are handled before the loop gets its turn."""
LOST: Final = (
    zmq.EVENT_CLOSED
    | zmq.EVENT_DISCONNECTED
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)
"""The events after which a connection of ours will carry nothing more; "closed" is a connection that was refused."""
CONNECTION: Final = LOST | zmq.EVENT_HANDSHAKE_SUCCEEDED
READY_TIMEOUT_S: Final = CONNECT_TIMEOUT_S + HANDSHAKE_TIMEOUT_S
"""A connection that is not ready by then is lost: libzmq says nothing of a name that does not resolve."""


class Sockets:
    """The context of one transport, and its sockets."""

    def __init__(self) -> None:
        self._context = zmq.Context(io_threads=IO_THREADS)
        self._context.set(zmq.MAX_SOCKETS, SOCKETS_PER_PEER * PEERS_MAX)

    def connect(self, address: str) -> tuple[zmq.Socket[bytes], zmq.Socket[bytes]]:
        """A DEALER towards the peer at `address`, and the socket that tells what becomes of the connection.

        Raises `UnreachableError` when that is no address, and when there is no socket for it.
        """
        split_address(address)
        with contextlib.ExitStack() as stack:
            try:
                dealer = stack.enter_context(self._socket(zmq.DEALER))
                dealer.ipv6 = address.startswith("[")
                dealer.connect_timeout = int(1000 * CONNECT_TIMEOUT_S)
                dealer.reconnect_ivl = -1
                monitor = dealer.get_monitor_socket(CONNECTION)  # before the connection can fail
                stack.callback(close_both, dealer, monitor)
                dealer.connect(f"tcp://{address}")
            except zmq.ZMQError as error:  # also when this process has no socket left
                raise UnreachableError(f"cannot connect to {address}: {error.strerror}") from None
            stack.pop_all()
        return dealer, monitor

    def _socket(self, kind: int) -> zmq.Socket[bytes]:
        socket = self._context.socket(kind)
        socket.linger = 0
        socket.sndhwm = SEND_QUEUE_MESSAGES
        socket.rcvhwm = RECEIVE_QUEUE_MESSAGES
        socket.maxmsgsize = CONTROL_FRAME_BYTES_MAX
        socket.handshake_ivl = int(1000 * HANDSHAKE_TIMEOUT_S)
        socket.heartbeat_ivl = int(1000 * HEARTBEAT_INTERVAL_S)
        socket.heartbeat_timeout = int(1000 * HEARTBEAT_TIMEOUT_S)
        socket.heartbeat_ttl = int(1000 * HEARTBEAT_TIMEOUT_S)
        socket.tcp_keepalive = 1
        socket.tcp_keepalive_idle = 30
        socket.tcp_keepalive_intvl = 10
        socket.tcp_maxrt = int(1000 * SERVED_READ_IDLE_S)
        return socket

    def close(self) -> None:
        """End libzmq's threads. Every socket must be closed before; blocks for the milliseconds that this takes."""
        self._context.term()


class LoopSocket:
    """A socket on the loop: `on_message` gets each message that comes, and `send` never waits."""

    def __init__(self, socket: zmq.Socket[bytes], on_message: Callable[[list[bytes]], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._socket = socket
        self._on_message = on_message
        self._fd = int(socket.fd)
        self._draining = False
        self._closed = False
        self._loop.add_reader(self._fd, self.drain)
        self._drain_soon()

    def send(self, parts: Sequence[Buffer], *, copy: bool = True) -> None:
        """Queue one message. Raises `zmq.Again` when the queue is full, another `ZMQError` when the peer is gone."""
        try:
            last = len(parts) - 1
            for place, part in enumerate(parts):
                flags = zmq.NOBLOCK if place == last else zmq.NOBLOCK | zmq.SNDMORE
                self._socket.send(part, flags, copy=copy or len(part) < ZERO_COPY_BYTES_MIN)
        finally:
            # The descriptor tells of changes, not of states, and a send may have taken the news of a message in.
            self._drain_soon()

    def leave(self) -> zmq.Socket[bytes]:
        """Leave the loop: nothing comes any more. Returns the socket, for its owner to close."""
        self._loop.remove_reader(self._fd)
        self._closed = True
        return self._socket

    def _drain_soon(self) -> None:
        if not self._draining:
            self._draining = True
            self._loop.call_soon(self.drain)

    def drain(self) -> None:
        """Hand out what has come."""
        self._draining = False
        for _ in range(MESSAGES_PER_TURN):
            if self._closed:
                return
            if not cast(int, self._socket.get(zmq.EVENTS)) & zmq.POLLIN:  # cheaper than to try and catch `zmq.Again`
                return
            try:
                message = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:  # what came was dropped meanwhile, with its connection
                return
            self._on_message(message)
        self._drain_soon()


class WatchedSocket:
    """A socket on the loop, and what is told of its connections: `on_event(whether one is ready, or else lost)`."""

    def __init__(
        self,
        socket: zmq.Socket[bytes],
        monitor: zmq.Socket[bytes],
        on_message: Callable[[list[bytes]], None],
        on_event: Callable[[bool], None],
    ) -> None:
        self._ends = LoopSocket(socket, on_message), LoopSocket(monitor, lambda event: on_event(is_ready(event)))
        self.send, self.drain = self._ends[0].send, self._ends[0].drain

    def close(self) -> None:
        """Close both: nothing comes any more."""
        close_both(*(end.leave() for end in self._ends))


def split_address(address: str) -> tuple[str, int]:
    """Host (an IPv6 host without its brackets) and port of ``HOST:PORT``. Raises `UnreachableError` when it is none."""
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.%]+)\]|([^\[\]:/;\s]+)):(\d{1,5})", address)
    if not match or not 0 < int(match[3]) < 1 << 16:
        raise UnreachableError(f"{address!r} is not an address: HOST:PORT is")
    return match[1] or match[2], int(match[3])


def close_both(socket: zmq.Socket[bytes], monitor: zmq.Socket[bytes]) -> None:
    """Close a socket and its monitor."""
    socket.disable_monitor()
    monitor.close()
    socket.close()


def is_ready(event: list[bytes]) -> bool:
    """Whether a monitor's message of `CONNECTION` says that the connection is ready; otherwise it is lost."""
    return bool(parse_monitor_message(event)["event"] == zmq.EVENT_HANDSHAKE_SUCCEEDED)
