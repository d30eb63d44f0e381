"""Which bytes of the arena are free: best fit with coalescing, over plain numbers.

Chunks of one namespace have one size, so what eviction frees is what the next put takes: best fit finds the exact hole
and fragmentation stays near zero. Neighbouring holes merge at once, so a larger chunk can follow many small ones.

Owns nothing but numbers: no memory, no keys. Runs on the agent's loop.
"""

from __future__ import annotations

from bisect import bisect_left, insort

from kvmesh.transport.limits import EXTENT_ALIGNMENT_BYTES


def aligned(size_bytes: int) -> int:
    """`size_bytes` rounded up to whole pages: what an extent of that size takes."""
    return -(-size_bytes // EXTENT_ALIGNMENT_BYTES) * EXTENT_ALIGNMENT_BYTES


class Extents:
    """The free-space map of `capacity_bytes` bytes. Offsets and sizes are multiples of a page."""

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes // EXTENT_ALIGNMENT_BYTES * EXTENT_ALIGNMENT_BYTES
        self.free_bytes = self.capacity_bytes
        self._used: dict[int, int] = {}  # offset -> size
        self._free: dict[int, int] = {}  # offset -> size
        self._free_ends: dict[int, int] = {}  # end -> offset, to find the hole on the left
        self._sizes: list[tuple[int, int]] = []  # (size, offset), sorted
        if self.capacity_bytes:
            self._add_hole(0, self.capacity_bytes)

    @property
    def largest_free_bytes(self) -> int:
        """The largest extent that `allocate` could give now."""
        return self._sizes[-1][0] if self._sizes else 0

    def allocate(self, size_bytes: int) -> int | None:
        """The offset of a new extent of at least `size_bytes`; None when no hole is large enough."""
        assert size_bytes > 0
        need = aligned(size_bytes)
        at = bisect_left(self._sizes, (need, 0))
        if at == len(self._sizes):
            return None
        size, offset = self._sizes[at]
        self._remove_hole(offset, size)
        if size > need:
            self._add_hole(offset + need, size - need)
        self._used[offset] = need
        self.free_bytes -= need
        return offset

    def free(self, offset: int) -> None:
        """Give the extent at `offset` back, and merge it with the holes beside it."""
        size = self._used.pop(offset)
        self.free_bytes += size
        left = self._free_ends.get(offset)
        if left is not None:
            left_size = self._free[left]
            self._remove_hole(left, left_size)
            offset, size = left, left_size + size
        right_size = self._free.get(offset + size)
        if right_size is not None:
            self._remove_hole(offset + size, right_size)
            size += right_size
        self._add_hole(offset, size)

    def _add_hole(self, offset: int, size: int) -> None:
        self._free[offset] = size
        self._free_ends[offset + size] = offset
        insort(self._sizes, (size, offset))

    def _remove_hole(self, offset: int, size: int) -> None:
        del self._free[offset]
        del self._free_ends[offset + size]
        del self._sizes[bisect_left(self._sizes, (size, offset))]


def largest_gap(capacity_bytes: int, taken: list[tuple[int, int]]) -> int:
    """The largest run of bytes between the extents `taken`, (offset, size) each: what eviction of all others could
    free."""
    largest = at = 0
    for offset, size in sorted(taken):
        largest = max(largest, offset - at)
        at = offset + aligned(size)
    return max(largest, capacity_bytes - at)
