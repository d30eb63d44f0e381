"""Tensors over the arena: zero-copy views, and the copy that a put makes. The only module of the node that needs torch.

A view keeps a small *keeper* object alive for as long as any tensor, numpy array or slice made from it lives; the
keeper's end is how a hit learns that the lease behind a view is not needed any more. torch offers no way to invalidate
a tensor, so the lease follows the last view instead of the view ending with the lease: a view of a chunk that was
evicted cannot exist.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch

from kvmesh.arena import Arena
from kvmesh.keys import Namespace, TensorSpec
from kvmesh.parts import Part
from kvmesh.transport.errors import TensorError

Views = torch.Tensor | dict[str, torch.Tensor]
"""A chunk as an engine sees it: one tensor, or several by name."""
Fill = Callable[[Any], None]
Value = torch.Tensor | Mapping[str, torch.Tensor] | Fill
"""What a put takes for one chunk: its tensor, its tensors by name, or a function that fills the views that it is
given."""


def views(arena: Arena, offset: int, space: Namespace, on_end: Callable[[], None] | None = None) -> Views:
    """The tensors of the chunk at `offset`. `on_end` is called, in any thread, when the last thing made from them is
    gone."""
    keeper = (ctypes.c_char * space.chunk_bytes).from_address(arena.address + offset)
    # The callback holds the arena: while a view lives, so does the mapping under it.
    end = weakref.finalize(keeper, _ended, arena, on_end)
    end.atexit = False
    found = {
        name: torch.frombuffer(keeper, dtype=dtype_of(spec), count=spec.bytes // dtype_of(spec).itemsize, offset=start)
        .view(spec.shape)
        for name, (start, spec) in space.placements.items()
    }  # fmt: skip
    return next(iter(found.values())) if len(found) == 1 else found


def part_view(
    arena: Arena, offset: int, space: Namespace, part: Part, whole: bool, on_end: Callable[[], None] | None = None
) -> torch.Tensor:
    """The part of the chunk at `offset`: a view into it where the `whole` chunk stands there, else the part by
    itself."""
    size_bytes = space.chunk_bytes if whole else part.slice.bytes
    keeper = (ctypes.c_char * size_bytes).from_address(arena.address + offset)
    weakref.finalize(keeper, _ended, arena, on_end).atexit = False
    dtype: torch.dtype = getattr(torch, part.dtype)
    if not whole:
        return torch.frombuffer(keeper, dtype=dtype).view(part.shape)
    start, end = part.slice.offset_bytes, part.slice.end
    found = torch.frombuffer(keeper, dtype=dtype, count=(end - start) // dtype.itemsize, offset=start)
    return found.as_strided(part.shape, part.stride)


def _ended(_arena: Arena, on_end: Callable[[], None] | None) -> None:
    if on_end is not None:
        on_end()


def dtype_of(spec: TensorSpec) -> torch.dtype:
    """torch's dtype of that name."""
    dtype = getattr(torch, spec.dtype)
    assert isinstance(dtype, torch.dtype)
    return dtype


def check(space: Namespace, value: Value) -> None:
    """Raises `TensorError` when `value` is not what a chunk of `space` is made of."""
    if callable(value) and not isinstance(value, torch.Tensor):
        return
    given = value if isinstance(value, Mapping) else {next(iter(space.tensors)): value}
    if set(given) != set(space.tensors):
        need = ", ".join(space.tensors)
        got = ", ".join(map(str, given)) if isinstance(value, Mapping) else "one without a name"
        raise TensorError(f"a chunk of this namespace has the tensors {need}; given: {got}")
    for name, spec in space.tensors.items():
        tensor = given[name]
        if not isinstance(tensor, torch.Tensor):
            raise TensorError(f"tensor {name!r} must be a torch tensor, not {type(tensor).__name__}")
        if tuple(tensor.shape) != spec.shape:
            raise TensorError(f"tensor {name!r} has shape {tuple(tensor.shape)}; its namespace says {spec.shape}")
        if tensor.dtype is not dtype_of(spec):
            raise TensorError(f"tensor {name!r} has dtype {tensor.dtype}; its namespace says torch.{spec.dtype}")


def on_gpu(value: Value) -> bool:
    """Whether some of what a put takes lies in a GPU's memory. What a function will fill in is not known."""
    if isinstance(value, torch.Tensor):
        return value.is_cuda
    return isinstance(value, Mapping) and any(tensor.is_cuda for tensor in value.values())


def write(into: Views, value: Value) -> None:
    """Copy `value`, which `check` has passed, into the views of a reserved chunk."""
    if callable(value) and not isinstance(value, torch.Tensor):
        value(into)
    elif isinstance(into, dict):
        assert isinstance(value, Mapping)
        for name, target in into.items():
            target.copy_(value[name])
    else:
        into.copy_(next(iter(value.values())) if isinstance(value, Mapping) else value)
