"""The bulk connections of one node to its peers: which one a read takes, when one is lost, when one is idle.

A peer has at most `BULK_LINKS_PER_PEER_MAX` of them; a read goes to the one with the fewest reads. Used by the bulk
thread alone.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import zmq

from .limits import BULK_LINKS_PER_PEER_MAX, LINK_IDLE_S
from .zmq_sockets import READY_TIMEOUT_S, Sockets, close_both, is_ready

R = TypeVar("R")


@dataclass(slots=True, eq=False)
class Link(Generic[R]):
    """One connection, and the reads on it by id."""

    address: str
    socket: zmq.Socket[bytes]
    monitor: zmq.Socket[bytes]
    used_s: float
    ready: bool = False
    reads: dict[int, R] = field(default_factory=dict)


class Links(Generic[R]):
    """All connections, and the wait for something to come on one of them, or for a wake-up."""

    def __init__(self, sockets: Sockets, wake_fd: int) -> None:
        self._sockets = sockets
        self._poller = zmq.Poller()
        self._poller.register(wake_fd, zmq.POLLIN)
        self._by_address: dict[str, list[Link[R]]] = {}
        self._by_socket: dict[zmq.Socket[bytes], Link[R]] = {}

    def __iter__(self) -> Iterator[Link[R]]:
        return itertools.chain.from_iterable(list(self._by_address.values()))

    def to(self, address: str) -> Link[R]:
        """The connection for one more read. Raises `UnreachableError` when the address is none."""
        links = self._by_address.get(address, [])
        best = min(links, key=lambda link: len(link.reads), default=None)
        if best is not None and (not best.reads or len(links) >= BULK_LINKS_PER_PEER_MAX):
            return best
        link: Link[R] = Link(address, *self._sockets.connect(address, bulk=True), time.monotonic())
        for end in (link.socket, link.monitor):
            self._poller.register(end, zmq.POLLIN)
            self._by_socket[end] = link
        self._by_address.setdefault(address, []).append(link)
        return link

    def wait(self) -> tuple[list[Link[R]], list[Link[R]]]:
        """Sleep until something happens. Returns the connections that have messages, and those that are lost."""
        readable: list[Link[R]] = []
        lost: list[Link[R]] = []
        for end, _ in self._poller.poll(int(1000 * READY_TIMEOUT_S) if self._by_address else None):
            link = self._by_socket.get(end)
            if link is None:
                continue  # the wake-up
            if end is link.socket:
                readable.append(link)
            elif is_ready(link.monitor.recv_multipart()):
                link.ready = True
            else:
                lost.append(link)
        return readable, lost

    def overdue(self) -> tuple[list[Link[R]], list[Link[R]]]:
        """The connections that did not become ready in time, and those that nobody has used for long."""
        now = time.monotonic()
        unready = [link for link in self if not link.ready and now - link.used_s > READY_TIMEOUT_S]
        return unready, [link for link in self if link.ready and not link.reads and now - link.used_s > LINK_IDLE_S]

    def close(self, link: Link[R]) -> None:
        """Close the connection. What its reads become is the caller's business."""
        for end in (link.monitor, link.socket):
            self._poller.unregister(end)
            del self._by_socket[end]
        links = self._by_address[link.address]
        links.remove(link)
        if not links:
            del self._by_address[link.address]
        close_both(link.socket, link.monitor)
