"""Agent processes for benchmarks: started like a user would, ended with the block."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

import kvmesh

JOIN_TIMEOUT_S = 30.0


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
def agents(names: Sequence[str], *, memory: str) -> Iterator[list[kvmesh.Mesh]]:
    """Agents on this host that know each other, and a client of each."""
    folder = Path(tempfile.mkdtemp(prefix="kvmesh-bench-"))
    processes: list[subprocess.Popen[str]] = []
    meshes: list[kvmesh.Mesh] = []
    try:
        joins: list[str] = []
        for name in names:
            socket = folder / f"{name}.sock"
            command = [sys.executable, "-m", "kvmesh.cli", "agent", "--json", "--name", name, "--mesh-port", "0"]
            command += ["--gossip-port", "0", "--state-dir", str(folder), "--socket", str(socket), "--memory", memory]
            command += ["--log-level", "error", *joins]
            process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            processes.append(process)
            assert process.stdout is not None
            ready = json.loads(process.stdout.readline())
            joins += ["--join", ready["gossip_address"]]
            meshes.append(kvmesh.connect(socket))
        _wait_for_each_other(meshes, set(names))
        yield meshes
    finally:
        for mesh in meshes:
            mesh.close()
        for process in processes:
            process.terminate()
            process.wait()
            if process.stdout is not None:
                process.stdout.close()
        shutil.rmtree(folder)


def _wait_for_each_other(meshes: Sequence[kvmesh.Mesh], names: set[str]) -> None:
    ends = time.monotonic() + JOIN_TIMEOUT_S
    for mesh in meshes:
        while {node["name"] for node in mesh.nodes()["nodes"]} != names:
            if time.monotonic() > ends:
                raise SystemExit("the agents did not find each other")
            time.sleep(0.05)
