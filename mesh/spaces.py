"""What nodes tell each other of their namespaces, and what they compare.

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

from kvmesh.keys import Namespace

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
