"""A sender and connections out of it, and ways to hold its thread at one place."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading

from kvmesh.transport import zmq_sending
from kvmesh.transport.limits import DIRECT_SEND_BYTES_MAX, KIB
from kvmesh.transport.zmq_sending import Outbox, Sender
from tests.support.waiting import wait_until_async
from tests.transport.ends import LONG_S

LARGE = DIRECT_SEND_BYTES_MAX + 1
really_send = zmq_sending._send


def in_thread() -> bool:
    return threading.current_thread().name == "kvmesh-send"


class Ways:
    """A sender, and connections out of it."""

    def __init__(self) -> None:
        self.sender = Sender()
        self._stack = contextlib.ExitStack()
        self._open: list[Outbox] = []
        self._stopped = False

    def connect(self, *, receive_bytes: int = 4 * KIB) -> tuple[Outbox, socket.socket]:
        """A connection with small buffers: the outbox, and the end that reads."""
        with socket.create_server(("127.0.0.1", 0)) as listening:
            reading = self._stack.enter_context(contextlib.closing(socket.socket()))
            reading.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
            reading.connect(listening.getsockname())
            sending, _ = listening.accept()
        sending.setblocking(False)
        sending.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * KIB)
        reading.setblocking(False)
        self._stack.callback(sending.close)  # should the test fail
        outbox = Outbox(sending)
        self._open.append(outbox)
        return outbox, reading

    def close(self, outbox: Outbox) -> None:
        self._open.remove(outbox)
        self.sender.close(outbox)

    async def stop(self) -> None:
        """End all that is open, and the thread."""
        if self._stopped:
            return
        self._stopped = True
        for outbox in self._open:
            self.sender.close(outbox)
        async with asyncio.timeout(LONG_S):
            await self.sender.stop()
        for outbox in self._open:
            assert outbox.socket.fileno() == -1
            assert outbox.waiting == 0
        assert not self.sender._by_fd

    async def __aenter__(self) -> Ways:
        return self

    async def __aexit__(self, *_: object) -> None:
        with self._stack:
            await self.stop()


async def hear(reading: socket.socket, count: int) -> bytes:
    """So many bytes, or fewer when that is the end."""
    heard = bytearray()
    async with asyncio.timeout(LONG_S):
        while len(heard) < count:
            got = await asyncio.get_running_loop().sock_recv(reading, min(count - len(heard), 1 << 20))
            if not got:
                break
            heard += got
    return bytes(heard)


async def end_of(reading: socket.socket) -> bytes:
    """All that comes until the connection ends, however it does."""
    heard = bytearray()
    async with asyncio.timeout(LONG_S):
        with contextlib.suppress(ConnectionError):
            while got := await asyncio.get_running_loop().sock_recv(reading, 1 << 16):
                heard += got
    return bytes(heard)


async def until_closed(*outboxes: Outbox) -> None:
    await wait_until_async(
        lambda: all(outbox.socket.fileno() == -1 and not outbox.waiting for outbox in outboxes),
        2.0,
        "every socket is closed, and nothing waits any more",
    )


class Gate:
    """Holds the thread at one place until the loop opens it."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self._open = threading.Event()

    def hold(self) -> None:
        self.reached.set()
        self._open.wait(LONG_S)

    async def is_reached(self) -> None:
        await wait_until_async(self.reached.is_set, LONG_S, "the thread is there")

    def open(self) -> None:
        self._open.set()

    def __enter__(self) -> Gate:
        return self

    def __exit__(self, *_: object) -> None:
        self.open()
