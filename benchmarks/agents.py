"""Agent processes for benchmarks: started like a user would, ended with the block."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

import kvmesh

JOIN_TIMEOUT_S = 60.0
"""Thirty agents on two cores need a while."""
KNOWN_TIMEOUT_S = 30.0
ZMQ_ONLY = "zmq"
"""`--transports`: what goes over TCP even between two agents of one host."""


@dataclass(frozen=True, slots=True)
class Agent:
    """One agent process, and a client of it."""

    name: str
    mesh: kvmesh.Mesh
    pid: int


def space(chunk_bytes: int) -> kvmesh.Namespace:
    """A namespace whose chunks have `chunk_bytes` bytes (a multiple of 4 KiB)."""
    return kvmesh.Namespace(
        model="benchmark", revision="1", dtype="float32", layers=chunk_bytes // 4096, kv_heads=2, head_dim=16,
        chunk_tokens=16,
    )  # fmt: skip


def chunks(of: kvmesh.Namespace, count: int, first: int = 0) -> dict[bytes, torch.Tensor]:
    """`count` chunks with their keys; `first` makes another chain."""
    chain = of.chain(range_of(first, count * of.chunk_tokens))
    shape = next(iter(of.tensors.values())).shape
    return {key: torch.rand(shape) for key in chain}


def range_of(first: int, count: int) -> list[int]:
    """Token ids that start at `first`."""
    return list(range(first, first + count))


@contextmanager
def agents(
    names: Sequence[str], *, memory: str, transports: str | None = None, mesh_ports: Mapping[str, tuple[int, int]] = {}
) -> Iterator[list[Agent]]:
    """Agents on this host that know each other, and a client of each.

    `transports` is the flag's value. `mesh_ports` has, by name, the port that an agent listens on and the one that it
    tells others, where something stands in between.
    """
    folder = Path(tempfile.mkdtemp(prefix="kvmesh-bench-"))
    processes: list[subprocess.Popen[str]] = []
    started: list[Agent] = []
    try:
        joins: list[str] = []
        for name in names:
            socket = folder / f"{name}.sock"
            own, told = mesh_ports.get(name, (0, 0))
            command = [sys.executable, "-m", "kvmesh.cli", "agent", "--json", "--name", name, "--mesh-port", str(own)]
            command += ["--gossip-port", "0", "--state-dir", str(folder), "--socket", str(socket), "--memory", memory]
            command += ["--log-level", "error", *joins]
            command += ["--transports", transports] if transports else []
            command += ["--advertise-mesh-port", str(told)] if told else []
            process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            processes.append(process)
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                raise RuntimeError(f"agent {name} did not start: {' '.join(command)}")
            ready = json.loads(line)
            joins = joins or ["--join", ready["gossip_address"]]
            started.append(Agent(name, kvmesh.connect(socket), process.pid))
        _wait_for_each_other(started, set(names))
        yield started
    finally:
        for agent in started:
            agent.mesh.close()
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait()
            if process.stdout is not None:
                process.stdout.close()
        shutil.rmtree(folder)


def wait_until_known(at: kvmesh.Mesh, chain: Sequence[bytes], *, holders: int = 1) -> None:
    """Until the agent behind `at` knows that so many nodes hold all of `chain`."""
    ends = time.monotonic() + KNOWN_TIMEOUT_S
    while sum(one["run_chunks"] >= len(chain) for one in at.locate(chain)["holders"]) < holders:
        if time.monotonic() > ends:
            raise TimeoutError(f"agent {at.node} did not hear that its peers hold {len(chain)} chunks")
        time.sleep(0.02)


def _wait_for_each_other(started: Sequence[Agent], names: set[str]) -> None:
    ends = time.monotonic() + JOIN_TIMEOUT_S
    for agent in started:
        while {node["name"] for node in agent.mesh.nodes()["nodes"]} != names:
            if time.monotonic() > ends:
                raise TimeoutError("the agents did not find each other")
            time.sleep(0.05)
