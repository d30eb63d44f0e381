"""What the processes of a cluster test see, asked over their sockets, and chunks to be seen."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch

import kvmesh
from tests.support.cluster import Process
from tests.support.waiting import wait_until

SPACE = kvmesh.Namespace(model="m", revision="r", dtype="float32", layers=2, kv_heads=2, head_dim=16, chunk_tokens=16)
_FAILED = re.compile(r"(\S+) at \S+ does not answer: its chunks are forgotten")


def nodes(process: Process) -> dict[str, dict[str, Any]]:
    """What a process says of every node, by name."""
    with kvmesh.connect(process.socket) as mesh:
        return {node["name"]: node for node in mesh.nodes()["nodes"]}


def states(process: Process) -> dict[str, str]:
    """The state of every node, as a process sees it."""
    return {name: node["state"] for name, node in nodes(process).items()}


def wait_states(processes: Iterable[Process], wanted: dict[str, str], timeout_s: float) -> None:
    """Wait until all of the processes see these states, and no other nodes."""
    for process in processes:
        wait_until(lambda process=process: states(process) == wanted, timeout_s, f"{process.name} sees {wanted}")


def wait_alive(processes: Sequence[Process], timeout_s: float = 20) -> None:
    """Wait until they all see each other alive."""
    wait_states(processes, {process.name: "alive" for process in processes}, timeout_s)


def held(process: Process) -> dict[str, tuple[Any, ...]]:
    """By node: epoch, seq, fingerprint and bytes in the map of a process. It is empty while the map is not complete."""
    with kvmesh.connect(process.socket) as mesh:
        document = mesh.map()
    if not document["complete"]:
        return {}
    return {
        node["name"]: (node["epoch"], node["seq"], node["fingerprint"], node["bytes"]) for node in document["nodes"]
    }


def holders(process: Process, chain: list[bytes]) -> dict[str, int]:
    """By node, how much of the chain's front it has in the map of a process."""
    with kvmesh.connect(process.socket) as mesh:
        return {holder["node"]: holder["run_chunks"] for holder in mesh.locate(chain)["holders"]}


def chunks(seed: int, count: int) -> tuple[list[bytes], list[torch.Tensor]]:
    """A chain and its tensors: others for each seed."""
    chain = SPACE.chain(list(range(seed * 100_000, seed * 100_000 + count * SPACE.chunk_tokens)))
    generator = torch.Generator().manual_seed(seed)
    shape = next(iter(SPACE.tensors.values())).shape
    return chain, [torch.randn(shape, generator=generator) for _ in chain]


def put(process: Process, seed: int, count: int) -> list[bytes]:
    """Have a process hold the chain of a seed."""
    chain, tensors = chunks(seed, count)
    with kvmesh.connect(process.socket) as mesh:
        assert mesh.put(SPACE, dict(zip(chain, tensors, strict=True))).stored == count
    return chain


def get(process: Process, seed: int, count: int, deadline_s: float) -> int:
    """How many chunks of a seed's chain a process gives within the deadline; each of them is looked at."""
    chain, tensors = chunks(seed, count)
    with kvmesh.connect(process.socket) as mesh, mesh.get(SPACE, chain, deadline_s=deadline_s) as hit:
        found = list(hit)
        assert all(torch.equal(got, want) for got, want in zip(found, tensors, strict=False))
        count = hit.count
        del found
    return count


def declared_failed(process: Process) -> set[str]:
    """Everyone of whom the process has said, at any time, that it failed: its log forgets nothing."""
    return set(_FAILED.findall(process.log))
