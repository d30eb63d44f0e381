"""``kvmesh doctor`` and ``demo``: their tables, documents and exit codes."""

import json
import sys
from types import ModuleType
from typing import Any

import pytest

from kvmesh import doctor
from kvmesh.doctor import Finding
from tests.mesh.cli_fakes import Cli

FINDINGS = [
    Finding("python", "ok", "3.11.7"),
    Finding("locked memory", "note", "8 MiB may be locked: enough for TCP, too little for RDMA on the arena", "ulimit"),
    Finding("agent", "warning", "none runs: nothing is at /tmp/kvmesh-0/agent.sock", "start it: kvmesh agent"),
]
PROBLEM = Finding("shared memory", "problem", "memfd_create fails: Operation not permitted", "allow it")


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    return Cli(capsys, monkeypatch)


def test_what_the_doctor_says(cli: Cli, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor, "examine", lambda *_: FINDINGS)
    for columns in (80, 120):
        ran = cli("doctor", env={"COLUMNS": str(columns)})
        assert (ran.code, ran.err) == (0, "")
        assert max(map(len, ran.out.splitlines())) <= columns
        assert "start it: kvmesh agent" in ran.out
        assert ran.out.endswith("0 problems, 1 warning\n")
    ran = cli("doctor", "--json")
    document = json.loads(ran.out)
    assert (document["problems"], document["warnings"]) == (0, 1)
    assert document["findings"][0] == {"name": "python", "status": "ok", "what": "3.11.7", "advice": ""}


def test_a_problem_is_exit_code_1(cli: Cli, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor, "examine", lambda *_: [*FINDINGS, PROBLEM])
    assert cli("doctor").code == 1
    assert cli("doctor", "--json").code == 1
    monkeypatch.setattr(doctor, "examine", lambda *_: FINDINGS[:1])
    assert "what to do" not in cli("doctor").out


def test_the_doctor_is_told_what_the_agent_is_told(cli: Cli, monkeypatch: pytest.MonkeyPatch):
    told: list[Any] = []
    monkeypatch.setattr(doctor, "examine", lambda *arguments: told.append(arguments) or [])
    cli("doctor", "--mesh-port", "0", "--gossip-port", "7", env={"KVMESH_SOCKET": "/a.sock", "KVMESH_MEMORY": "1MiB"})
    ((socket, host, port, gossip_port, arena_bytes, _),) = told
    assert (str(socket), host, port, gossip_port, arena_bytes) == ("/a.sock", "127.0.0.1", 0, 7, 1 << 20)


def test_the_demo_decides_its_exit_code(cli: Cli, monkeypatch: pytest.MonkeyPatch):
    told: list[Any] = []
    demo = ModuleType("kvmesh.demo")
    demo.run = lambda **given: told.append(given) or 1  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "kvmesh.demo", demo)
    assert cli("demo", "--json", "--model", "/m").code == 1
    assert told == [{"json": True, "model": "/m"}]
