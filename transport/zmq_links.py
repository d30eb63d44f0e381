"""The bulk connections of one node to its peers: which one a read takes, when one is lost, when one is idle.

They are plain sockets that speak ZMTP (zmtp.py) to the peer's ROUTER, so that bodies can be received where they belong;
what comes on them is not looked at here. Nothing waits: connecting, sending and receiving are done as far as they go,
and `wait` tells when they go further. A host that is a name is looked up by somebody else, and the connection waits for
the answer like any other. A peer has at most `BULK_LINKS_PER_PEER_MAX` connections; a read goes to the one with the
fewest reads. Used by one thread, or by the loop.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import math
import os
import select
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final, Generic, TypeVar

from .errors import UnreachableError
from .limits import (
    BULK_LINKS_PER_PEER_MAX,
    CONNECT_TIMEOUT_S,
    HEARTBEAT_INTERVAL_S,
    LINK_IDLE_S,
    SERVED_READ_IDLE_S,
)
from .zmq_names import Place, numeric
from .zmq_sockets import split_address
from .zmtp import Connection, Null, ZmtpError

TICK_S: Final = HEARTBEAT_INTERVAL_S / 20
"""The connections are looked over for what is due at most so often, however many there are."""
OPTIONS: Final = (
    (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 30),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10),
    (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * SERVED_READ_IDLE_S)),
)
R = TypeVar("R")


@dataclass(slots=True, eq=False)
class Link(Generic[R]):
    """One connection, and the reads on it by id."""

    address: str
    connection: Connection
    opened_s: float
    used_s: float
    socket: socket.socket | None = None
    """None until the host's name is looked up, and after the end."""
    connected: bool = False
    lost: bool = False
    """It is of no use, and closed at the next look."""
    closed: bool = False
    watched: int = 0
    """What the socket is waited for."""
    reads: dict[int, R] = field(default_factory=dict)
    coming: R | None = None
    """The read whose bytes come next. With None the bytes are nobody's."""

    def receive(self, into: list[memoryview]) -> int:
        """Receive what is there; 0 when nothing is. Raises `OSError` when the connection is over."""
        assert self.socket is not None
        try:
            count = self.socket.recvmsg_into(into)[0]
        except BlockingIOError:
            return 0
        if not count:
            raise ConnectionError("closed by the peer")
        return count

    @property
    def due_s(self) -> float:
        """When the connection has to be looked at."""
        due = self.connection.due_s if self.connected else self.opened_s + CONNECT_TIMEOUT_S
        return due if self.reads else min(due, self.used_s + LINK_IDLE_S)


