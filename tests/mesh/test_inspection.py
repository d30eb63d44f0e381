"""Bytes that change in the arena: nobody gets to see them, and the copy is taken out."""

from __future__ import annotations

import logging

import pytest
import torch

import kvmesh
from kvmesh.agent import Agent
from tests.support.agents import LocalAgents

SPACE = kvmesh.Namespace(model="m", revision="r", dtype="float32", layers=2, kv_heads=2, head_dim=16, chunk_tokens=16)
CHAIN = SPACE.chain(list(range(48)))


def put(mesh: kvmesh.Mesh) -> None:
    mesh.put(SPACE, {key: torch.full((2, 2, 2, 16, 16), float(number)) for number, key in enumerate(CHAIN)})


def flip(agents: LocalAgents, agent: Agent, number: int, byte: int = 5, bit: int = 3) -> None:
    """Change one bit of a held chunk, as memory may."""

    def change() -> None:
        chunk = agent.store.get(CHAIN[number])
        assert chunk is not None
        agent.arena.view(chunk.offset, chunk.size_bytes)[byte] ^= 1 << bit

    agents.do(change)


def test_a_client_does_not_see_bytes_that_changed_and_the_copy_is_taken_out(
    agents: LocalAgents, caplog: pytest.LogCaptureFixture
) -> None:
    a = agents.start("a")
    mesh = agents.mesh("a")
    put(mesh)
    flip(agents, a, 1)
    with mesh.get(SPACE, CHAIN) as hit:
        assert hit.count == 3
        assert hit[0].sum() == 0
        with pytest.raises(kvmesh.CorruptChunkError, match="chunk 1 of this hit"):
            hit[1]
        assert hit[2].sum() == 2 * hit[2].numel()
    with caplog.at_level(logging.ERROR):
        agents.wait_for(lambda: a.store.get(CHAIN[1]) is None)
    agents.wait_for(lambda: a.store.stats().leases == 0)
    stats = mesh.stats()
    assert (stats["store"]["corrupt"], stats["inspection"]["corrupt"]) == (1, 1)
    assert stats["store"]["quarantined_bytes"] == SPACE.chunk_bytes
    with mesh.get(SPACE, CHAIN) as hit:
        assert (hit.count, hit.reason) == (1, "miss")


def test_iteration_gives_what_stands_before_the_change(agents: LocalAgents) -> None:
    a = agents.start("a")
    mesh = agents.mesh("a")
    put(mesh)
    flip(agents, a, 2)
    with mesh.get(SPACE, CHAIN) as hit:
        views = iter(hit)
        assert [next(views).sum() for _ in range(2)] == [0, hit[1].numel()]
        with pytest.raises(kvmesh.CorruptChunkError):
            next(views)


def test_a_suspicion_alone_takes_nothing_out(agents: LocalAgents) -> None:
    a = agents.start("a")
    put(agents.mesh("a"))
    agents.do(lambda: a.inspector.suspect(CHAIN[0]))
    agents.do(lambda: a.inspector.suspect(b"?" * 32))
    agents.wait_for(lambda: a.inspector.counts["sound"] == 1)
    assert a.inspector.counts["suspected"] == 2
    assert a.store.get(CHAIN[0]) is not None


def test_the_line_of_suspicions_is_bounded(agents: LocalAgents, monkeypatch: pytest.MonkeyPatch) -> None:
    a = agents.start("a")
    put(agents.mesh("a"))
    monkeypatch.setattr("kvmesh.inspection.SUSPECTS_MAX", 2)
    agents.do(lambda: [a.inspector.suspect(key) for key in (*CHAIN, CHAIN[0])])
    agents.wait_for(lambda: a.inspector.counts["sound"] == 2)
    agents.wait_for(lambda: a.inspector._task is None)
    assert a.inspector.counts == {"suspected": 4, "sound": 2}


def test_who_does_not_verify_sees_what_is_there(agents: LocalAgents) -> None:
    a = agents.start("a")
    mesh = agents.mesh("a")
    put(mesh)
    flip(agents, a, 0, bit=0)
    with mesh.get(SPACE, CHAIN, verify=False) as hit:
        assert not torch.equal(hit[0], torch.zeros(2, 2, 2, 16, 16))


def test_after_an_inspection_there_is_a_rest_and_closing_does_not_wait_for_it(
    agents: LocalAgents, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = agents.start("a")
    put(agents.mesh("a"))
    monkeypatch.setattr("kvmesh.inspection.INSPECTION_REST", 1e9)
    agents.do(lambda: [a.inspector.suspect(key) for key in CHAIN])
    agents.wait_for(lambda: a.inspector.counts["sound"] == 1)
    agents.do(lambda: None)
    assert a.inspector.counts["sound"] == 1, "the second one waits"
    agents.run(a.inspector.close())
    assert a.inspector._task is None
    assert a.inspector.counts["sound"] == 1
