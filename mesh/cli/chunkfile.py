"""Chunks in a safetensors file, so that a shell script can use the mesh.

For every whole chunk i of the prompt, from 0, the file holds the tensors ``chunk.<i>.<tensor name>``. Its metadata say
which namespace and keys they are (``namespace``, ``keys``, ``chunks``); a file of another program may lack them.

Reading checks every name, dtype and shape before anything is stored, from the file's header alone. Writing streams from
the arena: the library's `save_file` would copy every chunk first. A file appears under its name only when it is whole.
Knows files and tensors, nothing of agents; runs on the caller's thread.
"""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from kvmesh.keys import DTYPE_BYTES, Namespace, TensorSpec
from kvmesh.transport.errors import NamespaceError, SettingsError, TensorError

if TYPE_CHECKING:
    import torch

    Views = torch.Tensor | Mapping[str, torch.Tensor]

DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
"""safetensors' names of dtypes, and torch's."""
CODES = {dtype: code for code, dtype in DTYPES.items()}
TENSOR_NAME = re.compile(r"chunk\.(0|[1-9]\d*)\.(.+)", re.DOTALL)


class ChunkFile:
    """An open safetensors file whose chunks fit the namespace and the chain."""

    def __init__(self, path: Path, handle: Any, space: Namespace, chain: Sequence[bytes]) -> None:
        self._path = path
        self._handle = handle
        self._space = space
        self.chunks = self._count(len(chain))
        self._check_metadata(chain)

    def fill(self, index: int) -> Callable[[Views], None]:
        """What copies chunk `index` into the arena's views of it. Nothing is read before it is called."""

        def fill(views: Views) -> None:
            for name, view in by_name(self._space, views).items():
                view.copy_(self._handle.get_tensor(f"chunk.{index}.{name}"))

        return fill

    def _count(self, chunks_max: int) -> int:
        """How many whole chunks the file has from the front. Raises `TensorError` for whatever does not fit."""
        expected = self._space.tensors
        found: dict[int, set[str]] = {}
        for full_name in self._handle.keys():  # noqa: SIM118 - the handle is no dict
            match = TENSOR_NAME.fullmatch(full_name)
            if not match or match[2] not in expected:
                raise TensorError(
                    f"{self._path}: tensor {full_name!r} is not of this namespace; its chunks have "
                    f"{', '.join(f'chunk.<i>.{name}' for name in expected)}"
                )
            self._check_tensor(full_name, expected[match[2]])
            found.setdefault(int(match[1]), set()).add(match[2])
        if not found:
            raise TensorError(f"{self._path} holds no chunk: name its tensors chunk.<i>.<tensor name>")
        if max(found) >= chunks_max:
            raise TensorError(
                f"{self._path} holds chunk {max(found)}, but the prompt has {chunks_max} whole chunks: "
                "give the tokens of the file"
            )
        for index in range(max(found) + 1):
            if missing := expected.keys() - found.get(index, set()):
                raise TensorError(f"{self._path} lacks chunk.{index}.{min(missing)}: chunks must be whole, from 0 on")
        return len(found)

    def _check_tensor(self, full_name: str, spec: TensorSpec) -> None:
        piece = self._handle.get_slice(full_name)
        dtype = DTYPES.get(piece.get_dtype(), piece.get_dtype())
        shape = tuple(piece.get_shape())
        if (dtype, shape) != (spec.dtype, spec.shape):
            raise TensorError(
                f"{self._path}: {full_name} is {dtype} {list(shape)}, "
                f"but the namespace says {spec.dtype} {list(spec.shape)}"
            )

    def _check_metadata(self, chain: Sequence[bytes]) -> None:
        metadata = self._handle.metadata() or {}
        written = metadata.get("namespace", self._space.id)
        if written != self._space.id:
            raise NamespaceError(f"{self._path} is of namespace {written}, but --space is {self._space.id}")
        keys = metadata.get("keys", "").split()
        if keys and keys != [key.hex() for key in chain[: len(keys)]]:
            raise TensorError(f"{self._path} is of other tokens: its keys are not those of --tokens in --space")


@contextmanager
def open_chunks(path: Path, space: Namespace, chain: Sequence[bytes]) -> Iterator[ChunkFile]:
    """The file, checked. Raises `SettingsError` when it cannot be read, else what `ChunkFile` raises."""
    from safetensors import SafetensorError, safe_open

    try:
        path.open("rb").close()  # the library's own reasons repeat the path, and call a directory "No such device"
        handle = safe_open(path, framework="pt")
    except OSError as error:
        raise SettingsError(f"cannot read {path}: {error.strerror or error}") from None
    except SafetensorError as error:
        raise SettingsError(f"{path} is not a safetensors file: {error}") from None
    with handle as opened:
        yield ChunkFile(path, opened, space, chain)


def by_name(space: Namespace, views: Views) -> Mapping[str, torch.Tensor]:
    """A chunk's tensors by name: the tensor of a namespace with only one comes without it."""
    if isinstance(views, Mapping):
        return views
    return {next(iter(space.tensors)): views}


def save_chunks(path: Path, space: Namespace, keys: Sequence[bytes], chunks: Sequence[Views]) -> int:
    """Write the chunks, and return the file's size. The old file under this name stays until the new one is whole."""
    # The larger elements first, as the library has it: every tensor then starts at a multiple of its element.
    order = sorted(
        ((index, name) for index in range(len(keys)) for name in space.tensors),
        key=lambda one: (-DTYPE_BYTES[space.tensors[one[1]].dtype], one),
    )
    header = _header(space, keys, order)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with temporary.open("xb") as file:
            file.write(header)
            for index, name in order:
                _write_tensor(file, by_name(space, chunks[index])[name])
            size = file.tell()
        temporary.replace(path)
    except OSError as error:
        raise SettingsError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        temporary.unlink(missing_ok=True)
    return size


def _header(space: Namespace, keys: Sequence[bytes], order: Sequence[tuple[int, str]]) -> bytes:
    """The file up to its first tensor: a length, and JSON padded to a multiple of 8."""
    metadata = {"namespace": space.id, "keys": " ".join(key.hex() for key in keys), "chunks": str(len(keys))}
    entries: dict[str, Any] = {"__metadata__": metadata}
    at = 0
    for index, name in order:
        spec = space.tensors[name]
        entries[f"chunk.{index}.{name}"] = {
            "dtype": CODES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [at, at + spec.bytes],
        }
        at += spec.bytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _write_tensor(file: BinaryIO, tensor: torch.Tensor) -> None:
    import torch

    file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
