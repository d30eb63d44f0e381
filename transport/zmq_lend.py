"""The holder's end of reads: whose turn it is, how far a reader may go, and when to give up on one.

Each served read has credit, a lease of time, and a `Packer` that turns what it wants into messages (zmq_pack.py). A
*turn* of a read is one step of its packer: mostly one message. Readers that have something to do share the node evenly
by bytes, whatever each of them asks for and in however many reads: each gets `TURN_BYTES`, then the next; what it takes
beyond that counts against its next turn. Verified bytes count like sent ones. A chunk is leased when its first piece is
sent, and given back when the last one has gone out (loans.py): credit therefore bounds what a reader keeps from
eviction, and what waits here for it.

Calls do not wait behind bulk: they have connections of their own, and after `PUMP_BYTES` at the latest the loop gets
its turn.

A read ends when all is sent, when the reader cancels it or is gone, when its lease of time is over, or when it has had
work and no credit for too long. Knows nothing of sockets: `send` takes (reader, message), and raises `FullError` for
"not now" and `GoneError` for "gone". Runs on the loop.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from .counters import Counters
from .frames import Buffer, Read, Wanted
from .interface import ChunkSource
from .limits import (
    FRAME_BYTES_DEFAULT,
    FRAMES_PER_WINDOW,
    MIB,
    READS_PER_PEER_MAX,
    READS_SERVED_MAX,
    SERVED_READ_IDLE_S,
    WANTS_SERVED_MAX,
)
from .loans import LoansOut
from .zmq_pack import Packer
from .zmq_port import FullError, GoneError

log = logging.getLogger(__name__)

TURN_BYTES: Final = 1 * MIB
"""What a reader gets before the next one."""
PUMP_BYTES: Final = 4 * MIB
"""What is verified and copied before the loop gets its turn: some 0.5 ms."""
TURNS_AT_ONCE: Final = 16
"""Turns before the loop gets its own: a message that is sent without a copy takes some 30 us."""
Send = Callable[[bytes, Sequence[Buffer]], None]


@dataclass(slots=True, eq=False)
class _Served:
    """One read."""

    reader: _Reader
    id: int
    packer: Packer
    window_bytes: int
    credit_bytes: int
    lease_s: float
    ends_s: float
    """When its lease of time is over."""
    active_s: float
    """When it last could go on: since then it waits for credit."""
    unsent: list[Buffer] | None = None
    """A message that the socket did not take."""
    waiting: bool = False
    """It stands in line for a turn."""


@dataclass(slots=True, eq=False)
class _Reader:
    """Everything that one peer reads here."""

    name: bytes
    reads: dict[int, _Served] = field(default_factory=dict)
    line: deque[_Served] = field(default_factory=deque)
    """The reads that have something to do."""
    turn_bytes: int = TURN_BYTES
    """What is left of its turn; below zero it took more than that."""
    waiting: bool = False
    """It stands in line for a turn."""


class Lender:
    """All reads that this node serves."""

    def __init__(
        self,
        source: ChunkSource | None,
        send: Send,
        counters: Counters,
        on_drop: Callable[[bytes, int, str], None],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._source = source
        self._send = send
        self._counters = counters
        self._on_drop = on_drop
        self._readers: dict[bytes, _Reader] = {}
        self._reads = 0
        self._wants = 0
        self._line: deque[_Reader] = deque()
        self._pumping = False
        self.loans = LoansOut(source)

    @property
    def readers(self) -> list[bytes]:
        """Everyone who reads here."""
        return list(self._readers)

    def open(self, name: bytes, message: Read, payload: bytes) -> str | None:
        """Serve one more read of the reader `name`, or say why not."""
        wanted = Wanted(message, payload)
        reader = self._readers.get(name) or _Reader(name)
        if message.id in reader.reads:
            return "this read is open already"
        if len(reader.reads) >= READS_PER_PEER_MAX or self._reads >= READS_SERVED_MAX:
            return "too many reads at once"
        if self._wants + wanted.count > WANTS_SERVED_MAX:
            return "too many chunks asked for at once"
        frame_bytes = min(FRAME_BYTES_DEFAULT, message.window_bytes // FRAMES_PER_WINDOW)
        packer = Packer(message.id, wanted, frame_bytes, self._source, self.loans, self._counters)
        now = self._loop.time()
        read = _Served(
            reader,
            message.id,
            packer,
            message.window_bytes,
            message.window_bytes,
            message.lease_s,
            now + message.lease_s,
            now,
        )
        self._readers[name] = reader
        reader.reads[read.id] = read
        self._reads += 1
        self._wants += packer.count
        if self._pumping or not wanted.is_small:
            self._wait(read)
        else:
            self._line_up(read)
            self._pump()  # at once: it is over then
        return None

    def grant(self, name: bytes, read_id: int, credit_bytes: int) -> bool:
        """More credit. False when that is more than the reader can have consumed: the read is ended then."""
        read = self._find(name, read_id)
        if read is None:
            return True  # the last pieces are on their way, and the reader does not know yet that it needs no credit
        read.credit_bytes += credit_bytes
        if read.credit_bytes > read.window_bytes:
            self._end(read)
            return False
        self._wait(read)
        return True

    def end(self, name: bytes, read_id: int) -> bool:
        """Serve this read no longer. False when it is not open."""
        read = self._find(name, read_id)
        if read is not None:
            self._end(read)
        return read is not None

    def forget(self, name: bytes) -> None:
        """The reader is gone."""
        reader = self._readers.get(name)
        for read in list(reader.reads.values()) if reader is not None else ():
            self._end(read)

    def sweep(self, idle_s: float = SERVED_READ_IDLE_S) -> None:
        """End the reads whose lease is over, or that wait for credit for longer than `idle_s`; let those try again
        that met a full socket."""
        now = self._loop.time()
        for read in [read for reader in self._readers.values() for read in reader.reads.values()]:
            if now >= read.ends_s:
                self._expire(read)
            elif now - read.active_s >= idle_s and not read.waiting:
                self._counters.refused += 1
                self._drop(read, f"no credit for {idle_s:g} s")
            elif read.unsent is not None:
                self._wait(read)

    def close(self) -> None:
        """End every read."""
        for name in self.readers:
            self.forget(name)

    # --- reads that end ----------------------------------------------------------------------------------------------
    def _find(self, name: bytes, read_id: int) -> _Served | None:
        reader = self._readers.get(name)
        return reader.reads.get(read_id) if reader is not None else None

    def _end(self, read: _Served) -> None:
        read.packer.close()
        read.unsent = None
        del read.reader.reads[read.id]
        self._reads -= 1
        self._wants -= read.packer.count
        if not read.reader.reads:
            del self._readers[read.reader.name]

    def _expire(self, read: _Served) -> None:
        self._counters.expired += 1
        self._drop(read, f"its {read.lease_s:g} s are over")

    def _drop(self, read: _Served, why: str) -> None:
        self._end(read)
        self._on_drop(read.reader.name, read.id, why)

    # --- turns -------------------------------------------------------------------------------------------------------
    def _line_up(self, read: _Served) -> None:
        reader = read.reader
        if not read.waiting:
            read.waiting = True
            reader.line.append(read)
        if not reader.waiting:
            reader.waiting = True
            self._line.append(reader)

    def _wait(self, read: _Served) -> None:
        self._line_up(read)
        if not self._pumping:
            self._pumping = True
            self._loop.call_soon(self._pump)

    def _pump(self) -> None:
        self._pumping = True
        touched_bytes = 0
        for _ in range(TURNS_AT_ONCE):
            reader = self._next_reader()
            if reader is None or touched_bytes >= PUMP_BYTES:
                break
            read = reader.line.popleft()
            read.waiting = False
            if reader.reads.get(read.id) is read:
                touched_bytes += self._turn(read)
        self._pumping = bool(self._line)
        if self._pumping:
            self._loop.call_soon(self._pump)

    def _next_reader(self) -> _Reader | None:
        """Who is to have the next turn."""
        while self._line:
            reader = self._line[0]
            if not reader.line:
                reader.waiting = False
                self._line.popleft()
            elif reader.turn_bytes <= 0:
                reader.turn_bytes += TURN_BYTES
                self._line.rotate(-1)
            else:
                return reader
        return None

    def _turn(self, read: _Served) -> int:
        """One step of `read`. Returns how many bytes were verified and copied."""
        now = self._loop.time()
        if now >= read.ends_s:
            self._expire(read)
            return 0
        touched_bytes = 0
        message = read.unsent
        if message is None:
            try:
                step = read.packer.step(read.credit_bytes)
            except Exception:
                log.exception("a read could not be served")
                self._drop(read, "internal error")
                return 0
            if step is None:
                return 0  # until there is more credit
            touched_bytes = step.touched_bytes
            read.credit_bytes -= step.cost_bytes
            read.reader.turn_bytes -= max(step.cost_bytes, touched_bytes)
            message = step.message
        if message is not None and not self._deliver(read, message):
            return touched_bytes
        read.active_s = now
        if read.packer.complete:
            self._end(read)
        else:
            self._wait(read)
        return touched_bytes

    def _deliver(self, read: _Served, message: list[Buffer]) -> bool:
        """Whether the socket took the message."""
        read.unsent = None
        try:
            self._send(read.reader.name, message)
        except FullError:
            read.unsent = message
            return False
        except GoneError:
            self.forget(read.reader.name)
            return False
        return True
