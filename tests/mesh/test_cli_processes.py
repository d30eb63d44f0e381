"""``kvmesh agent`` and ``controller``: where each setting comes from, and the line that says "ready"."""

import json
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from kvmesh.cli.processes import _announce
from kvmesh.settings import AgentSettings, ControllerSettings, NodeSettings
from tests.mesh.cli_fakes import Cli

Given = list[NodeSettings]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    return Cli(capsys, monkeypatch)


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> Iterator[Given]:
    """The settings that the processes were given; each says "ready" and ends."""
    found: Given = []

    def run(settings: NodeSettings, on_ready: Callable[[dict[str, Any]], None]) -> None:
        found.append(settings)
        facts = {"name": settings.name, "pid": 1, "epoch": 2, "mesh_address": "127.0.0.1:41235"}
        if isinstance(settings, AgentSettings):
            facts |= {"role": "agent", "socket": str(settings.socket), "memory_bytes": settings.memory_bytes}
        else:
            facts |= {"role": "controller"}
        on_ready(facts)

    for name in ("agent", "controller"):
        module = ModuleType(f"kvmesh.{name}")
        module.run = run  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, f"kvmesh.{name}", module)
    root = logging.getLogger()
    before = (root.handlers[:], root.level)
    yield found
    root.handlers[:], root.level = before


def test_flags_become_settings(cli: Cli, given: Given):
    ran = cli(
        "agent", "--name", "n1", "--bind", "localhost", "--mesh-port", "0", "--join", "n2:1", "--join", "n3:2,n4:3",
        "--memory", "1GiB", "--socket", "/tmp/n1.sock", "--log-level", "debug",
    )  # fmt: skip
    assert ran.code == 0
    assert given == [
        AgentSettings(
            name="n1", bind="localhost", mesh_port=0, join=("n2:1", "n3:2", "n4:3"), log_level="debug",
            memory_bytes=1 << 30, socket=Path("/tmp/n1.sock"),
        )
    ]  # fmt: skip
    assert cli("controller", "--name", "c1").code == 0
    assert given[1] == ControllerSettings("c1")


def test_defaults_are_those_of_the_settings(cli: Cli, given: Given):
    cli("agent")
    assert given == [AgentSettings()]
    cli("controller")
    assert given[1] == ControllerSettings(name=f"{AgentSettings().name}-controller")


def test_the_ready_line(cli: Cli, given: Given):
    ran = cli("agent", "--name", "n1", "--socket", "/tmp/n1.sock")
    assert ran.out == "agent n1 is ready: mesh 127.0.0.1:41235, socket /tmp/n1.sock, 4.0 GiB\n"
    assert cli("controller", "--name", "c1").out == "controller c1 is ready: mesh 127.0.0.1:41235\n"
    ran = cli("agent", "--name", "n1", "--json")
    assert ran.out.count("\n") == 1
    assert json.loads(ran.out)["mesh_address"] == "127.0.0.1:41235"


def test_the_ready_line_with_gossip(capsys: pytest.CaptureFixture[str]):
    facts = {"role": "controller", "name": "c1", "mesh_address": "127.0.0.1:1", "gossip_address": "127.0.0.1:2"}
    _announce(False)(facts)
    assert capsys.readouterr().out == "controller c1 is ready: mesh 127.0.0.1:1, gossip 127.0.0.1:2\n"


VALUES = [
    # name, the setting's field, then what a flag, a variable and the file say
    ("name", "name", ("f", "v", "t"), ("f", "v", "t")),
    ("bind", "bind", ("localhost", "::1", "127.0.0.1"), ("localhost", "::1", "127.0.0.1")),
    ("mesh-port", "mesh_port", (1, 2, 3), (1, 2, 3)),
    ("join", "join", ("f:1", "v:1 w:2", ["t:1", "u:2"]), (("f:1",), ("v:1", "w:2"), ("t:1", "u:2"))),
    ("log-level", "log_level", ("debug", "error", "warning"), ("debug", "error", "warning")),
    ("membership", "membership", ("gossip", "static", "gossip"), ("gossip", "static", "gossip")),
    ("gossip-port", "gossip_port", (0, 1, 2), (0, 1, 2)),
    ("advertise", "advertise", ("10.0.0.1", "10.0.0.2:2", "[fd00::3]:3"), ("10.0.0.1", "10.0.0.2:2", "[fd00::3]:3")),
    ("advertise-mesh-port", "advertise_mesh_port", (1, 2, 3), (1, 2, 3)),
    ("profile", "profile", ("wan", "local", "memberlist-lan"), ("wan", "local", "memberlist-lan")),
    ("label", "label", ("f", "v", "t"), ("f", "v", "t")),
    ("key-file", "key_file", ("/f", "/v", "/t"), (Path("/f"), Path("/v"), Path("/t"))),
    ("state-dir", "state_dir", ("/f", "/v", "/t"), (Path("/f"), Path("/v"), Path("/t"))),
    ("memory", "memory_bytes", ("1MiB", "2MiB", "3MiB"), (1 << 20, 2 << 20, 3 << 20)),
    ("socket", "socket", ("/f", "/v", "/t"), (Path("/f"), Path("/v"), Path("/t"))),
    ("transports", "transports", ("zmq", "shm", "nixl, shm"), (("zmq",), ("shm", "zmq"), ("nixl", "shm", "zmq"))),
]


