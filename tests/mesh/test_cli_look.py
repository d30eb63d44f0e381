"""``kvmesh nodes``, ``map`` and ``locate``, on fixed documents."""

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from kvmesh.cli import look, reach
from kvmesh.transport.errors import AgentUnavailableError, SettingsError
from tests.mesh.cli_fakes import SPACE, Cli, FakeView

KEY = "ab" * 32
NODE: dict[str, Any] = {
    "name": "inference-node-eu-17.example", "role": "controller", "state": "suspect", "address": "127.0.0.1:41235",
    "epoch": 1795516800123, "seq": 2, "chunks": 12345, "bytes": 123 << 30, "rtt_s": 0.00031, "head_age_s": 0.4,
    "up_s": 7300.0,
    "meta": {"host": "h", "gpus": "8xH100", "cpus": "96", "memory_bytes": str(2048 << 30)},
}  # fmt: skip
PLAIN = {**NODE, "name": "n2", "rtt_s": None, "head_age_s": None, "up_s": None, "meta": {"cpus": "many"}}
NODES = {"nodes": [NODE, PLAIN]}
MAP = {
    "complete": False,
    "entries": 12345,
    "namespaces": [
        {"id": "0" * 32, "model": "SmolLM2-135M", "dtype": "bfloat16", "layout": "torch", "shard": [0, 2],
         "chunks": 12345, "bytes": 1 << 30},
        {"id": "1" * 32, "chunks": 1, "bytes": 1},
    ],
    "nodes": [
        {"name": "n1", "chunks": 12345, "bytes": 1 << 30, "tiers": {"ram": 12345}},
        {"name": "n2", "chunks": 3, "bytes": 1, "tiers": {"disk": 3}},
    ],
}  # fmt: skip
FOUND = {"chunks": 6, "holders": [{"node": "n1", "run_chunks": 5, "tier": "ram"}]}


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    return Cli(capsys, monkeypatch)


def test_names_that_two_processes_use_are_said_beside_the_table(cli: Cli):
    conflict = {"name": "n2", "address": "127.0.0.1:1", "other_address": "127.0.0.1:2"}
    cli.answer(FakeView({"nodes": {**NODES, "conflicts": [conflict]}}))
    ran = cli("nodes")
    assert ran.code == 0
    assert "n2" in ran.out
    assert "two processes were called n2: at 127.0.0.1:1 and at 127.0.0.1:2" in ran.err


@pytest.mark.parametrize(
    ("command", "document"), [(["nodes"], NODES), (["map"], MAP), (["locate", "--key", KEY], FOUND)]
)
def test_json_is_the_document(cli: Cli, command: list[str], document: dict[str, Any]):
    view = FakeView({command[0]: document})
    cli.answer(view)
    ran = cli(*command, "--json")
    assert (ran.code, json.loads(ran.out), ran.err) == (0, document, "")
    assert view.asked[-1] == "closed"


def test_nodes_at_120_columns(cli: Cli):
    cli.answer(FakeView({"nodes": NODES}))
    ran = cli("nodes", env={"COLUMNS": "120"})
    assert ran.code == 0
    for text in ("127.0.0.1:41235", "suspect", "12,345", "123.0 GiB", "0.4s", "0.31 ms", "1795516800123"):
        assert text in ran.out
    assert max(map(len, ran.out.splitlines())) <= 120


def test_nodes_at_80_columns(cli: Cli):
    cli.answer(FakeView({"nodes": NODES}))
    out = cli("nodes", env={"COLUMNS": "80"}).out
    assert max(map(len, out.splitlines())) <= 80
    for text in ("controller", "suspect", "127.0.0.1:41235", "12,345", "123.0 GiB", "0.31 ms"):
        assert text in out
    assert not {"host", "epoch", "up", "head"} & set(out.splitlines()[0].split())


def test_nodes_with_short_names_have_the_age_of_the_head_at_80_columns(cli: Cli):
    serf = {**PLAIN, "name": "s1", "role": "serf", "epoch": 0, "meta": {"dc": "x"}}
    cli.answer(FakeView({"nodes": {"nodes": [{**NODE, "name": "n1"}, serf]}}))
    header, first, second = cli("nodes", env={"COLUMNS": "80"}).out.splitlines()
    assert header.split() == ["name", "role", "state", "address", "chunks", "bytes", "head", "rtt"]
    assert first.split()[-3:] == ["0.4s", "0.31", "ms"]
    assert second.split()[:2] == ["s1", "serf"]
    assert second.split()[-2:] == ["-", "-"]


