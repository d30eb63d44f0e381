"""Chunks for tests: a small namespace, tensors that a seed gives, and two agents that know each other."""

from __future__ import annotations

from collections.abc import Sequence

import torch

import kvmesh
from kvmesh.agent import Agent
from kvmesh.client import Mesh
from tests.support.agents import MIB, LocalAgents

SPACE = kvmesh.Namespace(model="m", revision="r", dtype="float32", layers=2, kv_heads=2, head_dim=16, chunk_tokens=16)


def chain_of(space: kvmesh.Namespace, count: int, first: int = 0) -> list[bytes]:
    return space.chain(range_of(first, count * space.chunk_tokens))


def range_of(first: int, count: int) -> list[int]:
    return list(range(first, first + count))


def tensor(space: kvmesh.Namespace, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(next(iter(space.tensors.values())).shape, generator=generator)


def put(mesh: Mesh, space: kvmesh.Namespace, chain: Sequence[bytes]) -> list[torch.Tensor]:
    tensors = [tensor(space, i) for i in range(len(chain))]
    assert mesh.put(space, dict(zip(chain, tensors, strict=True))).stored == len(chain)
    return tensors


def pair(agents: LocalAgents, *, memory: int = 16 * MIB) -> tuple[Agent, Agent]:
    a = agents.start("a", memory=memory)
    b = agents.start("b", memory=memory, join=("a",))
    agents.wait_alive(a, "b")
    agents.wait_alive(b, "a")
    return a, b


def leases(agent: Agent, agents: LocalAgents) -> int:
    return agents.do(agent.store.stats).leases
