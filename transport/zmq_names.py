"""Looks host names up for connections, each in a thread of its own: the resolver takes its time, and has no stop.

At most `NAMES_AT_ONCE_MAX` are looked up at the same time. The answer goes to whoever asked through `tell`, which runs
a call where the connections live.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from typing import Any

from .limits import NAMES_AT_ONCE_MAX

Place = tuple[socket.AddressFamily, Any]
"""An address family, and an address of it as `socket.connect` wants it."""


class Names:
    """The names that are being looked up."""

    def __init__(self, tell: Callable[[Callable[[], None]], object]) -> None:
        """`tell(call)` may be called in any thread, and must not raise."""
        self._tell = tell
        self._at_once = 0

    def look_up(self, host: str, port: int, found: Callable[[Place | None], None]) -> bool:
        """`found(place)` is told in the end, None: there is no such host. False: there are too many names already, or
        no thread for one more."""

        def look_up() -> None:
            place = named(host, port)
            self._tell(lambda: answer(place))

        def answer(place: Place | None) -> None:
            self._at_once -= 1
            found(place)

        if self._at_once >= NAMES_AT_ONCE_MAX:
            return False
        try:
            threading.Thread(target=look_up, name="kvmesh-name", daemon=True).start()
        except RuntimeError:  # this process has no thread left
            return False
        self._at_once += 1
        return True


def numeric(host: str, port: int) -> Place | None:
    """The address when `host` is one already; None when it is a name. Does not wait."""
    try:
        family, _, _, _, where = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST | socket.AI_NUMERICSERV
        )[0]
    except (OSError, UnicodeError):
        return None
    return family, where


def named(host: str, port: int) -> Place | None:
    """The IPv4 address of a name, None when it has none. Waits for as long as the resolver likes."""
    try:
        family, _, _, _, where = socket.getaddrinfo(host, port, socket.AF_INET, socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError):
        return None
    return family, where
