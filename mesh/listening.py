"""The agent's unix socket: one agent a path, for its own user only.

Two agents never share a path: a lock file beside it is held for as long as the agent lives, and the kernel lets go of
it however the agent ends. So a socket that a killed agent left behind is simply replaced. The directory is made 0700,
the socket 0600; a connection of another user is refused by its credentials. Runs on the agent's loop.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import socket
import stat
import struct
from pathlib import Path

from kvmesh.sessions import Desk, Session
from kvmesh.transport.errors import SettingsError
from kvmesh.transport.limits import ACCEPT_RETRY_S, CLIENTS_MAX

log = logging.getLogger(__name__)

_PATH_BYTES_MAX = 107  # sockaddr_un
_CREDENTIALS = struct.Struct("3i")  # SO_PEERCRED: pid, uid, gid


class Listener:
    """Accepts clients at one path until closed."""

    def __init__(self, path: Path, desk: Desk) -> None:
        """Claims `path`. Raises `SettingsError` when that cannot be."""
        if len(os.fsencode(path)) > _PATH_BYTES_MAX:
            raise SettingsError(f"--socket {path}: the path is longer than {_PATH_BYTES_MAX} bytes; use a shorter one")
        self.path = path
        self._desk = desk
        self._sessions: set[Session] = set()
        self._empty = asyncio.Event()
        self._empty.set()
        self._accepting: asyncio.Task[None] | None = None
        if path.exists() and not path.is_socket():
            raise SettingsError(f"--socket {path}: something else is there already; use another path")
        _make_directory(path.parent)
        self._lock = _lock(path)
        try:
            self._socket = _bind(path)
        except BaseException:
            os.close(self._lock)
            raise

    @property
    def clients(self) -> int:
        """Connections that are open now."""
        return len(self._sessions)

    def start(self) -> None:
        """Begin to accept."""
        self._accepting = asyncio.create_task(self._accept())

    async def close(self) -> None:
        """Disconnect every client and free the path."""
        if self._accepting is not None:
            self._accepting.cancel()
            await asyncio.gather(self._accepting, return_exceptions=True)
        self._socket.close()
        self.path.unlink(missing_ok=True)
        for session in list(self._sessions):
            session.close()
        await self._empty.wait()  # their connection_lost comes with the loop's next turns
        os.close(self._lock)  # the lock's file stays: removing it would let two agents hold two locks of one name

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, _ = await loop.sock_accept(self._socket)
                if len(self._sessions) >= CLIENTS_MAX or not _same_user(connection):
                    connection.close()
                    continue
                await loop.connect_accepted_socket(self._session, connection)
            except OSError as error:  # no file descriptor is left, most likely: a client that goes makes room
                log.warning("a client could not be accepted: %s", error.strerror)
                await asyncio.sleep(ACCEPT_RETRY_S)

    def _session(self) -> Session:
        session = Session(self._desk, self._gone)
        self._sessions.add(session)
        self._empty.clear()
        return session

    def _gone(self, session: Session) -> None:
        self._sessions.discard(session)
        if not self._sessions:
            self._empty.set()


def _same_user(connection: socket.socket) -> bool:
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    _, uid, _ = _CREDENTIALS.unpack(raw)
    return uid in (os.getuid(), 0)


def _make_directory(directory: Path) -> None:
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = directory.stat()
    except OSError as error:
        raise SettingsError(f"--socket: the directory {directory} cannot be used: {error.strerror}") from None
    shared = bool(found.st_mode & stat.S_ISVTX)  # like /tmp: others may create files, but not replace ours
    if found.st_uid not in (os.getuid(), 0) and not shared:
        raise SettingsError(f"--socket: the directory {directory} belongs to another user; use one of your own")


def _lock(path: Path) -> int:
    lock = -1
    try:
        lock = os.open(f"{path}.lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise SettingsError(f"another agent serves {path}: stop it, or give this one another --socket") from None
    except OSError as error:
        raise SettingsError(f"--socket {path} cannot be used: {error.strerror}") from None
    return lock


def _bind(path: Path) -> socket.socket:
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if path.is_socket():
            path.unlink()  # left by an agent that was killed: we hold the lock, so nobody serves it
        listening.setblocking(False)
        previous = os.umask(0o177)
        try:
            listening.bind(str(path))
        finally:
            os.umask(previous)
        listening.listen(CLIENTS_MAX)
    except OSError as error:
        listening.close()
        raise SettingsError(f"--socket {path} cannot be used: {error.strerror}") from None
    return listening