class Links(Generic[R]):
    """All connections, and the wait for something to come on one of them, or for a wake-up."""

    def __init__(self, look_up: Callable[[str, int, Callable[[Place | None], None]], bool], wake_fd: int = -1) -> None:
        """`look_up`: as `Names.look_up`. `wake_fd`: an eventfd that ends a wait."""
        self._wake_fd = wake_fd
        self._look_up = look_up
        self._epoll = select.epoll()
        if wake_fd >= 0:
            self._epoll.register(wake_fd, select.EPOLLIN)
        self._by_address: dict[str, list[Link[R]]] = {}
        self._by_fd: dict[int, Link[R]] = {}
        self.due_s = math.inf
        """When `look_over` has something to do."""

    def fileno(self) -> int:
        """A descriptor that is readable when a wait would end."""
        return self._epoll.fileno()

    def __iter__(self) -> Iterator[Link[R]]:
        return iter([link for links in self._by_address.values() for link in links])

    def to(self, address: str) -> Link[R]:
        """The connection for one more read. Raises `UnreachableError` when there cannot be one."""
        links = [link for link in self._by_address.get(address, ()) if not link.lost]
        best = min(links, key=lambda link: len(link.reads), default=None)
        if best is not None and (not best.reads or len(links) >= BULK_LINKS_PER_PEER_MAX):
            return best
        host, port = split_address(address)
        now = time.monotonic()
        link: Link[R] = Link(address, Connection(Null()), now, now)
        place = numeric(host, port)
        if place is not None:
            self._connect(link, place)
        elif not self._look_up(host, port, functools.partial(self.found, link)):
            raise UnreachableError("no further host name can be looked up now")
        self._by_address.setdefault(address, []).append(link)
        self.due_s = min(self.due_s, link.due_s)
        return link

    def found(self, link: Link[R], place: Place | None) -> None:
        """The host's name was looked up; None: it does not exist."""
        if link.closed:
            return
        try:
            if place is None:
                raise UnreachableError("no such host")
            self._connect(link, place)
        except UnreachableError:
            self.give_up(link)

    def give_up(self, link: Link[R]) -> None:
        """The next `look_over` returns it as lost."""
        link.lost = True
        self.due_s = 0.0

    def _connect(self, link: Link[R], place: Place) -> None:
        family, where = place
        with contextlib.ExitStack() as stack:
            try:
                opened = stack.enter_context(socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK))
                for level, option, value in OPTIONS:
                    opened.setsockopt(level, option, value)
                code = opened.connect_ex(where)
                self._epoll.register(opened, select.EPOLLOUT)
            except OSError as error:  # also when this process has no descriptor left
                code = error.errno or errno.EINVAL
            if code not in (0, errno.EINPROGRESS):
                raise UnreachableError(f"cannot connect to {link.address}: {errno.errorcode.get(code, code)}")
            stack.pop_all()
        link.socket, link.watched = opened, select.EPOLLOUT
        self._by_fd[opened.fileno()] = link

    def wait(self, until_s: float) -> list[Link[R]]:
        """Sleep until something happens. Returns the connections that have bytes, or news of their end."""
        until_s = min(until_s, self.due_s)
        timeout_s = None if until_s == math.inf else max(0.0, until_s - time.monotonic())
        readable: list[Link[R]] = []
        for fd, events in self._epoll.poll(timeout_s):
            link = self._by_fd.get(fd)
            if link is None:
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(self._wake_fd)
                continue
            if not link.connected:
                self._connected(link)
            elif events & ~select.EPOLLOUT:
                readable.append(link)
                if not link.connection.ready:  # from when it is, it is asked for signs of life
                    self.due_s = min(self.due_s, time.monotonic() + HEARTBEAT_INTERVAL_S)
            if events & select.EPOLLOUT:
                self.flush(link)
        return readable

    def _connected(self, link: Link[R]) -> None:
        assert link.socket is not None
        if link.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self.give_up(link)
        else:
            link.connected = True
            link.connection.open(time.monotonic())
            self.due_s = min(self.due_s, link.due_s)

    def flush(self, link: Link[R]) -> None:
        """Send what goes."""
        if not link.connected or link.socket is None:
            return
        outgoing = link.connection.outgoing
        try:
            while outgoing:
                del outgoing[: link.socket.send(outgoing)]
        except BlockingIOError:
            pass
        except OSError:
            outgoing.clear()  # receiving tells of the end, once it has what came before
        watched = select.EPOLLIN | (select.EPOLLOUT if outgoing else 0)
        if watched != link.watched:
            link.watched = watched
            self._epoll.modify(link.socket, watched)

    def look_over(self) -> list[Link[R]]:
        """Do what is due: heartbeats, and the end of idle connections. Returns those that are lost."""
        now = time.monotonic()
        if now < self.due_s:
            return []
        lost: list[Link[R]] = []
        self.due_s = math.inf
        for link in self:
            if link.lost or not self._tick(link, now):
                lost.append(link)
            elif not link.reads and now - link.used_s >= LINK_IDLE_S:
                self.close(link)
            else:
                self.due_s = min(self.due_s, link.due_s)
        self.due_s = max(self.due_s, now + TICK_S)
        return lost

    def _tick(self, link: Link[R], now: float) -> bool:
        if not link.connected:
            return now - link.opened_s < CONNECT_TIMEOUT_S
        try:
            link.connection.tick(now)
        except ZmtpError:
            return False
        self.flush(link)
        return True

    def unused(self, link: Link[R]) -> None:
        """A read on the connection has ended."""
        link.used_s = time.monotonic()
        self.due_s = min(self.due_s, link.due_s)

    def close(self, link: Link[R]) -> None:
        """Close the connection. What its reads become is the caller's business."""
        link.closed = True
        if link.socket is not None:
            self._epoll.unregister(link.socket)
            del self._by_fd[link.socket.fileno()]
            link.socket.close()
            link.socket = None
        links = self._by_address[link.address]
        links.remove(link)
        if not links:
            del self._by_address[link.address]

    def shut(self) -> None:
        """Close all of them."""
        for link in self:
            self.close(link)
        self._epoll.close()
