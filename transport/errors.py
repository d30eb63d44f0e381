"""The exceptions of kvmesh: one tree, and what a caller does about each.

    KVMeshError
    ├── CallerError              you erred: what was asked cannot be; correct the call
    │   ├── NamespaceError       a field of a namespace is missing, wrong, or unknown to the agent
    │   ├── TensorError          a tensor's name, shape, dtype or device is not what its namespace says
    │   ├── ChunkTooLargeError   a chunk can never fit into the arena
    │   ├── LeaseError           a hit was used after its release, or after its leases ran out
    │   ├── UnsupportedModelError a model's cache cannot be shared safely: run it without the mesh
    │   └── SettingsError        a flag, a variable, a file or an address is not usable
    ├── AgentUnavailableError    the local agent is not there, or went away: start it, then connect again
    │   └── VersionMismatchError the agent speaks another version of the protocol: upgrade one of the two
    ├── CorruptChunkError        a chunk's bytes changed in memory: use those before it, compute the rest
    └── PeerError                they erred: counted where it happens, and a miss for whoever asked
        ├── ProtocolError        a peer's message is malformed, too large, or of a version that we do not speak
        └── UnreachableError     a peer did not answer in time, or nothing listens there

A miss is never an exception (design.md, promise 3): it is a shorter hit. A `PeerError` never reaches an engine.

This module stands in the lowest layer, so that all three folders raise from one tree. It imports nothing.
"""


class KVMeshError(Exception):
    """The root. Catch it where any failure of the mesh means "go on without it"."""


class CallerError(KVMeshError):
    """You asked for what cannot be. The message says which argument, and what would be right."""


class NamespaceError(CallerError):
    """A namespace's field is missing or wrong. The message names the field."""


class TensorError(CallerError):
    """A tensor is not of the shape, dtype or name that its namespace gives to chunks. The message has both."""


class ChunkTooLargeError(CallerError):
    """A chunk is larger than the whole arena. Start the agent with more ``--memory``, or use fewer tokens a chunk."""


class LeaseError(CallerError):
    """A hit was used after its ``with`` block, or after its leases ran out. The message says which: copy what you need
    inside the block, or get the chain again."""


class UnsupportedModelError(CallerError):
    """A model's cache is not a function of the tokens alone, or has a form that chunks cannot hold. The message says
    why."""


class SettingsError(CallerError):
    """A flag, an environment variable, a file or an address cannot be used. The message says which and why."""


class AgentUnavailableError(KVMeshError):
    """The local agent does not answer. Start ``kvmesh agent``; an engine goes on without hits until then."""


class VersionMismatchError(AgentUnavailableError):
    """The agent speaks another protocol version. Upgrade kvmesh on the side that the message names."""


class CorruptChunkError(KVMeshError):
    """The bytes of a chunk do not match the checksum of its put. It was not given out: compute from this chunk on."""


class PeerError(KVMeshError):
    """Another process of the mesh erred. It is counted; whoever asked sees a miss."""


class ProtocolError(PeerError):
    """A peer sent what the protocol does not allow. The message is dropped; the peer is not trusted further."""


class UnreachableError(PeerError):
    """A peer did not answer within the time given. Try the next one."""
