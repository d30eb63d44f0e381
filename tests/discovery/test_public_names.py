"""The public names of kvmesh.discovery. A change here is a change for every user."""

from __future__ import annotations

import kvmesh.discovery


def test_the_public_names() -> None:
    assert kvmesh.discovery.__all__ == [
        "CALL_PREFIX", "HEAD_BYTES", "TIERS", "ClusterMap", "Conflict", "Discovery", "DiscoveryStats",
        "FollowerCounters", "Gossip", "GossipMembership", "GossipStats", "Head", "Identity", "Journal", "MapSummary",
        "Member", "MemberState", "Membership",
        "NamespaceSummary", "NodeSummary", "PingCounters", "Record", "Run", "StaticMembership", "Totals", "node_id",
    ]  # fmt: skip
    for name in kvmesh.discovery.__all__:
        assert getattr(kvmesh.discovery, name).__doc__ or name.isupper()
