"""Waiting in tests: for a condition, with a bound, and with words for what did not come. Never a sleep for luck.

The waiting functions call `condition` every few milliseconds until it returns something true, and return that; `hold`
is for what must not change meanwhile. An exception of the condition's own is not swallowed: a condition says "not yet"
by returning something false.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")

POLL_INTERVAL_S = 0.005


def wait_until(condition: Callable[[], T], timeout_s: float, what: str) -> T:
    """Wait until `condition()` is true, and return its value. Fails with `what` after `timeout_s`."""
    ends = time.monotonic() + timeout_s
    while not (value := condition()):
        if time.monotonic() > ends:
            raise AssertionError(f"waited {timeout_s} s in vain until {what}; last seen: {value!r}")
        time.sleep(POLL_INTERVAL_S)
    return value


async def wait_until_async(condition: Callable[[], T | Awaitable[T]], timeout_s: float, what: str) -> T:
    """As `wait_until`, letting the loop run meanwhile. `condition` may be a coroutine function."""
    ends = time.monotonic() + timeout_s
    while True:
        answer = condition()
        value: T = await answer if isinstance(answer, Awaitable) else answer
        if value:
            return value
        if time.monotonic() > ends:
            raise AssertionError(f"waited {timeout_s} s in vain until {what}; last seen: {value!r}")
        await asyncio.sleep(POLL_INTERVAL_S)


def hold(check: Callable[[], None], seconds: float, *, every_s: float) -> None:
    """What must stay so for a while: `check()` asserts it, again and again until the time is over."""
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        check()
        time.sleep(every_s)