@pytest.mark.parametrize(("name", "field", "said", "meant"), VALUES, ids=[value[0] for value in VALUES])
def test_a_flag_wins_over_a_variable_over_the_file(
    cli: Cli, given: Given, tmp_path: Path, name: str, field: str, said: tuple[Any, ...], meant: tuple[Any, ...]
):
    file = tmp_path / "kvmesh.toml"
    file.write_text(f"{name} = {json.dumps(said[2])}\n")
    cli("agent", "--config", file)
    variable = f"KVMESH_{name.replace('-', '_').upper()}"
    cli("agent", "--config", file, env={variable: str(said[1])})
    cli("agent", "--config", file, f"--{name}", said[0])
    assert [getattr(settings, field) for settings in given] == [meant[2], meant[1], meant[0]]


def test_one_file_for_an_agent_and_a_controller(cli: Cli, given: Given, tmp_path: Path):
    file = tmp_path / "kvmesh.toml"
    file.write_text(
        'mesh_port = 1\njoin = "n2:1"\nmemory = 1048576\n'
        '[agent]\nname = "n1"\nmesh-port = 2\n[controller]\nname = "c1"\nlog-level = "error"\n'
    )
    assert cli("agent", env={"KVMESH_CONFIG": str(file)}).code == 0
    assert cli("controller").code == 0
    agent, controller = given
    assert isinstance(agent, AgentSettings)
    assert (agent.name, agent.mesh_port, agent.join, agent.memory_bytes) == ("n1", 2, ("n2:1",), 1 << 20)
    assert (controller.name, controller.mesh_port, controller.join) == ("c1", 1, ("n2:1",))
    assert controller.log_level == "error"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("memroy = '1GiB'\nfoo = 1", "memroy, foo are not settings; the settings are name, bind, mesh-port"),
        ("[agent]\nnope = 1", "[agent] nope is not a setting"),
        ("[controller]\nmemory = '1GiB'", "[controller] memory is not a setting"),
        ("[router]\nname = 'r'", "router is not a setting"),
        ("[router]\nname = 'r'", "memory, socket, transports, and the tables [agent] and [controller]"),
        ("mesh-port = '80'", "mesh-port must be a whole number, not '80'"),
        ("mesh-port = true", "mesh-port must be a whole number, not True"),
        ("join = [1]", "join must be a list of texts or text, not [1]"),
        ("name = 3", "name must be text, not 3"),
        ("mesh-port = 1\nmesh_port = 2", "mesh_port is given twice"),
        ("name = ", "is not TOML"),
        ("mesh-port = 99999", "--mesh-port 99999: use a port from 1 to 65535"),
    ],
)
def test_mistakes_in_the_file_are_named(cli: Cli, given: Given, tmp_path: Path, text: str, sentence: str):
    file = tmp_path / "kvmesh.toml"
    file.write_text(text)
    ran = cli("agent", "--config", file)
    assert (ran.code, ran.out, given) == (2, "", [])
    assert sentence in ran.err
    assert ran.err.count("\n") == 1


def test_a_file_that_is_not_there(cli: Cli, given: Given, tmp_path: Path):
    ran = cli("agent", "--config", tmp_path / "none.toml")
    assert (ran.code, ran.err) == (2, f"kvmesh: cannot read --config {tmp_path}/none.toml: No such file or directory\n")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--mesh-port", "abc"], "--mesh-port abc: use a port"),
        (["--gossip-port", "abc"], "--gossip-port abc: use a port"),
        (["--memory", "lots"], "--memory 'lots' is not a size"),
        (["--bind", "0.0.0.0"], "loopback only"),
        (["--log-level", "loud"], "--log-level 'loud'"),
    ],
)
def test_mistakes_in_flags_are_named(cli: Cli, given: Given, arguments: list[str], sentence: str):
    ran = cli("agent", *arguments)
    assert (ran.code, ran.out, given) == (2, "", [])
    assert sentence in ran.err


def test_logs_go_to_stderr_at_the_level(cli: Cli, given: Given, capsys: pytest.CaptureFixture[str]):
    cli("agent", "--log-level", "warning")
    logging.getLogger("kvmesh.x").info("quiet")
    logging.getLogger("kvmesh.x").warning("loud")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.endswith(" WARNING kvmesh.x: loud\n")
    assert "quiet" not in captured.err
