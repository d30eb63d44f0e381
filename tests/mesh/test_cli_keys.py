"""``kvmesh keygen`` and ``kvmesh keys``."""

import io
import json
import stat
from pathlib import Path
from typing import Any

import pytest

from kvmesh.discovery.keying import KeysResult, NodeKeys
from kvmesh.discovery.wire.keyring import Keyring, fingerprint, from_text, to_text
from kvmesh.queries import keys_document
from tests.mesh.cli_fakes import Cli, FakeView

OLD, NEW = b"o" * 32, b"n" * 32
BOTH = (fingerprint(OLD), fingerprint(NEW))
NODES: dict[str, Any] = {"nodes": [{"name": "a", "state": "alive", "epoch": 1}]}


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    return Cli(capsys, monkeypatch)


def result(operation: Any, *nodes: NodeKeys, error: str = "") -> dict[str, Any]:
    return keys_document(KeysResult(operation, "" if operation == "list" else fingerprint(NEW), nodes, error))


def ok(name: str, *fingerprints: str) -> NodeKeys:
    return NodeKeys(name, "ok", "", fingerprints or BOTH)


def test_keygen_prints_a_new_key_each_time(cli: Cli):
    first, second = cli("keygen"), cli("keygen")
    assert (first.code, len(from_text(first.out)), first.out.count("\n")) == (0, 32, 1)
    assert first.out != second.out
    document = json.loads(cli("keygen", "--json").out)
    assert document["fingerprint"] == fingerprint(from_text(document["key"]))


def test_keygen_writes_a_file_that_only_its_owner_reads_and_never_overwrites(cli: Cli, tmp_path: Path):
    path = tmp_path / "gossip.keys"
    ran = cli("keygen", path)
    assert ran.code == 0
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    (key,) = Keyring.load(path).keys
    assert ran.out == f"{path} has the new key {fingerprint(key)}\n"
    ran = cli("keygen", path)
    assert (ran.code, ran.out) == (2, "")
    assert "is there already" in ran.err
    assert Keyring.load(path).keys == (key,)
    document = json.loads(cli("keygen", tmp_path / "two", "--json").out)
    assert document == {
        "file": str(tmp_path / "two"),
        "fingerprint": fingerprint(Keyring.load(tmp_path / "two").primary),
    }


def test_keygen_follows_no_link_and_says_what_cannot_be_written(cli: Cli, tmp_path: Path):
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    assert cli("keygen", tmp_path / "link").code == 2
    assert not (tmp_path / "elsewhere").exists()
    ran = cli("keygen", tmp_path / "none" / "k")
    assert (ran.code, ran.err) == (2, f"kvmesh: cannot write {tmp_path}/none/k: No such file or directory\n")


def test_the_list_has_fingerprints_and_how_many_nodes_have_them(cli: Cli):
    document = result("list", ok("a"), ok("b"), ok("c", fingerprint(NEW)))
    view = FakeView({"nodes": NODES, "keys": document})
    cli.answer(view)
    for columns in ("80", "120"):
        ran = cli("keys", "list", env={"COLUMNS": columns})
        assert (ran.code, ran.err) == (0, "")
        rows = [line.split() for line in ran.out.splitlines()]
        assert rows[1:] == [[fingerprint(NEW), "3", "1"], [fingerprint(OLD), "2", "2"]]
    assert json.loads(cli("keys", "list", "--json").out) == document
    assert view.asked[1] == ("list", b"")


@pytest.mark.parametrize(
    ("operation", "verb"), [("install", "installed on"), ("use", "used by"), ("remove", "removed from")]
)
def test_a_change_on_all_nodes(cli: Cli, operation: str, verb: str):
    view = FakeView({"nodes": NODES, "keys": result(operation, ok("a"), ok("b"))})
    cli.answer(view)
    ran = cli("keys", operation, to_text(NEW), "--controller", "127.0.0.1:1")
    assert (ran.code, ran.out, ran.err) == (0, f"key {fingerprint(NEW)} {verb} 2 of 2 nodes\n", "")
    assert view.asked[:2] == [(None, "127.0.0.1:1"), (operation, NEW)]


