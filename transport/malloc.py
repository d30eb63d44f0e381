"""Lets the C allocator keep the pages of freed frames.

A holder joins small chunks that do not follow each other in the arena, and the runs of parts, in frames of its own,
which are freed once they are sent. glibc would give a freed frame's pages back to the kernel at once, and the next one
would fault them in again, one by one: measured with chunks of 64 KiB that were joined, 34,000 faults and 80 ms of the
CPU for 256 MiB, more than all else that a holder does for them. Kept pages are bounded
by `KEPT_BYTES` for each arena of the allocator. Process-wide, so only a node's own process (an agent, a controller)
opens a transport. Bulk that is received needs none of this: it goes straight to where it belongs.
"""

from __future__ import annotations

import ctypes
from typing import Final

from .limits import FRAME_BYTES_MAX, READ_WINDOW_BYTES_MAX

KEPT_BYTES: Final = READ_WINDOW_BYTES_MAX
M_TRIM_THRESHOLD: Final = -1
M_MMAP_THRESHOLD: Final = -3


def keep_freed_pages() -> None:
    """Set glibc's thresholds. Another C library has no such call: then nothing changes."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 2 * FRAME_BYTES_MAX)
        mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
