"""What a command reads from files: a namespace, a prompt, keys. Every failure is one sentence that names the file.

Knows JSON and the names of `Namespace`'s fields, nothing of tensors: those are in `chunkfile`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvmesh.transport.errors import NamespaceError, SettingsError
from kvmesh.transport.limits import KEY_BYTES

if TYPE_CHECKING:
    from kvmesh.keys import Namespace

STDIN = Path("-")


def read_bytes(path: Path, *, flag: str) -> bytes:
    """The whole file. Raises `SettingsError` with the system's reason."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise SettingsError(f"cannot read {flag} {path}: {error.strerror or error}") from None


def read_space(path: Path) -> Namespace:
    """The namespace in a SPACE.json. Raises `NamespaceError`, naming the unknown, missing or wrong fields."""
    from kvmesh.keys import Namespace, TensorSpec

    document = _json(read_bytes(path, flag="--space"), f"--space {path}")
    if not isinstance(document, dict):
        raise NamespaceError(f"--space {path} must be a JSON object with the fields of kvmesh.Namespace")
    names = [field.name for field in fields(Namespace)]
    required = [one.name for one in fields(Namespace) if one.default is MISSING and one.default_factory is MISSING]
    if unknown := [name for name in document if name not in names]:
        raise NamespaceError(f"--space {path}: unknown {_fields(unknown)}; a namespace has {', '.join(names)}")
    if missing := [name for name in required if name not in document]:
        raise NamespaceError(f"--space {path}: missing {_fields(missing)}")
    try:
        tensors = {name: TensorSpec(**spec) for name, spec in _tensor_specs(document.get("tensors", {})).items()}
        return Namespace(**{**document, "tensors": tensors})
    except NamespaceError as error:
        raise NamespaceError(f"--space {path}: {error}") from None


def _tensor_specs(value: Any) -> dict[str, dict[str, Any]]:
    """`tensors` as the arguments of `TensorSpec`, with the shape of each checked to be a list."""
    if not isinstance(value, dict):
        raise NamespaceError('field \'tensors\' must be an object: {"NAME": {"dtype": …, "shape": […]}, …}')
    found: dict[str, dict[str, Any]] = {}
    for name, spec in value.items():
        if not isinstance(spec, dict) or set(spec) != {"dtype", "shape"} or not isinstance(spec["shape"], list):
            raise NamespaceError(f'tensor {name!r} must be {{"dtype": …, "shape": […]}}, not {json.dumps(spec)}')
        found[name] = {"dtype": str(spec["dtype"]), "shape": tuple(spec["shape"])}
    return found


def read_tokens(path: Path) -> list[int]:
    """The token ids in a T.json (or on stdin for ``-``). Their range is checked where the keys are made."""
    if path == STDIN:
        data, source = sys.stdin.buffer.read(), "the tokens on stdin"
    else:
        data, source = read_bytes(path, flag="--tokens"), f"--tokens {path}"
    document = _json(data, source)
    if not isinstance(document, list):
        raise SettingsError(f"{source} must be a JSON list of token ids, for example [1, 2, 3]")
    return document


def read_space_and_chain(tokens: Path, space: Path) -> tuple[Namespace, list[bytes]]:
    """The namespace, and the keys of the prompt's whole chunks. A prompt below one chunk is an error: it has no key."""
    namespace = read_space(space)
    token_ids = read_tokens(tokens)
    try:
        chain = namespace.chain(token_ids)
    except NamespaceError as error:
        raise NamespaceError(f"--tokens {tokens}: {error}") from None
    if not chain:
        raise SettingsError(
            f"--tokens {tokens} has {len(token_ids)} tokens, less than one chunk of {namespace.chunk_tokens}: "
            "only whole chunks are shared"
        )
    return namespace, chain


def chain_of(tokens: Path | None, space: Path | None, keys: Sequence[str] | None) -> list[bytes]:
    """The chain that a command is about: of a prompt in a namespace, or the keys themselves."""
    if keys and (tokens or space):
        raise SettingsError("--key excludes --tokens and --space: name the chunks in one of the two ways")
    if keys:
        return [parse_key(key) for key in keys]
    if tokens is None or space is None:
        raise SettingsError("name the chunks: --tokens T.json with --space SPACE.json, or --key HEX")
    return read_space_and_chain(tokens, space)[1]


def parse_key(text: str) -> bytes:
    """32 bytes from 64 hex digits."""
    try:
        key = bytes.fromhex(text)
    except ValueError:
        key = b""
    if len(key) != KEY_BYTES:
        raise SettingsError(f"--key {text!r} is not a key: write {2 * KEY_BYTES} hex digits")
    return key


def _json(data: bytes, source: str) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise SettingsError(f"{source} is not JSON: {error}") from None


def _fields(names: Sequence[str]) -> str:
    return f"field{'s' if len(names) > 1 else ''} {', '.join(map(repr, names))}"
