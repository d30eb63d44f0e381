"""Taking a slice of a chunk: its runs, one after the other, as one stretch of bytes.

What a `Slice` is stands in interface.py; this module knows how to get at its bytes where the chunk is in memory. That
it lies in its chunk is checked before (landings.py at the reader, frames.py at the holder). Pure functions, any thread.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from .interface import Slice


def run_count(part: Slice | None) -> int:
    """How many contiguous runs a part has; a whole chunk, and runs that touch, are one."""
    return 1 if part is None or part.stride_bytes == part.run_bytes else part.count


def runs(part: Slice) -> Iterator[tuple[int, int]]:
    """Offset and length of each contiguous run of a part; those that touch are one."""
    if run_count(part) == 1:
        yield part.offset_bytes, part.bytes
        return
    for number in range(part.count):
        yield part.offset_bytes + number * part.stride_bytes, part.run_bytes


def as_one_run(part: Slice) -> Slice | None:
    """The same bytes as a single run, when there is no gap between the runs."""
    return Slice(part.offset_bytes, part.bytes) if run_count(part) == 1 else None


def piece_bytes(part: Slice, offset: int, most: int) -> int:
    """How many of the bytes from `offset` on, which counts in the slice, make a piece of at most `most`: some whole
    runs, or a piece of one when a run has more than that."""
    if part.run_bytes <= most:
        return min(part.bytes - offset, most // part.run_bytes * part.run_bytes)
    return min(part.run_bytes - offset % part.run_bytes, most)


def piece(chunk: memoryview, part: Slice, offset: int, size_bytes: int) -> memoryview:
    """A piece as `piece_bytes` cuts it: a view when it lies in one run, else a copy without the gaps."""
    number, within = divmod(offset, part.run_bytes)
    start = part.offset_bytes + number * part.stride_bytes + within
    if within + size_bytes <= part.run_bytes:
        return chunk[start : start + size_bytes]
    shape = (size_bytes // part.run_bytes, part.run_bytes)
    runs = np.ndarray(shape, np.uint8, chunk, start, (part.stride_bytes, 1))
    return np.ascontiguousarray(runs).reshape(-1).data


def taken(chunk: memoryview, part: Slice) -> memoryview:
    """All of the slice: a view when it is one run, else a copy."""
    return piece(chunk, as_one_run(part) or part, 0, part.bytes)
