"""What discovery counts, and what it says aloud: for people who look, and for those who read the log.

Values and log lines; nothing is decided here, and nothing is counted here.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .following import FollowerCounters
from .gossip import GossipCounters
from .keying import KeyCounters
from .membership import Conflict, Failed, HeadTold, Joined, Left
from .static import PingCounters
from .swim.base import SwimCounters
from .swim.exchanging import JoinFailed

if TYPE_CHECKING:
    from .network import NetworkCounters

_log = logging.getLogger("kvmesh.discovery")


@dataclass(frozen=True, slots=True)
class GossipStats:
    """A copy of what membership by gossip counts."""

    protocol: SwimCounters
    members: GossipCounters
    network: NetworkCounters
    keys: KeyCounters
    rumours: int
    """Rumours that wait to be told."""
    health: int
    """How badly this process itself does, by its own probes: 0 is well."""


@dataclass(frozen=True, slots=True)
class DiscoveryStats:
    """A copy of what discovery counts."""

    pings: PingCounters | None
    """Of a static membership."""
    gossip: GossipStats | None
    following: FollowerCounters
    followers: int
    """Nodes that are followed now."""
    map_entries: int
    map_entries_refused: int
    """Chunks that found no room in the map."""
    snapshots_served: int
    snapshots_refused: int
    """Times that a follower was told to come back for its snapshot."""
    calls_failed: int
    """Calls to peers that got no answer in time."""
    protocol_errors: int
    """Messages of peers, either way, that could not be read, and calls that peers refused."""
    unexpected_errors: int
    """Exceptions that are none of the documented ones, of a transport or of discovery itself."""


def tell(event: object) -> None:
    """What an operator wants to read."""
    match event:
        case Joined(member):
            _log.info("%s %s joined at %s, epoch %d", member.role, member.name, member.address, member.epoch)
        case Failed(member):
            _log.warning(
                "%s %s at %s does not answer: its chunks are forgotten", member.role, member.name, member.address
            )
        case Left(member):
            _log.info("%s %s left", member.role, member.name)
        case Conflict(name, address, other_address):
            _log.warning(
                "two processes are called %s: %s and %s; give one another --name", name, address, other_address
            )
        case JoinFailed(reasons, retry_in_s):
            _log.warning(
                "no node answers that is to be joined; trying again in %.0f s: %s", retry_in_s, "; ".join(reasons)
            )
        case HeadTold():
            pass
        case _:
            _log.debug("%s", event)
