"""Chunks whose bytes follow from their keys, so that whoever gets one can tell whether it is right.

A put writes straight into the arena, and a check reads the view that a get gave: neither keeps a second copy of what is
in the mesh. Every 8 bytes of a chunk differ from those of every other chunk, so that a piece at the wrong place, or of
the wrong chunk, is seen as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

import kvmesh
from kvmesh.client import PutResult

KIB, MIB = 1 << 10, 1 << 20


def space_of(chunk_bytes: int, **fields: Any) -> kvmesh.Namespace:
    """A namespace whose chunks have so many bytes: a multiple of 256."""
    heads, left = divmod(chunk_bytes, 256)
    assert not left
    given = {"model": "m", "revision": "r", **fields}
    return kvmesh.Namespace(dtype="float32", layers=1, kv_heads=heads, head_dim=8, chunk_tokens=4, **given)


def chain_of(space: kvmesh.Namespace, seed: int, count: int) -> list[bytes]:
    """A chain of `count` chunks, another for each seed."""
    first = seed * 4096
    return space.chain([(first + token) % (1 << 32) for token in range(count * space.chunk_tokens)])


def bytes_of(key: bytes, count: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The first `count` bytes of the chunk `key`."""
    start, step = np.frombuffer(key[:16], np.uint64)
    # A walk over all 64-bit numbers, odd steps: it does not repeat, and no two chunks walk alike.
    walk = np.arange(count // 8, dtype=np.uint64)
    walk *= step | np.uint64(1)
    walk += start
    return walk.view(np.uint8)


def fill(key: bytes) -> Any:
    """What a put takes for the chunk `key`."""

    def write(view: torch.Tensor) -> None:
        into = view.view(torch.uint8).view(-1).numpy()
        into[:] = bytes_of(key, into.nbytes)

    return write


def wrong(key: bytes, view: torch.Tensor) -> str:
    """Empty when a view has the bytes of the chunk `key`; else what is wrong."""
    got = view.view(torch.uint8).view(-1).numpy()
    differs = got != bytes_of(key, got.nbytes)
    if not differs.any():
        return ""
    places = np.flatnonzero(differs)
    return f"chunk {key.hex()[:16]}: {places.size} bytes are wrong, from {places[0]} to {places[-1]} of {got.nbytes}"


def put(mesh: kvmesh.Mesh, space: kvmesh.Namespace, chain: Sequence[bytes]) -> PutResult:
    """Store the chunks of a chain."""
    return mesh.put(space, {key: fill(key) for key in chain})


def get(mesh: kvmesh.Mesh, space: kvmesh.Namespace, chain: Sequence[bytes], deadline_s: float) -> tuple[int, str]:
    """How much of a chain comes, and why no more. Each chunk is looked at, and fails the caller when it is wrong."""
    with mesh.get(space, chain, deadline_s=deadline_s) as hit:
        for key, view in zip(chain, hit, strict=False):
            fault = wrong(key, view)
            assert not fault, fault
            del view
        return hit.count, hit.reason
