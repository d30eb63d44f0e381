"""What one read sends next: wanted chunks and parts become messages.

A message has up to `frame_bytes` of bytes. Large ones go straight from the arena, without a copy, each as a part of its
own. Short ones (`SMALL_CHUNK_BYTES` and below) go without a copy as well when they follow each other in the arena, as
chunks do that were put one after the other; else they are copied together into one part. Measured with chunks of
64 KiB: as one stretch of the arena 3.7 GB/s and 1.1 ms of this thread for 64 MiB; copied together 1.9 GB/s and 9.0 ms;
without a copy and a part each 1.8 GB/s and 9.2 ms (libzmq sent then). From 128 KiB on a part each is as fast as the
copy, and takes less of this thread.

A part of a chunk is sent only after the whole chunk was found to be what was put. That, and the checksum of the part,
take time: a `step` does a bounded amount of it, and sends nothing as long as it is not done. Wants of one chunk that
stand next to each other share the lease and the verification.

Knows neither readers nor credit nor sockets (zmq_lend.py does). Runs on the loop.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Final, TypeAlias

import xxhash

from .checksum import bound
from .counters import Counters
from .frames import CORRUPT_HERE, HELD, NOT_HELD, WRONG_SIZE, Buffer, Bulk, Item, Wanted, cost, encode
from .interface import ChunkSource, Loan, Slice
from .limits import (
    ITEM_COST_BYTES,
    ITEMS_PER_MESSAGE_MAX,
    KIB,
    MESH_PROTOCOL_VERSION,
    MIB,
    PARTS_PER_MESSAGE_MAX,
    SMALL_CHUNK_BYTES,
)
from .loans import LoansOut, lend, suspect
from .slices import as_one_run, piece, piece_bytes

STEP_BYTES: Final = 2 * MIB
"""What a step reads or copies of chunks, at least until the piece that it is at is done: some 0.2 ms."""
HASH_BYTES: Final = 512 * KIB
"""Bytes that are hashed at a time."""


@dataclass(slots=True)
class Step:
    """What one step did."""

    message: list[Buffer] | None
    """To be sent; None when there is none yet."""
    cost_bytes: int
    """What the message costs of the reader's credit."""
    touched_bytes: int
    """Bytes of chunks that were read or copied for it."""


@dataclass(slots=True)
class _Whole:
    """A chunk that is kept while wants of it follow each other."""

    key: bytes
    loan: Loan
    view: memoryview
    sound: bool | None = None
    """Whether it is what was put; None as long as nobody has looked."""


@dataclass(slots=True)
class _Sending:
    """What is wanted at the present index, as far as it is not sent."""

    checksum: int
    size_bytes: int
    bytes: memoryview
    """All of it; or the chunk, when `gaps` says which runs."""
    gaps: Slice | None = None
    loan: Loan | None = None
    """A small chunk's: its bytes are not exported yet."""
    offset: int = 0


Reason: TypeAlias = Item
"""An item without bytes: why there are none."""


