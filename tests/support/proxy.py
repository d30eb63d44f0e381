"""A TCP proxy for tests that does to a connection what networks do: it delays, throttles, cuts, swallows, flips bits.

    with Proxy(seed=3) as proxy:
        holder = cluster.agent("a", flags=["--mesh-port", str(port), "--advertise-mesh-port", str(proxy.port)])
        proxy.target = f"127.0.0.1:{port}"
        proxy.down.bytes_per_s = 1_000_000      # down: from the target to those who connect; up: the other way
        proxy.cut(reset=True)

Faults are set for a direction and hold for every connection from then on; counters are over all of them. Which bits
flip depends on the seed, the number of the connection and the byte's place in it, and on nothing else.

Each connection has a thread, which waits in poll and moves up to `BLOCK_BYTES` at a time, so an undisturbed stream
costs little more than two copies in the kernel. What is delayed is kept here, in order. Attributes may be set from any
thread.
"""

from __future__ import annotations

import contextlib
import os
import random
import select
import socket
import struct
import threading
import time
from collections import deque
from dataclasses import dataclass
from types import TracebackType

BLOCK_BYTES = 1 << 20
HELD_BYTES_MAX = 1 << 20
"""What the proxy keeps of one direction that does not flow; beyond it TCP holds the sender back."""
DELAYED_BYTES_MAX = 64 << 20
"""The same, where a delay is to be filled."""
BURST_S = 0.01
"""What a throttled direction may send at once, in seconds of its rate."""
RESET = struct.pack("ii", 1, 0)
"""SO_LINGER: closing throws away what was not sent, and tells the other end by a reset."""


@dataclass(slots=True)
class Faults:
    """What is done to one direction. All of it may change at any time."""

    delay_s: float = 0.0
    jitter_s: float = 0.0
    """Added to the delay: up to so much, other for each block. Order is kept."""
    bytes_per_s: float | None = None
    """For all connections together, as a link has it."""
    flip_every_bytes: float | None = None
    """One bit flips in so many bytes, on average."""
    flip_skip_bytes: int = 0
    """So much at the start of each connection is left as it is: a handshake survives."""
    flip_first: int = 0
    """Connections that came before this one (`Proxy.accepted` counts them) are left as they are."""
    cut_after_bytes: int | None = None
    """A connection that has passed exactly so much, from its start, is cut: with a reset, or in order."""
    cut_resets: bool = True
    bytes: int = 0
    """Passed so far."""
    flips: int = 0
    """Bits that were flipped so far."""


class Proxy:
    """Listens on loopback from the start; connects to `target` for each connection. Use it as a context manager."""

    def __init__(self, target: str = "", *, seed: int = 0, host: str = "127.0.0.1") -> None:
        self.target = target
        """``HOST:PORT``, for connections that come from now on. As long as it is empty they are closed at once."""
        self.seed = seed
        self.up, self.down = Faults(), Faults()
        self.black_hole = False
        """Connections that come are accepted, and whatever they send is thrown away."""
        self.accepted = 0
        """Connections that came so far, and reached the target."""
        self._paused = False
        self._ending = False
        self._lock = threading.Lock()
        self._connections: set[_Connection] = set()
        self._buckets = {id(faults): _Bucket() for faults in (self.up, self.down)}
        self._listener = socket.create_server((host, 0), backlog=128)
        self._host = host
        self.port: int = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._accept, name=f"proxy-{self.port}")
        self._thread.start()

    def __enter__(self) -> Proxy:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def address(self) -> str:
        """Where to connect: ``HOST:PORT``."""
        return f"{self._host}:{self.port}"

    @property
    def connections(self) -> int:
        """Connections that are open now."""
        with self._lock:
            return len(self._connections)

    def pause(self, *, first: int = 0, new: bool = True) -> None:
        """Let nothing pass until `resume`. Of the open connections those stand still that came as the `first` or later
        (`accepted` counts them), and those that are to come only if `new`."""
        self._paused = new
        for connection in self._open():
            if connection.number >= first:
                connection.paused = True
                connection.wake()

    def resume(self) -> None:
        """Go on where `pause` left off."""
        self._paused = False
        for connection in self._open():
            connection.paused = False
            connection.wake()

    def cut(self, *, reset: bool = True) -> None:
        """End every connection that is open, with a reset or in order. New ones may come."""
        for connection in self._open():
            connection.cut(reset)

    def swallow(self) -> None:
        """From now on throw away what the open connections send, for ever: they are dead and nobody is told."""
        for connection in self._open():
            connection.hole = True
            connection.wake()

    def close(self) -> None:
        """End everything. Returns when the threads are gone."""
        if self._ending:
            return
        self._ending = True
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread in accept
        self._thread.join()
        self._listener.close()
        self.cut(reset=True)
        for connection in self._open():
            connection.thread.join()

    # --- inside ----------------------------------------------------------------------------------------------------
    def _open(self) -> list[_Connection]:
        with self._lock:
            return list(self._connections)

    def _accept(self) -> None:
        while not self._ending:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            try:
                host, _, port = self.target.rpartition(":")
                far = socket.create_connection((host.strip("[]"), int(port)), timeout=5)
            except (OSError, ValueError):
                near.close()
                continue
            connection = _Connection(self, near, far, self.accepted)
            with self._lock:
                self.accepted += 1
                connection.paused = self._paused
                self._connections.add(connection)
            connection.thread.start()

    def _gone(self, connection: _Connection) -> None:
        with self._lock:
            self._connections.discard(connection)


