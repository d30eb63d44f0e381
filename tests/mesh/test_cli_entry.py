"""From arguments to exit codes: help, version, sentences for errors, and silence for a closed pipe."""

import json
import os
import subprocess
import sys

import pytest

from kvmesh.cli import entry
from kvmesh.transport.errors import AgentUnavailableError
from tests.mesh.cli_fakes import Cli, FakeView

COMMANDS = [
    "agent", "controller", "nodes", "map", "locate", "keys", "put", "get", "pin", "unpin", "evict", "keygen", "doctor",
    "demo", "bench",
]  # fmt: skip


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    return Cli(capsys, monkeypatch)


@pytest.mark.slow  # a fresh interpreter
def test_help_imports_nothing_heavy():
    heavy = ("numpy", "torch", "zmq", "transformers", "asyncio", "msgspec", "psutil", "safetensors", "rich")
    program = (
        "import sys; from kvmesh.cli import main\n"
        f"code = [main(['--help']), *(main([name, '--help']) for name in {COMMANDS})]\n"
        f"sys.exit(','.join(name for name in {heavy} if name in sys.modules) or max(code))"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (ran.returncode, ran.stderr) == (0, "")


@pytest.mark.slow  # a fresh interpreter
def test_the_module_runs_and_a_closed_pipe_is_silent():
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "kvmesh.cli", "--help"]
    ran = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(write)
    assert (ran.returncode, ran.stderr) == (141, "")


def test_help_names_every_command_and_nothing_else(cli: Cli):
    ran = cli("--help")
    assert ran.code == 0
    listed = ran.out.split("Commands:")[1].split("Exit codes")[0]
    assert [line.split()[0] for line in listed.splitlines() if line.strip()] == COMMANDS
    assert "..." not in listed


def test_version(cli: Cli):
    ran = cli("--version")
    assert (ran.code, ran.out.split()[0]) == (0, "kvmesh")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_json(cli: Cli, command: str):
    ran = cli(command, "--help")
    assert ran.code == 0
    assert "--json" in ran.out


def test_no_command_shows_the_help_but_is_no_success(cli: Cli):
    ran = cli()
    assert (ran.code, ran.err) == (2, "")
    assert "Commands:" in ran.out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nope"], "No such command 'nope'"),
        (["node"], "Did you mean 'nodes'? See 'kvmesh --help'."),
        (["nodes", "--nope"], "No such option: --nope"),
        (["put"], "Missing argument 'FILE'. See 'kvmesh put --help'."),
        (["nodes", "extra"], "extra"),
    ],
)
def test_usage_errors_are_one_sentence(cli: Cli, arguments: list[str], sentence: str):
    ran = cli(*arguments)
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith("kvmesh: ")
    assert ran.err.count("\n") == 1
    assert sentence in ran.err


def test_an_error_of_the_mesh_is_its_sentence(cli: Cli):
    cli.answer(FakeView({"nodes": AgentUnavailableError("no agent at /x: start one with\n 'kvmesh agent'")}))
    for arguments in (["nodes"], ["nodes", "--json"]):
        ran = cli(*arguments)
        assert (ran.code, ran.out) == (2, "")
        assert ran.err == "kvmesh: no agent at /x: start one with 'kvmesh agent'\n"


def test_a_bug_is_one_line_and_a_traceback_on_request(cli: Cli):
    cli.answer(FakeView({}))
    ran = cli("nodes")
    assert (ran.code, ran.out) == (2, "")
    assert ran.err == (
        "kvmesh: unexpected KeyError: 'nodes'. This is a bug in kvmesh; KVMESH_DEBUG=1 shows where it happened.\n"
    )
    ran = cli("nodes", env={"KVMESH_DEBUG": "1"})
    assert ran.code == 2
    assert "Traceback" in ran.err


def test_interrupts_and_closed_pipes_are_silent(cli: Cli):
    cli.answer(FakeView({"nodes": KeyboardInterrupt(), "map": BrokenPipeError()}))
    for command, code in (("nodes", 130), ("map", 141)):
        ran = cli(command)
        assert (ran.code, ran.out, ran.err) == (code, "", "")


def test_an_error_is_reported_even_when_stderr_is_closed(monkeypatch: pytest.MonkeyPatch):
    def closed(*_: object, **__: object) -> None:
        raise BrokenPipeError

    monkeypatch.setattr(entry.typer, "echo", closed)
    assert entry.main(["nope"]) == 2


def test_json_is_one_document(cli: Cli):
    cli.answer(FakeView({"nodes": {"nodes": []}}))
    ran = cli("nodes", "--json")
    assert (ran.code, json.loads(ran.out)) == (1, {"nodes": []})
