"""The client for asyncio: the same calls as coroutines.

Each call runs in a thread of a small pool, so neither a wait for peers nor a copy into the arena holds up the loop. A
hit comes back settled: using it does not wait any more.

    mesh = await kvmesh.aio.connect()
    async with mesh.get(space, chain) as hit: ...
"""

from __future__ import annotations

import asyncio
import functools
import os
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from kvmesh import client
from kvmesh.hit import Hit
from kvmesh.keys import Namespace
from kvmesh.parts import Part
from kvmesh.transport.limits import (
    AGENT_HELLO_TIMEOUT_S,
    CLIENT_CONNECTIONS_MAX,
    GET_DEADLINE_DEFAULT_S,
    LEASE_S_DEFAULT,
    PREFETCH_DEADLINE_DEFAULT_S,
)

if TYPE_CHECKING:
    from kvmesh.tensors import Value

P = ParamSpec("P")
T = TypeVar("T")


async def connect(
    socket: str | os.PathLike[str] | None = None,
    *,
    timeout_s: float = AGENT_HELLO_TIMEOUT_S,
    lease_s: float = LEASE_S_DEFAULT,
) -> AsyncMesh:
    """As `kvmesh.connect`."""
    threads = ThreadPoolExecutor(CLIENT_CONNECTIONS_MAX, thread_name_prefix="kvmesh-client")
    try:
        mesh = await asyncio.get_running_loop().run_in_executor(
            threads, functools.partial(client.connect, socket, timeout_s=timeout_s, lease_s=lease_s)
        )
    except BaseException:
        threads.shutdown(wait=False)
        raise
    return AsyncMesh(mesh, threads)


class AsyncMesh:
    """`kvmesh.client.Mesh`, whose docstrings hold here, as coroutines."""

    def __init__(self, mesh: client.Mesh, threads: ThreadPoolExecutor) -> None:
        self._mesh = mesh
        self._threads = threads
        self.node = mesh.node

    async def put(
        self, space: Namespace, chunks: Mapping[bytes, Value], *, pin: bool = False, ttl_s: float | None = None
    ) -> client.PutResult:
        """Store chunks in this node."""
        return await self._run(self._mesh.put, space, chunks, pin=pin, ttl_s=ttl_s)

    @asynccontextmanager
    async def get(
        self,
        space: Namespace,
        chain: Sequence[bytes],
        *,
        deadline_s: float = GET_DEADLINE_DEFAULT_S,
        part: Part | None = None,
        prefill_tokens_per_s: float | None = None,
        verify: bool = True,
    ) -> AsyncIterator[Hit]:
        """The longest run of chunks from the front of `chain`, settled."""

        def settled() -> Hit:
            hit = self._mesh.get(
                space,
                chain,
                deadline_s=deadline_s,
                part=part,
                prefill_tokens_per_s=prefill_tokens_per_s,
                verify=verify,
            )
            try:
                hit.count  # noqa: B018 - waits for the last report, in this thread
            except BaseException:
                hit.close()
                raise
            return hit

        # Not cancelled half-way: a hit that nobody receives would keep its leases.
        task = asyncio.ensure_future(self._run(settled))
        try:
            hit = await asyncio.shield(task)
        except asyncio.CancelledError:
            task.add_done_callback(_close_result)
            raise
        with hit:
            yield hit

    async def prefetch(
        self,
        space: Namespace,
        chain: Sequence[bytes],
        *,
        deadline_s: float = PREFETCH_DEADLINE_DEFAULT_S,
        prefill_tokens_per_s: float | None = None,
    ) -> int:
        """Start to fetch what peers hold of the front of `chain`."""
        return await self._run(
            self._mesh.prefetch, space, chain, deadline_s=deadline_s, prefill_tokens_per_s=prefill_tokens_per_s
        )

    async def pin(self, chain: Sequence[bytes]) -> int:
        """Keep this node's copies from eviction."""
        return await self._run(self._mesh.pin, chain)

    async def unpin(self, chain: Sequence[bytes]) -> int:
        """Let eviction have this node's copies again."""
        return await self._run(self._mesh.unpin, chain)

    async def delete(self, chain: Sequence[bytes]) -> int:
        """Remove this node's copies."""
        return await self._run(self._mesh.delete, chain)

    async def locate(self, chain: Sequence[bytes]) -> dict[str, Any]:
        """Who holds the front of `chain`."""
        return await self._run(self._mesh.locate, chain)

    async def nodes(self) -> dict[str, Any]:
        """The members of the mesh."""
        return await self._run(self._mesh.nodes)

    async def map(self) -> dict[str, Any]:
        """What is held where."""
        return await self._run(self._mesh.map)

    async def stats(self) -> dict[str, Any]:
        """The local agent's counters."""
        return await self._run(self._mesh.stats)

    async def close(self) -> None:
        """Disconnect."""
        self._mesh.close()  # waits for nothing; all threads of the pool may be waiting for peers
        await asyncio.get_running_loop().run_in_executor(None, self._threads.shutdown)

    async def __aenter__(self) -> AsyncMesh:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _run(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, functools.partial(call, *args, **kwargs))


def _close_result(task: asyncio.Future[Hit]) -> None:
    if not task.cancelled() and task.exception() is None:
        task.result().close()
