"""How fast and how hard the membership works: memberlist's three profiles, and ours.

A number here is a trade, said beside it. All members of a mesh should have the same profile: a node that probes faster
than its peers finds crashes sooner, and suspects slow ones sooner.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final


@dataclass(frozen=True, slots=True)
class Profile:
    """The constants of one kind of network. The defaults are memberlist's for a LAN (config.go, DefaultLANConfig)."""

    name: str
    probe_interval_s: float = 1.0
    """Between two probes. Half of it: crashes are seen in half the time, for twice the packets, loaded or not."""
    probe_timeout_s: float = 0.5
    """How long a direct answer may take; then others are asked. Above the 99th percentile of a round trip, with room
    for a busy scheduler: a timeout costs seven packets."""
    ping_interval_s: float = 0.0
    """Between two pings of one probe to its target, until it answers or is judged; once others were asked, further ones
    are asked with each. A lost packet is not a lost node. Where nothing is lost the first ping is answered, and that is
    all. 0: one ping, and others are asked once."""
    indirect_checks: int = 3
    """Nodes that are asked to probe for us. With three, a lossy path of our own is told from a dead node."""
    suspicion_mult: int = 4
    """Suspicion lasts this times log10(N) probe intervals: long enough that the suspect hears of it by gossip (whose
    time grows with log N as well), answers, and is heard."""
    suspicion_min_s: float = 0.0
    """And at least so long, however small the mesh: log10(N) is 1 for ten nodes and for three, and a process that gets
    no processor for two seconds is not dead."""
    suspicion_max_timeout_mult: int = 6
    """It lasts this much longer while nobody else confirms it: one node that suspects all others is ill itself."""
    insist_interval_s: float = 0.0
    """From half of a suspicion on, each node that still has it asks the suspect itself, this often: where a refutation
    got lost, it is fetched. 0: never. It costs nothing but where it is needed: at a real crash, some packets a node."""
    awareness_max: int = 8
    """How many times slower a node probes that finds its own probes failing."""
    gossip_interval_s: float = 0.2
    """Between two rounds of gossip."""
    gossip_nodes: int = 3
    """Nodes in one round: with three, a rumour's carriers triple each round, and loss costs a round, not the rumour."""
    gossip_at_once: bool = False
    """Begin a round as soon as there is a rumour, if the last one was an interval ago: the rumour waits at no node."""
    gossip_to_the_dead_s: float = 30.0
    """How long a failed node still gets gossip, to hear of it and refute."""
    retransmit_mult: int = 4
    """A rumour is sent this times ceil(log10(N + 1)) times by each node. At 30 % loss and N = 1,000 some 11 copies come
    to every node, so one in 70,000 misses it and waits for a push/pull."""
    transmits_min: int = 0
    """At least so many times, however small the mesh."""
    push_pull_interval_s: float = 30.0
    """Between two exchanges of everything, which repair what gossip missed."""
    push_pull_linear: bool = False
    """Beyond 32 nodes, the interval grows with N, not with log N: the bytes of an exchange grow with N too, so that
    their rate stays the same. The price: in a mesh of 1,000, what gossip missed takes as many times longer."""
    reconnect_interval_s: float = 30.0
    """Between two attempts to reach a failed node (Serf's habit): it heals partitions that outlast gossip to the
    dead."""
    dead_reclaim_s: float = 0.0
    """After so long a failed name may be taken by another address, even when neither has an epoch. 0: never."""
    stream_timeout_s: float = 10.0
    """For one exchange over a stream."""
    packet_bytes_max: int = 1400
    """A packet that no common network has to cut in pieces, with room for tunnels."""


LAN: Final = Profile("memberlist-lan")
"""memberlist's LAN profile, unchanged (Serf's reconnect included)."""

WAN: Final = replace(
    LAN,
    name="wan",
    probe_interval_s=5.0,  # a WAN's round trips and bursts of loss are longer,
    probe_timeout_s=3.0,  # so answers get more time,
    suspicion_mult=6,  # suspects more,
    push_pull_interval_s=60.0,
    gossip_interval_s=0.5,  # and gossip comes less often,
    gossip_nodes=4,  # to one more node
    gossip_to_the_dead_s=60.0,
    stream_timeout_s=30.0,
)
"""memberlist's WAN profile: between sites."""

LOCAL: Final = replace(
    LAN,
    name="local",
    probe_timeout_s=0.2,
    indirect_checks=1,  # one host's loopback does not lose packets on one path alone
    retransmit_mult=2,
    suspicion_mult=3,
    push_pull_interval_s=15.0,
    gossip_interval_s=0.1,
    gossip_to_the_dead_s=15.0,
    stream_timeout_s=1.0,
)
"""memberlist's profile for loopback."""

KVMESH_LAN: Final = replace(
    LAN,
    name="lan",
    probe_interval_s=0.5,
    probe_timeout_s=0.25,
    suspicion_mult=3,  # so at 100 nodes a suspicion lasts 3 s, and one other accuser is enough to end it that soon
    suspicion_min_s=3.0,  # in a smaller mesh, too
    ping_interval_s=0.08,
    insist_interval_s=0.15,
    gossip_interval_s=0.1,
    gossip_at_once=True,
    retransmit_mult=6,  # with 4, one rumour in ten misses one of 30 nodes at 30 % loss
    transmits_min=18,  # what the multiplier gives 100 nodes; with less, a small mesh misses one rumour in a hundred
    push_pull_interval_s=15.0,
    push_pull_linear=True,
    reconnect_interval_s=5.0,
    stream_timeout_s=5.0,
)
"""Ours, the default. A holder that crashed costs every fetch that still goes to it, so it is found in less than half of
memberlist's time; that costs twice the probes, about 1 kB a second and node. docs/discovery.md has what was measured,
for both."""

PROFILES: Final = {"lan": KVMESH_LAN, "wan": WAN, "local": LOCAL, "memberlist-lan": LAN}
"""By the name that ``--profile`` takes."""
