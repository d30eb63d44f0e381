"""How fetches end: cancelled, closed, by errors, meeting others, and when whoever asked goes away."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from kvmesh.fetch import Fate, Flight
from kvmesh.plan import ReadPlan
from kvmesh.transport.interface import Landing, Reading, Want
from kvmesh.transport.limits import PLAN_SHARE_CHUNKS_MAX
from tests.mesh.fetch_support import (
    SPACE,
    ask,
    at_rest,
    at_rest_soon,
    content,
    ended,
    fetch,
    reader,
    right,
    waiting,
)
from tests.support.agents import MIB, LocalAgents


# --- cancelled reads -------------------------------------------------------------------------------------------------
class SlowToClose:
    """A reading that may write to its buffers until `let_go` is set."""

    def __init__(self, reading: Reading, let_go: asyncio.Event) -> None:
        self._reading = reading
        self._let_go = let_go

    async def __anext__(self) -> list[Landing]:
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
    agents.wait_for(lambda: all(flight.fate for flight in again.values()))
    assert right(agents, r, SPACE, chain), "into other extents"
    agents.do(let_go.set)
    at_rest(agents, r)


def test_closing_ends_every_flight(agents: LocalAgents) -> None:
    chain = SPACE.chain(list(range(4 * 16)))
    r = reader(agents, {"a": chain})
    agents.do(lambda: agents.network.stall("a"))
    flights = agents.do(lambda: r.fetcher.want(None, chain, ask(SPACE)))
    agents.run(r.fetcher.close())
    assert {flight.fate for flight in flights.values()} == {Fate.MISS}
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
        fates = [await ended(flight) for flight in flights.values()]
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


def test_a_prefetch_that_is_longer_than_the_arena_keeps_its_front(agents: LocalAgents) -> None:
    """It goes in several reads; what a later one brings must not take the place of what an earlier one brought."""
    chain = SPACE.chain(list(range(160 * 16)))
    agents.start("a", memory=4 * MIB)
    agents.mesh("a").put(SPACE, {key: content(SPACE, key[0]) for key in chain})
    r = agents.start("r", join=("a",), memory=MIB)
    agents.wait_alive(r, "a")
    agents.wait(r, lambda: all(r.node.discovery.map.has("a", key) for key in chain))
    fits = MIB // SPACE.chunk_bytes
    assert PLAN_SHARE_CHUNKS_MAX // 4 <= fits < len(chain)
    assert fetch(agents, r, chain, ask(SPACE)) == [Fate.LANDED] * fits
    assert right(agents, r, SPACE, chain[:fits])


def test_those_who_watch_are_told_one_after_the_other(agents: LocalAgents) -> None:
    """Each may begin a fetch that ends at once: with hundreds of them the stack would not hold."""
    r = reader(agents, {})
    told: list[int] = []
    inside = False

    def watch(number: int) -> None:
        nonlocal inside
        assert not inside
        inside = True
        told.append(number)
        if number < 1000:
            r.fetcher._told.append(lambda: watch(number + 1))
        r.fetcher.tell()
        inside = False

    agents.do(lambda: r.fetcher._told.append(lambda: watch(0)))
    agents.do(r.fetcher.tell)
    assert told == list(range(1001))
