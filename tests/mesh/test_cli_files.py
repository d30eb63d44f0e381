"""SPACE.json, T.json and keys: each mistake is one sentence that names the file and the field."""

import io
import json
from pathlib import Path
from typing import Any

import pytest

from kvmesh.cli.files import chain_of, parse_key, read_space, read_space_and_chain, read_tokens
from kvmesh.keys import Namespace, TensorSpec
from kvmesh.transport.errors import CallerError, NamespaceError, SettingsError
from tests.mesh.cli_fakes import SPACE


def written(tmp_path: Path, document: Any, name: str = "space.json") -> Path:
    path = tmp_path / name
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    return path


def test_a_space_is_a_namespace(tmp_path: Path):
    assert read_space(written(tmp_path, SPACE)) == Namespace(**SPACE)
    tensors = {"k": {"dtype": "int8", "shape": [2, 3]}, "v": {"dtype": "float32", "shape": [5]}}
    full = {**SPACE, "layout": "x", "shard": [1, 2], "tenant": "t", "tensors": tensors}
    space = read_space(written(tmp_path, full))
    assert space.shard == (1, 2)
    assert space.tensors == {"k": TensorSpec("int8", (2, 3)), "v": TensorSpec("float32", (5,))}


@pytest.mark.parametrize(
    ("document", "sentence"),
    [
        ({**SPACE, "modle": "m", "x": 1}, "unknown fields 'modle', 'x'; a namespace has model, revision"),
        ({"model": "m", "dtype": "float32"}, "missing fields 'revision', 'layers', 'kv_heads', 'head_dim'"),
        ({**SPACE, "layers": "1"}, "'layers' must be a positive whole number"),
        ({**SPACE, "shard": 1}, "'shard' must be (rank, size)"),
        ({**SPACE, "tensors": []}, "'tensors' must be an object"),
        ({**SPACE, "tensors": {"k": {"dtype": "int8"}}}, "tensor 'k' must be"),
        ({**SPACE, "tensors": {"k": {"dtype": "int8", "shape": ["1"]}}}, "must be one or more positive sizes"),
        ({**SPACE, "tensors": {"k": {"dtype": "int3", "shape": [1]}}}, "dtype 'int3' is not known"),
        ([], "must be a JSON object"),
        ("{", "is not JSON"),
        ("\x00", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
    ],
)
def test_a_wrong_space_is_explained(tmp_path: Path, document: Any, sentence: str):
    path = written(tmp_path, document)
    with pytest.raises(CallerError) as caught:
        read_space(path)
    assert sentence in str(caught.value)
    assert str(path) in str(caught.value)


def test_tokens_come_from_a_file_or_stdin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert read_tokens(written(tmp_path, [1, 2, 3])) == [1, 2, 3]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"[4, 5]")))
    assert read_tokens(Path("-")) == [4, 5]
    with pytest.raises(SettingsError, match="must be a JSON list of token ids"):
        read_tokens(written(tmp_path, {"tokens": []}))
    with pytest.raises(SettingsError, match=r"cannot read --tokens .*: No such file"):
        read_tokens(tmp_path / "none.json")


def test_a_chain_is_of_whole_chunks(tmp_path: Path):
    space = written(tmp_path, SPACE)
    tokens = written(tmp_path, list(range(20)), "t.json")
    assert chain_of(tokens, space, None) == Namespace(**SPACE).chain(list(range(16)))
    with pytest.raises(SettingsError, match="has 7 tokens, less than one chunk of 8"):
        read_space_and_chain(written(tmp_path, list(range(7)), "t.json"), space)
    with pytest.raises(NamespaceError, match=r"--tokens .*t.json: token ids must be whole numbers"):
        read_space_and_chain(written(tmp_path, ["a"] * 8, "t.json"), space)


def test_chunks_are_named_in_one_of_two_ways(tmp_path: Path):
    key = bytes(range(32))
    assert chain_of(None, None, [key.hex(), key.hex().upper()]) == [key, key]
    with pytest.raises(SettingsError, match="--key excludes"):
        chain_of(tmp_path, None, [key.hex()])
    for tokens, space in ((None, None), (tmp_path, None), (None, tmp_path)):
        with pytest.raises(SettingsError, match="name the chunks"):
            chain_of(tokens, space, [])


@pytest.mark.parametrize("text", ["", "00", "0" * 63, "0" * 66, "g" * 64])
def test_what_is_no_key_is_refused(text: str):
    with pytest.raises(SettingsError, match="is not a key: write 64 hex digits"):
        parse_key(text)