class Packer:
    """The wants of one read, on their way to become messages."""

    def __init__(
        self,
        read_id: int,
        wanted: Wanted,
        frame_bytes: int,
        source: ChunkSource | None,
        loans: LoansOut,
        counters: Counters,
    ) -> None:
        self.count = wanted.count
        self._id = read_id
        self._wanted = wanted
        self._frame_bytes = frame_bytes
        self._source = source
        self._loans = loans
        self._counters = counters
        self._index = 0
        self._sending: _Sending | None = None
        self._preparing: Generator[int, None, _Sending | Reason] | None = None
        self._whole: _Whole | None = None
        self._budget_bytes = 0

    @property
    def complete(self) -> bool:
        """All is sent."""
        return self._index == self.count

    def close(self) -> None:
        """Send nothing more: leases go back, as soon as what is sent allows."""
        self._index = self.count
        self._drop()
        self._preparing = self._whole = None

    def step(self, credit_bytes: int) -> Step | None:
        """Make the next message, or some way towards it. None when the credit does not suffice for one."""
        self._budget_bytes = STEP_BYTES
        items: list[Item] = []
        payload = _Payload(self._loans)
        room = min(credit_bytes, self._frame_bytes + ITEM_COST_BYTES * ITEMS_PER_MESSAGE_MAX)
        waits = False
        while self._index < self.count and len(items) < ITEMS_PER_MESSAGE_MAX:
            item = self._next(room - ITEM_COST_BYTES, payload)
            if item is None:
                waits = self._preparing is None
                break
            items.append(item)
            room -= ITEM_COST_BYTES + item.bytes
            if self._sending is not None:
                break  # the rest of a chunk comes with another message
        if not items:
            return None if waits else Step(None, 0, STEP_BYTES - self._budget_bytes)
        self._counters.bytes_served += sum(item.bytes for item in items)
        parts = payload.close()
        touched_bytes = STEP_BYTES - self._budget_bytes + payload.copied_bytes
        header = encode(Bulk(MESH_PROTOCOL_VERSION, self._id, items))
        return Step([header, *parts], cost(items), touched_bytes)

    # --- one item ----------------------------------------------------------------------------------------------------
    def _next(self, room_bytes: int, payload: _Payload) -> Item | None:
        """The next item, with its bytes added to `payload`. None when it does not fit, or takes longer."""
        key, chunk_bytes, part = self._wanted[self._index]
        sending = self._sending
        if sending is None:
            size_bytes = chunk_bytes if part is None else part.bytes
            if min(size_bytes, self._frame_bytes) > room_bytes:
                return None
            begun = self._begin(key, chunk_bytes, part)
            if begun is None:
                return None
            if isinstance(begun, Item):
                self._advance(key)
                return begun
            sending = self._sending = begun
        size_bytes = self._piece_bytes(sending)
        if size_bytes > room_bytes:
            return None
        item = Item(self._index, HELD, sending.checksum, sending.offset, size_bytes)
        payload.add(sending, size_bytes)
        sending.offset += size_bytes
        if sending.offset == sending.size_bytes:
            self._counters.chunks_served += 1
            self._advance(key)
        return item

    def _piece_bytes(self, sending: _Sending) -> int:
        if sending.gaps is not None:
            return piece_bytes(sending.gaps, sending.offset, self._frame_bytes)
        return min(sending.size_bytes - sending.offset, self._frame_bytes)

    def _advance(self, key: bytes) -> None:
        """On to the next want; a chunk that is not its own is kept no longer."""
        self._index += 1
        self._sending = None
        if self._whole is not None and (self._index == self.count or self._wanted[self._index][0] != key):
            self._whole = None

    def _drop(self) -> None:
        if self._sending is not None and self._sending.loan is not None:
            self._sending.loan.release()
        self._sending = None

    def _begin(self, key: bytes, chunk_bytes: int, part: Slice | None) -> _Sending | Reason | None:
        """What to send at the present index; None when finding out takes longer than this step."""
        if part is None and self._whole is None:
            return self._begin_whole(key, chunk_bytes)
        if self._preparing is None:
            self._preparing = self._prepare(key, chunk_bytes, part)
        while self._budget_bytes > 0:
            try:
                self._budget_bytes -= next(self._preparing)
            except StopIteration as done:
                self._preparing = None
                begun: _Sending | Reason = done.value
                return begun
        return None

    def _begin_whole(self, key: bytes, chunk_bytes: int) -> _Sending | Reason:
        loan = self._lend(key, chunk_bytes)
        if isinstance(loan, Item):
            return loan
        if chunk_bytes <= min(SMALL_CHUNK_BYTES, self._frame_bytes):
            return _Sending(bound(loan.checksum, key, None), chunk_bytes, loan.buffer, loan=loan)
        return _Sending(bound(loan.checksum, key, None), chunk_bytes, self._loans.export([loan]))

    def _lend(self, key: bytes, chunk_bytes: int) -> Loan | Reason:
        loan = lend(self._source, key)
        if loan is None:
            self._counters.not_held += 1
            return Item(self._index, NOT_HELD, 0, 0, 0)
        if loan.buffer.nbytes != chunk_bytes:
            loan.release()
            return Item(self._index, WRONG_SIZE, loan.checksum, 0, 0)
        return loan

    # --- parts: each generator yields how many bytes it has touched --------------------------------------------------
    def _prepare(self, key: bytes, chunk_bytes: int, part: Slice | None) -> Generator[int, None, _Sending | Reason]:
        if self._whole is None:
            loan = self._lend(key, chunk_bytes)
            if isinstance(loan, Item):
                return loan
            self._whole = _Whole(key, loan, self._loans.export([loan]))
        whole = self._whole
        if whole.view.nbytes != chunk_bytes:
            return Item(self._index, WRONG_SIZE, whole.loan.checksum, 0, 0)
        if whole.sound is None:
            whole.sound = (yield from _hashed(whole.view)) == whole.loan.checksum
            if not whole.sound:
                self._counters.corrupt += 1
                suspect(self._source, key)
        if not whole.sound:
            return Item(self._index, CORRUPT_HERE, 0, 0, 0)
        if part is None:
            return _Sending(bound(whole.loan.checksum, key, None), chunk_bytes, whole.view)
        one = as_one_run(part)
        if one is not None or part.bytes <= self._frame_bytes:
            run = piece(whole.view, one or part, 0, part.bytes)
            return _Sending(bound((yield from _hashed(run)), key, part), part.bytes, run)
        hasher, offset = xxhash.xxh3_64(), 0
        while offset < part.bytes:
            size_bytes = piece_bytes(part, offset, HASH_BYTES)
            hasher.update(piece(whole.view, part, offset, size_bytes))
            offset += size_bytes
            yield size_bytes
        return _Sending(bound(hasher.intdigest(), key, part), part.bytes, whole.view, gaps=part)


