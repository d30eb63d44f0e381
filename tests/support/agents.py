"""Agents of this process: real agents, stores and unix sockets, on one loop in a background thread, over a network in
memory."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, TypeVar

from kvmesh.agent import Agent, open_agent
from kvmesh.client import Mesh, connect
from kvmesh.settings import AgentSettings
from kvmesh.transport import CallHandler, ChunkSource, MemoryNetwork, Transport
from tests.support.waiting import wait_until_async

T = TypeVar("T")
MIB = 1 << 20


class LocalAgents:
    """A context manager. `start` an agent, `mesh` a client to it; whatever was started ends with the block."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.network = MemoryNetwork()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="agents")
        self._stacks: dict[str, AsyncExitStack] = {}
        self._meshes: list[Mesh] = []

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work` on the agents' loop."""
        future: Future[T] = asyncio.run_coroutine_threadsafe(work, self._loop)
        return future.result(timeout=20)

    def do(self, work: Callable[[], T]) -> T:
        """The result of `work()`, called on the agents' loop."""

        async def call() -> T:
            return work()

        return self.run(call())

    def start(self, name: str, *, memory: int = 16 * MIB, join: tuple[str, ...] = ()) -> Agent:
        """A running agent that knows the agents named in `join`."""
        settings = AgentSettings(
            name=name,
            mesh_port=0,
            membership="static",
            join=tuple(f"{peer}:1" for peer in join),
            memory_bytes=memory,
            socket=self.directory / f"{name}.sock",
        )

        async def open_transport(_host: str, _port: int, source: ChunkSource | None, handler: CallHandler) -> Transport:
            return self.network.open(name, source, handler)

        async def open_() -> Agent:
            stack = AsyncExitStack()
            agent = await stack.enter_async_context(open_agent(settings, open_transport))
            self._stacks[name] = stack
            return agent

        return self.run(open_())

    def stop(self, name: str) -> None:
        """End an agent in order."""
        self.run(self._stacks.pop(name).aclose())

    def mesh(self, name: str) -> Mesh:
        """A client of the agent `name`."""
        mesh = connect(self.directory / f"{name}.sock")
        self._meshes.append(mesh)
        return mesh

    def wait(self, agent: Agent, seen: Callable[[], bool]) -> None:
        """Until `seen()` holds on the loop of `agent`, as its discovery goes on."""
        assert self.run(agent.node.discovery.wait_for(seen, timeout_s=10)), "not seen within 10 s"

    def wait_for(self, seen: Callable[[], bool]) -> None:
        """Until `seen()` holds on the loop, at most 10 s."""
        self.run(wait_until_async(seen, 10, "it is seen"))

    def wait_alive(self, agent: Agent, *names: str) -> None:
        """Until `agent` sees all of `names` alive."""
        self.wait(agent, lambda: set(names) <= {m.name for m in agent.node.discovery.members() if m.state == "alive"})

    def __enter__(self) -> LocalAgents:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        for mesh in self._meshes:
            mesh.close()
        for name in list(self._stacks):
            self.stop(name)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
