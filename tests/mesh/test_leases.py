"""Leases of clients by time: who renews keeps them, who does not loses them, and finds out before it uses a byte."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import torch

import kvmesh
from kvmesh.leases import Grants
from kvmesh.renewing import Renewals
from kvmesh.store import Store
from kvmesh.transport.limits import LEASE_S_MAX, LEASE_S_MIN
from tests.support.agents import LocalAgents
from tests.support.chunks import pair
from tests.support.waiting import wait_until

PAGE = 4096
SPACE = kvmesh.Namespace(model="m", revision="r", dtype="float32", layers=2, kv_heads=2, head_dim=16, chunk_tokens=16)
CHAIN = SPACE.chain(list(range(48)))


# --- the agent's side ------------------------------------------------------------------------------------------------
def store_with_a_chunk() -> Store:
    store = Store(4 * PAGE, on_admit=lambda _: None, on_evict=lambda _: None)
    store.add_owner("writer")
    assert store.reserve("writer", b"k" * 32, b"s" * 16, PAGE) >= 0
    assert store.commit("writer", b"k" * 32, 7) is not None
    return store


def test_a_grant_that_nobody_renews_ends() -> None:
    store = store_with_a_chunk()
    grants = Grants(store)
    grant = grants.open(1, 5, 10.0, now=100.0)
    assert store.lease(grant, b"k" * 32, 100.0) is not None
    assert grants.expire(109.9) == 0
    assert grants.renew(1, 5, 109.9)
    assert grants.expire(119.8) == 0
    assert grants.expire(119.9) == 1
    assert (store.stats().leases, len(grants), grants.expired) == (0, 0, 1)
    assert not grants.renew(1, 5, 119.9)


def test_a_grant_is_not_renewed_after_its_time_even_when_nobody_has_looked_yet() -> None:
    store = store_with_a_chunk()
    grants = Grants(store)
    grant = grants.open(1, 5, 10.0, now=0.0)
    store.lease(grant, b"k" * 32, 0.0)
    assert not grants.renew(1, 5, 10.0)
    assert store.stats().leases == 0


def test_a_session_that_goes_takes_its_grants_with_it_and_no_other() -> None:
    grants = Grants(store_with_a_chunk())
    for session, get in [(1, 1), (1, 2), (2, 1)]:
        grants.open(session, get, 10.0, now=0.0)
    grants.end_session(1)
    grants.end_session(1)
    assert (grants.count(1), grants.count(2), len(grants)) == (0, 1, 1)
    grants.end(2, 1)
    assert len(grants) == 0


@pytest.mark.parametrize(
    ("asked", "given"),
    [(-1.0, LEASE_S_MIN), (float("nan"), LEASE_S_MIN), (1e9, LEASE_S_MAX), (float("inf"), LEASE_S_MAX)],
)
def test_whatever_a_client_asks_for_a_grant_ends(asked: float, given: float) -> None:
    grants = Grants(store_with_a_chunk())
    assert grants.open(1, 1, asked, now=0.0).lease_s == given
    assert grants.expire(given) == 1


# --- the client's side -----------------------------------------------------------------------------------------------
class Leased:
    """Leases that note what they are told."""

    def __init__(self, epoch: int = 1) -> None:
        self.epoch, self.session, self.get = epoch, 3, 4
        self.begun = True
        self.told: list[float] = []

    def last_until(self, expires_s: float) -> None:
        self.told.append(expires_s)


def test_leases_are_renewed_until_they_are_of_no_use_and_then_the_thread_ends() -> None:
    asked: list[list[tuple[int, int]]] = []
    ended = threading.Event()

    def exchange(gets: list[tuple[int, int]]) -> tuple[int, list[bool]]:
        asked.append(gets)
        return 1, [True] * len(gets)

    renewals = Renewals(0.03, exchange, ended.set)
    leases = Leased()
    before = time.monotonic()
    renewals.add(leases)
    wait_until(lambda: len(leases.told) >= 2, 10, "the leases are renewed twice")
    assert asked[0] == [(3, 4)]
    assert all(until > before + 0.03 for until in leases.told)
    renewals.discard(leases)
    assert ended.wait(10), "without leases the thread ends"
    renewals.add(leases)
    told = len(leases.told)
    wait_until(lambda: len(leases.told) > told, 10, "it starts again with the next lease")
    renewals.discard(leases)
    renewals.close()


@pytest.mark.parametrize(
    ("answer", "told"),
    [((1, [False]), [0.0]), ((2, [False]), [float("inf")]), (None, [])],
    ids=["over", "an agent that started again", "no answer"],
)
def test_what_an_answer_means(answer: tuple[int, list[bool]] | None, told: list[float]) -> None:
    asked = threading.Event()

    def exchange(_: list[tuple[int, int]]) -> tuple[int, list[bool]] | None:
        asked.set()
        return answer

    renewals = Renewals(0.03, exchange, lambda: None)
    leases = Leased()
    renewals.add(leases)
    assert asked.wait(10)
    wait_until(lambda: len(leases.told) >= len(told), 10, "the leases are told")
    renewals.discard(leases)
    renewals.close()
    assert leases.told[:1] == told


# --- both ------------------------------------------------------------------------------------------------------------
def put(mesh: kvmesh.Mesh) -> None:
    mesh.put(SPACE, {key: torch.full((2, 2, 2, 16, 16), float(number)) for number, key in enumerate(CHAIN)})


def test_a_client_that_lives_keeps_its_leases_beyond_their_time(agents: LocalAgents) -> None:
    a = agents.start("a")
    with kvmesh.connect(agents.directory / "a.sock", lease_s=0.15) as mesh:
        put(mesh)
        with mesh.get(SPACE, CHAIN) as hit:
            first = agents.do(lambda: a.grants.of(hit._leases.session)[0].expires_s)
            wait_until(lambda: a.grants.of(hit._leases.session)[0].expires_s > first + 0.2, 10, "it was renewed often")
            agents.do(lambda: a.grants.expire(time.monotonic()))
            assert hit[2].sum() == 2 * hit[2].numel()
        agents.wait_for(lambda: a.store.stats().leases == 0)
        assert agents.do(lambda: len(a.grants)) == 0


def test_a_client_that_was_stopped_finds_out_before_it_uses_a_byte(
    agents: LocalAgents, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = agents.start("a")
    monkeypatch.setattr(Renewals, "add", lambda *_: None)  # as if this process did not run
    with kvmesh.connect(agents.directory / "a.sock", lease_s=0.1) as mesh:
        put(mesh)
        hit = mesh.get(SPACE, CHAIN)
        assert hit.count == 3
        agents.wait_for(lambda: a.grants.expire(time.monotonic()) == 1)
        with pytest.raises(kvmesh.LeaseError, match="ran out"):
            hit[0]
        with pytest.raises(LookupError), hit:
            raise LookupError  # an exception of the caller's own is not hidden
        assert agents.do(a.store.stats).leases == 0
        hit = mesh.get(SPACE, CHAIN)
        copied = [view.clone() for view in hit]
        agents.wait_for(lambda: a.grants.expire(time.monotonic()) == 1)
        with pytest.raises(kvmesh.LeaseError, match="throw away"), hit:
            pass
        assert len(copied) == 3
        assert mesh.get(SPACE, CHAIN).count == 3, "the connection is in order: a late release means nothing"


def test_a_live_view_keeps_its_lease_after_the_mesh_was_closed(agents: LocalAgents) -> None:
    a = agents.start("a")
    mesh = kvmesh.connect(agents.directory / "a.sock", lease_s=0.1)
    put(mesh)
    with mesh.get(SPACE, CHAIN) as hit:
        view = hit[1]
    mesh.close()
    session = hit._leases.session
    first = agents.do(lambda: a.grants.of(session)[0].expires_s)
    wait_until(lambda: a.grants.of(session)[0].expires_s > first + 0.1, 10, "the view's lease was renewed")
    assert view.sum() == view.numel()
    del view
    agents.wait_for(lambda: a.store.stats().leases == 0)
    wait_until(lambda: mesh._renewals._thread is None, 10, "the thread has ended")


@pytest.mark.parametrize("lease_s", [0.0, -1.0, float("nan"), LEASE_S_MAX * 2])
def test_a_lease_must_last_some_time_and_not_for_ever(agents: LocalAgents, lease_s: float) -> None:
    with pytest.raises(kvmesh.KVMeshError, match="lease_s"):
        kvmesh.connect(agents.directory / "a.sock", lease_s=lease_s)


def test_a_get_that_the_agent_has_not_heard_of_yet_is_not_over(
    agents: LocalAgents, monkeypatch: pytest.MonkeyPatch
) -> None:
    agents.start("a")
    add = Renewals.add

    def at_once(renewals: Renewals, leases: Any) -> None:
        """As if the renewing thread had its turn before the request is sent."""
        add(renewals, leases)
        renewals._renew([leases])

    monkeypatch.setattr(Renewals, "add", at_once)
    with agents.mesh("a") as mesh:
        put(mesh)
        with mesh.get(SPACE, CHAIN) as hit:
            assert hit[2].sum() == 2 * hit[2].numel()


def test_leases_that_ran_out_are_said_beside_another_failure_of_the_mesh(
    agents: LocalAgents, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else an engine would use what it copied before, and some of that may be of another chunk."""
    a = agents.start("a")
    monkeypatch.setattr(Renewals, "add", lambda *_: None)  # as if this process did not run
    with kvmesh.connect(agents.directory / "a.sock", lease_s=0.05) as mesh:
        put(mesh)
        hit = mesh.get(SPACE, CHAIN)
        assert hit.count == 3
        agents.wait_for(lambda: a.grants.expire(time.monotonic()) == 1)
        with pytest.raises(kvmesh.LeaseError, match="throw away"), hit:
            raise kvmesh.AgentUnavailableError("went away")


def test_a_grant_that_ends_while_its_get_still_fetches_ends_the_hit(
    agents: LocalAgents, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, b = pair(agents)
    put(agents.mesh("a"))
    agents.wait(b, lambda: b.node.discovery.map.has("a", CHAIN[-1]))
    agents.do(lambda: agents.network.stall("a"))
    monkeypatch.setattr(Renewals, "add", lambda *_: None)  # as if this process did not run
    with kvmesh.connect(agents.directory / "b.sock", lease_s=0.05) as mesh:
        hit = mesh.get(SPACE, CHAIN, deadline_s=20)
        agents.wait_for(lambda: b.grants.expire(time.monotonic()) == 1)
        agents.do(lambda: agents.network.resume("a"))
        assert (hit.count, hit.reason) == (0, "miss")
        hit.close()
    stats = b.store.stats
    agents.wait_for(lambda: (stats().leases, stats().reserved_chunks) == (0, 0) and stats().chunks > 0)
    assert agents.do(lambda: len(b.grants)) == 0
