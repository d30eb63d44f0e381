"""One connection of a client to its agent: frames in order, one request at a time, and one-way notes from any thread.

Whoever holds a connection sends a request and reads its answers in its own thread: there is no reader thread in
between, so an answer costs one wake-up. Notes (`Release`) may be sent by any thread at any time, also by a finaliser
that the garbage collector runs in the middle of a send: they go through a queue that whoever has the socket empties.
"""

from __future__ import annotations

import os
import queue
import select
import socket
import threading
import time
from pathlib import Path

from kvmesh import protocol
from kvmesh.arena import Arena
from kvmesh.transport.errors import AgentUnavailableError, KVMeshError, ProtocolError, VersionMismatchError
from kvmesh.transport.limits import AGENT_PROTOCOL_VERSION, CLIENT_REPLY_GRACE_S

# Room for the answer to a get of thousands of chunks. Not more: the C library maps room for one answer anew, and gives
# it back, from 128 KiB on (17 µs each time).
_RECEIVE_BYTES = 32 * 1024
_WAIT_S_MAX = 3600.0  # poll takes no more than 24 days, and a deadline may be any number


class Connection:
    """A socket to the agent, past the handshake. `welcome` and `arena_fd` are what the agent said and gave."""

    def __init__(self, path: Path, *, timeout_s: float) -> None:
        """Connects. Raises `AgentUnavailableError` or `VersionMismatchError`."""
        self.path = path
        self._frames: list[bytes] = []
        self._reader = protocol.FrameReader()
        self._sending = threading.Lock()
        self._counting = threading.RLock()  # re-entrant: a finaliser may run in the middle of anything
        self._notes: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._next_id = 1
        self.spaces: set[bytes] = set()
        """Namespaces that this connection has opened."""
        self.arenas: tuple[Arena, Arena]
        """The agent's arena as this process has it mapped, writable and read-only. Set by whoever mapped it."""
        self.closed = False
        """Of no use for a further call."""
        self._pid = os.getpid()
        self._torn = False  # a frame was sent in part: nothing can follow it
        self._holds = 0  # hits and puts whose leases and reservations hang on this connection
        self._socket = _connect(path, timeout_s)
        self._readable = select.poll()  # of whoever waits for an answer: one thread at a time
        self._readable.register(self._socket, select.POLLIN)
        try:
            self.welcome, self.arena_fd = self._greet(timeout_s)
        except BaseException:
            self.close()
            raise

    def call(self, request: protocol.Message, *, timeout_s: float) -> protocol.Reply:
        """Send `request` and return its one answer. Raises what the agent answers with, or `AgentUnavailableError`."""
        self.send(request)
        return self.receive(timeout_s)

    def next_id(self) -> int:
        """An id for the next request."""
        self._next_id += 1
        return self._next_id

    def send(self, message: protocol.Message) -> None:
        """Send one frame."""
        data = protocol.frame(message)
        with self._sending:
            self._write(data)
        self._flush()

    def note(self, message: protocol.Message) -> None:
        """Send a frame that has no answer, now or with the next one. Waits for no lock and never raises: for
        finalisers."""
        if self._pid != os.getpid():
            return  # a child got copies of the parent's views by fork: their end is not the end of the parent's
        self._notes.put(protocol.frame(message))
        self._flush()

    def receive(self, timeout_s: float) -> protocol.Reply:
        """The next answer."""
        limit = time.monotonic() + timeout_s
        while not self._frames:
            left = limit - time.monotonic()
            if left <= 0:
                raise self._lost(f"did not answer within {timeout_s:.1f} s")
            _poll(self._readable, left)
            try:
                data = self._socket.recv(_RECEIVE_BYTES)
            except BlockingIOError:
                continue
            except OSError as error:
                raise self._lost(f"went away ({error.strerror})") from None
            if not data:
                raise self._lost("went away")
            self._frames.extend(self._reader.feed(data))
        reply = protocol.decode_reply(self._frames.pop(0))
        if isinstance(reply, protocol.Failed):
            raise protocol.raised(reply)
        return reply

    def close(self) -> None:
        """No call will use this connection again: close the socket as soon as no lease and no reservation hangs on it,
        since with it the agent takes them back. A view that is still alive would see its chunk replaced."""
        self.closed = True
        self._close_when_free()

    def gone(self) -> bool:
        """Whether the agent has closed its end, as far as can be seen without waiting."""
        if self.closed:
            return True
        if not self._readable.poll(0):
            return False
        try:
            return self._socket.recv(1, socket.MSG_PEEK) == b""
        except BlockingIOError:
            return False
        except OSError:
            return True

    def hold(self) -> None:
        """A hit's leases or a put's reservations hang on this connection: it stays open, also when closed, until as
        many `let_go`."""
        with self._counting:
            self._holds += 1

    def let_go(self) -> None:
        """What hung on this connection is back. Safe in a finaliser."""
        with self._counting:
            self._holds -= 1
        self._close_when_free()

    def _close_when_free(self) -> None:
        if self.closed and self._holds == 0:
            self._socket.close()

    # --- inside ----------------------------------------------------------------------------------------------------
    def _greet(self, timeout_s: float) -> tuple[protocol.Welcome, int]:
        self._write(protocol.frame(protocol.Hello(0, AGENT_PROTOCOL_VERSION, os.getpid())))
        fds: list[int] = []
        try:
            _wait(self._socket, select.POLLIN, timeout_s)
            # The descriptor comes with the first byte of the welcome, which is far smaller than the buffer.
            data, fds, _, _ = socket.recv_fds(self._socket, _RECEIVE_BYTES, 1)
            self._frames.extend(self._reader.feed(data))
            reply = self.receive(timeout_s)
        except ProtocolError as error:
            _close_all(fds)
            raise VersionMismatchError(str(error)) from None
        except OSError:
            _close_all(fds)
            raise self._lost("did not greet this client") from None
        except KVMeshError:
            _close_all(fds)
            raise
        if not isinstance(reply, protocol.Welcome) or len(fds) != 1:
            _close_all(fds)
            raise VersionMismatchError(f"what listens at {self.path} is not an agent of this version of kvmesh")
        return reply, fds[0]

    def _write(self, data: bytes) -> None:
        if self._torn:
            raise self._lost("does not read what this client sends")
        self._torn = True  # until all of it is sent, whatever happens meanwhile
        left: bytes | memoryview = data
        while left:
            try:
                sent = self._socket.send(left)
            except BlockingIOError:
                if not _wait(self._socket, select.POLLOUT, CLIENT_REPLY_GRACE_S):
                    raise self._lost("does not read what this client sends") from None
            except OSError as error:
                raise self._lost(f"went away ({error.strerror})") from None
            else:
                left = memoryview(left)[sent:]
        self._torn = False

    def _flush(self) -> None:
        """Send the waiting notes, unless somebody is sending: who then does so when done."""
        while not self._notes.empty() and self._sending.acquire(blocking=False):
            try:
                self._write(self._notes.get_nowait())
            except (queue.Empty, AgentUnavailableError):
                pass
            finally:
                self._sending.release()

    def _lost(self, what: str) -> AgentUnavailableError:
        self.close()
        return AgentUnavailableError(f"the agent at {self.path} {what}: is `kvmesh agent` running?")


def _connect(path: Path, timeout_s: float) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.settimeout(timeout_s)
        sock.connect(str(path))
    except FileNotFoundError:
        sock.close()
        raise AgentUnavailableError(
            f"there is no agent socket at {path}: start `kvmesh agent`, or name its --socket (KVMESH_SOCKET)"
        ) from None
    except OSError as error:
        sock.close()
        raise AgentUnavailableError(
            f"no agent answers at {path} ({error.strerror or error}): start `kvmesh agent`"
        ) from None
    # From here on it never blocks by itself. A timeout would be a property of the socket, and two threads use it: the
    # one that waits for an answer, and any that sends a note.
    sock.setblocking(False)
    return sock


def _wait(sock: socket.socket, events: int, timeout_s: float) -> bool:
    """Wait until `sock` is ready for `events`; False after `timeout_s`, or after `_WAIT_S_MAX`. A closed socket is
    ready: its use will say so."""
    if sock.fileno() < 0:
        return True
    poll = select.poll()
    poll.register(sock, events)
    return _poll(poll, timeout_s)


def _poll(poll: select.poll, timeout_s: float) -> bool:
    return bool(poll.poll(min(max(0.0, timeout_s), _WAIT_S_MAX) * 1000))


def _close_all(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)
