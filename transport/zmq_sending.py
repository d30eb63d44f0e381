"""The thread that sends bulk: what the loop hands over goes out as fast as each connection takes it.

An `Outbox` is the way out of one connection. Little is sent by the loop itself, at once, so that a small read costs no
wake-up of a thread; more, or what the socket does not take, is handed to the thread, and the outbox belongs to it until
it is empty. Bytes go out in the order in which they were given. The thread takes the connections in turn, `TURN_BYTES`
each, with one system call for as many buffers as that has; the interpreter's lock is free meanwhile.

Whoever reads the socket is the loop (zmq_port.py). It says when the connection is over; the thread closes the socket
then if the outbox is its own at that time, since a descriptor must not be closed under a system call.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import select
import socket
import threading
from collections import deque
from collections.abc import Sequence
from typing import Final

from .limits import DIRECT_SEND_BYTES_MAX, MIB
from .zmtp import Buffer

log = logging.getLogger(__name__)

TURN_BYTES: Final = 2 * MIB
"""What one connection gets before the next one."""
BUFFERS_PER_CALL: Final = 256
"""Buffers of one system call; the kernel takes 1024."""


class Outbox:
    """What waits to go out of one connection."""

    __slots__ = ("broken", "closed", "handed", "lock", "queue", "registered", "sending", "socket")

    def __init__(self, opened: socket.socket) -> None:
        self.socket = opened
        self.queue: deque[Buffer] = deque()
        """Given by the loop."""
        self.sending: deque[Buffer] = deque()
        """Taken by whoever sends."""
        self.handed = False
        """It belongs to the thread. Both this and "the queue is empty" change under the lock alone."""
        self.closed = False
        self.broken = False
        """Sending failed, perhaps in the middle of a frame: nothing can follow."""
        self.registered = False
        self.lock = threading.Lock()

    @property
    def waiting(self) -> int:
        """How many buffers wait."""
        return len(self.queue) + len(self.sending)


class Sender:
    """The thread, and the loop's way to it."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._commands: deque[Outbox] = deque()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._stopping = False
        self._ended = self._loop.create_future()
        # From here on the thread's own.
        self._epoll = select.epoll()
        self._epoll.register(self._wake, select.EPOLLIN)
        self._by_fd: dict[int, Outbox] = {}
        self._ready: deque[Outbox] = deque()
        self._thread = threading.Thread(target=self._run, name="kvmesh-send", daemon=True)
        try:
            self._thread.start()
        except BaseException:  # this process has no thread left
            self._epoll.close()
            os.close(self._wake)
            raise

    # --- called on the loop ----------------------------------------------------------------------------------------
    def send(self, outbox: Outbox, buffers: Sequence[Buffer]) -> None:
        """Send these bytes, after those that were given before. After an error, whoever reads the socket hears of its
        end."""
        if outbox.closed or outbox.broken:
            return
        with outbox.lock:
            if outbox.handed:
                outbox.queue.extend(buffers)
                return
        outbox.sending.extend(buffers)
        if sum(map(len, buffers)) <= DIRECT_SEND_BYTES_MAX:
            try:
                _send(outbox)
            except BlockingIOError:
                pass
            except OSError:
                _spoil(outbox)
            if not outbox.sending:
                return
        outbox.handed = True
        self._tell(outbox)

    def close(self, outbox: Outbox) -> None:
        """The connection is over: send nothing more, and close its socket."""
        outbox.closed = True
        with outbox.lock:
            known = outbox.handed or outbox.registered
        if known:  # to the thread, which may give it back just now
            with contextlib.suppress(OSError):  # so that no system call of the thread waits or succeeds any more
                outbox.socket.shutdown(socket.SHUT_RDWR)
            self._tell(outbox)
        else:
            outbox.sending.clear()
            outbox.socket.close()

    async def stop(self) -> None:
        """Returns when the thread has gone. Every outbox must be closed before."""
        self._stopping = True
        os.eventfd_write(self._wake, 1)
        await asyncio.shield(self._ended)
        self._thread.join()  # it has said its last word: this does not wait
        while self._commands:  # after a failure of the thread
            self._drop(self._commands.popleft())
        self._epoll.close()
        os.close(self._wake)

    def _tell(self, outbox: Outbox) -> None:
        self._commands.append(outbox)
        os.eventfd_write(self._wake, 1)

    # --- the thread ------------------------------------------------------------------------------------------------
    def _run(self) -> None:
        try:
            while not (self._stopping and not self._commands and not self._ready):
                self._turn()
        except Exception:
            log.exception("the sending thread failed: this node serves no large reads any more")
        finally:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                self._loop.call_soon_threadsafe(self._ended.set_result, None)

    def _turn(self) -> None:
        for fd, _ in self._epoll.poll(0 if self._ready else None):
            if fd != self._wake:
                self._ready.append(self._by_fd[fd])
                continue
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._wake)
            while self._commands:
                self._ready.append(self._commands.popleft())
        for _ in range(len(self._ready)):
            outbox = self._ready.popleft()
            try:
                more = self._push(outbox)
            except Exception:
                log.exception("a connection is lost by an error of our own")
                _spoil(outbox)
            else:
                if more:
                    self._ready.append(outbox)

    def _push(self, outbox: Outbox) -> bool:
        """Send a turn's worth. Whether there may be more that goes now."""
        if outbox.closed:
            self._drop(outbox)
            return False
        sending, queue = outbox.sending, outbox.queue
        size_bytes = sum(map(len, sending))
        while queue and size_bytes < TURN_BYTES and len(sending) < BUFFERS_PER_CALL:
            sending.append(queue.popleft())
            size_bytes += len(sending[-1])
        try:
            _send(outbox)
        except BlockingIOError:
            self._await(outbox)
            return False
        except OSError:
            _spoil(outbox)
        if sending:
            self._await(outbox)
            return False
        with outbox.lock:
            more = outbox.handed = bool(queue)
        return more  # not what stands there by now: without the lock it is the loop's to change

    def _await(self, outbox: Outbox) -> None:
        """Until the socket takes more."""
        events = select.EPOLLOUT | select.EPOLLONESHOT
        if outbox.registered:
            self._epoll.modify(outbox.socket, events)
        else:
            outbox.registered = True
            self._by_fd[outbox.socket.fileno()] = outbox
            self._epoll.register(outbox.socket, events)

    def _drop(self, outbox: Outbox) -> None:
        """Close it; a second time does nothing."""
        if outbox.registered:
            outbox.registered = False
            del self._by_fd[outbox.socket.fileno()]
            self._epoll.unregister(outbox.socket)
        outbox.queue.clear()
        outbox.sending.clear()
        outbox.socket.close()


def _spoil(outbox: Outbox) -> None:
    """Send nothing more. Whoever reads the socket hears of its end, and closes the outbox."""
    outbox.broken = True
    outbox.sending.clear()
    outbox.queue.clear()
    with contextlib.suppress(OSError):
        outbox.socket.shutdown(socket.SHUT_RDWR)


def _send(outbox: Outbox) -> None:
    """Send once, and take what went out of `sending`. Raises `OSError`."""
    sending = outbox.sending
    sent = outbox.socket.sendmsg(sending)
    while sent:
        first = sending[0]
        if sent < len(first):
            sending[0] = memoryview(first)[sent:]
            return
        sent -= len(first)
        sending.popleft()
