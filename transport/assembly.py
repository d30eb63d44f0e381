"""Puts the pieces of one read together in the buffers that wait for them, and verifies each chunk.

A peer's items are believed only as far as they fit: an index that is wanted and has not ended, pieces in order and
without gap, one checksum for all pieces of a chunk, no byte beyond the buffer. Anything else is a `FrameError`, and
nothing of that item is written. The checksum is taken of what stands in the buffer, piece by piece, while the piece
is still in the CPU's cache.

Sans-IO. Used by one thread at a time; copying and hashing let other threads run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import xxhash

from .checksum import checksum
from .frames import HELD, NOT_HELD, FrameError, Item
from .interface import Landing, Outcome, Want


@dataclass(slots=True)
class _Partial:
    """A chunk of which the first pieces have come."""

    checksum: int
    offset: int = 0
    hasher: xxhash.xxh3_64 = field(default_factory=xxhash.xxh3_64)


class Assembly:
    """The wanted chunks of one read that have not ended."""

    def __init__(self, wants: Sequence[Want]) -> None:
        self._open = dict(enumerate(wants))
        self._partial: dict[int, _Partial] = {}

    @property
    def complete(self) -> bool:
        """Every chunk has ended."""
        return not self._open

    def accept(self, items: Sequence[Item], payload: memoryview) -> list[Landing]:
        """Take the pieces of one message in; `payload` has their bytes. Returns the chunks that ended by it."""
        landings: list[Landing] = []
        at = 0
        for item in items:
            landing = self._accept(item, payload[at : at + item.bytes])
            at += item.bytes
            if landing is not None:
                del self._open[item.index]
                landings.append(landing)
        return landings

    def _accept(self, item: Item, piece: memoryview) -> Landing | None:
        want = self._open.get(item.index)
        if want is None:
            raise FrameError("a chunk that is not wanted, or not any more")
        if item.state != HELD:
            if item.bytes or item.offset or item.index in self._partial:
                raise FrameError("a chunk that is not sent has no bytes")
            outcome = Outcome.NOT_HELD if item.state == NOT_HELD else Outcome.WRONG_SIZE
            return Landing(item.index, outcome, item.checksum)
        partial = self._partial.get(item.index)
        expected = (partial.offset, partial.checksum) if partial else (0, item.checksum)
        if not item.bytes or (item.offset, item.checksum) != expected:
            raise FrameError("a piece that does not follow the one before")
        if item.offset + item.bytes > want.into.nbytes:
            raise FrameError("a piece that ends beyond its chunk")
        target = np.frombuffer(want.into, np.uint8)[item.offset : item.offset + item.bytes]
        np.copyto(target, np.frombuffer(piece, np.uint8))
        if partial is None and item.bytes == want.into.nbytes:
            return _verified(item, checksum(target.data))
        partial = self._partial.setdefault(item.index, _Partial(item.checksum))
        partial.hasher.update(target.data)
        partial.offset += item.bytes
        if partial.offset < want.into.nbytes:
            return None
        del self._partial[item.index]
        return _verified(item, partial.hasher.intdigest())


def _verified(item: Item, found: int) -> Landing:
    return Landing(item.index, Outcome.LANDED if found == item.checksum else Outcome.CORRUPT, item.checksum)
