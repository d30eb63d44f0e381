"""An engine's way to its agent: used while it works, left alone for a while when it does not.

A `Mesh` connects again by itself, so an agent may be restarted at any time. But a request must not pay for an agent
that is gone or hangs: after a failure the engine goes on without the mesh, and asks again at the earliest after an
interval that doubles up to a bound. Any thread may use a link.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from kvmesh.transport.errors import AgentUnavailableError
from kvmesh.transport.limits import (
    ENGINE_CONNECT_TIMEOUT_S,
    ENGINE_RECONNECT_INTERVAL_MAX_S,
    ENGINE_RECONNECT_INTERVAL_MIN_S,
)

if TYPE_CHECKING:
    from kvmesh.client import Mesh


class AgentLink:
    """The way to one agent. `connect` makes a connection or raises `AgentUnavailableError`; `mesh` is one made
    already.
    """

    def __init__(
        self,
        connect: Callable[[], Mesh],
        *,
        mesh: Mesh | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._connect = connect
        self._mesh = mesh
        self._clock = clock
        self._lock = threading.Lock()
        self._interval_s = ENGINE_RECONNECT_INTERVAL_MIN_S
        self._retry_at = 0.0
        self._reason = ""

    @contextmanager
    def use(self) -> Iterator[Mesh]:
        """The connection, for one exchange with the agent; how that goes decides when the next one is tried.

        Raises `AgentUnavailableError`: at once while it is too early to try again.
        """
        mesh = self._connected()
        try:
            yield mesh
        except AgentUnavailableError as error:
            with self._lock:
                self._postpone(str(error))
            raise
        with self._lock:
            self._interval_s = ENGINE_RECONNECT_INTERVAL_MIN_S

    def close(self) -> None:
        """Close the connection that is open, if any. The next use makes a new one."""
        with self._lock:
            mesh, self._mesh = self._mesh, None
        if mesh is not None:
            mesh.close()

    def _connected(self) -> Mesh:
        with self._lock:
            if self._clock() < self._retry_at:
                raise AgentUnavailableError(self._reason)
            if self._mesh is None:
                try:
                    self._mesh = self._connect()
                except AgentUnavailableError as error:
                    self._postpone(str(error))
                    raise
            return self._mesh

    def _postpone(self, reason: str) -> None:
        self._reason = reason
        self._retry_at = self._clock() + self._interval_s
        self._interval_s = min(self._interval_s * 2, ENGINE_RECONNECT_INTERVAL_MAX_S)


def connect_to(socket: str | os.PathLike[str] | None) -> Callable[[], Mesh]:
    """A function that connects to the agent at `socket` within the time that a request can spare."""

    def connect() -> Mesh:
        import kvmesh

        return kvmesh.connect(socket, timeout_s=ENGINE_CONNECT_TIMEOUT_S)

    return connect
