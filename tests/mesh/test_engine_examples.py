"""The examples of the engine and of plain tensors run as they are written, against a real agent."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mesh.engine_support import save_tiny_model
from tests.support.cluster import Cluster

pytestmark = [pytest.mark.cluster, pytest.mark.slow]  # starts an agent, and interpreters that import torch

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(socket: Path, name: str, *arguments: str) -> str:
    environment = os.environ | {"KVMESH_SOCKET": str(socket)}
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_put_get_finds_the_second_time_what_it_stored_the_first_time(tmp_path: Path) -> None:
    with Cluster(tmp_path) as cluster:
        agent = cluster.agent("a")
        first = run(agent.socket, "put_get.py")
        second = run(agent.socket, "put_get.py")
    assert "found 0 of 3 chunks" in first
    assert "stored 3 new chunks" in first
    assert "node a has 3 chunks" in first
    assert "found 3 of 3 chunks" in second


@pytest.mark.model
def test_transformers_generate_reuses_the_second_time(tmp_path: Path) -> None:
    words = "the mill grinds when the tide turns and the wheel goes round "
    folder = save_tiny_model(tmp_path / "model", words)
    with Cluster(tmp_path) as cluster:
        agent = cluster.agent("a")
        first, second = (run(agent.socket, "transformers_generate.py", str(folder), words * 50) for _ in range(2))
        nobody = run(tmp_path / "nobody.sock", "transformers_generate.py", str(folder), words * 50)
    assert "reused 0 of 600 tokens" in first
    assert "reused 512 of 600 tokens" in second
    assert first.splitlines()[0] == second.splitlines()[0]
    assert "without the mesh:" in nobody
    assert "kvmesh agent" in nobody
    assert nobody.splitlines()[0] == first.splitlines()[0]
