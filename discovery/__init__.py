"""Who is there and who holds what: membership, journal, following, map. Imports `kvmesh.transport` only.

A process makes one `Discovery` over its transport's `call`, and passes it the calls that begin with `CALL_PREFIX`. A
node also has a `Journal` that it tells about every chunk; everybody's journals, followed, are the `ClusterMap`. The
other names are what these give out.
"""

from .driver import CALL_PREFIX, Discovery, Gossip
from .following import FollowerCounters
from .gossip import GossipMembership
from .head import HEAD_BYTES, Head, node_id
from .holdings import Record, Totals
from .journal import Journal
from .map import ClusterMap, MapSummary, NamespaceSummary, NodeSummary, Run
from .membership import Conflict, Member, Membership, MemberState
from .messages import Identity
from .packing import TIERS
from .reports import DiscoveryStats, GossipStats
from .static import PingCounters, StaticMembership

__all__ = [
    "CALL_PREFIX",
    "HEAD_BYTES",
    "TIERS",
    "ClusterMap",
    "Conflict",
    "Discovery",
    "DiscoveryStats",
    "FollowerCounters",
    "Gossip",
    "GossipMembership",
    "GossipStats",
    "Head",
    "Identity",
    "Journal",
    "MapSummary",
    "Member",
    "MemberState",
    "Membership",
    "NamespaceSummary",
    "NodeSummary",
    "PingCounters",
    "Record",
    "Run",
    "StaticMembership",
    "Totals",
    "node_id",
]
