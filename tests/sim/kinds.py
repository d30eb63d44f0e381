"""The kinds of membership, as the harness makes them."""

from __future__ import annotations

from random import Random

from kvmesh.discovery.gossip import GossipMembership
from kvmesh.discovery.head import Head
from kvmesh.discovery.membership import Membership
from kvmesh.discovery.static import StaticMembership
from kvmesh.discovery.swim.profile import KVMESH_LAN, Profile
from kvmesh.discovery.wire import packets
from tests.sim.process import Kind, Node, Process


def static_kind(node: Node, random: Random) -> Membership:
    """A list of peers."""
    return StaticMembership(node.start.identity, node.start.seeds, head=lambda: _head_of(node), random=random)


def gossip_kind(
    profile: Profile = KVMESH_LAN, *, encrypted: bool = False, made: type[GossipMembership] = GossipMembership
) -> Kind:
    """Gossip with this profile."""
    overhead_bytes = packets.overhead_bytes(encrypted, "")

    def make(node: Node, random: Random) -> Membership:
        return made(
            node.start.identity,
            node.endpoint,
            head=lambda: _head_of(node),
            random=random,
            profile=profile,
            seeds=node.start.seeds,
            known=node.start.known,
            packet_overhead_bytes=overhead_bytes,
            public_key=PUBLIC_KEY,
        )

    return make


PUBLIC_KEY = bytes(range(32))


def _head_of(node: Node) -> Head | None:
    return node.journal.head if isinstance(node, Process) else node.head