class _Bucket:
    """What the threads of a direction share: tokens, the bytes that may pass now when it is throttled; and counters."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._tokens = 0.0
        self._filled_s = time.monotonic()

    def take(self, rate: float, wanted: int) -> tuple[int, float]:
        """(How many bytes may pass now, when to ask again if none)."""
        with self._lock:
            now = time.monotonic()
            self._tokens = min(max(rate * BURST_S, 1.0), self._tokens + rate * (now - self._filled_s))
            self._filled_s = now
            if self._tokens < min(wanted, rate * BURST_S / 2, 1024):
                return 0, now + BURST_S / 2
            granted = min(wanted, int(self._tokens))
            self._tokens -= granted
            return granted, now

    def give_back(self, count: int) -> None:
        """So much did not pass after all."""
        with self._lock:
            self._tokens += count

    def count(self, faults: Faults, passed: int, flips: int) -> None:
        """Add to the counters of the direction."""
        with self._lock:
            faults.bytes += passed
            faults.flips += flips


class _Flow:
    """One direction of one connection."""

    def __init__(
        self,
        source: socket.socket,
        sink: socket.socket,
        faults: Faults,
        bucket: _Bucket,
        number: int,
        rng: random.Random,
    ) -> None:
        self.source, self.sink, self.faults = source, sink, faults
        self._number = number
        self._bucket = bucket
        self._rng = rng
        self._read = self._passed = self._held = 0
        self._flips_at: int | None = None
        self._queue: deque[tuple[float, memoryview]] = deque()  # due, what is left of it
        self._spare: list[bytearray] = []
        self._due_s = 0.0
        self._at_end = False
        self.ended = False
        """All has passed, and the end of the stream with it."""
        self.blocked = False
        """The sink takes nothing now."""

    @property
    def wants(self) -> bool:
        """Whether more may be read."""
        held_max = DELAYED_BYTES_MAX if self.faults.delay_s or self.faults.jitter_s else HELD_BYTES_MAX
        return not self._at_end and self._held < held_max

    def read(self, hole: bool) -> None:
        """Take what the source has, once. In a hole it is gone."""
        block = self._spare.pop() if self._spare else bytearray(BLOCK_BYTES)
        try:
            count = self.source.recv_into(block)
        except BlockingIOError:
            self._spare.append(block)
            return
        if not count or hole:
            self._at_end = not count
            self.ended = self._at_end and hole
            self._spare.append(block)
            return
        faults, now = self.faults, time.monotonic()
        if faults.flip_every_bytes is not None and self._number >= faults.flip_first:
            self._flip(block, count, faults.flip_every_bytes)
        self._read += count
        self._held += count
        due = now + faults.delay_s + (faults.jitter_s * self._rng.random() if faults.jitter_s else 0.0)
        self._due_s = max(self._due_s, due)
        data = memoryview(block)[:count]
        if count < BLOCK_BYTES // 8 and (self._queue or self._due_s > now):
            data = memoryview(bytes(data))  # what waits takes no more room than it has bytes
            self._spare.append(block)
        self._queue.append((self._due_s, data))

    def write(self) -> float | None:
        """Pass what may pass. Returns when to come again; None: when something is heard from a socket.

        Raises `ConnectionAbortedError` at the byte at which the connection is to be cut.
        """
        self.blocked = False
        faults = self.faults
        while self._queue:
            due, data = self._queue[0]
            if due > time.monotonic():
                return due
            allowed = len(data)
            if faults.cut_after_bytes is not None:
                allowed = min(allowed, faults.cut_after_bytes - self._passed)
                if allowed <= 0:
                    raise ConnectionAbortedError
            rate = faults.bytes_per_s
            if rate is not None:
                allowed, again = self._bucket.take(rate, allowed)
                if not allowed:
                    return again
            try:
                sent = self.sink.send(data[:allowed])
            except BlockingIOError:
                sent, self.blocked = 0, True
            if rate is not None:
                self._bucket.give_back(allowed - sent)
            self._passed += sent
            self._held -= sent
            self._bucket.count(faults, sent, 0)
            if sent == len(data):
                self._queue.popleft()
                if isinstance(data.obj, bytearray):
                    self._spare.append(data.obj)
            elif sent:
                self._queue[0] = due, data[sent:]
            if self.blocked:
                return None
        if faults.cut_after_bytes is not None and self._passed >= faults.cut_after_bytes:
            raise ConnectionAbortedError
        if self._at_end and not self.ended:
            self.ended = True
            with contextlib.suppress(OSError):
                self.sink.shutdown(socket.SHUT_WR)
        return None

    def _flip(self, block: bytearray, count: int, every: float) -> None:
        """Flip bits of the next `count` bytes of the stream."""
        if self._flips_at is None:
            self._flips_at = max(self._read, self.faults.flip_skip_bytes) + int(self._rng.expovariate(1 / every))
        while self._flips_at < self._read + count:
            if self._flips_at >= self._read:
                block[self._flips_at - self._read] ^= 1 << self._rng.randrange(8)
                self._bucket.count(self.faults, 0, 1)
            self._flips_at += 1 + int(self._rng.expovariate(1 / every))


class _Connection:
    """Two sockets, and the thread that moves bytes between them."""

    def __init__(self, proxy: Proxy, near: socket.socket, far: socket.socket, number: int) -> None:
        self._proxy = proxy
        self.number = number
        self.hole = proxy.black_hole
        self.paused = False
        """Nothing is read or written: TCP holds both ends back, and nothing is lost."""
        self._cut: bool | None = None  # with a reset or without; None: not to be cut
        self._near, self._far = near, far
        for end in (near, far):
            end.setblocking(False)
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sides = ((near, far, proxy.up, "up"), (far, near, proxy.down, "down"))
        self._flows = [
            _Flow(
                source,
                sink,
                faults,
                proxy._buckets[id(faults)],
                number,
                random.Random(f"{proxy.seed} {number} {called}"),
            )
            for source, sink, faults, called in sides
        ]
        self._waking = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._lock = threading.Lock()  # nobody wakes by a descriptor that is closed
        self._closed = False
        self.thread = threading.Thread(target=self._run, name=f"proxy-{proxy.port}-{number}")

    def wake(self) -> None:
        """Look again at what is set."""
        with self._lock:
            if not self._closed:
                os.eventfd_write(self._waking, 1)

    def cut(self, reset: bool) -> None:
        """End, from any thread."""
        self._cut = reset
        self.wake()

    def _run(self) -> None:
        reset = True
        try:
            while self._cut is None and not all(flow.ended for flow in self._flows):
                self._turn()
            reset = bool(self._cut)
        except ConnectionAbortedError:
            reset = any(flow.faults.cut_after_bytes is not None and flow.faults.cut_resets for flow in self._flows)
        except OSError:
            pass  # one end reset the connection: so does the other then
        finally:
            for end in (self._near, self._far):
                with contextlib.suppress(OSError):
                    if reset:
                        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
                    else:
                        end.shutdown(socket.SHUT_RDWR)
                end.close()
            with self._lock:
                self._closed = True
                os.close(self._waking)
            self._proxy._gone(self)

    def _turn(self) -> None:
        poll = select.poll()
        events = {self._waking: select.POLLIN, self._near.fileno(): 0, self._far.fileno(): 0}
        comes: list[float] = []
        if not self.paused:
            for flow in self._flows:
                again = None if self.hole else flow.write()
                if again is not None:
                    comes.append(again)
                if flow.wants:
                    events[flow.source.fileno()] |= select.POLLIN
                if flow.blocked:
                    events[flow.sink.fileno()] |= select.POLLOUT
            if all(flow.ended for flow in self._flows):
                return
        for fd, mask in events.items():
            if mask or fd == self._waking:
                poll.register(fd, mask)
        wait_s = max(0.0, min(comes) - time.monotonic()) if comes else None
        found = dict(poll.poll(None if wait_s is None else wait_s * 1000))
        if self._waking in found:
            os.eventfd_read(self._waking)
        for flow in self._flows:
            if found.get(flow.source.fileno(), 0) & (select.POLLIN | select.POLLHUP | select.POLLERR):
                flow.read(self.hole)
