"""Where a look-at command gets its answers: the local agent, or a controller.

Both answer the same questions with the same documents (`kvmesh.queries`). Synchronous, one question at a time; for
short-lived commands.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, Protocol, Self

import msgspec

from kvmesh import protocol, queries
from kvmesh.client import connect
from kvmesh.discovery.keying import ROUNDS_MAX, Operation
from kvmesh.settings import MESH_PORT_DEFAULT, socket_default
from kvmesh.transport import Transport, open_zmq
from kvmesh.transport.errors import AgentUnavailableError, ProtocolError, UnreachableError
from kvmesh.transport.limits import CALL_TIMEOUT_S, KEYS_ROUND_S


class View(Protocol):
    """The cluster, as one of its processes sees it."""

    def nodes(self) -> dict[str, Any]: ...
    def map(self) -> dict[str, Any]: ...
    def locate(self, chain: Sequence[bytes]) -> dict[str, Any]: ...
    def stats(self) -> dict[str, Any]: ...
    def keys(self, operation: Operation, key: bytes = b"") -> dict[str, Any]: ...
    def close(self) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def open_view(agent: str | None = None, controller: str | None = None) -> View:
    """The view of the agent at a socket, or of the controller at ``HOST:PORT``; of neither: the default agent, else
    controller.

    Raises `AgentUnavailableError` when nobody answers.
    """
    if controller is not None:
        return ControllerView(controller)
    if agent is not None:
        return connect(agent)
    try:
        return connect()
    except AgentUnavailableError as error:
        if "KVMESH_SOCKET" in os.environ:
            raise  # one agent is named: an answer from elsewhere would only mislead
        address = f"127.0.0.1:{MESH_PORT_DEFAULT}"
        view = ControllerView(address)
        try:
            view.nodes()
        except AgentUnavailableError:
            view.close()
            raise AgentUnavailableError(
                f"no agent answers at {socket_default()} and no controller at {address}: start one, or name it with "
                "--agent SOCKET or --controller HOST:PORT"
            ) from error
        return view


class ControllerView(AbstractContextManager["ControllerView"]):
    """What a process of the mesh, found at its mesh address, answers."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._runner = asyncio.Runner()
        self._transport: Transport = self._runner.run(open_zmq("127.0.0.1", 0, None, _refuse))

    def nodes(self) -> dict[str, Any]:
        """See `kvmesh.client.Mesh.nodes`."""
        return self._ask(queries.Nodes())

    def map(self) -> dict[str, Any]:
        """See `kvmesh.client.Mesh.map`."""
        return self._ask(queries.Map())

    def locate(self, chain: Sequence[bytes]) -> dict[str, Any]:
        """See `kvmesh.client.Mesh.locate`."""
        return self._ask(queries.Locate(protocol.pack_keys(chain)))

    def stats(self) -> dict[str, Any]:
        """The counters of the process that answers."""
        return self._ask(queries.Stats())

    def keys(self, operation: Operation, key: bytes = b"") -> dict[str, Any]:
        """See `kvmesh.client.Mesh.keys`."""
        return self._ask(queries.Keys(operation, key), timeout_s=CALL_TIMEOUT_S + ROUNDS_MAX * KEYS_ROUND_S)

    def close(self) -> None:
        """Disconnect."""
        self._runner.run(self._transport.close())
        self._runner.close()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _ask(self, question: queries.Question, timeout_s: float = CALL_TIMEOUT_S) -> dict[str, Any]:
        request = queries.CALL_PREFIX + queries.encode(question)
        try:
            answer = self._runner.run(self._transport.call(self._address, request, timeout_s=timeout_s))
        except UnreachableError:
            raise AgentUnavailableError(
                f"nothing answers at {self._address}: start `kvmesh controller`, or give its mesh address"
            ) from None
        document: dict[str, Any] = msgspec.json.decode(answer)
        return document


async def _refuse(_request: bytes) -> bytes:
    raise ProtocolError("this process only asks")