def test_a_key_may_come_from_stdin(cli: Cli, monkeypatch: pytest.MonkeyPatch):
    view = FakeView({"nodes": NODES, "keys": result("use", ok("a"))})
    cli.answer(view)
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{to_text(NEW)}\n"))
    assert cli("keys", "use", "-").code == 0
    assert view.asked[1] == ("use", NEW)


def test_nodes_that_did_not_do_it_are_named(cli: Cli):
    silent = NodeKeys("b", "silent", "it did not answer within 2 s")
    cli.answer(
        FakeView(
            {"nodes": NODES, "keys": result("install", ok("a"), silent, NodeKeys("c\x1b", "failed", "it is full"))}
        )
    )
    ran = cli("keys", "install", to_text(NEW))
    assert (ran.code, ran.out) == (1, f"key {fingerprint(NEW)} installed on 1 of 3 nodes\n")
    assert ran.err.splitlines() == [
        "kvmesh: b: it did not answer within 2 s",
        "kvmesh: c\N{REPLACEMENT CHARACTER}: it is full",
        "kvmesh: repeat the command once these nodes can do it; for the others it changes nothing",
    ]
    assert cli("keys", "install", to_text(NEW), "--json").code == 1
    many = [NodeKeys(f"n{number}", "silent", "no") for number in range(30)]
    cli.answer(FakeView({"nodes": NODES, "keys": result("install", *many)}))
    assert "kvmesh: and 10 more nodes: --json names them all" in cli("keys", "install", to_text(NEW)).err


def test_what_would_cut_nodes_off_is_not_done(cli: Cli):
    lacks = NodeKeys("b", "failed", "it does not have this key")
    cli.answer(FakeView({"nodes": NODES, "keys": result("use", ok("a"), lacks, error="nothing was changed")}))
    ran = cli("keys", "use", to_text(NEW))
    assert (ran.code, ran.out) == (1, "")
    assert ran.err == "kvmesh: b: it does not have this key\nkvmesh: nothing was changed\n"


def test_nodes_that_failed_and_were_not_asked_are_named(cli: Cli):
    found = [("a", "alive", 1), ("c\x1b", "failed", 3), ("b", "failed", 2), ("s", "failed", 0), ("l", "left", 4)]
    nodes = {"nodes": [{"name": name, "state": state, "epoch": epoch} for name, state, epoch in found]}
    cli.answer(FakeView({"nodes": nodes, "keys": result("use", ok("a"))}))
    ran = cli("keys", "use", to_text(NEW))
    assert (ran.code, ran.out) == (0, f"key {fingerprint(NEW)} used by 1 of 1 node\n")
    assert ran.err.startswith("kvmesh: not asked, since they do not answer: b, c\N{REPLACEMENT CHARACTER}. A node that")
    many = {"nodes": [{"name": f"n{number:02}", "state": "failed", "epoch": 1} for number in range(30)]}
    cli.answer(FakeView({"nodes": many, "keys": result("use", ok("a"))}))
    assert "n19 and 10 more. A node" in cli("keys", "use", to_text(NEW)).err


def test_without_gossip_keys_it_is_an_error_that_says_what_to_do(cli: Cli):
    cli.answer(
        FakeView(
            {"nodes": NODES, "keys": result("list", error="a: it runs without gossip keys: start it with --key-file")}
        )
    )
    for flags in ([], ["--json"]):
        ran = cli("keys", "list", *flags)
        assert (ran.code, ran.out) == (2, "")
        assert ran.err == "kvmesh: a: it runs without gossip keys: start it with --key-file\n"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["lst"], "kvmesh keys 'lst': use one of list, use, install, remove"),
        (["list", to_text(NEW)], "give no KEY"),
        (["use"], "kvmesh keys use needs the KEY"),
        (["use", "short"], "base64"),
        (["use", "c2hvcnQ="], "16, 24 or 32 bytes, not 5"),
        ([], "Missing argument"),
    ],
)
def test_mistakes_are_named(cli: Cli, arguments: list[str], sentence: str):
    view = FakeView({})
    cli.answer(view)
    ran = cli("keys", *arguments)
    assert (ran.code, ran.out, view.asked) == (2, "", [])
    assert sentence in ran.err
    assert to_text(NEW) not in ran.err