def _hashed(view: memoryview) -> Generator[int, None, int]:
    hasher = xxhash.xxh3_64()
    for start in range(0, view.nbytes, HASH_BYTES):
        hasher.update(view[start : start + HASH_BYTES])
        yield min(HASH_BYTES, view.nbytes - start)
    return hasher.intdigest()


class _Payload:
    """The parts that one message's bytes are sent in."""

    def __init__(self, loans: LoansOut) -> None:
        self._loans = loans
        self._parts: list[Buffer] = []
        self._row: list[Loan] = []
        """Small chunks that follow each other in the arena."""
        self._short: list[memoryview] = []
        """Bytes to copy together."""
        self._short_loans: list[Loan] = []
        self.copied_bytes = 0

    def add(self, sending: _Sending, size_bytes: int) -> None:
        """The next `size_bytes` of what is being sent."""
        if sending.loan is not None:
            last = self._row[-1] if self._row else None
            if last is not None and not self._loans.follow(last, sending.loan):
                self._end_row()
            self._row.append(sending.loan)
            sending.loan = None
            return
        self._end_row()
        if sending.gaps is None:
            self._add(sending.bytes[sending.offset : sending.offset + size_bytes])
        elif sending.gaps.run_bytes >= SMALL_CHUNK_BYTES:
            ends = sending.offset + size_bytes
            for start in range(sending.offset, ends, sending.gaps.run_bytes):
                self._add(piece(sending.bytes, sending.gaps, start, min(sending.gaps.run_bytes, ends - start)))
        else:
            self.copied_bytes += size_bytes
            self._add(piece(sending.bytes, sending.gaps, sending.offset, size_bytes))

    def close(self) -> list[Buffer]:
        """All parts."""
        self._end_row()
        self._end_short()
        assert len(self._parts) <= PARTS_PER_MESSAGE_MAX  # each second one at least has `SMALL_CHUNK_BYTES`
        return self._parts

    def _add(self, view: memoryview) -> None:
        if view.nbytes >= SMALL_CHUNK_BYTES:
            self._end_short()
            self._parts.append(view)
        else:
            self._short.append(view)

    def _end_row(self) -> None:
        row, self._row = self._row, []
        if sum(loan.buffer.nbytes for loan in row) >= SMALL_CHUNK_BYTES:
            self._end_short()
            self._parts.append(self._loans.export(row))
        else:
            self._short += [loan.buffer for loan in row]
            self._short_loans += row

    def _end_short(self) -> None:
        short, self._short = self._short, []
        if len(short) == 1 and not self._short_loans:
            self._parts.append(short[0])  # of a chunk that is exported, or a copy already
        elif short:
            joined = b"".join(short)
            self._parts.append(joined)
            self.copied_bytes += len(joined)
        while self._short_loans:
            self._short_loans.pop().release()
