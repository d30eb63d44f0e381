"""Keys: what names a chunk, and nothing else may.

A key is the keyed BLAKE2b-256 of (namespace, parent key, tokens):

    tenant_key  = BLAKE2b-512(tenant, person="kvmesh-tenant")          the hash's key: tenants never share a chunk
    namespace   = BLAKE2b-256(canonical bytes, key=tenant_key, person="kvmesh-space")
    key[0]      = BLAKE2b-256(namespace | 32 zero bytes | tokens[0:n], key=tenant_key, person="kvmesh-chunk")
    key[i]      = BLAKE2b-256(namespace | key[i-1]      | tokens[i*n:(i+1)*n], key=tenant_key, person="kvmesh-chunk")

    part        = BLAKE2b-256(key | offset | run | stride | count, person="kvmesh-part")      a slice, as a chunk

where n is `chunk_tokens` and tokens are little-endian uint32. The canonical bytes of a namespace are a row of texts in
UTF-8, each with its length as a little-endian uint32 in front, so no two different namespaces have the same bytes:

    "kvmesh namespace 1"
    name, value       for model, revision, dtype, layers, kv_heads, head_dim, layout, chunk_tokens, shard ("rank/size")
    "tensor", name, dtype, shape ("4x2x8")       for each tensor, ordered by name

The four numbers of a slice are little-endian uint64, in bytes; the stride of a single run is 0.
Test vectors: tests/mesh/test_keys.py.

A wrong byte in a cache is worse than a miss, so whatever changes the content of the tensors must be a field here: a new
field of the engine's goes into `layout` (engine, backend, block format) or `tensors`. This module does no I/O and does
not import torch.
"""

from __future__ import annotations

import array
import hashlib
import math
import operator
import struct
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any, SupportsIndex

import numpy as np

from kvmesh.parts import Part, Range, part_of
from kvmesh.transport.errors import NamespaceError
from kvmesh.transport.limits import (
    CHAIN_CHUNKS_MAX,
    CHUNK_BYTES_MAX,
    CHUNK_TOKENS_DEFAULT,
    KEY_BYTES,
    NAMESPACE_BYTES_MAX,
    NAMESPACE_ID_BYTES,
    TENSORS_PER_CHUNK_MAX,
)

if TYPE_CHECKING:
    import torch

    from kvmesh.transport.interface import Slice

    Tokens = Sequence[int] | np.ndarray[Any, Any] | torch.Tensor

DTYPE_BYTES: dict[str, int] = {
    "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1,
    "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1, "bool": 1,
}  # fmt: skip
"""The dtypes that a chunk's tensors may have, by torch's names, and the bytes of one element."""

