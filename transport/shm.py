"""Shared memory between two processes of one host: the reader maps the holder's arena and copies out of it, once.

    holder                                   reader
    Listener ◀── Hello: who do I talk to, what are my leases called ──  ShmMover
             ──  Welcome, with the arena's memfd (SCM_RIGHTS) ──▶       maps it read-only
             ◀─────────── nothing more, until one of the two ends ────▶

The connection stays open and is the sign of life: its end, by whatever cause, gives back the reader's leases at the
holder, and stops copies at the reader. Leases themselves are taken by calls (lending.py).

Peers are on one host when they see the same boot id *and* the socket can be reached. The socket has an abstract name,
random, so that nothing is left behind in any directory when a process is killed, and no path can be too long. Abstract
names belong to a network namespace: two containers that share none do not reach each other, and use the network.
Whoever connects must have our user id as the kernel tells it (SO_PEERCRED), and so must whoever listens.

The memfd must be sealed against shrinking, or a holder could take the ground from under our copy (SIGBUS). The fd that
is passed is open for reading alone. Everything here runs on the loop; the copies run in threads (copying.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import mmap
import os
import secrets
import socket
import stat
import struct
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import Annotated, Final, TypeVar

import msgspec
import numpy as np

from .copying import Bytes, CopyMove
from .counters import Counters
from .errors import ProtocolError, UnreachableError
from .interface import Region
from .lending_messages import Instance, Number
from .limits import (
    ACCEPT_RETRY_S,
    HANDSHAKE_TIMEOUT_S,
    MESH_PROTOCOL_VERSION,
    SHM_HELLO_BYTES_MAX,
    SHM_PEERS_MAX,
)
from .onesided import Piece

_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")
_CREDENTIALS: Final = struct.Struct("3i")
_SOCKET: Final = socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC


class _Message(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    version: int


class Offer(_Message, frozen=True, tag=1):
    """What a peer must know to connect."""

    boot_id: Annotated[str, msgspec.Meta(min_length=1, max_length=64)]
    socket_name: Annotated[bytes, msgspec.Meta(min_length=1, max_length=100)]
    instance: Instance


class Hello(_Message, frozen=True, tag=2):
    """The reader's first and only words."""

    instance: Instance
    """The holder that it means."""
    reader: Instance
    """What its leases go by."""


class Welcome(_Message, frozen=True, tag=3):
    """The holder's only words; the fd comes with them."""

    arena_bytes: Number


M = TypeVar("M", bound=_Message)
_encoder = msgspec.msgpack.Encoder()


def boot_id() -> str:
    """The same for all processes until the kernel starts again; empty when it is not known."""
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return ""


