"""The whole demo with a tiny random model: real agents, a controller and engines. What it shows, and that it leaves
nothing.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

import kvmesh.demo
from kvmesh.demo import document as texts
from tests.mesh.engine_support import save_tiny_model
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.model, pytest.mark.cluster, pytest.mark.slow]  # six processes, two of which import torch


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny-llama", texts.DOCUMENT + texts.NOTICE)


@pytest.fixture
def nothing_left(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """The demo's folder and children are gone after the test."""
    monkeypatch.setenv("TMPDIR", "/tmp")
    before = set(Path("/tmp").glob("kvmesh-demo-*"))
    yield
    assert set(Path("/tmp").glob("kvmesh-demo-*")) <= before
    assert not psutil.Process().children(recursive=True)


@pytest.mark.usefixtures("nothing_left")
def test_the_figures_are_complete_and_say_that_it_worked(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert kvmesh.demo.run(json=True, model=str(tiny)) == 0
    figures = json.loads(capsys.readouterr().out)
    assert list(figures)[:9] == [
        "model",
        "prompt_tokens",
        "ttft_cold_s",
        "ttft_mesh_s",
        "ttft_local_s",
        "tokens_reused",
        "bytes_moved",
        "answers_equal",
        "survived_kill",
    ]
    assert figures["model"] == "tiny-llama"
    assert figures["prompt_tokens"] > 1500
    assert figures["answers_equal"] is True
    assert figures["survived_kill"] is True
    assert figures["mesh_errors"] == []
    assert {node["name"] for node in figures["map"]["nodes"]} >= {"A", "B", "C"}


def command(tiny: Path, *flags: str) -> list[str]:
    return [sys.executable, "-m", "kvmesh.cli", "demo", "--model", str(tiny), *flags]


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_everything(tiny: Path, number: signal.Signals) -> None:
    with subprocess.Popen(command(tiny), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as demo:
        family = wait_until(lambda: _family(demo.pid, at_least=6), 30.0, "the demo's processes run")
        demo.send_signal(number)
        out, errors = demo.communicate(timeout=30)
    assert demo.returncode == 128 + number, errors
    assert "Traceback" not in out + errors
    assert not any(process.is_running() for process in family)


def test_the_children_of_a_killed_demo_end_by_themselves(tiny: Path, tmp_path: Path) -> None:
    # Its temporary folder stays: nobody is left to remove it. So it gets one that the test removes.
    with subprocess.Popen(
        command(tiny), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ | {"TMPDIR": str(tmp_path)}
    ) as demo:
        family = wait_until(lambda: _family(demo.pid, at_least=6), 30.0, "the demo's processes run")
        demo.kill()
    wait_until(lambda: not any(process.is_running() for process in family), 30.0, "all of them have ended")


def _family(pid: int, *, at_least: int) -> list[psutil.Process]:
    """The demo's children, once there are enough and all of them have become what they are to be."""
    children = psutil.Process(pid).children()
    tied = [child for child in children if "kvmesh.demo.child" not in child.cmdline()]
    return tied if len(tied) >= at_least else []
