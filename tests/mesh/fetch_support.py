"""What the tests of fetches share: a reader with peers, and what became of what it fetched."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import kvmesh
from kvmesh.agent import Agent
from kvmesh.fetch import Ask, Fate, Flight
from tests.support.agents import MIB, LocalAgents
from tests.support.chunks import tensor

SPACE = kvmesh.Namespace(model="m", revision="r", dtype="float32", layers=2, kv_heads=2, head_dim=16, chunk_tokens=16)
LARGE = kvmesh.Namespace(model="m", revision="r", dtype="float32", layers=8, kv_heads=16, head_dim=64, chunk_tokens=16)
"""Chunks of 1 MiB: a chain of them is worth sharing."""


content = functools.cache(tensor)


async def ended(flight: Flight) -> Fate:
    """How a flight ended, when it has."""
    if flight.fate is None:
        done = asyncio.Event()
        flight.watchers.append(done.set)
        await done.wait()
    assert flight.fate is not None
    return flight.fate


def reader(
    agents: LocalAgents,
    held: dict[str, list[bytes]],
    space: kvmesh.Namespace = SPACE,
    memory: int = 16 * MIB,
    peers: dict[str, Agent] | None = None,
) -> Agent:
    """Agent r, and its peers with what each of them holds: the chunk ``key`` is `content(space, key[0])`."""
    peers = {} if peers is None else peers
    for name, keys in held.items():
        peers[name] = agents.start(name, memory=memory)
        agents.mesh(name).put(space, {key: content(space, key[0]) for key in keys})
    r = agents.start("r", join=tuple(held), memory=memory)
    agents.wait_alive(r, *held)
    agents.wait(r, lambda: all(r.node.discovery.map.has(name, key) for name, keys in held.items() for key in keys))
    return r


def ask(space: kvmesh.Namespace, *, within_s: float = 10.0, prefill: float | None = None, **how: Any) -> Ask:
    deadline = time.monotonic() + within_s
    return Ask(space.digest[:16], space.chunk_bytes, space.chunk_tokens, deadline, prefill, **how)


def fetch(agents: LocalAgents, r: Agent, keys: Sequence[bytes], what: Ask) -> list[Fate]:
    """How the flights of `keys` end."""

    async def work() -> list[Fate]:
        return [await ended(flight) for flight in r.fetcher.want(None, keys, what).values()]

    return agents.run(work())


def right(agents: LocalAgents, r: Agent, space: kvmesh.Namespace, keys: Sequence[bytes]) -> bool:
    """Whether `r` holds the chunks of `keys` with the content that `reader` put."""

    def check() -> bool:
        for key in keys:
            chunk = r.store.get(key)
            expected = content(space, key[0]).numpy().tobytes()
            if chunk is None or bytes(r.arena.view(chunk.offset, chunk.size_bytes)) != expected:
                return False
        return True

    return agents.do(check)


def flip(agent: Agent, key: bytes) -> None:
    """Change a bit of a chunk in the arena that it lies in."""
    chunk = agent.store.get(key)
    assert chunk is not None
    agent.arena.view(chunk.offset, 1)[0] ^= 0x40


def after_landings(agents: LocalAgents, r: Agent, count: int, what: Callable[[], None]) -> None:
    """Do `what` on the loop when `count` flights have landed."""
    land = r.fetcher.land
    landed = 0

    def counted(flight: Flight, chunk: Any) -> None:
        nonlocal landed
        landed += 1
        land(flight, chunk)
        if landed == count:
            what()

    r.fetcher.land = counted  # type: ignore[method-assign]


def at_rest(agents: LocalAgents, r: Agent) -> None:
    """Nothing is reserved, quarantined or under way any more."""
    agents.wait_for(lambda: r.store.stats().reserved_chunks == 0)
    stats = agents.do(r.fetcher.stats)
    assert (stats["quarantined_bytes"], stats["flights"]) == (0, 0)
    assert all(row["reads"] == 0 for row in stats["paths"])


def at_rest_soon(agents: LocalAgents, r: Agent) -> None:
    agents.wait_for(lambda: r.fetcher.stats()["flights"] == 0)
    at_rest(agents, r)


def waiting(r: Agent) -> int:
    """How many wait for flights, over all flights."""
    return sum(len(flight.waiters) for flight in r.fetcher._flights.values())
