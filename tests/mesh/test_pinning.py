"""Registering arenas with CUDA, against a stand-in for its runtime: there is no GPU here."""

from __future__ import annotations

import gc
import logging
from dataclasses import dataclass, field

import pytest
import torch

import kvmesh
from kvmesh import pinning, tensors
from kvmesh.arena import Arena
from tests.support.agents import LocalAgents

SPACE = kvmesh.Namespace(model="m", revision="r", dtype="float32", layers=1, kv_heads=1, head_dim=16, chunk_tokens=16)


@dataclass
class Cudart:
    """As much of CUDA's runtime as is used."""

    code: int = 0
    registered: dict[int, tuple[int, int]] = field(default_factory=dict)
    calls: int = 0

    def cudaHostRegister(self, address: int, size_bytes: int, flags: int) -> int:  # noqa: N802 - CUDA's name
        self.calls += 1
        if not self.code:
            self.registered[address] = (size_bytes, flags)
        return self.code

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802 - CUDA's name
        del self.registered[address]
        return 0


@pytest.fixture
def cudart(monkeypatch: pytest.MonkeyPatch) -> Cudart:
    runtime = Cudart()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    return runtime


@pytest.mark.parametrize(("writable", "flags"), [(True, 1), (False, 9)])
def test_an_arena_is_registered_once_and_until_its_end(cudart: Cudart, writable: bool, flags: int) -> None:
    arena = Arena.create(8192)
    assert pinning.pin(arena, writable=writable)
    assert pinning.pin(arena, writable=writable)
    assert cudart.registered == {arena.address: (8192, flags)}
    assert cudart.calls == 1
    arena.close()
    del arena
    gc.collect()
    assert cudart.registered == {}


def test_a_refusal_is_told_once_and_costs_nothing_else(cudart: Cudart, caplog: pytest.LogCaptureFixture) -> None:
    cudart.code = 2
    arena = Arena.create(4096)
    with caplog.at_level(logging.WARNING):
        assert not pinning.pin(arena, writable=True)
        assert not pinning.pin(arena, writable=True)
    assert caplog.text.count("cannot register the arena (error 2)") == 1
    arena.close()


def test_a_put_from_a_gpu_registers_the_arena_and_one_from_memory_does_not(
    agents: LocalAgents, cudart: Cudart, monkeypatch: pytest.MonkeyPatch
) -> None:
    agents.start("a")
    mesh = agents.mesh("a")
    chain = SPACE.chain(list(range(32)))
    mesh.put(SPACE, {chain[0]: torch.zeros(1, 2, 1, 16, 16)})
    assert cudart.calls == 0
    monkeypatch.setattr(tensors, "on_gpu", lambda _: True)
    mesh.put(SPACE, {chain[1]: torch.zeros(1, 2, 1, 16, 16)})
    assert [flags for _, flags in cudart.registered.values()] == [1]


def test_an_engine_on_a_gpu_has_its_hits_arena_registered(agents: LocalAgents, cudart: Cudart) -> None:
    agents.start("a")
    mesh = agents.mesh("a")
    assert mesh.pin_memory()
    assert sorted(flags for _, flags in cudart.registered.values()) == [1, 9]