class ShmEnd:
    """This process's side: a `kvmesh.transport.onesided.OneSidedEnd`."""

    def __init__(
        self,
        region: Region | None,
        instance: bytes,
        threads: Executor,
        counters: Counters,
        on_reader_gone: Callable[[bytes], None],
        on_holder_gone: Callable[[ShmMover], None],
    ) -> None:
        self._boot_id = boot_id()
        self._instance = instance
        self._threads = threads
        self._on_holder_gone = on_holder_gone
        self._listener: _Listener | None = None
        if region is not None and self._boot_id:
            with contextlib.suppress(OSError):  # no room for one more socket: peers use the network
                self._listener = _Listener(region, instance, counters, on_reader_gone)

    def offer(self) -> bytes:
        """As `OneSidedEnd.offer`."""
        if self._listener is None:
            return b""
        return _encoder.encode(Offer(MESH_PROTOCOL_VERSION, self._boot_id, self._listener.name, self._instance))

    async def mover(self, peer_offer: bytes, peer_address: str, reader: bytes) -> ShmMover:
        """As `OneSidedEnd.mover`."""
        offer = _decode(Offer, peer_offer)
        if offer.boot_id != self._boot_id:
            raise UnreachableError(f"{peer_address} is on another host")
        with contextlib.ExitStack() as stack:
            try:
                connection = stack.enter_context(socket.socket(socket.AF_UNIX, _SOCKET))
                connection.connect(b"\0" + offer.socket_name)
                if not _same_user(connection):
                    raise UnreachableError(f"{peer_address} is a process of another user")
                connection.send(_encoder.encode(Hello(MESH_PROTOCOL_VERSION, offer.instance, reader)))
                async with asyncio.timeout(HANDSHAKE_TIMEOUT_S):
                    await _readable(connection)
                data, fds, _, _ = socket.recv_fds(connection, SHM_HELLO_BYTES_MAX, 1, socket.MSG_CMSG_CLOEXEC)
            except (OSError, TimeoutError) as error:
                raise UnreachableError(f"{peer_address} does not share its memory: {error}") from None
            for fd in fds:
                stack.callback(os.close, fd)
            if not data or not fds:
                raise UnreachableError(f"{peer_address} does not share its memory with this process")
            mapping = _map(fds[0], _decode(Welcome, data).arena_bytes)
            kept = socket.socket(fileno=connection.detach())  # a copy would need one more descriptor
            return ShmMover(kept, mapping, self._threads, self._on_holder_gone)

    async def close(self) -> None:
        """As `OneSidedEnd.close`."""
        if self._listener is not None:
            self._listener.close()
            self._listener = None


