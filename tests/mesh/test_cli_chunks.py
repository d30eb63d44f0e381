"""``kvmesh put``, ``get``, ``pin``, ``unpin`` and ``evict``, against a mesh of one process."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from kvmesh.cli.chunkfile import open_chunks, save_chunks
from kvmesh.keys import DTYPE_BYTES, Namespace
from kvmesh.transport.errors import SettingsError
from tests.mesh.cli_fakes import SPACE, Cli, FakeMesh

TENSORS = {"kv": {"dtype": "bfloat16", "shape": [2, 3]}, "mask": {"dtype": "bool", "shape": [5]}}
SPACE_OF_TWO = {**SPACE, "layout": "x", "tensors": TENSORS}


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    return Cli(capsys, monkeypatch)


@pytest.fixture
def prompt(tmp_path: Path) -> Callable[..., list[str]]:
    """The arguments that name a prompt of so many chunks."""

    def write(chunks: int = 3, space: dict[str, Any] = SPACE) -> list[str]:
        (tmp_path / "t.json").write_text(json.dumps(list(range(8 * chunks + 1))))
        (tmp_path / "s.json").write_text(json.dumps(space))
        return ["--tokens", str(tmp_path / "t.json"), "--space", str(tmp_path / "s.json")]

    return write


def some_chunks(chunks: int = 3) -> dict[str, torch.Tensor]:
    return {f"chunk.{index}.kv": torch.full((1, 2, 1, 8, 4), float(index)) for index in range(chunks)}


def test_there_and_back(cli: Cli, prompt: Callable[..., list[str]], tmp_path: Path):
    mesh = FakeMesh()
    cli.connect(mesh)
    save_file(some_chunks(), tmp_path / "in.safetensors")
    ran = cli("put", tmp_path / "in.safetensors", *prompt(), "--pin", "--ttl", "60", "--agent", "/a.sock")
    assert (ran.code, ran.out) == (0, "3 chunks stored on n1 (768 B), 0 existed, 0 refused\n")
    assert mesh.told == {"agent": Path("/a.sock"), "pin": True, "ttl_s": 60.0}
    ran = cli("put", tmp_path / "in.safetensors", *prompt(), "--json")
    assert json.loads(ran.out) == {
        "node": "n1", "namespace": Namespace(**SPACE).id, "chunks": 3,
        "stored": 0, "existed": 3, "refused": 0, "bytes_stored": 0,
    }  # fmt: skip
    out = tmp_path / "out.safetensors"
    ran = cli("get", *prompt(), "--out", out, "--deadline", "2")
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.startswith(f"3 of 3 chunks written to {out}")
    assert mesh.told["deadline_s"] == 2.0
    with safe_open(out, framework="pt") as file:
        assert {name: file.get_tensor(name).flatten()[0].item() for name in file.keys()} == {  # noqa: SIM118
            "chunk.0.kv": 0.0, "chunk.1.kv": 1.0, "chunk.2.kv": 2.0
        }  # fmt: skip
        chain = Namespace(**SPACE).chain(list(range(25)))
        assert file.metadata() == {
            "namespace": Namespace(**SPACE).id, "keys": " ".join(key.hex() for key in chain), "chunks": "3"
        }  # fmt: skip
    assert cli("put", out, *prompt()).code == 0, "what get wrote, put takes"
    assert mesh.open_count == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.safetensors", "out.safetensors", "s.json", "t.json"]


def test_a_partial_hit_says_so(cli: Cli, prompt: Callable[..., list[str]], tmp_path: Path):
    cli.connect(FakeMesh(room=2))
    save_file(some_chunks(), tmp_path / "in.safetensors")
    ran = cli("put", tmp_path / "in.safetensors", *prompt())
    assert (ran.code, ran.out) == (1, "2 chunks stored on n1 (512 B), 0 existed, 1 refused\n")
    assert "n1 refused 1 of 3 chunks: its arena is full" in ran.err
    ran = cli("get", *prompt(), "--out", tmp_path / "out.safetensors")
    assert (ran.code, ran.err) == (0, "kvmesh: the other 1 chunk did not come: miss\n")
    ran = cli("get", *prompt(), "--out", tmp_path / "out.safetensors", "--json")
    document = json.loads(ran.out)
    assert (document["chunks"], document["found"], document["reason"]) == (3, 2, "miss")
    assert document["file_bytes"] == (tmp_path / "out.safetensors").stat().st_size


def test_nothing_found_leaves_no_file(cli: Cli, prompt: Callable[..., list[str]], tmp_path: Path):
    cli.connect(FakeMesh())
    out = tmp_path / "out.safetensors"
    ran = cli("get", *prompt(), "--out", out)
    assert (ran.code, ran.out) == (1, "")
    assert ran.err == f"kvmesh: no chunk of 3 found (miss); {out} was not written\n"
    assert not out.exists()
    ran = cli("get", *prompt(), "--out", out, "--json")
    assert (ran.code, json.loads(ran.out)["file"]) == (1, None)


def test_a_namespace_of_several_tensors(cli: Cli, prompt: Callable[..., list[str]], tmp_path: Path):
    cli.connect(FakeMesh())
    given = {}
    for index in range(2):
        given[f"chunk.{index}.kv"] = torch.randn(2, 3).to(torch.bfloat16)
        given[f"chunk.{index}.mask"] = torch.tensor([True, False, True, True, index == 0])
    save_file(given, tmp_path / "in.safetensors")
    arguments = prompt(2, SPACE_OF_TWO)
    assert cli("put", tmp_path / "in.safetensors", *arguments).code == 0
    assert cli("get", *arguments, "--out", tmp_path / "out.safetensors").code == 0
    with safe_open(tmp_path / "out.safetensors", framework="pt") as file:
        assert set(file.keys()) == set(given)
        for name, tensor in given.items():
            assert torch.equal(file.get_tensor(name), tensor)


@pytest.mark.parametrize("dtype", DTYPE_BYTES)
def test_every_dtype_survives_a_file(tmp_path: Path, dtype: str):
    space = Namespace(**{**SPACE, "dtype": dtype})
    chain = space.chain(list(range(8)))
    tensor = torch.arange(64).to(getattr(torch, dtype)).reshape(1, 2, 1, 8, 4)
    path = tmp_path / "x.safetensors"
    assert save_chunks(path, space, chain, [tensor]) == path.stat().st_size
    with open_chunks(path, space, chain) as chunks:
        into = torch.zeros_like(tensor)
        chunks.fill(0)(into)
    assert torch.equal(into.view(torch.uint8), tensor.view(torch.uint8))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"chunk.1.kv": torch.zeros(1, 2, 1, 8, 5)}, "is float32 [1, 2, 1, 8, 5], but the namespace says float32 [1"),
        ({"chunk.1.kv": torch.zeros(1, 2, 1, 8, 4, dtype=torch.float16)}, "is float16 [1, 2, 1, 8, 4]"),
        ({"chunk.1.kv": torch.zeros(1, dtype=torch.complex64)}, "but the namespace says float32"),
        ({"chunk.1.kv": None}, "lacks chunk.1.kv: chunks must be whole, from 0 on"),
        ({"chunk.3.kv": torch.zeros(1, 2, 1, 8, 4)}, "holds chunk 3, but the prompt has 3 whole chunks"),
        ({"chunk.1.x": torch.zeros(1)}, "tensor 'chunk.1.x' is not of this namespace; its chunks have chunk.<i>.kv"),
        ({"chunk.01.kv": torch.zeros(1)}, "tensor 'chunk.01.kv' is not of this namespace"),
        ({"weight": torch.zeros(1)}, "tensor 'weight' is not of this namespace"),
        ({f"chunk.{index}.kv": None for index in range(3)}, "holds no chunk"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_explained_and_not_stored(
    cli: Cli, prompt: Callable[..., list[str]], tmp_path: Path, change: dict[str, Any], sentence: str
):
    mesh = FakeMesh()
    cli.connect(mesh)
    tensors = {name: tensor for name, tensor in {**some_chunks(), **change}.items() if tensor is not None}
    save_file(tensors, tmp_path / "in.safetensors")
    ran = cli("put", tmp_path / "in.safetensors", *prompt())
    assert (ran.code, ran.out, mesh.chunks) == (2, "", {})
    assert sentence in ran.err
    assert ran.err.count("\n") == 1


def test_a_file_of_other_chunks_is_refused(cli: Cli, prompt: Callable[..., list[str]], tmp_path: Path):
    cli.connect(FakeMesh())
    path = tmp_path / "in.safetensors"
    save_file(some_chunks(), path, {"namespace": "f" * 32})
    assert f"is of namespace {'f' * 32}" in cli("put", path, *prompt()).err
    save_file(some_chunks(), path, {"keys": " ".join(["0" * 64] * 3)})
    assert "is of other tokens" in cli("put", path, *prompt()).err


def test_files_that_cannot_be_used(cli: Cli, prompt: Callable[..., list[str]], tmp_path: Path):
    mesh = FakeMesh()
    cli.connect(mesh)
    arguments = prompt()
    ran = cli("put", tmp_path / "none.safetensors", *arguments)
    assert (ran.code, ran.err) == (2, f"kvmesh: cannot read {tmp_path}/none.safetensors: No such file or directory\n")
    assert cli("put", tmp_path, *arguments).err == f"kvmesh: cannot read {tmp_path}: Is a directory\n"
    (tmp_path / "text").write_text("not safetensors")
    assert "text is not a safetensors file" in cli("put", tmp_path / "text", *arguments).err
    save_file(some_chunks(), tmp_path / "in.safetensors")
    cli("put", tmp_path / "in.safetensors", *arguments)
    ran = cli("get", *arguments, "--out", tmp_path / "no" / "out")
    assert (ran.code, ran.err) == (2, f"kvmesh: cannot write {tmp_path}/no/out: No such file or directory\n")
    assert "--ttl 0.0: give seconds above zero" in cli("put", tmp_path / "x", *arguments, "--ttl", "0").err
    for deadline in ("-1", "inf", "nan"):
        assert "give seconds, zero or more" in cli("get", *arguments, "--out", "x", "--deadline", deadline).err


def test_a_failed_write_leaves_the_old_file(tmp_path: Path):
    space = Namespace(**SPACE)
    path = tmp_path / "x.safetensors"
    path.write_text("old")
    with pytest.raises(KeyError):
        save_chunks(path, space, space.chain(list(range(8))), [{"other": torch.zeros(1)}])
    (tmp_path / "directory").mkdir()
    with pytest.raises(SettingsError, match="cannot write"):
        save_chunks(tmp_path / "directory", space, [], [])
    assert path.read_text() == "old"
    assert sorted(one.name for one in tmp_path.iterdir()) == ["directory", "x.safetensors"]


def test_pin_unpin_and_evict(cli: Cli, prompt: Callable[..., list[str]], tmp_path: Path):
    mesh = FakeMesh()
    cli.connect(mesh)
    save_file(some_chunks(2), tmp_path / "in.safetensors")
    arguments = prompt(3)
    cli("put", tmp_path / "in.safetensors", *arguments)
    assert cli("pin", *arguments).out == "2 of 3 chunks pinned on n1\n"
    key = next(iter(mesh.chunks)).hex()
    assert json.loads(cli("unpin", "--key", key, "--json").out) == {"node": "n1", "chunks": 1, "unpinned": 1}
    ran = cli("unpin", "--key", key)
    assert (ran.code, ran.out) == (1, "")
    assert ran.err == "kvmesh: no chunk of 1 unpinned on n1: it has none of them to change\n"
    assert json.loads(cli("evict", *arguments, "--json").out) == {"node": "n1", "chunks": 3, "evicted": 2}
    assert cli("evict", *arguments, "--json").code == 1
