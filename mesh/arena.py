"""The arena: the node's shared memory, one memfd that the agent and its engines map.

The agent creates it and passes the file descriptor to each client; bytes that an engine writes there are the bytes that
the transport sends. The memfd is sealed against growing and shrinking, so no process can take the ground from under
another's mapping.

Clients map it twice: writable, to fill what they reserved, and read-only, for the views that a hit hands out: a chunk
is immutable, and a stray write to a view must fault in the engine that made it and not change the cache of everyone
else.

Owns the mapping. Knows nothing of chunks, and of who may use which bytes.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os

import numpy as np

from kvmesh.transport.errors import SettingsError

_SEALS = fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL


class Arena:
    """`size_bytes` bytes of shared memory, mapped into this process."""

    def __init__(self, fd: int, size_bytes: int, *, writable: bool) -> None:
        """Maps `fd`, which stays the caller's."""
        self.size_bytes = size_bytes
        self._fd = -1
        access = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        try:
            self._map = mmap.mmap(fd, size_bytes, flags=mmap.MAP_SHARED, prot=access)
        except OSError as error:
            raise SettingsError(_no_room(size_bytes, error)) from None
        self.address = int(np.frombuffer(self._map, np.uint8).ctypes.data)
        """Where the mapping starts in this process."""
        self._bytes = memoryview(self._map)

    @classmethod
    def create(cls, size_bytes: int) -> Arena:
        """A new arena. Pages cost memory once they are written. Raises `SettingsError` when the kernel has no room for
        it."""
        fd = -1
        try:
            fd = os.memfd_create("kvmesh-arena", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            os.ftruncate(fd, size_bytes)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
            arena = cls(fd, size_bytes, writable=True)
        except OSError as error:
            if fd >= 0:
                os.close(fd)
            raise SettingsError(_no_room(size_bytes, error)) from None
        except SettingsError:
            os.close(fd)
            raise
        arena._fd = fd
        return arena

    def fileno(self) -> int:
        """The memfd, to pass to a client. Only an arena that this process created has one."""
        assert self._fd >= 0
        return self._fd

    def view(self, offset: int, size_bytes: int) -> memoryview:
        """The bytes of one extent, without a copy."""
        assert 0 <= offset <= self.size_bytes - size_bytes
        return self._bytes[offset : offset + size_bytes]

    def close(self) -> None:
        """Unmap. Where views are still alive, the mapping goes with the last of them."""
        # A memoryview or mmap with exports refuses to close: the exports keep the mapping, and free it when they go.
        with contextlib.suppress(BufferError):
            self._bytes.release()
            self._map.close()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _no_room(size_bytes: int, error: OSError) -> str:
    if error.errno in (errno.ENOMEM, errno.EINVAL, errno.EFBIG, errno.ENOSPC):
        return f"the kernel has no room for an arena of {size_bytes} bytes ({error.strerror}): use a smaller --memory"
    return f"the arena cannot be made: {error.strerror}"