class ShmMover:
    """Copies out of one peer's arena: a `kvmesh.transport.onesided.Mover`."""

    hashes = True

    def __init__(
        self,
        connection: socket.socket,
        mapping: mmap.mmap,
        threads: Executor,
        on_gone: Callable[[ShmMover], None],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._connection = connection
        self._mapping = mapping
        self._arena: Bytes = np.frombuffer(mapping, np.uint8)
        self._threads = threads
        self._on_gone = on_gone
        self._moves: set[CopyMove] = set()
        self._open = True
        self._loop.add_reader(connection, self._end)

    def move(self, pieces: Sequence[Piece]) -> CopyMove:
        """As `Mover.move`."""
        if not self._open:
            raise UnreachableError("the peer is gone")
        if any(piece.remote_offset > len(self._arena) - piece.into.nbytes for piece in pieces):
            raise UnreachableError("what was lent is not inside the memory that the peer shares")
        self._moves = {move for move in self._moves if not move.done}
        move = CopyMove(self._arena, pieces, self._threads)
        self._moves.add(move)
        return move

    async def close(self) -> None:
        """As `Mover.close`."""
        self._disconnect()
        for move in self._moves:
            await move.stop()
        self._moves.clear()
        self._arena = np.empty(0, np.uint8)
        with contextlib.suppress(BufferError):  # a copy that was made just now still refers to it, and frees it
            self._mapping.close()

    def _end(self) -> None:
        """The connection has ended, or its peer says what it should not."""
        self._disconnect()
        for move in self._moves:
            move.give_up()
        self._on_gone(self)

    def _disconnect(self) -> None:
        if self._open:
            self._open = False
            self._loop.remove_reader(self._connection)
            self._connection.close()


class _Listener:
    """The holder's socket, and the readers that are connected."""

    def __init__(
        self, region: Region, instance: bytes, counters: Counters, on_reader_gone: Callable[[bytes], None]
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._instance = instance
        self._arena_bytes = region.size_bytes
        self._counters = counters
        self._on_reader_gone = on_reader_gone
        self._connections: dict[socket.socket, asyncio.TimerHandle] = {}
        self._readers: dict[socket.socket, bytes] = {}
        self._retry: asyncio.TimerHandle | None = None
        self.name = b"kvmesh-" + secrets.token_hex(16).encode()
        with contextlib.ExitStack() as stack:
            self._fd = os.open(f"/proc/self/fd/{region.fd}", os.O_RDONLY | os.O_CLOEXEC)
            stack.callback(os.close, self._fd)
            self._socket = stack.enter_context(socket.socket(socket.AF_UNIX, _SOCKET))
            self._socket.bind(b"\0" + self.name)
            self._socket.listen()
            stack.pop_all()
        self._loop.add_reader(self._socket, self._accept)

    def close(self) -> None:
        """End every connection, and free the name."""
        if self._retry is not None:
            self._retry.cancel()
        self._loop.remove_reader(self._socket)
        self._socket.close()
        for connection in list(self._connections):
            self._lose(connection)
        os.close(self._fd)

    def _listen(self) -> None:
        self._retry = None
        self._loop.add_reader(self._socket, self._accept)

    def _accept(self) -> None:
        try:
            connection, _ = self._socket.accept()
        except (BlockingIOError, ConnectionError, InterruptedError):
            return
        except OSError:  # no descriptor is free: it would be tried for ever
            self._loop.remove_reader(self._socket)
            self._retry = self._loop.call_later(ACCEPT_RETRY_S, self._listen)
            return
        if len(self._connections) >= SHM_PEERS_MAX or not _same_user(connection):
            self._counters.refused += 1
            connection.close()
            return
        connection.setblocking(False)
        self._connections[connection] = self._loop.call_later(HANDSHAKE_TIMEOUT_S, self._lose, connection)
        self._loop.add_reader(connection, self._receive, connection)

    def _receive(self, connection: socket.socket) -> None:
        """The hello; after it only the end."""
        try:
            data = connection.recv(SHM_HELLO_BYTES_MAX)
            if data and connection not in self._readers:
                hello = _decode(Hello, data)
                if hello.instance != self._instance or hello.reader in self._readers.values():
                    raise ProtocolError("meant for another process, or for a reader that is here already")
                welcome = _encoder.encode(Welcome(MESH_PROTOCOL_VERSION, self._arena_bytes))
                socket.send_fds(connection, [welcome], [self._fd])
                self._readers[connection] = hello.reader
                self._connections[connection].cancel()
                return
        except BlockingIOError:
            return
        except ProtocolError:
            self._counters.malformed += 1
        except OSError:
            pass
        self._lose(connection)

    def _lose(self, connection: socket.socket) -> None:
        self._connections.pop(connection).cancel()
        self._loop.remove_reader(connection)
        connection.close()
        reader = self._readers.pop(connection, None)
        if reader is not None:
            self._on_reader_gone(reader)


def _map(fd: int, size_bytes: int) -> mmap.mmap:
    """The peer's arena, read-only. Raises `ProtocolError` for what is not a sealed arena of this size."""
    try:
        found = os.fstat(fd)
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
        if not stat.S_ISREG(found.st_mode) or not 0 < size_bytes == found.st_size:
            raise ProtocolError(f"the peer shares {found.st_size} bytes and not the {size_bytes} that it names")
        if not seals & fcntl.F_SEAL_SHRINK:
            raise ProtocolError("the peer shares memory that it could take away")
        return mmap.mmap(fd, size_bytes, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
    except (OSError, OverflowError, ValueError) as error:
        raise ProtocolError(f"what the peer shares cannot be mapped: {error}") from None


def _same_user(connection: socket.socket) -> bool:
    """Whether the process at the other end has our user id. A user namespace without it shows another one."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return bool(_CREDENTIALS.unpack(credentials)[1] == os.geteuid())


async def _readable(connection: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()

    def set_ready() -> None:
        if not ready.done():
            ready.set_result(None)

    loop.add_reader(connection, set_ready)
    try:
        await ready
    finally:
        loop.remove_reader(connection)


def _decode(kind: type[M], data: bytes) -> M:
    try:
        message = msgspec.msgpack.decode(data, type=kind)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise ProtocolError(f"not a message about shared memory: {error}") from None
    if message.version != MESH_PROTOCOL_VERSION:
        raise ProtocolError(f"the peer speaks mesh protocol version {message.version}, not {MESH_PROTOCOL_VERSION}")
    return message
