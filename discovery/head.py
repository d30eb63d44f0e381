"""The head of a journal: 48 bytes that say how far it is and what, in sum, it holds.

    node id 16 | epoch u64 | seq u64 | count u64 | fingerprint u64        (little-endian)

Two heads of one node that differ tell a follower that it is behind; equal seq with another count or fingerprint tells
it that it is wrong. A head is what gossip and pings carry: never a key. This module is values only.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from kvmesh.transport.errors import ProtocolError

_HEAD: Final = struct.Struct("<16sQQQQ")
HEAD_BYTES: Final = _HEAD.size


@lru_cache(maxsize=8192)
def node_id(name: str) -> bytes:
    """The 16 bytes that stand for a node's name: its BLAKE2b-128."""
    return hashlib.blake2b(name.encode(), digest_size=16).digest()


@dataclass(frozen=True, slots=True)
class Head:
    """The summary of one journal at one moment."""

    node_id: bytes
    epoch: int
    """The node's start: larger at each start."""
    seq: int
    """The number of the newest entry; 0 before the first."""
    count: int
    """Copies that the node holds: a chunk on two tiers counts twice."""
    fingerprint: int
    """64 bits over all copies, independent of their order (`kvmesh.discovery.holdings`)."""

    def to_bytes(self) -> bytes:
        """The 48 bytes."""
        return _HEAD.pack(self.node_id, self.epoch, self.seq, self.count, self.fingerprint)

    @classmethod
    def from_bytes(cls, data: bytes) -> Head:
        """The head in `data`. Raises `ProtocolError` when it has another length."""
        if len(data) != HEAD_BYTES:
            raise ProtocolError(f"a head has {HEAD_BYTES} bytes, not {len(data)}")
        return cls(*_HEAD.unpack(data))
