"""NIXL runs in processes of its own, and this module keeps them: started, spoken to, ended, started again.

Why processes. UCX ends its process by itself (``ucs_fatal``) when a reader goes away at the wrong moment of a reply in
software, so a peer's death would be ours. UCX over TCP checks no key: who reaches its port reads and writes what the
process has mapped. And NIXL cannot call a transfer back: releasing one that is under way leaves UCX writing (measured:
3 of 256 MiB were there at the release, all of it later), and so does forgetting the peer. A process that has exited
writes nothing, whatever it was doing: its sockets and queue pairs are closed before its parent can reap it. So each is
expendable, maps the arena and nothing else of value, and what is uncertain ends with it.

    Keeper (loop of the agent)  ── socket pair, messages below ──  transport/nixl_child.py (a process; one thread)

The two speak msgpack behind a length. Both are of one installation, so nothing is negotiated; the child's messages are
checked all the same, since its memory is not to be trusted. The keeper knows nothing of peers and moves.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import os
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata, util
from typing import Final, TypeAlias

import msgspec

from .interface import Region
from .limits import (
    NIXL_MESSAGE_BYTES_MAX,
    NIXL_RESTART_INTERVAL_MAX_S,
    NIXL_RESTART_INTERVAL_MIN_S,
    NIXL_START_S,
    NIXL_STEADY_S,
)

log = logging.getLogger(__name__)

LENGTH: Final = struct.Struct("<I")
PACKAGES: Final = {"nixl_cu12": "nixl-cu12", "nixl_cu13": "nixl-cu13"}
"""The modules that hold NIXL's bindings, and their packages. The package ``nixl`` only picks one, importing torch."""
SERVE: Final = "serve"
READ: Final = "read"


class Meet(msgspec.Struct, frozen=True, tag=1, array_like=True):
    """To the child: make this peer's agent known, and read a few of its bytes to see whether it can be reached."""

    peer: int
    agent: str
    metadata: bytes
    base: int
    size_bytes: int


class Copy(msgspec.Struct, frozen=True, tag=2, array_like=True):
    """To the child: copy these runs of a move: (offset in the peer's arena, offset in ours, bytes) each."""

    move: int
    peer: int
    runs: list[tuple[int, int, int]]
    last: bool
    """Whether no more runs of this move follow."""


class Stop(msgspec.Struct, frozen=True, tag=3, array_like=True):
    """To the child: start no more of this move, and say when nothing of it is under way."""

    move: int


class Forget(msgspec.Struct, frozen=True, tag=4, array_like=True):
    """To the child: this peer is not read from any more. Its moves have ended."""

    peer: int


class Ready(msgspec.Struct, frozen=True, tag=5, array_like=True):
    """From the child: its agent has the arena registered."""

    agent: str
    metadata: bytes
    base: int
    """Where the arena is mapped in the child: what a peer's descriptors count from."""
    package: str
    """The version of NIXL that it found."""


class Met(msgspec.Struct, frozen=True, tag=6, array_like=True):
    """From the child: the peer's bytes can be read."""

    peer: int


class Lost(msgspec.Struct, frozen=True, tag=7, array_like=True):
    """From the child: the peer cannot be read from. When a move was under way the child exits after this."""

    peer: int
    reason: str


class Ended(msgspec.Struct, frozen=True, tag=8, array_like=True):
    """From the child: nothing of this move is under way any more."""

    move: int
    complete: bool


ToChild: TypeAlias = Meet | Copy | Stop | Forget
FromChild: TypeAlias = Ready | Met | Lost | Ended


def installed() -> tuple[str, str] | None:
    """The module with NIXL's bindings, and the version of its package; None when there is none. Imports nothing."""
    for module, package in PACKAGES.items():
        if util.find_spec(module) is not None:
            return module, metadata.version(package)
    return None


def frame(message: ToChild | FromChild) -> bytes:
    """The message as it stands on the socket."""
    body = msgspec.msgpack.encode(message)
    return LENGTH.pack(len(body)) + body


def environment(host: str) -> dict[str, str]:
    """The child's environment. What the operator sets of UCX's and NIXL's variables wins over ours.

    UCX reads its variables when it is loaded, so they belong to the process and not to a call.
    """
    ours = {
        "UCX_ERROR_SIGNALS": "",  # no handler of UCX's: a child that crashes is to die at once,
        "UCX_HANDLE_ERRORS": "none",  # without the debugger or the endless wait that UCX offers for it
        "UCX_LOG_LEVEL": "fatal",  # a peer that went away is told to the agent, which logs it
        "NIXL_LOG_LEVEL": "FATAL",
        "UCX_WARN_UNUSED_ENV_VARS": "n",
        "UCX_TCP_CONN_NB": "y",  # else connecting to a host that does not answer holds up all peers
        "UCX_TCP_TX_SEG_SIZE": "64k",  # UCX sends 8 KiB at once, and takes up to 64: 2.2 times the throughput
    }
    if is_loopback(host):
        ours |= {"UCX_TLS": "tcp", "UCX_NET_DEVICES": "lo"}  # UCX listens on every device otherwise
    return {**ours, **os.environ}