ROOT_KEY = bytes(KEY_BYTES)
"""The parent of a chain's first key."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One named tensor of a chunk: contiguous, row-major, `shape` in elements of `dtype`."""

    dtype: str
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.dtype not in DTYPE_BYTES:
            raise NamespaceError(f"dtype {self.dtype!r} is not known: use one of {', '.join(DTYPE_BYTES)}")
        if not isinstance(self.shape, (tuple, list)) or not self.shape or not all(_is_size(n) for n in self.shape):
            raise NamespaceError(f"tensor shape {self.shape!r} must be one or more positive sizes")
        object.__setattr__(self, "shape", tuple(self.shape))  # a list, as it comes from JSON

    @property
    def bytes(self) -> int:
        """The size of the tensor in bytes."""
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class Namespace:
    """What a chunk belongs to. Two chunks with equal tokens are the same only if every field here is equal.

    `tensors` names the tensors of one chunk. Left empty it is the KV cache of `layout` "torch": one tensor ``kv`` of
    shape ``[layers, 2, kv_heads, chunk_tokens, head_dim]`` (index 0 of the second axis is K, 1 is V), of this shard's
    heads only.

    Raises `NamespaceError`, naming the field.
    """

    model: str
    revision: str
    dtype: str
    layers: int
    kv_heads: int
    head_dim: int
    layout: str = "torch"
    chunk_tokens: int = CHUNK_TOKENS_DEFAULT
    shard: tuple[int, int] = (0, 1)
    """(rank, size) of tensor parallelism."""
    tenant: str = ""
    tensors: Mapping[str, TensorSpec] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        for name in ("model", "revision", "dtype", "layout", "tenant"):
            _check_text(f"namespace field {name!r}", getattr(self, name))
        for name in ("model", "dtype", "layout"):
            if not getattr(self, name):
                raise NamespaceError(f"namespace field {name!r} must not be empty")
        for name in ("layers", "kv_heads", "head_dim", "chunk_tokens"):
            value = getattr(self, name)
            if not _is_size(value):
                raise NamespaceError(f"namespace field {name!r} must be a positive whole number, not {value!r}")
        if self.dtype not in DTYPE_BYTES:
            raise NamespaceError(f"namespace field 'dtype' is {self.dtype!r}: use one of {', '.join(DTYPE_BYTES)}")
        object.__setattr__(self, "shard", _shard(self.shard))
        object.__setattr__(self, "tensors", self._tensors())
        if self.chunk_bytes > CHUNK_BYTES_MAX:
            raise NamespaceError(
                f"a chunk of this namespace has {self.chunk_bytes} bytes, more than {CHUNK_BYTES_MAX}: "
                "lower 'chunk_tokens'"
            )
        if len(self.canonical) > NAMESPACE_BYTES_MAX:
            raise NamespaceError(f"the namespace takes more than {NAMESPACE_BYTES_MAX} bytes: shorten its names")

    def _tensors(self) -> dict[str, TensorSpec]:
        shape = (self.layers, 2, self.kv_heads, self.chunk_tokens, self.head_dim)
        kv = TensorSpec(self.dtype, shape)
        if not self.tensors:
            if self.layout != "torch":
                raise NamespaceError(f"namespace field 'tensors' must be given for layout {self.layout!r}")
            return {"kv": kv}
        if len(self.tensors) > TENSORS_PER_CHUNK_MAX:
            raise NamespaceError(f"namespace field 'tensors' has more than {TENSORS_PER_CHUNK_MAX} tensors")
        for name, spec in self.tensors.items():
            _check_text("a name in namespace field 'tensors'", name)
            if not isinstance(spec, TensorSpec):
                raise NamespaceError(f"namespace field 'tensors' has {spec!r} for {name!r}, which is not a TensorSpec")
        # dataclasses.replace() hands the old spec on beside a new chunk_tokens: the two must not part unseen.
        if self.layout == "torch" and self.tensors.get("kv", kv) != kv:
            raise NamespaceError(f"namespace field 'tensors' has kv as {self.tensors['kv']}, but its fields say {kv}")
        return {name: self.tensors[name] for name in sorted(self.tensors)}

    @cached_property
    def chunk_bytes(self) -> int:
        """The size of one chunk in the arena: its tensors one after the other, each at a multiple of 64 bytes."""
        end = 0
        for start, spec in self.placements.values():
            end = start + spec.bytes
        return end

    @cached_property
    def placements(self) -> dict[str, tuple[int, TensorSpec]]:
        """Where each tensor starts within a chunk, in bytes."""
        found: dict[str, tuple[int, TensorSpec]] = {}
        at = 0
        for name, spec in self.tensors.items():
            found[name] = (at, spec)
            at = -(-(at + spec.bytes) // 64) * 64
        return found

    @cached_property
    def canonical(self) -> bytes:
        """The namespace as bytes: what its digest is taken of. The tenant is not in it: it is the key of the digest."""
        parts = [b"kvmesh namespace 1"]
        for item in fields(self):
            if item.name in ("tenant", "tensors"):
                continue
            value = getattr(self, item.name)
            text = "{}/{}".format(*value) if item.name == "shard" else str(value)
            parts += [item.name.encode(), text.encode()]
        for name, spec in self.tensors.items():
            parts += [b"tensor", name.encode(), spec.dtype.encode(), "x".join(map(str, spec.shape)).encode()]
        return b"".join(struct.pack("<I", len(part)) + part for part in parts)

    @cached_property
    def digest(self) -> bytes:
        """32 bytes that stand for the namespace, tenant included, in every key."""
        return hashlib.blake2b(self.canonical, digest_size=32, key=self._tenant_key, person=b"kvmesh-space").digest()

    @cached_property
    def id(self) -> str:
        """The namespace's short name: the first 16 bytes of its digest, in hex."""
        return self.digest[:NAMESPACE_ID_BYTES].hex()

    @cached_property
    def _tenant_key(self) -> bytes:
        return hashlib.blake2b(self.tenant.encode(), digest_size=64, person=b"kvmesh-tenant").digest()

    def part(
        self,
        *,
        layers: Range | None = None,
        heads: Range | None = None,
        tensor: str | None = None,
        byte_range: Range | None = None,
    ) -> Part:
        """A slice of each chunk, for a get that takes no more than it needs.

        `layers`, `heads`: (first, end), of the KV cache of layout "torch"; `heads` count within this shard. `tensor`:
        one of the named tensors. `byte_range`: (first, end) within the chunk. Raises `NamespaceError`.
        """
        return part_of(self, layers=layers, heads=heads, tensor=tensor, byte_range=byte_range)

    def chain(self, token_ids: Tokens) -> list[bytes]:
        """The keys of a prompt's whole chunks, first to last; tokens past the last whole chunk have no key.

        `token_ids`: one-dimensional integers in [0, 2^32): a list, a numpy array or a CPU tensor.
        Raises `NamespaceError` for anything else, and for a prompt of more than `CHAIN_CHUNKS_MAX` chunks.
        """
        return self.extend(ROOT_KEY, token_ids)

    def extend(self, parent: bytes, token_ids: Tokens) -> list[bytes]:
        """As `chain`, for tokens that follow the chunk `parent`."""
        if len(parent) != KEY_BYTES:
            raise NamespaceError(f"a parent key has {KEY_BYTES} bytes, not {len(parent)}")
        view = token_bytes(token_ids)
        step = self.chunk_tokens * 4
        if len(view) // step > CHAIN_CHUNKS_MAX:
            raise NamespaceError(f"the prompt has more than {CHAIN_CHUNKS_MAX} chunks of {self.chunk_tokens} tokens")
        # The keyed state with the namespace in it is made once and copied: a copy is cheaper than keying again.
        base = hashlib.blake2b(self.digest, digest_size=KEY_BYTES, key=self._tenant_key, person=b"kvmesh-chunk")
        keys: list[bytes] = []
        for start in range(0, len(view) - step + 1, step):
            state = base.copy()
            state.update(parent)
            state.update(view[start : start + step])
            parent = state.digest()
            keys.append(parent)
        return keys


def part_key(key: bytes, part: Slice) -> bytes:
    """What names the slice `part` of the chunk `key` where it lies by itself in an arena."""
    stride_bytes = part.stride_bytes if part.count > 1 else 0
    numbers = struct.pack("<4Q", part.offset_bytes, part.run_bytes, stride_bytes, part.count)
    return hashlib.blake2b(key + numbers, digest_size=KEY_BYTES, person=b"kvmesh-part").digest()


def token_bytes(token_ids: Tokens) -> memoryview:
    """Token ids as little-endian uint32, without Python work per token; not copied where they are that already."""
    if isinstance(token_ids, (list, tuple)):
        try:
            data = array.array("I", token_ids)
        except (OverflowError, TypeError) as error:
            raise NamespaceError(f"token ids must be whole numbers from 0 to 2^32-1: {error}") from None
        if sys.byteorder == "big":
            data.byteswap()
        return memoryview(data).cast("B")
    try:
        tokens = np.asarray(token_ids)
    except (TypeError, ValueError, RuntimeError) as error:  # a tensor on a GPU, of a dtype that numpy lacks, or ragged
        raise NamespaceError(f"token ids must be one row of whole numbers in CPU memory: {error}") from None
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise NamespaceError(f"token ids must be one row of whole numbers, not {tokens.dtype} of shape {tokens.shape}")
    if tokens.size and (int(tokens.min()) < 0 or int(tokens.max()) > 0xFFFFFFFF):
        raise NamespaceError("token ids must lie between 0 and 2^32-1")
    return np.ascontiguousarray(tokens, "<u4").view("u1").data


def _shard(value: Sequence[SupportsIndex]) -> tuple[int, int]:
    try:
        rank, size = (operator.index(part) for part in value)
    except (TypeError, ValueError):
        raise NamespaceError(f"namespace field 'shard' must be (rank, size), not {value!r}") from None
    if not 0 <= rank < size:
        raise NamespaceError(f"namespace field 'shard' is ({rank}, {size}): the rank must be from 0 to size-1")
    return rank, size


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _check_text(what: str, value: object) -> None:
    """Text that can be written as UTF-8: a lone surrogate has no bytes, so it can name nothing."""
    if not isinstance(value, str):
        raise NamespaceError(f"{what} must be text, not {value!r}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise NamespaceError(f"{what} is {value!r}, which is not valid Unicode") from None
