"""Page-locking: makes an arena known to CUDA, so that a GPU copies from it and to it by DMA, without a bounce buffer.

Done by the process that copies (the engine's), the first time that it copies between the arena and a GPU. Registering
locks every page of the arena into memory; it takes some seconds for a large one, and is done once. Where CUDA refuses
(no room to lock, a driver that cannot register read-only memory) copies work as before, only slower, and the log says
so once.

Knows nothing of chunks. Any thread.
"""

from __future__ import annotations

import logging
import threading
import weakref
from typing import Any, Final

from kvmesh.arena import Arena

log = logging.getLogger(__name__)

PORTABLE: Final = 1
"""cudaHostRegisterPortable: known to every device of this process."""
READ_ONLY: Final = 8
"""cudaHostRegisterReadOnly: for the mapping that views are made from."""

_lock = threading.Lock()
_known: weakref.WeakKeyDictionary[Arena, bool] = weakref.WeakKeyDictionary()


def pin(arena: Arena, *, writable: bool) -> bool:
    """Register `arena` with CUDA, once. Whether it is registered. Needs a torch with CUDA."""
    with _lock:
        if arena not in _known:
            import torch

            cudart: Any = torch.cuda.cudart  # it has no types
            _known[arena] = _register(arena, cudart(), writable)
        return _known[arena]


def _register(arena: Arena, cudart: Any, writable: bool) -> bool:
    code = int(cudart.cudaHostRegister(arena.address, arena.size_bytes, PORTABLE if writable else PORTABLE | READ_ONLY))
    if code:
        log.warning(
            "CUDA cannot register the arena (error %d): copies between it and the GPU are slower; raise the limit of "
            "locked memory (ulimit -l) or use a smaller --memory",
            code,
        )
        return False
    # The arena's end comes before its mapping's: a registration must not outlive what it is of.
    weakref.finalize(arena, cudart.cudaHostUnregister, arena.address).atexit = False
    return True