def test_a_pipe_gets_every_column_in_one_line(cli: Cli):
    cli.answer(FakeView({"nodes": NODES}))
    header, first, second = cli("nodes").out.splitlines()
    titles = ["name", "role", "state", "address", "epoch", "up", "chunks", "bytes", "head", "rtt", "host"]
    assert header.split() == titles
    assert first.startswith("inference-node-eu-17.example")
    assert first.endswith("8xH100, 96 cpus, 2.0 TiB")
    assert second.split()[-3:] == ["-", "-", "-"]


def test_rows_keep_their_places_whatever_order_the_members_have(cli: Cli):
    own, others = {**PLAIN, "name": "z"}, [{**PLAIN, "name": name} for name in ("c", "a", "b")]
    cli.answer(FakeView({"nodes": {"nodes": [own, *others]}}))
    assert [line.split()[0] for line in cli("nodes").out.splitlines()[1:]] == ["z", "a", "b", "c"]
    assert [node["name"] for node in json.loads(cli("nodes", "--json").out)["nodes"]] == ["z", "a", "b", "c"]


def test_no_nodes_is_nothing_found(cli: Cli):
    cli.answer(FakeView({"nodes": {"nodes": []}}))
    assert cli("nodes").code == 1


def test_the_map(cli: Cli):
    cli.answer(FakeView({"map": MAP}))
    for columns in (80, 120):
        out = cli("map", env={"COLUMNS": str(columns)}).out
        assert max(map(len, out.splitlines())) <= columns
        assert out.startswith("12,345 entries on 2 nodes; the map is not complete yet")
        for text in ("0" * 12, "SmolLM2-135M", "disk", "ram", "1.0 GiB"):
            assert text in out
    assert "0/2" in out


def test_an_empty_map_is_an_answer(cli: Cli):
    cli.answer(FakeView({"map": {"complete": True, "entries": 0, "namespaces": [], "nodes": []}}))
    ran = cli("map")
    assert (ran.code, ran.out) == (0, "0 entries on 0 nodes; the map is complete\n")


def test_locate(cli: Cli, tmp_path: Path):
    view = FakeView({"locate": FOUND})
    cli.answer(view)
    (tmp_path / "s.json").write_text(json.dumps(SPACE))
    (tmp_path / "t.json").write_text(json.dumps(list(range(48))))
    ran = cli("locate", "--tokens", tmp_path / "t.json", "--space", tmp_path / "s.json")
    assert (ran.code, ran.out.splitlines()[1].split()) == (0, ["n1", "5", "6", "ram"])
    assert len(view.asked[1]) == 6


def test_locate_of_what_nobody_has(cli: Cli):
    cli.answer(FakeView({"locate": {"chunks": 2, "holders": []}}))
    ran = cli("locate", "--key", KEY, "--key", KEY)
    assert (ran.code, ran.out) == (1, "")
    assert ran.err == "kvmesh: no node is known to hold the first chunk of 2\n"


def test_who_is_asked(cli: Cli):
    view = FakeView({"nodes": NODES})
    cli.answer(view)
    cli("nodes", "--agent", "/a.sock")
    cli("nodes", "--controller", "c1:7950")
    assert [asked for asked in view.asked if asked != "closed"] == [(Path("/a.sock"), None), (None, "c1:7950")]


def test_one_asks_one():
    with pytest.raises(SettingsError, match="exclude each other"):
        reach.view(Path("/a.sock"), "c1:7950")
    with pytest.raises(SettingsError, match="--controller 'c1' is not an address"):
        reach.view(None, "c1")


def test_watching_follows_and_survives_an_agent_that_restarts(cli: Cli, monkeypatch: pytest.MonkeyPatch):
    conflict = {"name": "n3", "address": "127.0.0.1:1", "other_address": "127.0.0.1:2"}
    last = {"nodes": [{**PLAIN, "name": "n3"}], "conflicts": [conflict]}
    answers = [NODES, AgentUnavailableError("it is gone"), last]
    view = FakeView({"nodes": answers[0]})
    cli.answer(view)
    screen = Console(force_terminal=True, width=120, record=True, color_system=None)
    monkeypatch.setattr(look, "console", lambda: screen)

    def next_second(seconds: float) -> None:
        del answers[0]
        if not answers:
            raise KeyboardInterrupt
        view.documents = {"nodes": answers[0]}

    monkeypatch.setattr(look, "_pause", next_second)
    ran = cli("nodes", "--watch")
    assert (ran.code, ran.err) == (0, "")
    shown = screen.export_text()
    assert "inference-node" in shown
    assert "it is gone" in shown
    assert "n3" in shown
    assert "two processes were called n3: at 127.0.0.1:1 and at 127.0.0.1:2" in shown


def test_watching_needs_a_terminal(cli: Cli):
    cli.answer(FakeView({"nodes": NODES}))
    assert "draws on a terminal" in cli("nodes", "--watch").err
    assert "exclude each other" in cli("nodes", "--watch", "--json").err
