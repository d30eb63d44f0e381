"""A mesh port alone, without what it serves, and peers of it that say any bytes and read when they like."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
import weakref
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from kvmesh.transport import zmq_port
from kvmesh.transport.counters import Counters
from kvmesh.transport.limits import (
    MIB,
)
from kvmesh.transport.zmq_port import GoneError, Port, listen
from kvmesh.transport.zmq_sending import Outbox
from kvmesh.transport.zmtp import Buffer
from tests.support.waiting import wait_until_async
from tests.transport.ends import LONG_S
from tests.transport.strangers import GREETING
from tests.transport.strangers import READY as ROUTER_READY

READY = ROUTER_READY.replace(b"ROUTER", b"DEALER")
HELLO = GREETING + READY
PING = b"\x04\x0b\x04PING\0\x64abcd"
PONG = b"\x04PONGabcd"


class Node:
    """A port, and what it told."""

    def __init__(
        self, *, echoes: bool = True, made: Callable[[socket.socket], socket.socket] = lambda listening: listening
    ) -> None:
        listening, self.address = listen("127.0.0.1", 0)
        self.counters = Counters()
        self.heard: list[tuple[bytes, list[bytes]]] = []
        self.gone: list[bytes] = []
        self._echoes = echoes
        self.port = Port(made(listening), self._hear, self._forget, self.counters)

    def _hear(self, peer: bytes, parts: list[bytes]) -> None:
        assert peer not in self.gone
        assert all(type(part) is bytes for part in parts)
        self.heard.append((peer, parts))
        if self._echoes:
            self.port.send(peer, parts)

    def _forget(self, peer: bytes) -> None:
        self.gone.append(peer)
        with pytest.raises(GoneError):
            self.port.send(peer, [b"to nobody"])

    @property
    def peers(self) -> list[bytes]:
        return list(self.port._peers)

    def outbox(self, peer: bytes) -> Outbox:
        return self.port._peers[peer].outbox

    async def has(self, count: int) -> list[bytes]:
        """Wait until so many are connected: their names."""
        await wait_until_async(lambda: len(self.peers) == count, LONG_S, f"{count} are connected")
        return self.peers

    async def __aenter__(self) -> Node:
        return self

    async def __aexit__(self, *_: object) -> None:
        async with asyncio.timeout(LONG_S):
            await self.port.close()
        assert len(set(self.gone)) == len(self.gone)


class Plain:
    """A peer that says any bytes, and reads when it likes."""

    def __init__(self, address: str, *, receive_bytes: int | None = None) -> None:
        self.socket = socket.socket()
        if receive_bytes is not None:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        host, port = address.split(":")
        self.socket.connect((host, int(port)))
        self.socket.setblocking(False)
        self.commands: list[bytes] = []
        self._greeted = False

    async def say(self, *wire: Buffer) -> None:
        async with asyncio.timeout(LONG_S):
            await asyncio.get_running_loop().sock_sendall(self.socket, b"".join(wire))

    async def exactly(self, count: int) -> bytes:
        heard = bytearray()
        while len(heard) < count:
            got = await asyncio.get_running_loop().sock_recv(self.socket, min(count - len(heard), MIB))
            if not got:
                raise EOFError
            heard += got
        return bytes(heard)

    async def hear(self) -> list[bytes]:
        """The next message; commands that come before it are noted. Raises `EOFError`."""
        parts: list[bytes] = []
        async with asyncio.timeout(LONG_S):
            if not self._greeted:
                self._greeted = True
                assert await self.exactly(len(GREETING)) == GREETING[:11] + b"\1" + GREETING[12:]
            while True:
                flags, size = await self.exactly(2)
                if flags & 2:
                    size = int.from_bytes(bytes([size]) + await self.exactly(7), "big")
                body = await self.exactly(size)
                if flags & 4:
                    self.commands.append(body)
                    continue
                parts.append(body)
                if not flags & 1:
                    return parts

    async def hear_commands_until_the_end(self) -> None:
        with pytest.raises(EOFError):
            await self.hear()

    async def ended(self) -> None:
        """Read until the port has closed this connection."""
        async with asyncio.timeout(LONG_S):
            with contextlib.suppress(ConnectionError):
                while await asyncio.get_running_loop().sock_recv(self.socket, MIB):
                    pass

    def end(self, *, resets: bool = False) -> None:
        if resets:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()

    def __enter__(self) -> Plain:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()


class Clock:
    """The time of `zmq_port`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(zmq_port, "time", self)
        monkeypatch.setattr(zmq_port, "TICK_S", 0.001)

    def monotonic(self) -> float:
        return self.now


class Lent:
    """A buffer, and whether somebody still refers to it."""

    def __init__(self, size_bytes: int) -> None:
        array = np.zeros(size_bytes, np.uint8)
        self._back = threading.Event()
        weakref.finalize(array, self._back.set).atexit = False
        self.view: memoryview | None = array.data

    def take(self) -> memoryview:
        assert self.view is not None
        return self.view

    @property
    def is_back(self) -> bool:
        self.view = None
        return self._back.is_set()


class Narrow(socket.socket):
    """A connection of which each system call brings only so many bytes."""

    sizes: Iterator[int]

    def recv_into(self, buffer: Buffer, *_: int) -> int:  # type: ignore[override]
        return super().recv_into(buffer, min(next(self.sizes), len(buffer)))


class NarrowPort(socket.socket):
    """Accepts narrow connections."""

    sizes: Callable[[], Iterator[int]]

    def accept(self) -> tuple[Narrow, object]:
        accepted, address = super().accept()
        narrow = Narrow(fileno=accepted.detach())
        narrow.sizes = self.sizes()
        return narrow, address


def narrowed(sizes: Callable[[], Iterator[int]]) -> Callable[[socket.socket], socket.socket]:
    def made(listening: socket.socket) -> NarrowPort:
        narrow = NarrowPort(fileno=listening.detach())
        narrow.setblocking(False)
        narrow.sizes = sizes
        return narrow

    return made


def always(count: int) -> Iterator[int]:
    while True:
        yield count
