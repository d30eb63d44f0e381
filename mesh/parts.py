"""Parts: a slice of a chunk, as an engine asks for it.

An engine of another tensor-parallel degree needs some heads of a chunk, a layer-by-layer loader some layers, a tool
some bytes. `kvmesh.transport` moves just those (`kvmesh.transport.interface.Slice`: runs of bytes at a regular
distance); here is what such a slice means as a tensor. A part that came from a peer lies by itself in the arena, run
after run, under a key of its own (`kvmesh.keys.part_key`); where the whole chunk is held, a part is a view into it.

    mesh.get(space, chain, part=space.part(heads=(0, 2)))        views of shape [layers, 2, 2, chunk_tokens, head_dim]
    mesh.get(space, chain, part=space.part(layers=(0, 4)))       views of shape [4, 2, kv_heads, chunk_tokens, head_dim]
    mesh.get(space, chain, part=space.part(tensor="hidden"))     one of several tensors
    mesh.get(space, chain, part=space.part(byte_range=(0, 64)))  uint8

Pure values: this module does no I/O and does not import torch.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, SupportsIndex

from kvmesh.transport.errors import NamespaceError
from kvmesh.transport.interface import Slice

if TYPE_CHECKING:
    from kvmesh.keys import Namespace

Range = Sequence[SupportsIndex]
"""(first, end): `end` is not in it."""


@dataclass(frozen=True, slots=True)
class Part:
    """A slice of every chunk of one namespace. Made by `Namespace.part`."""

    slice: Slice
    dtype: str
    shape: tuple[int, ...]
    """Of the view that a get gives, in elements of `dtype`."""
    stride: tuple[int, ...]
    """Of the same view within the whole chunk, in elements; where the part lies by itself it is contiguous."""


def part_of(
    space: Namespace,
    *,
    layers: Range | None,
    heads: Range | None,
    tensor: str | None,
    byte_range: Range | None,
) -> Part:
    """See `Namespace.part`, which this is."""
    kinds = [layers is not None or heads is not None, tensor is not None, byte_range is not None]
    if sum(kinds) != 1:
        raise NamespaceError("a part is layers and heads, or one tensor, or one byte_range: give one of the three")
    if byte_range is not None:
        first, end = _range("byte_range", byte_range, space.chunk_bytes)
        return Part(Slice(first, end - first), "uint8", (end - first,), (1,))
    if tensor is not None:
        if tensor not in space.tensors:
            raise NamespaceError(f"this namespace has no tensor {tensor!r}, only {', '.join(space.tensors)}")
        start, spec = space.placements[tensor]
        return Part(Slice(start, spec.bytes), spec.dtype, spec.shape, _strides(spec.shape))
    return _layers_and_heads(space, layers, heads)


def _layers_and_heads(space: Namespace, layers: Range | None, heads: Range | None) -> Part:
    if space.layout != "torch" or list(space.tensors) != ["kv"]:
        raise NamespaceError(
            "layers and heads can be told apart in chunks of layout 'torch' alone: name a tensor or a byte_range"
        )
    spec = space.tensors["kv"]
    item_bytes = spec.bytes // math.prod(spec.shape)
    layer, layer_end = _range("layers", (0, space.layers) if layers is None else layers, space.layers)
    head, head_end = _range("heads", (0, space.kv_heads) if heads is None else heads, space.kv_heads)
    head_bytes = space.chunk_tokens * space.head_dim * item_bytes
    row_bytes = space.kv_heads * head_bytes  # K, or V, of one layer
    shape = (layer_end - layer, 2, head_end - head, space.chunk_tokens, space.head_dim)
    rows = 2 * (layer_end - layer)
    offset = 2 * layer * row_bytes + head * head_bytes
    if head_end - head == space.kv_heads:
        part = Slice(offset, rows * row_bytes)
    else:
        part = Slice(offset, (head_end - head) * head_bytes, row_bytes, rows)
    return Part(part, spec.dtype, shape, _strides(spec.shape))


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of a contiguous tensor, in elements."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def _range(name: str, value: Range, size: int) -> tuple[int, int]:
    try:
        first, end = (operator.index(bound) for bound in value)
    except (TypeError, ValueError):
        raise NamespaceError(f"{name} must be (first, end), not {value!r}") from None
    if not 0 <= first < end <= size:
        raise NamespaceError(f"{name} is ({first}, {end}): it must lie within (0, {size}) and hold at least one")
    return first, end
