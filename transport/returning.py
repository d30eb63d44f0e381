"""Giving leases back: gathered for some milliseconds, so that a holder gets one call for several batches.

Nobody waits for it, and no cancelled read ends it. When the call fails the leases end by themselves, at their time.
Runs on the loop.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

from .errors import PeerError
from .lending_messages import GiveBack, Returned, encode_request
from .limits import GIVE_BACK_GATHER_S, GIVE_BACK_TIMEOUT_S, LEASES_PER_READER_MAX

Call = Callable[[bytes, float], Awaitable[bytes]]
"""A call to a holder: the request, and how long it may take."""


class Returns:
    """What one transport gives back to its holders."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._gathered: dict[bytes, tuple[Call, list[Returned]]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._calls: set[asyncio.Task[None]] = set()

    def add(self, call: Call, reader: bytes, returned: Returned) -> None:
        """Soon tell the holder that `call` reaches. `reader` names us there."""
        _, leases = self._gathered.setdefault(reader, (call, []))
        leases.append(returned)
        if len(leases) == LEASES_PER_READER_MAX:
            self._tell()
        elif self._timer is None:
            self._timer = self._loop.call_later(GIVE_BACK_GATHER_S, self._tell)

    async def close(self) -> None:
        """Tell all holders at once, and wait for them a moment."""
        self._tell()
        if self._calls:
            _, late = await asyncio.wait(self._calls, timeout=GIVE_BACK_TIMEOUT_S)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)

    def _tell(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        gathered, self._gathered = self._gathered, {}
        for reader, (call, leases) in gathered.items():
            task = self._loop.create_task(_give_back(call, GiveBack(reader, leases)))
            self._calls.add(task)
            task.add_done_callback(self._calls.discard)


async def _give_back(call: Call, message: GiveBack) -> None:
    with contextlib.suppress(PeerError):
        await call(encode_request(message), GIVE_BACK_TIMEOUT_S)
