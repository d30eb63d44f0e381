"""Puts the pieces of one read where they belong, and verifies each chunk.

A peer's items are believed only as far as they fit: an index that is wanted and has not ended, pieces in order and
without gap, one checksum for all pieces of a chunk, no byte beyond the buffer. Anything else is a `FrameError`, nothing
of that message is written, and the read is over. Once the items of a message are announced, `targets` says where its
next bytes belong, for a socket to write there itself, and `filled` that it did. The checksum is taken piece by piece,
while the piece is still in the CPU's cache.

What is read may be a part of a chunk: to this module the part is the chunk.

Sans-IO. Used by one thread at a time; hashing lets other threads run.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import xxhash

from .checksum import bound, checksum
from .frames import CORRUPT_HERE, HELD, NOT_HELD, WRONG_SIZE, FrameError, Item
from .interface import Landing, Outcome, Want

_WITHOUT_BYTES: Final = {
    NOT_HELD: Outcome.NOT_HELD,
    WRONG_SIZE: Outcome.WRONG_SIZE,
    CORRUPT_HERE: Outcome.CORRUPT,
}


@dataclass(slots=True, eq=False)
class _Chunk:
    """A chunk of which an item has told."""

    index: int
    view: memoryview
    claim: int
    """The checksum as it came: bound to the chunk that the holder means."""
    checksum: int
    """The same of the chunk that is wanted."""
    announced: int
    """Up to where the items go that came so far."""
    filled: int = 0
    """Up to where the bytes go that came so far."""
    hasher: xxhash.xxh3_64 | None = None
    """Of these bytes; None before the first."""


class Assembly:
    """The wanted chunks of one read."""

    def __init__(self, wants: Sequence[Want]) -> None:
        self._wants = wants
        self._told = bytearray(len(wants))
        """Whether an item has told of a chunk to its end."""
        self._left = len(wants)
        self._partial: dict[int, _Chunk] = {}
        """The chunks that items have told of, but not to their end."""
        self._coming: deque[_Chunk] = deque()
        """Where announced bytes are still to come, in order."""
        self.expected = 0
        """How many bytes that is."""

    @property
    def complete(self) -> bool:
        """Every chunk has ended."""
        return not self._left

    def announce(self, items: Sequence[Item]) -> list[Landing]:
        """Take the items of one message; the bytes come next. Returns the chunks that ended without any."""
        landings: list[Landing] = []
        for item in items:
            if item.index >= len(self._wants) or self._told[item.index]:
                raise FrameError("a chunk that is not wanted, or not any more")
            if item.state == HELD:
                self._announce(item)
            elif item.bytes or item.offset or item.index in self._partial:
                raise FrameError("a chunk that is not sent has no bytes")
            else:
                self._told[item.index] = True
                self._left -= 1
                landings.append(Landing(item.index, _WITHOUT_BYTES[item.state], item.checksum))
        return landings

    def _announce(self, item: Item) -> None:
        chunk = self._partial.pop(item.index, None)
        if chunk is None:
            want = self._wants[item.index]
            expected = bound(item.checksum, want.key, want.part)
            chunk = _Chunk(item.index, want.into.cast("B"), item.checksum, expected, 0)
        size_bytes = len(chunk.view)
        end = item.offset + item.bytes
        if item.offset != chunk.announced or end <= item.offset or item.checksum != chunk.claim:
            raise FrameError("a piece that does not follow the one before")
        if chunk.filled != chunk.announced:
            raise FrameError("two pieces of a chunk in one message")
        if end > size_bytes:
            raise FrameError("a piece that ends beyond its chunk")
        if end == size_bytes:
            self._told[item.index] = True
        else:
            self._partial[item.index] = chunk
        chunk.announced = end
        self._coming.append(chunk)
        self.expected += item.bytes

    def targets(self, most: int) -> list[memoryview]:
        """Where the next bytes belong, in order: at most so many, and none beyond what was announced."""
        views: list[memoryview] = []
        for chunk in self._coming:
            size_bytes = chunk.announced - chunk.filled
            if size_bytes >= most:
                views.append(chunk.view[chunk.filled : chunk.filled + most])
                break
            views.append(chunk.view[chunk.filled : chunk.announced])
            most -= size_bytes
        return views

    def filled(self, count: int) -> list[Landing]:
        """The first `count` bytes of `targets` are there. Returns the chunks that ended by that."""
        landings: list[Landing] = []
        self.expected -= count
        while count:
            chunk = self._coming[0]
            start = chunk.filled
            end = chunk.filled = min(chunk.announced, start + count)
            count -= end - start
            if end == chunk.announced:
                self._coming.popleft()
            found = _hash(chunk, start, end)
            if found is not None:
                self._left -= 1
                outcome = Outcome.LANDED if found == chunk.checksum else Outcome.CORRUPT
                landings.append(Landing(chunk.index, outcome, chunk.checksum))
        return landings


def _hash(chunk: _Chunk, start: int, end: int) -> int | None:
    """Take the bytes from `start` to `end` in. Returns the checksum of the chunk, if that was its end."""
    view = chunk.view
    if end - start == len(view):
        return checksum(view)
    if chunk.hasher is None:
        chunk.hasher = xxhash.xxh3_64()
    chunk.hasher.update(view[start:end])
    return chunk.hasher.intdigest() if end == len(view) else None
