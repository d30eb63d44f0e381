"""The holder's end of reads: what to send next, to whom, and when to give up on a reader.

Each served read has a list of wanted chunks, a place in it, and credit. A *turn* of a read sends one message: one
piece of a large chunk, straight from the arena, or several small chunks copied into one frame. Reads that have work
and credit take turns, so many readers share the node evenly whatever each of them asks for. A chunk is leased when
its first piece is sent, and given back when libzmq is done with the last one (loans.py): credit therefore bounds what
a reader keeps from eviction.

A read ends when all is sent, when the reader cancels it or is gone, or when it has had work and no credit for too
long. Knows nothing of sockets: `send` takes (reader, message), and raises `zmq.Again` for "not now" and
`zmq.ZMQError` for "gone". Runs on the loop.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import zmq

from .counters import Counters
from .frames import HELD, NOT_HELD, WANTED, WRONG_SIZE, Buffer, Bulk, Item, Read, cost, encode, wanted
from .interface import ChunkSource, Loan
from .limits import (
    FRAME_BYTES_DEFAULT,
    FRAMES_PER_WINDOW,
    ITEM_COST_BYTES,
    ITEMS_PER_MESSAGE_MAX,
    MESH_PROTOCOL_VERSION,
    READS_PER_PEER_MAX,
    READS_SERVED_MAX,
    SERVED_READ_IDLE_S,
    SMALL_CHUNK_BYTES,
    WANTS_SERVED_MAX,
)
from .loans import LoansOut, lend

TURNS_AT_ONCE: Final = 16
"""Messages that are sent before the loop gets its turn."""
Send = Callable[[bytes, Sequence[Buffer]], None]


@dataclass(slots=True)
class _Piecewise:
    """The large chunk whose pieces are being sent."""

    view: memoryview
    checksum: int
    offset: int = 0


@dataclass(slots=True, eq=False)
class _Served:
    """One read."""

    reader: bytes
    id: int
    wanted: bytes
    count: int
    window_bytes: int
    credit_bytes: int
    frame_bytes: int
    active_s: float
    """When it last could go on: since then it waits for credit."""
    index: int = 0
    chunk: _Piecewise | None = None
    unsent: list[Buffer] | None = None
    """A message that the socket did not take."""
    waiting: bool = True
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
        self._reads: dict[tuple[bytes, int], _Served] = {}
        self._per_reader: Counter[bytes] = Counter()
        self._wants = 0
        self._line: deque[_Served] = deque()
        self._pumping = False
        self.loans = LoansOut()

    @property
    def readers(self) -> list[bytes]:
        """Everyone who reads here."""
        return list(self._per_reader)

    def open(self, reader: bytes, message: Read, payload: bytes) -> str | None:
        """Serve one more read, or say why not."""
        count = len(payload) // WANTED.size
        if (reader, message.id) in self._reads:
            return "this read is open already"
        if self._per_reader[reader] >= READS_PER_PEER_MAX or len(self._reads) >= READS_SERVED_MAX:
            return "too many reads at once"
        if self._wants + count > WANTS_SERVED_MAX:
            return "too many chunks asked for at once"
        frame_bytes = min(FRAME_BYTES_DEFAULT, message.window_bytes // FRAMES_PER_WINDOW)
        read = _Served(
            reader,
            message.id,
            payload,
            count,
            message.window_bytes,
            message.window_bytes,
            frame_bytes,
            self._loop.time(),
        )
        self._reads[reader, message.id] = read
        self._per_reader[reader] += 1
        self._wants += count
        self._line.append(read)
        self._pump_soon()
        return None

    def grant(self, reader: bytes, read_id: int, credit_bytes: int) -> bool:
        """More credit. False when that is more than the reader can have consumed: the read is ended then."""
        read = self._reads.get((reader, read_id))
        if read is None:
            return (
                True  # the last pieces are on their way, and the reader does not know yet that no more credit is needed
            )
        read.credit_bytes += credit_bytes
        if read.credit_bytes > read.window_bytes:
            self.end(reader, read_id)
            return False
        self._wait(read)
        return True

    def end(self, reader: bytes, read_id: int) -> bool:
        """Serve this read no longer. False when it is not open."""
        read = self._reads.pop((reader, read_id), None)
        if read is None:
            return False
        read.chunk = read.unsent = None
        self._wants -= read.count
        self._per_reader[reader] -= 1
        if not self._per_reader[reader]:
            del self._per_reader[reader]
        return True

    def forget(self, reader: bytes) -> None:
        """The reader is gone."""
        for key in [key for key in self._reads if key[0] == reader]:
            self.end(*key)

    def sweep(self, idle_s: float = SERVED_READ_IDLE_S) -> None:
        """End the reads that wait for credit for longer than `idle_s`; let those try again that met a full socket."""
        now = self._loop.time()
        for read in list(self._reads.values()):
            if now - read.active_s >= idle_s and not read.waiting:
                self.end(read.reader, read.id)
                self._counters.refused += 1
                self._on_drop(read.reader, read.id, f"no credit for {idle_s:g} s")
            elif read.unsent is not None:
                self._wait(read)

    def close(self) -> None:
        """End every read."""
        for key in list(self._reads):
            self.end(*key)

    # --- turns -----------------------------------------------------------------------------------------------------
    def _wait(self, read: _Served) -> None:
        if not read.waiting:
            read.waiting = True
            self._line.append(read)
            self._pump_soon()

    def _pump_soon(self) -> None:
        if not self._pumping:
            self._pumping = True
            self._loop.call_soon(self._pump)

    def _pump(self) -> None:
        self._pumping = False
        for _ in range(TURNS_AT_ONCE):
            if not self._line:
                return
            read = self._line.popleft()
            read.waiting = False
            if (read.reader, read.id) in self._reads and self._turn(read):
                read.waiting = True
                self._line.append(read)
        self._pump_soon()

    def _turn(self, read: _Served) -> bool:
        """Send one message of `read`. Whether it can go on at once."""
        message = read.unsent or self._message(read)
        if message is None:
            return False
        read.unsent = None
        try:
            self._send(read.reader, message)
        except zmq.Again:
            read.unsent = message
            return False
        except zmq.ZMQError:
            self.forget(read.reader)
            return False
        read.active_s = self._loop.time()
        if read.index == read.count:
            self.end(read.reader, read.id)
            return False
        return True

    def _message(self, read: _Served) -> list[Buffer] | None:
        """The next message, or None when the credit does not suffice for one."""
        items: list[Item] = []
        small: list[Loan] = []
        piece: memoryview | None = None
        room = min(read.credit_bytes, read.frame_bytes + ITEM_COST_BYTES * ITEMS_PER_MESSAGE_MAX)
        while piece is None and read.index < read.count and len(items) < ITEMS_PER_MESSAGE_MAX:
            _, size_bytes = wanted(read.wanted, read.index)
            rest_bytes = size_bytes - (read.chunk.offset if read.chunk else 0)
            large = size_bytes > min(SMALL_CHUNK_BYTES, read.frame_bytes)
            if ITEM_COST_BYTES + min(rest_bytes, read.frame_bytes) > room or (large and small):
                break
            if read.chunk is None:
                item, loan = self._take(read)
                if loan is not None and large:
                    read.chunk = _Piecewise(self.loans.export(loan), loan.checksum)
                elif loan is not None:
                    small.append(loan)
            if read.chunk is not None:
                item, piece = _cut(read, read.chunk, min(rest_bytes, read.frame_bytes))
            if read.chunk is None or rest_bytes == item.bytes:
                read.index, read.chunk = read.index + 1, None
                self._counters.chunks_served += item.state == HELD
            items.append(item)
            room -= ITEM_COST_BYTES + item.bytes
        if not items:
            return None
        read.credit_bytes -= cost(items)
        self._counters.bytes_served += sum(item.bytes for item in items)
        payload = piece if piece is not None else _join(small)
        header = encode(Bulk(MESH_PROTOCOL_VERSION, read.id, items))
        return [header, payload] if payload else [header]

    def _take(self, read: _Served) -> tuple[Item, Loan | None]:
        """The read's next chunk as one item, with its loan; or the reason why there is none."""
        key, size_bytes = wanted(read.wanted, read.index)
        loan = lend(self._source, key)
        if loan is None:
            self._counters.not_held += 1
            return Item(read.index, NOT_HELD, 0, 0, 0), None
        if loan.buffer.nbytes != size_bytes:
            item = Item(read.index, WRONG_SIZE, loan.checksum, 0, 0)
            loan.release()
            return item, None
        return Item(read.index, HELD, loan.checksum, 0, size_bytes), loan


def _cut(read: _Served, chunk: _Piecewise, size_bytes: int) -> tuple[Item, memoryview]:
    """The chunk's next piece."""
    offset = chunk.offset
    chunk.offset += size_bytes
    return Item(read.index, HELD, chunk.checksum, offset, size_bytes), chunk.view[offset : chunk.offset]


def _join(loans: Sequence[Loan]) -> bytes:
    """A copy of several small chunks, which go back at once."""
    joined = b"".join(loan.buffer for loan in loans)
    for loan in loans:
        loan.release()
    return joined
