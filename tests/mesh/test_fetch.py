"""Fetches: from several holders, past holders that fail, for a price, of parts; and those that meet others."""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import kvmesh
from kvmesh.agent import Agent
from kvmesh.fetch import Ask, Fate, Flight
from kvmesh.keys import part_key
from kvmesh.plan import ReadPlan
from kvmesh.rates import Path as RatePath
from kvmesh.transport.interface import Landing, Outcome, Reading, Slice, Want
from tests.support.agents import MIB, LocalAgents
from tests.support.chunks import tensor

SPACE = kvmesh.Namespace(model="m", revision="r", dtype="float32", layers=2, kv_heads=2, head_dim=16, chunk_tokens=16)
LARGE = kvmesh.Namespace(model="m", revision="r", dtype="float32", layers=8, kv_heads=16, head_dim=64, chunk_tokens=16)
"""Chunks of 1 MiB: a chain of them is worth sharing."""


@pytest.fixture
def agents(tmp_path: Path) -> Iterator[LocalAgents]:
    with LocalAgents(tmp_path) as running:
        yield running


content = functools.cache(tensor)


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
        return [await flight.done for flight in r.fetcher.want(None, keys, what).values()]

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
    assert agents.do(r.fetcher.stats)["corrupt"] == 1
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
    assert flights[chain[5]].done.result() is Fate.PRICE
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
            assert await flight.done is Fate.LANDED
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


# --- cancelled reads -------------------------------------------------------------------------------------------------
class SlowToClose:
    """A reading that may write to its buffers until `let_go` is set."""

    def __init__(self, reading: Reading, let_go: asyncio.Event) -> None:
        self._reading = reading
        self._let_go = let_go

    async def __anext__(self) -> Landing:
        return await self._reading.__anext__()

    async def close(self) -> None:
        await self._let_go.wait()
        await self._reading.close()


def test_nobody_waits_for_the_quarantine_of_a_cancelled_read(
    agents: LocalAgents, monkeypatch: pytest.MonkeyPatch
) -> None:
    """faults.md, defect 8: what a transfer may still write to goes to nobody else."""
    chain = SPACE.chain(list(range(4 * 16)))
    r = reader(agents, {"a": chain})
    let_go = asyncio.Event()
    read = r.node.transport.read

    def slow_to_close(address: str, wants: Sequence[Want], *, deadline_s: float) -> SlowToClose:
        return SlowToClose(read(address, wants, deadline_s=deadline_s), let_go)

    monkeypatch.setattr(r.node.transport, "read", slow_to_close)
    agents.do(lambda: agents.network.stall("a"))
    assert fetch(agents, r, chain, ask(SPACE, within_s=0.05)) == [Fate.DEADLINE] * 4
    stats = agents.do(r.fetcher.stats)
    assert stats["quarantined_bytes"] == 4 * SPACE.chunk_bytes
    assert agents.do(r.store.stats).reserved_chunks == 4
    agents.do(lambda: agents.network.resume("a"))
    agents.do(r.fetcher.rates._paths.clear)  # it counts as too slow for anything now
    again = agents.do(lambda: r.fetcher.want(None, chain, ask(SPACE)))
    agents.wait_for(lambda: all(flight.done.done() for flight in again.values()))
    assert right(agents, r, SPACE, chain), "into other extents"
    agents.do(let_go.set)
    at_rest(agents, r)


def test_closing_ends_every_flight(agents: LocalAgents) -> None:
    chain = SPACE.chain(list(range(4 * 16)))
    r = reader(agents, {"a": chain})
    agents.do(lambda: agents.network.stall("a"))
    flights = agents.do(lambda: r.fetcher.want(None, chain, ask(SPACE)))
    agents.run(r.fetcher.close())
    assert {flight.done.result() for flight in flights.values()} == {Fate.MISS}
    assert agents.do(r.store.stats).reserved_chunks == 0
    agents.do(lambda: agents.network.resume("a"))


def test_after_closing_nothing_is_fetched(agents: LocalAgents) -> None:
    """Clients may still be there, with views of chunks that a fetch would replace as soon as they are disconnected."""
    chain = SPACE.chain(list(range(32)))
    r = reader(agents, {"a": chain})
    agents.run(r.fetcher.close())
    assert fetch(agents, r, chain, ask(SPACE)) == []
    with agents.mesh("r").get(SPACE, chain, deadline_s=5) as hit:
        assert (hit.count, hit.reason) == (0, "miss")


