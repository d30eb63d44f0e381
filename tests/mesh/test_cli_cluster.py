"""Every command against real agents and a real controller, as a shell script uses them."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kvmesh.keys import Namespace
from tests.mesh.cli_fakes import SPACE, Cli
from tests.support.cluster import Cluster, Process
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.slow]  # three processes start
CHUNKS = 3


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    return Cli(capsys, monkeypatch)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with Cluster(tmp_path) as processes:
        yield processes


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """The folder of in.safetensors, t.json and s.json."""
    tensors = {f"chunk.{index}.kv": torch.randn(1, 2, 1, 8, 4) for index in range(CHUNKS)}
    save_file(tensors, tmp_path / "in.safetensors")
    (tmp_path / "t.json").write_text(json.dumps(list(range(8 * CHUNKS + 1))))
    (tmp_path / "s.json").write_text(json.dumps(SPACE))
    return tmp_path


def at(process: Process) -> tuple[str, str]:
    """The flag that names the process to a command that looks."""
    if process.ready["role"] == "agent":
        return "--agent", str(process.socket)
    return "--controller", process.address


def test_a_prompt_goes_from_one_node_to_another(cli: Cli, cluster: Cluster, files: Path):
    controller = cluster.controller("c1")
    a = cluster.agent("a", join=[controller.gossip_address])
    b = cluster.agent("b", join=[controller.gossip_address, a.gossip_address])
    prompt = ("--tokens", files / "t.json", "--space", files / "s.json")

    ran = cli("put", files / "in.safetensors", *prompt, *at(a), "--json")
    assert (ran.code, json.loads(ran.out)["stored"]) == (0, CHUNKS)

    for process in (controller, a, b):

        def found(process: Process = process) -> bool:
            ran = cli("locate", *prompt, *at(process), "--json")
            return ran.code == 0 and json.loads(ran.out) == {
                "chunks": CHUNKS, "holders": [{"node": "a", "run_chunks": CHUNKS, "tier": "ram"}]
            }  # fmt: skip

        wait_until(found, 10, f"{process.name} knows the holder")
        nodes = json.loads(cli("nodes", *at(process), "--json").out)["nodes"]
        assert {node["name"]: node["state"] for node in nodes} == {"a": "alive", "b": "alive", "c1": "alive"}
        assert {node["name"]: node["chunks"] for node in nodes} == {"a": CHUNKS, "b": 0, "c1": 0}
        document = json.loads(cli("map", *at(process), "--json").out)
        assert document["entries"] == CHUNKS
        assert [space["id"] for space in document["namespaces"]] == [Namespace(**SPACE).id]

    out = files / "out.safetensors"
    ran = cli("get", *prompt, "--out", out, "--deadline", "10", *at(b))
    assert ran.code == 0, ran.err
    assert f"{CHUNKS} of {CHUNKS} chunks written" in ran.out
    given, got = load_file(files / "in.safetensors"), load_file(out)
    assert given.keys() == got.keys()
    assert all(torch.equal(given[name], got[name]) for name in given)

    assert cli("pin", *prompt, *at(a)).code == 0
    assert cli("unpin", *prompt, *at(a)).code == 0
    assert cli("evict", *prompt, *at(a)).out == f"{CHUNKS} of {CHUNKS} chunks evicted on a\n"
    assert cli("evict", *prompt, *at(a)).code == 1
    for command in ("nodes", "map"):
        for columns in ("80", "120"):
            ran = cli(command, *at(controller), env={"COLUMNS": columns})
            assert (ran.code, ran.err) == (0, "")
            assert max(map(len, ran.out.splitlines())) <= int(columns)
    ran = cli("doctor", *at(a), "--mesh-port", a.address.rpartition(":")[2], "--json")
    found = {finding["name"]: finding for finding in json.loads(ran.out)["findings"]}
    assert found["agent"]["what"] == f"a answers at {a.socket}"
    assert found["mesh port"]["what"] == f"{a.address} is the agent's"
    for process in (a, b, controller):
        process.stop()


def test_what_cannot_be_is_one_sentence(cli: Cli, cluster: Cluster, files: Path):
    a = cluster.agent("a")
    prompt = ("--tokens", files / "t.json", "--space", files / "s.json")
    port = a.address.rpartition(":")[2]
    free = ("--gossip-port", "0", "--state-dir", files)
    for arguments, words in (
        (("nodes", "--agent", files / "none.sock"), "none.sock"),
        (("nodes", "--controller", "127.0.0.1:1"), "127.0.0.1:1"),
        (("get", *prompt, "--out", files / "x", "--agent", files / "none.sock"), "none.sock"),
        (("agent", "--name", "b", "--mesh-port", port, *free, "--socket", f"{a.socket}2", "--memory", "1MiB"), port),
        (("agent", "--name", "b", "--mesh-port", "0", *free, "--socket", a.socket, "--memory", "1MiB"), str(a.socket)),
        (("controller", "--name", "b", "--mesh-port", port, *free), port),
    ):
        ran = cli(*arguments)
        assert (ran.code, ran.out) == (2, ""), arguments
        assert words in ran.err
        sentences = [line for line in ran.err.splitlines() if line.startswith("kvmesh: ")]
        assert len(sentences) == 1, ran.err
        assert "unexpected" not in ran.err
    (files / "big.json").write_text(json.dumps({**SPACE, "chunk_tokens": 8, "layers": 1 << 20}))
    ran = cli("get", "--tokens", files / "t.json", "--space", files / "big.json", "--out", files / "x", *at(a))
    assert (ran.code, "--memory" in ran.err) == (2, True)
    a.stop()
