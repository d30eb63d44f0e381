"""Namespaces on the way: what nodes tell each other of theirs and compare, and the JSON that a client opens one with.

Two nodes whose namespaces differ in a single field share nothing, and the only sign would be a hit rate of zero. So a
node describes its namespaces in its journal, and an engine that opens one hears which field keeps it from its peers'
chunks. The tenant's name is a secret of the hash: peers are told a tag of it that shows no more than whether two are
equal.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import msgspec

from kvmesh.keys import Namespace, TensorSpec
from kvmesh.transport.errors import NamespaceError

COMPARED = ("revision", "dtype", "layers", "kv_heads", "head_dim", "layout", "chunk_tokens")
"""Fields that all nodes that serve one model for one tenant must agree on."""


def describe(space: Namespace) -> dict[str, Any]:
    """The public fields of a namespace, as its journal carries them (JSON)."""
    tag = hashlib.blake2b(space.tenant.encode(), digest_size=8, person=b"kvmesh-tag").hexdigest()
    return {
        "model": space.model,
        **{name: getattr(space, name) for name in COMPARED},
        "shard": space.shard,
        "tenant": tag if space.tenant else "",
    }


def differences(space: Namespace, descriptions: Iterable[bytes]) -> list[str]:
    """What keeps `space` from chunks that peers hold of the same model and tenant: a sentence a field. Empty when
    nothing does."""
    mine = describe(space)
    notes: dict[str, None] = {}
    for description in descriptions:
        try:
            theirs = msgspec.json.decode(description, type=dict[str, Any])
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):  # it comes from a peer: it may be anything
            continue
        if theirs.get("model") != space.model or theirs.get("tenant") != mine["tenant"]:
            continue
        differ = [name for name in COMPARED if theirs.get(name) != mine[name]]
        if not differ and theirs.get("shard") != list(space.shard):
            continue
        for name in differ:
            notes[
                f"model {space.model!r}: {name} is {mine[name]!r} here and {theirs.get(name)!r} on a peer: "
                "these two share no chunks"
            ] = None
    return list(notes)


class _SpaceFields(msgspec.Struct, forbid_unknown_fields=True):
    model: str
    revision: str
    dtype: str
    layers: int
    kv_heads: int
    head_dim: int
    layout: str = "torch"
    chunk_tokens: int = 256
    shard: tuple[int, int] = (0, 1)
    tenant: str = ""
    tensors: dict[str, TensorSpec] = {}


def encode(space: Namespace) -> bytes:
    """A namespace as JSON: its fields, by their names."""
    return msgspec.json.encode({name: getattr(space, name) for name in _SpaceFields.__struct_fields__})


def decode(document: bytes) -> Namespace:
    """The namespace of a JSON document. Raises `NamespaceError`, naming the field that is missing, unknown or wrong."""
    try:
        fields = msgspec.json.decode(document, type=_SpaceFields)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise NamespaceError(f"the namespace is not usable: {error}") from None
    return Namespace(**{name: getattr(fields, name) for name in _SpaceFields.__struct_fields__})