def test_an_error_of_our_own_ends_the_fetch_and_no_more(
    agents: LocalAgents, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    chain = SPACE.chain(list(range(4 * 16)))
    r = reader(agents, {"a": chain})

    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(r.store, "commit", broken)
    assert fetch(agents, r, chain, ask(SPACE)) == [Fate.MISS] * 4
    at_rest(agents, r)
    monkeypatch.undo()
    assert fetch(agents, r, chain, ask(SPACE)) == [Fate.LANDED] * 4
    assert "an error of our own" in caplog.text
    caplog.clear()  # its traceback would keep the arenas


@pytest.mark.parametrize("ahead", [False, True], ids=["get", "prefetch"])
def test_the_front_of_a_fetched_chain_is_evicted_last(agents: LocalAgents, ahead: bool) -> None:
    chain = SPACE.chain(list(range(6 * 16)))
    r = reader(agents, {"a": chain})
    mesh = agents.mesh("r")
    mesh.put(SPACE, {key: content(SPACE, key[0]) for key in chain[:2]})
    if ahead:
        mesh.prefetch(SPACE, chain)
    else:
        with mesh.get(SPACE, chain, deadline_s=5) as hit:
            assert (hit.count, hit.fetched) == (6, 4)
    agents.wait_for(lambda: r.store.stats().chunks == 6 and r.store.stats().leases == 0)
    evicted = agents.do(lambda: list(r.store._chunks))
    if ahead:  # what was here before is used by the get that follows
        assert [key for key in evicted if key in chain[2:]] == chain[:1:-1]
    else:
        assert evicted == chain[::-1]


# --- fetches that meet others ----------------------------------------------------------------------------------------
def test_a_chunk_that_a_client_puts_meanwhile_does_not_end_the_fetch_of_the_rest(agents: LocalAgents) -> None:
    chain = SPACE.chain(list(range(32)))
    r = reader(agents, {"a": chain[:1], "b": chain[1:]})

    async def work() -> list[Fate]:
        r.store.add_owner("client")
        assert r.store.reserve("client", chain[0], SPACE.digest[:16], SPACE.chunk_bytes) >= 0
        flights = r.fetcher.want(None, chain, ask(SPACE))
        mine = r.store.commit("client", chain[0], 0)
        assert mine is not None
        fates = [await flight.done for flight in flights.values()]
        assert flights[chain[0]].chunk is mine
        return fates

    assert agents.run(work()) == [Fate.LANDED, Fate.LANDED]
    at_rest(agents, r)


def test_a_chunk_that_is_here_already_lands_at_once(agents: LocalAgents) -> None:
    chain = SPACE.chain(list(range(32)))
    r = reader(agents, {"a": chain})
    agents.mesh("r").put(SPACE, {chain[0]: torch.zeros(2, 2, 2, 16, 16)})
    assert fetch(agents, r, chain, ask(SPACE)) == [Fate.LANDED, Fate.LANDED]
    assert agents.do(r.fetcher.stats)["landed"] == 1


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


def at_rest_soon(agents: LocalAgents, r: Agent) -> None:
    agents.wait_for(lambda: r.fetcher.stats()["flights"] == 0)
    at_rest(agents, r)


def waiting(r: Agent) -> int:
    """How many wait for flights, over all flights."""
    return sum(len(flight.waiters) for flight in r.fetcher._flights.values())


# --- whoever asked goes away -----------------------------------------------------------------------------------------
def test_a_fetch_that_nobody_waits_for_any_more_ends(agents: LocalAgents) -> None:
    chain = SPACE.chain(list(range(20 * 16)))
    r = reader(agents, {"a": chain})
    agents.do(lambda: agents.network.stall("a"))
    mesh = agents.mesh("r")
    hits = [mesh.get(SPACE, chain, deadline_s=1000) for _ in range(2)]
    agents.wait_for(lambda: waiting(r) == 2 * len(chain))
    hits[0].close()
    agents.wait_for(lambda: waiting(r) == len(chain))
    assert agents.do(r.fetcher.stats)["flights"] == len(chain), "the other one still waits"
    hits[1].close()
    at_rest_soon(agents, r)


def test_a_prefetch_goes_on_when_a_get_that_joined_it_goes_away(agents: LocalAgents) -> None:
    chain = SPACE.chain(list(range(20 * 16)))
    r = reader(agents, {"a": chain})
    agents.do(lambda: agents.network.stall("a"))
    mesh = agents.mesh("r")
    assert mesh.prefetch(SPACE, chain, deadline_s=20) == len(chain)
    hit = mesh.get(SPACE, chain, deadline_s=20)
    agents.wait_for(lambda: waiting(r) == len(chain))
    hit.close()
    agents.wait_for(lambda: not waiting(r))
    agents.do(lambda: agents.network.resume("a"))
    agents.wait_for(lambda: r.store.stats().chunks == len(chain))
    at_rest_soon(agents, r)


@pytest.mark.parametrize("event", ["Begin", "Landed", "Tick"])
def test_an_error_of_our_own_ends_the_fetch_and_leaves_nothing(
    agents: LocalAgents, event: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    chain = SPACE.chain(list(range(8 * 16)))
    r = reader(agents, {"a": chain})
    handle = ReadPlan.handle

    def failing(self: ReadPlan, what: object, now: float) -> list[Any]:
        if type(what).__name__ == event:
            raise ZeroDivisionError
        return handle(self, what, now)  # type: ignore[arg-type]

    monkeypatch.setattr(ReadPlan, "handle", failing)
    if event == "Tick":
        agents.do(lambda: agents.network.stall("a"))
    fates = fetch(agents, r, chain, ask(SPACE, within_s=0.2))
    assert fates == [Fate.MISS] * len(fates)
    at_rest_soon(agents, r)
    said = caplog.text
    caplog.clear()  # the records have the frames, and these the arena
    assert "error of our own" in said