def is_loopback(host: str) -> bool:
    """Whether only this host reaches `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Keeper:
    """Keeps one child running, on the loop. Its callbacks run there: `on_start` with each new child's `Ready`,
    `on_message` with the rest, `on_death` when a child is gone for good and reaped."""

    def __init__(
        self,
        role: str,
        region: Region,
        host: str,
        on_start: Callable[[Ready], None],
        on_message: Callable[[FromChild], None],
        on_death: Callable[[], None],
    ) -> None:
        self._role, self._region, self._host = role, region, host
        self._on_start, self._on_message, self._on_death = on_start, on_message, on_death
        self._child: subprocess.Popen[bytes] | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._decoder = msgspec.msgpack.Decoder(FromChild)
        self._task: asyncio.Task[None] | None = None
        self._closing = asyncio.Event()
        self.first = asyncio.Event()
        """Set when the first child is ready, or could not start."""

    @property
    def pid(self) -> int | None:
        """The child's process id, for tests and logs."""
        return self._child.pid if self._child is not None else None

    def start(self) -> None:
        """Start, if it was not before."""
        if self._task is None:
            self._task = asyncio.create_task(self._keep(), name=f"nixl-{self._role}")

    def send(self, message: ToChild) -> None:
        """Give a message to the child that is ready now; dropped when there is none."""
        if self._writer is not None:
            self._writer.write(frame(message))

    def kill(self) -> None:
        """End the child now. `on_death` follows, and another child."""
        if self._child is not None:
            os.kill(self._child.pid, signal.SIGKILL)  # it is not reaped yet, so the number is still its own

    async def close(self) -> None:
        """End the child and start no other. `on_death` has been called when this returns."""
        self._closing.set()
        self.kill()
        if self._task is not None:
            await asyncio.wait([self._task])

    async def _keep(self) -> None:
        loop, interval_s = asyncio.get_running_loop(), NIXL_RESTART_INTERVAL_MIN_S
        while not self._closing.is_set():
            begun = loop.time()
            try:
                await self._one()
            finally:
                self.first.set()
            if loop.time() - begun > NIXL_STEADY_S:
                interval_s = NIXL_RESTART_INTERVAL_MIN_S
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(interval_s):
                    await self._closing.wait()
            interval_s = min(2 * interval_s, NIXL_RESTART_INTERVAL_MAX_S)

    async def _one(self) -> None:
        """One child's life."""
        try:
            ours, theirs = socket.socketpair()
            with theirs, contextlib.ExitStack() as stack:
                stack.callback(ours.close)
                self._child = self._spawn(theirs)
                stack.pop_all()
        except OSError as error:
            log.warning("the NIXL process (%s) does not start: %s", self._role, error)
            return
        reader, writer = await asyncio.open_unix_connection(sock=ours)
        try:
            async with asyncio.timeout(NIXL_START_S):
                ready = await self._message(reader)
            if isinstance(ready, Ready):
                self._writer = writer
                self._on_start(ready)
                self.first.set()
            while True:
                self._on_message(await self._message(reader))
        except (asyncio.IncompleteReadError, ConnectionError, TimeoutError, msgspec.DecodeError, UnicodeDecodeError):
            if not self._closing.is_set():
                log.info("the NIXL process (%s, %s) is gone", self._role, self.pid)
        finally:
            self._writer = None
            writer.close()
            self.kill()
            await self._reaped()
            self._on_death()

    async def _message(self, reader: asyncio.StreamReader) -> FromChild:
        (length,) = LENGTH.unpack(await reader.readexactly(LENGTH.size))
        if length > NIXL_MESSAGE_BYTES_MAX:
            raise msgspec.DecodeError(f"a message of {length} bytes")
        message: FromChild = self._decoder.decode(await reader.readexactly(length))
        return message

    def _spawn(self, theirs: socket.socket) -> subprocess.Popen[bytes]:
        arguments = [
            self._role,
            theirs.fileno(),
            self._region.fd,
            self._region.size_bytes,
            int(is_loopback(self._host)),
        ]
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "kvmesh.transport.nixl_child", *map(str, arguments)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,  # UCX and NIXL print there
            pass_fds=(theirs.fileno(), self._region.fd),
            env=environment(self._host),
        )

    async def _reaped(self) -> None:
        """Wait until the killed child is gone, without a thread."""
        assert self._child is not None
        loop, gone = asyncio.get_running_loop(), asyncio.Event()
        with contextlib.ExitStack() as stack:
            stack.callback(self._forget_child)
            try:
                descriptor = os.pidfd_open(self._child.pid)
            except OSError:
                return  # no descriptor is free: the loop waits for the milliseconds that the end of a process takes
            stack.callback(os.close, descriptor)
            stack.callback(loop.remove_reader, descriptor)
            loop.add_reader(descriptor, gone.set)
            await gone.wait()

    def _forget_child(self) -> None:
        assert self._child is not None
        self._child.wait()
        self._child = None
