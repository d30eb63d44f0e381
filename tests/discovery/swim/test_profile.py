"""memberlist's constants, typed from its config.go, and what holds of every profile."""

from __future__ import annotations

import pytest

from kvmesh.discovery.swim.profile import KVMESH_LAN, LAN, LOCAL, PROFILES, WAN, Profile

MEMBERLIST = {
    # TCPTimeout, IndirectChecks, RetransmitMult, SuspicionMult, SuspicionMaxTimeoutMult, PushPullInterval,
    # ProbeTimeout, ProbeInterval, AwarenessMaxMultiplier, GossipNodes, GossipInterval, GossipToTheDeadTime,
    # UDPBufferSize, DeadNodeReclaimTime
    "LAN": (10.0, 3, 4, 4, 6, 30.0, 0.5, 1.0, 8, 3, 0.2, 30.0, 1400, 0.0),
    "WAN": (30.0, 3, 4, 6, 6, 60.0, 3.0, 5.0, 8, 4, 0.5, 60.0, 1400, 0.0),
    "Local": (1.0, 1, 2, 3, 6, 15.0, 0.2, 1.0, 8, 3, 0.1, 15.0, 1400, 0.0),
}


@pytest.mark.parametrize(("name", "profile"), [("LAN", LAN), ("WAN", WAN), ("Local", LOCAL)])
def test_they_have_memberlists_constants(name: str, profile: Profile):
    assert MEMBERLIST[name] == (
        profile.stream_timeout_s,
        profile.indirect_checks,
        profile.retransmit_mult,
        profile.suspicion_mult,
        profile.suspicion_max_timeout_mult,
        profile.push_pull_interval_s,
        profile.probe_timeout_s,
        profile.probe_interval_s,
        profile.awareness_max,
        profile.gossip_nodes,
        profile.gossip_interval_s,
        profile.gossip_to_the_dead_s,
        profile.packet_bytes_max,
        profile.dead_reclaim_s,
    )


@pytest.mark.parametrize("profile", [LAN, WAN, LOCAL], ids=lambda profile: profile.name)
def test_and_none_of_our_additions(profile: Profile):
    additions = profile.ping_interval_s, profile.insist_interval_s, profile.gossip_at_once, profile.push_pull_linear
    assert additions == (0.0, 0.0, False, False)
    assert profile.transmits_min == 0
    assert profile.reconnect_interval_s == 30.0  # Serf's


def test_ours_finds_a_crash_in_half_of_memberlists_time():
    assert KVMESH_LAN.probe_interval_s * KVMESH_LAN.suspicion_mult < LAN.probe_interval_s * LAN.suspicion_mult / 2
    assert KVMESH_LAN.ping_interval_s < KVMESH_LAN.probe_timeout_s


def test_their_names_are_those_of_the_setting():
    assert PROFILES == {"lan": KVMESH_LAN, "wan": WAN, "local": LOCAL, "memberlist-lan": LAN}
    assert all(profile.name == name for name, profile in PROFILES.items())


@pytest.mark.parametrize("profile", PROFILES.values(), ids=lambda profile: profile.name)
def test_a_probe_has_time_for_both_of_its_stages(profile: Profile):
    assert 2 * profile.probe_timeout_s <= profile.probe_interval_s or profile is WAN
    assert profile.probe_timeout_s < profile.probe_interval_s
