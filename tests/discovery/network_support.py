"""Two or three networks of gossip for tests, over memory or over real sockets, and a protocol that writes down what it
is told and does what the test says."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar

from kvmesh.discovery.actions import Action
from kvmesh.discovery.network import GossipNetwork, MemoryGossip, open_network
from kvmesh.discovery.swim.events import AnswerPull, Pulled, SwimEvent
from kvmesh.discovery.wire import Endpoint, Keyring, PushedNode, PushedState, PushPull
from kvmesh.discovery.wire.messages import VERSIONS
from tests.support.waiting import wait_until_async

E = TypeVar("E")
WAIT_S = 10.0
"""A bound for what takes milliseconds on a quiet machine."""


class Side:
    """One network, with all that it reported. A push/pull is answered with `state`, or as `on_pulled` says."""

    def __init__(self, network: GossipNetwork, state: PushPull) -> None:
        self.network = network
        self.events: list[SwimEvent] = []
        self.state = state
        self.on_pulled: Callable[[Pulled], Action | None] = lambda pulled: AnswerPull(pulled.token, self.state)

    @property
    def endpoint(self) -> Endpoint:
        return self.network.endpoint

    def start(self) -> None:
        self.network.start(self.on_event)

    def on_event(self, event: SwimEvent) -> None:
        self.events.append(event)
        if isinstance(event, Pulled) and (action := self.on_pulled(event)) is not None:
            assert self.network.perform(action)

    def do(self, action: Action) -> None:
        assert self.network.perform(action)

    def told(self, kind: type[E]) -> list[E]:
        return [event for event in self.events if isinstance(event, kind)]

    async def hears(self, kind: type[E], count: int = 1) -> list[E]:
        """The events of that kind: so many, and no more."""
        await wait_until_async(lambda: len(self.told(kind)) >= count, WAIT_S, f"{count} {kind.__name__} came")
        assert len(self.told(kind)) == count
        return self.told(kind)


class Place:
    """Where networks are opened: on loopback, or in memory."""

    def __init__(self, kind: str) -> None:
        self.memory = MemoryGossip() if kind == "memory" else None
        self.sides: list[Side] = []

    async def open(
        self,
        name: str,
        *,
        start: bool = True,
        keyring: Keyring | None = None,
        label: str = "",
        members_file: Path | None = None,
    ) -> Side:
        if self.memory is not None:
            network = self.memory.open(name, keyring=keyring, label=label, members_file=members_file)
        else:
            network = await open_network(
                "127.0.0.1", 0, name=name, keyring=keyring, label=label, members_file=members_file
            )
        side = Side(network, state_of(name))
        self.sides.append(side)
        if start:
            side.start()
        return side

    async def nowhere(self) -> Endpoint:
        """An endpoint that was somebody's and is nobody's."""
        side = await self.open("nobody")
        await side.network.close()
        return side.endpoint


def state_of(name: str, count: int = 1, meta: bytes = b"") -> PushPull:
    """A state with `count` nodes."""
    nodes = (
        PushedNode(f"{name}-{number}", b"\x7f\0\0\1", 7000, meta, number, PushedState.ALIVE, VERSIONS)
        for number in range(count)
    )
    return PushPull(False, tuple(nodes), f"state of {name}".encode())


@asynccontextmanager
async def place(kind: str) -> AsyncIterator[Place]:
    here = Place(kind)
    try:
        yield here
    finally:
        for side in here.sides:
            await side.network.close()
    assert {task for task in asyncio.all_tasks() if task is not asyncio.current_task()} == set()


def play(kind: str, scene: Callable[[Place], Awaitable[None]]) -> None:
    """Run a scene at a place of that kind, and leave nothing behind."""

    async def run() -> None:
        async with place(kind) as here:
            await scene(here)

    asyncio.run(run())
