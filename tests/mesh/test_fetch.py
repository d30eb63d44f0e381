"""Fetches: from several holders, past holders that fail, for a price, and of parts."""

from __future__ import annotations

import asyncio
import logging
import time

import pytest

import kvmesh
from kvmesh.agent import Agent
from kvmesh.fetch import Fate, Flight
from kvmesh.keys import part_key
from kvmesh.rates import Path as RatePath
from kvmesh.transport.interface import Outcome, Slice
from tests.mesh.fetch_support import (
    LARGE,
    SPACE,
    after_landings,
    ask,
    at_rest,
    content,
    ended,
    fetch,
    flip,
    reader,
    right,
)
from tests.support.agents import MIB, LocalAgents

# --- several holders -------------------------------------------------------------------------------------------------
MOVES_MIB = pytest.mark.slow  # chains that are worth sharing have 10 MiB, put twice and read once


@MOVES_MIB
def test_two_holders_share_a_chain(agents: LocalAgents) -> None:
    chain = LARGE.chain(list(range(10 * 16)))
    r = reader(agents, {"a": chain, "b": chain}, LARGE, memory=20 * MIB)
    assert fetch(agents, r, chain, ask(LARGE)) == [Fate.LANDED] * 10
    assert right(agents, r, LARGE, chain)
    stats = agents.do(r.fetcher.stats)
    assert (stats["landed"], stats["bytes"]) == (10, 10 * LARGE.chunk_bytes), "each chunk once"
    assert {(row["peer"], row["backend"]) for row in stats["paths"]} == {("a", "memory"), ("b", "memory")}
    assert all(row["bytes"] >= 2 * LARGE.chunk_bytes for row in stats["paths"])
    shown = {node["name"]: node for node in agents.mesh("r").nodes()["nodes"]}
    assert shown["a"]["backend"] == shown["b"]["backend"] == "memory"
    assert min(shown["a"]["bytes_per_s"], shown["b"]["bytes_per_s"]) > 0
    assert shown["r"]["backend"] is None
    at_rest(agents, r)


def test_a_chain_that_only_one_holder_has_is_one_read(agents: LocalAgents) -> None:
    chain = SPACE.chain(list(range(50 * 16)))
    r = reader(agents, {"a": chain})
    assert fetch(agents, r, chain, ask(SPACE)) == [Fate.LANDED] * 50
    assert agents.do(r.fetcher.stats)["reads"] == 1


@MOVES_MIB
def test_what_a_dead_holder_owes_comes_from_the_other(agents: LocalAgents) -> None:
    """faults.md, row 1: a holder killed in the middle of a read."""
    chain = LARGE.chain(list(range(10 * 16)))
    r = reader(agents, {"a": chain, "b": chain}, LARGE, memory=20 * MIB)
    stopping: list[asyncio.Task[None]] = []

    def kill() -> None:
        stopping.append(asyncio.get_running_loop().create_task(agents.network.stop("a")))

    agents.do(lambda: after_landings(agents, r, 3, kill))
    assert fetch(agents, r, chain, ask(LARGE)) == [Fate.LANDED] * 10
    assert right(agents, r, LARGE, chain)
    stats = agents.do(r.fetcher.stats)
    assert stats["reassigned"] > 0
    assert stats["landed"] == 10, "what had landed stays"
    at_rest(agents, r)


@pytest.mark.parametrize("space", [pytest.param(LARGE, marks=MOVES_MIB), SPACE])
def test_a_straggler_is_hedged_once_and_then_left(agents: LocalAgents, space: kvmesh.Namespace) -> None:
    """faults.md, row 6: who falls silent costs a moment, not the deadline."""
    count = 10
    chain = space.chain(list(range(count * 16)))
    r = reader(agents, {"a": chain, "b": chain}, space, memory=24 * MIB)
    r.fetcher._surveyor._shuffle = lambda runs: runs.sort(key=lambda run: run.node)  # a is asked first
    agents.do(lambda: agents.network.stall("a"))
    started = time.monotonic()
    assert fetch(agents, r, chain, ask(space, within_s=20.0)) == [Fate.LANDED] * count
    assert time.monotonic() - started < 5.0
    assert right(agents, r, space, chain)
    stats = agents.do(r.fetcher.stats)
    assert stats["hedges"] == 1
    a = next(row for row in stats["paths"] if row["peer"] == "a")
    assert a["bytes_per_s"] is not None
    assert a["bytes_per_s"] < 2 * space.chunk_bytes / 0.02, "it counts as slow"
    at_rest(agents, r)
    agents.do(lambda: agents.network.resume("a"))


def test_a_corrupt_copy_is_replaced_by_another_holders_and_said_once(
    agents: LocalAgents, caplog: pytest.LogCaptureFixture
) -> None:
    chain = SPACE.chain(list(range(5 * 16)))
    peers: dict[str, Agent] = {}
    r = reader(agents, {"a": chain, "b": chain}, peers=peers)
    r.fetcher._surveyor._shuffle = lambda runs: runs.sort(key=lambda run: run.node)  # a is asked first
    agents.do(lambda: flip(peers["a"], chain[2]))
    with caplog.at_level(logging.WARNING, "kvmesh.fetch"):
        assert fetch(agents, r, chain, ask(SPACE)) == [Fate.LANDED] * 5
        agents.do(lambda: r.fetcher.warn("a", chain[0], Outcome.CORRUPT))
        agents.do(lambda: r.fetcher.warn("b", chain[0], Outcome.CORRUPT))
        said = [record.args[1] for record in caplog.records if record.name == "kvmesh.fetch" and record.args]  # type: ignore[index]
    assert right(agents, r, SPACE, chain)
    stats = agents.do(r.fetcher.stats)
    assert stats["corrupt"] == 1
    assert sum(row["bytes"] for row in stats["paths"]) == 6 * SPACE.chunk_bytes, "what came wrong has moved as well"
    assert said == ["a", "b"]
    at_rest(agents, r)


