"""What the CLI's tests put behind its seam (`kvmesh.cli.reach`): a view that has documents, a mesh that remembers."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from kvmesh.cli import main, reach
from kvmesh.keys import Namespace

SPACE = {
    "model": "m", "revision": "r", "dtype": "float32", "layers": 1, "kv_heads": 1, "head_dim": 4, "chunk_tokens": 8
}  # fmt: skip


@dataclass(frozen=True)
class Ran:
    """What one command did."""

    code: int
    out: str
    err: str


class Cli:
    """Runs commands in this process, without the caller's own settings."""

    def __init__(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self._capsys, self._monkeypatch = capsys, monkeypatch
        for name in [name for name in os.environ if name.startswith("KVMESH_")] + [
            "COLUMNS",
            "NO_COLOR",
            "FORCE_COLOR",
        ]:
            monkeypatch.delenv(name, raising=False)

    def __call__(self, *arguments: object, env: Mapping[str, str] | None = None) -> Ran:
        for name, value in (env or {}).items():
            self._monkeypatch.setenv(name, value)
        code = main([str(argument) for argument in arguments])
        captured = self._capsys.readouterr()
        return Ran(code, captured.out, captured.err)

    def answer(self, view: FakeView) -> None:
        """Let `view` answer the commands that look."""
        self._monkeypatch.setattr(reach, "view", view.open)

    def connect(self, mesh: FakeMesh) -> None:
        """Let `mesh` serve the commands that move or mark chunks."""
        self._monkeypatch.setattr(reach, "mesh", mesh.open)


@dataclass
class FakeView:
    """Answers with the documents that it was given."""

    documents: Mapping[str, Any]
    asked: list[Any] = field(default_factory=list)

    def open(self, agent: Any, controller: Any) -> FakeView:
        self.asked.append((agent, controller))
        return self

    def __enter__(self) -> FakeView:
        return self

    def __exit__(self, *_: object) -> None:
        self.asked.append("closed")

    def _say(self, name: str) -> Any:
        document = self.documents[name]
        if isinstance(document, BaseException):
            raise document
        return document

    def nodes(self) -> Any:
        return self._say("nodes")

    def map(self) -> Any:
        return self._say("map")

    def keys(self, operation: str, key: bytes = b"") -> Any:
        self.asked.append((operation, key))
        return self._say("keys")

    def locate(self, chain: Sequence[bytes]) -> Any:
        self.asked.append(list(chain))
        return self._say("locate")


@dataclass(frozen=True)
class PutResult:
    """As kvmesh's."""

    stored: int
    existed: int
    refused: int
    bytes_stored: int


class FakeMesh:
    """An agent of one process: chunks by key, with room for `room` of them."""

    node = "n1"

    def __init__(self, room: int = 100) -> None:
        self.room = room
        self.chunks: dict[bytes, Any] = {}
        self.pinned: set[bytes] = set()
        self.told: dict[str, Any] = {}
        self.open_count = 0

    def open(self, agent: Any) -> FakeMesh:
        self.told["agent"] = agent
        return self

    def __enter__(self) -> FakeMesh:
        self.open_count += 1
        return self

    def __exit__(self, *_: object) -> None:
        self.open_count -= 1

    def put(
        self, space: Namespace, chunks: Mapping[bytes, Callable[[Any], None]], *, pin: bool, ttl_s: Any
    ) -> PutResult:
        import torch

        self.told |= {"pin": pin, "ttl_s": ttl_s}
        stored = existed = refused = 0
        for key, fill in chunks.items():
            if key in self.chunks:
                existed += 1
            elif len(self.chunks) >= self.room:
                refused += 1
            else:
                views = {n: torch.empty(s.shape, dtype=getattr(torch, s.dtype)) for n, s in space.tensors.items()}
                made = views if len(views) > 1 else next(iter(views.values()))
                fill(made)
                self.chunks[key] = made
                stored += 1
        return PutResult(stored, existed, refused, stored * space.chunk_bytes)

    def get(self, space: Namespace, chain: Sequence[bytes], *, deadline_s: float) -> FakeHit:
        self.told["deadline_s"] = deadline_s
        found = []
        for key in chain:
            if key not in self.chunks:
                break
            found.append(self.chunks[key])
        return FakeHit(found, "complete" if len(found) == len(chain) else "miss")

    def pin(self, chain: Sequence[bytes]) -> int:
        known = self.chunks.keys() & set(chain)
        self.pinned |= known
        return len(known)

    def unpin(self, chain: Sequence[bytes]) -> int:
        known = self.pinned & set(chain)
        self.pinned -= known
        return len(known)

    def delete(self, chain: Sequence[bytes]) -> int:
        return sum(self.chunks.pop(key, None) is not None for key in chain)


class FakeHit:
    """A hit with everything there at once."""

    def __init__(self, chunks: list[Any], reason: str) -> None:
        self._chunks = chunks
        self.count, self.fetched, self.bytes_moved, self.reason = len(chunks), 0, 0, reason

    def __enter__(self) -> FakeHit:
        return self

    def __exit__(self, *_: object) -> None:
        self._chunks = []

    def __getitem__(self, index: int) -> Any:
        return self._chunks[index]
