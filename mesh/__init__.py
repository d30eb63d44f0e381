"""kvmesh: a peer-to-peer mesh that shares the KV cache of LLM inference engines between machines.

    import kvmesh
    mesh = kvmesh.connect()
    space = kvmesh.Namespace(model="…", revision="…", dtype="bfloat16", layers=30, kv_heads=3, head_dim=64)
    chain = space.chain(token_ids)
    mesh.put(space, {chain[0]: tensor})
    with mesh.get(space, chain, deadline_s=0.5) as hit: ...

Names are loaded when they are first used, so that ``import kvmesh`` and ``kvmesh --help`` stay quick and need neither
numpy nor torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvmesh.client import Mesh, PutResult, connect
    from kvmesh.hit import Hit
    from kvmesh.keys import Namespace, TensorSpec
    from kvmesh.parts import Part
    from kvmesh.transport.errors import (
        AgentUnavailableError,
        CallerError,
        ChunkTooLargeError,
        CorruptChunkError,
        KVMeshError,
        LeaseError,
        NamespaceError,
        PeerError,
        ProtocolError,
        SettingsError,
        TensorError,
        UnreachableError,
        UnsupportedModelError,
        VersionMismatchError,
    )

_HOMES = {
    "kvmesh.client": ("Mesh", "PutResult", "connect"),
    "kvmesh.hit": ("Hit",),
    "kvmesh.keys": ("Namespace", "TensorSpec"),
    "kvmesh.parts": ("Part",),
    "kvmesh.transport.errors": (
        "AgentUnavailableError", "CallerError", "ChunkTooLargeError", "CorruptChunkError", "KVMeshError", "LeaseError",
        "NamespaceError", "PeerError", "ProtocolError", "SettingsError", "TensorError", "UnreachableError",
        "UnsupportedModelError", "VersionMismatchError",
    ),
}  # fmt: skip
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__version__ = "0.1.0"
__all__ = [
    "AgentUnavailableError",
    "CallerError",
    "ChunkTooLargeError",
    "CorruptChunkError",
    "Hit",
    "KVMeshError",
    "LeaseError",
    "Mesh",
    "Namespace",
    "NamespaceError",
    "Part",
    "PeerError",
    "ProtocolError",
    "PutResult",
    "SettingsError",
    "TensorError",
    "TensorSpec",
    "UnreachableError",
    "UnsupportedModelError",
    "VersionMismatchError",
    "connect",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'kvmesh' has no attribute {name!r}")
    return getattr(import_module(_HOME_OF[name]), name)