# --- the price -------------------------------------------------------------------------------------------------------
def slow(r: Agent, peer: str) -> None:
    """Let `r` have measured that `peer` is slow: a MiB in ten seconds."""
    path, now = RatePath(peer, "memory"), time.monotonic()
    r.fetcher.rates.began(path, now - 10)
    r.fetcher.rates.ended(path, now, late_bytes=MIB)


def test_what_computing_does_faster_is_not_fetched(agents: LocalAgents) -> None:
    chain = SPACE.chain(list(range(20 * 16)))
    r = reader(agents, {"a": chain})
    agents.do(lambda: slow(r, "a"))
    assert fetch(agents, r, chain, ask(SPACE, prefill=1e5)) == [Fate.PRICE]
    stats = agents.do(r.fetcher.stats)
    assert (stats["refused_by_price"], stats["reads"], stats["flights"]) == (1, 0, 0)
    assert agents.do(r.store.stats).admitted == 0
    assert fetch(agents, r, chain, ask(SPACE, prefill=100.0)) == [Fate.LANDED] * 20, "a slower engine waits for it"


def test_what_cannot_come_in_time_is_not_asked_for(agents: LocalAgents) -> None:
    """8 KiB take 78 ms at the measured rate; twice as fast is thought possible."""
    chain = SPACE.chain(list(range(20 * 16)))
    r = reader(agents, {"a": chain})
    agents.do(lambda: slow(r, "a"))
    assert SPACE.chunk_bytes == 8 << 10
    assert fetch(agents, r, chain, ask(SPACE, within_s=0.03)) == [Fate.PRICE]
    flights = agents.do(lambda: r.fetcher.want(None, chain, ask(SPACE, within_s=0.5)))
    assert len(flights) == 12
    agents.wait_for(lambda: r.fetcher.stats()["flights"] == 0)


def test_a_get_ends_at_once_when_no_single_holder_can_make_it(agents: LocalAgents) -> None:
    """Together they might seem to bring a chunk in time; each alone needs longer."""
    chain = SPACE.chain(list(range(4 * 16)))
    r = reader(agents, {"a": chain, "b": chain})
    agents.do(lambda: (slow(r, "a"), slow(r, "b")))
    with agents.mesh("r").get(SPACE, chain, deadline_s=0.03) as hit:
        assert (hit.count, hit.reason) == (0, "computing is faster")
    assert agents.do(r.fetcher.stats)["reads"] == 0


def test_a_get_without_time_is_late_and_not_dear(agents: LocalAgents) -> None:
    chain = SPACE.chain(list(range(4 * 16)))
    r = reader(agents, {"a": chain})
    assert fetch(agents, r, chain, ask(SPACE, within_s=-1.0)) == [Fate.DEADLINE]
    assert agents.do(r.fetcher.stats)["refused_by_price"] == 0


def test_the_price_is_asked_for_what_nobody_fetches_yet(agents: LocalAgents) -> None:
    chain = SPACE.chain(list(range(20 * 16)))
    r = reader(agents, {"a": chain})
    agents.do(lambda: agents.network.stall("a"))
    joined = agents.do(lambda: r.fetcher.want(None, chain[:5], ask(SPACE)))

    def more() -> dict[bytes, Flight]:
        slow(r, "a")
        return r.fetcher.want(None, chain, ask(SPACE, prefill=1e6))

    flights = agents.do(more)
    assert list(flights) == chain[:6]
    assert all(flights[key] is joined[key] for key in chain[:5])
    assert flights[chain[5]].fate is Fate.PRICE
    agents.do(lambda: agents.network.resume("a"))
    agents.wait_for(lambda: r.store.run(chain) == 5)


# --- parts -----------------------------------------------------------------------------------------------------------
def test_a_part_lands_under_a_name_of_its_own(agents: LocalAgents) -> None:
    """The heads 1 of each layer's K and V: four runs of 1 KiB."""
    chain = SPACE.chain(list(range(3 * 16)))
    r = reader(agents, {"a": chain})
    part = Slice(offset_bytes=1024, run_bytes=1024, stride_bytes=2048, count=4)

    async def work() -> dict[bytes, Flight]:
        flights = r.fetcher.want(None, chain, ask(SPACE, part=part))
        assert r.fetcher.want(None, chain, ask(SPACE, part=part)) == flights, "single flight"
        whole = r.fetcher.want(None, chain[:1], ask(SPACE))
        assert whole[chain[0]] is not flights[chain[0]]
        for flight in (*flights.values(), *whole.values()):
            assert await ended(flight) is Fate.LANDED
        return flights

    flights = agents.run(work())
    assert list(flights) == chain
    for key, flight in flights.items():
        chunk = flight.chunk
        assert chunk is not None
        assert (chunk.key, chunk.size_bytes) == (part_key(key, part), 4096)
        expected = content(SPACE, key[0])[:, :, 1].contiguous().numpy().tobytes()
        assert bytes(r.arena.view(chunk.offset, 4096)) == expected
        assert not agents.do(lambda key=key: r.journal.holdings.get(part_key(key, part)))
    assert agents.do(lambda: r.store.get(chain[1])) is None
    at_rest(agents, r)
