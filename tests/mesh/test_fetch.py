"""Fetches that meet others: a client's put of the same chunk, another reader's deadline."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import kvmesh
from kvmesh.agent import Agent
from kvmesh.fetch import Fate, Flight
from tests.support.agents import LocalAgents

SPACE = kvmesh.Namespace(model="m", revision="r", dtype="float32", layers=2, kv_heads=2, head_dim=16, chunk_tokens=16)
SPACE_ID = SPACE.digest[:16]


@pytest.fixture
def agents(tmp_path: Path) -> Iterator[LocalAgents]:
    with LocalAgents(tmp_path) as running:
        yield running


def reader(agents: LocalAgents, held: dict[str, list[bytes]]) -> Agent:
    """Agent r, and its peers with what each of them holds."""
    for name, keys in held.items():
        agents.start(name)
        agents.mesh(name).put(SPACE, {key: torch.zeros(2, 2, 2, 16, 16) for key in keys})
    r = agents.start("r", join=tuple(held))
    agents.wait_alive(r, *held)
    agents.wait(r, lambda: all(r.node.discovery.map.has(name, key) for name, keys in held.items() for key in keys))
    return r


def test_a_chunk_that_a_client_puts_meanwhile_does_not_end_the_fetch_of_the_rest(agents: LocalAgents) -> None:
    chain = SPACE.chain(list(range(32)))
    r = reader(agents, {"a": chain[:1], "b": chain[1:]})

    async def fetch() -> list[Fate]:
        flights = r.fetcher.want(None, SPACE_ID, SPACE.chunk_bytes, chain, time.monotonic() + 5)
        r.store.add_owner("client")
        assert r.store.reserve("client", chain[0], SPACE_ID, SPACE.chunk_bytes) >= 0
        assert r.store.commit("client", chain[0], 0) is not None
        return [await flight.done for flight in flights.values()]

    assert agents.run(fetch()) == [Fate.LANDED, Fate.LANDED]


def test_what_ended_by_another_readers_deadline_is_fetched_again_together(
    agents: LocalAgents, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain = SPACE.chain(list(range(20 * 16)))
    r = reader(agents, {"a": chain})
    agents.do(lambda: agents.network.stall("a"))
    wanted: list[int] = []
    want = r.fetcher.want

    def counted(*args: object) -> dict[bytes, Flight]:
        flights = want(*args)  # type: ignore[arg-type]
        wanted.append(len(flights))
        return flights

    monkeypatch.setattr(r.fetcher, "want", counted)
    mesh = agents.mesh("r")
    short = mesh.get(SPACE, chain, deadline_s=0.1)
    agents.wait_for(lambda: wanted == [20])
    long = mesh.get(SPACE, chain, deadline_s=30)
    assert short.reason == "deadline"
    agents.do(lambda: agents.network.resume("a"))
    assert long.count == 20
    assert wanted == [20, 20, 20]
    short.close()
    long.close()
    assert agents.do(r.store.stats).leases == 0
