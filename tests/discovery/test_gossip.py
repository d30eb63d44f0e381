"""Membership by gossip, above the protocol: what a member is, and heads."""

from __future__ import annotations

import pytest

from kvmesh.discovery.actions import (
    Heard,
    JournalChanged,
    Refuse,
    Requested,
)
from kvmesh.discovery.gossip import HEAD_PREFIX
from kvmesh.discovery.head import Head, node_id
from kvmesh.discovery.heads import pack_heads, unpack_heads
from kvmesh.discovery.membership import Changed, Conflict, Failed, HeadTold, Joined, Left, MemberState
from kvmesh.discovery.messages import Leave, Ping
from kvmesh.discovery.meta import Meta
from kvmesh.discovery.serf import decode_state, encode_state
from kvmesh.discovery.swim.events import (
    Pulled,
)
from kvmesh.discovery.wire.messages import Dead, Endpoint, PushPull, Suspect, User
from kvmesh.transport.limits import CONFLICTS_MAX, HEAD_INTERVAL_S
from tests.discovery.gossip_side import (
    ELSEWHERE,
    IDENTITY,
    SERF_META,
    THERE,
    Side,
    alive,
    events,
    head,
    kinds,
    meta,
    told,
)
from tests.discovery.swim.support import only

# --- members ---------------------------------------------------------------------------------------------------------


def test_a_member_is_what_its_meta_says():
    side = Side()
    joined = only([one for one in side.hear(alive(said=meta(facts={"host": "h", "gpus": "2"}))) if type(one) is Joined])
    assert isinstance(joined, Joined)
    member = joined.member
    assert (member.name, member.role, member.state) == ("b", "agent", MemberState.ALIVE)
    assert (member.address, member.gossip_address) == ("10.0.0.2:7000", "10.0.0.2:7946")
    assert (member.epoch, member.incarnation, member.public_key) == (5, 1, b"k" * 32)
    assert member.meta == {"host": "h", "gpus": "2"}
    assert (member.last_seen, member.rtt_s) == (side.now, None)
    assert side.membership.member("b") == member
    assert side.membership.members() == [member]


def test_this_process_is_no_member_of_its_own():
    side = Side()
    assert side.membership.members() == []
    assert side.membership.member("a") is None
    assert side.membership.member("nobody") is None


def test_its_own_meta_is_what_others_can_read():
    side = Side()
    assert side.membership.swim.own.meta == Meta("agent", 7000, 5_000_000).encode()


def test_a_later_start_outranks_what_was_said_of_the_earlier_ones():
    """Epochs are milliseconds; what a name's earlier starts had to refute made their incarnations a little larger."""
    assert Side().membership.swim.own.incarnation == 5000


@pytest.mark.parametrize(
    ("ip", "address", "gossip_address"),
    [
        (bytes([10, 0, 0, 2]), "10.0.0.2:7000", "10.0.0.2:7946"),
        (bytes(10) + b"\xff\xff" + bytes([10, 0, 0, 2]), "10.0.0.2:7000", "10.0.0.2:7946"),
        (bytes(15) + b"\x01", "[::1]:7000", "[::1]:7946"),
    ],
)
def test_addresses_are_texts(ip: bytes, address: str, gossip_address: str):
    side = Side()
    side.hear(alive(place=Endpoint(ip, 7946)))
    member = side.membership.member("b")
    assert member is not None
    assert (member.address, member.gossip_address) == (address, gossip_address)


def test_events_of_a_members_life():
    side = Side()
    lives = [
        (alive(), [Joined, HeadTold], MemberState.ALIVE),
        (Suspect(1, "b", "c"), [Changed], MemberState.SUSPECT),
        (alive(incarnation=2), [Changed], MemberState.ALIVE),
        (alive(incarnation=3, said=meta(facts={"host": "h"})), [Changed, HeadTold], MemberState.ALIVE),
        (Dead(3, "b", "c"), [Failed], MemberState.FAILED),
        (alive(incarnation=4), [Joined, HeadTold], MemberState.ALIVE),
        (Dead(4, "b", "b"), [Left], MemberState.LEFT),
        (alive(incarnation=5, epoch=6), [Joined, HeadTold], MemberState.ALIVE),
        (alive(incarnation=1, epoch=7, place=ELSEWHERE), [Changed, HeadTold], MemberState.ALIVE),
    ]
    for message, expected, state in lives:
        found = side.hear(message)
        assert kinds(found) == expected
        member = side.membership.member("b")
        assert member is not None
        assert member.state == state
        assert isinstance(found[0], Joined | Changed | Failed | Left)
        assert found[0].member == member


def test_whoever_has_no_journal_has_no_head():
    side = Side()
    assert kinds(side.hear(alive(said=meta("controller")))) == [Joined]
    assert kinds(side.hear(told(head()))) == [HeadTold], "but what it tells is passed on"
    member = side.membership.member("b")
    assert member is not None
    assert (member.role, member.head) == ("controller", None)


def test_heard_elsewhere_a_member_was_seen():
    side = Side()
    side.hear(alive())
    side.now += 10.0
    assert side.feed(Heard("b", 4)) == side.feed(Heard("nobody", 5)) == []
    assert side.membership.members()[0].last_seen == 100.0, "that was another start"
    side.feed(Heard("b", 5))
    assert side.membership.members()[0].last_seen == 110.0


@pytest.mark.parametrize("message", [Ping(IDENTITY, None), Leave("b", 5)], ids=lambda one: type(one).__name__)
def test_a_peer_of_the_static_kind_is_refused_with_advice(message: Ping | Leave):
    refusal = only(Side().feed(Requested(7, message)))
    assert isinstance(refusal, Refuse)
    assert refusal.token == 7
    assert "join with a gossip address" in refusal.reason


def test_conflicts_are_told_once_with_both_addresses():
    side = Side()
    side.hear(alive())
    conflict = Conflict("b", "10.0.0.2:7946", "10.0.0.3:7946")
    assert side.hear(alive(incarnation=9, place=ELSEWHERE)) == [conflict]
    assert side.hear(alive(incarnation=9, place=ELSEWHERE)) == []
    assert side.membership.conflicts() == [conflict]
    own = Conflict("a", "10.0.0.1:7946", "10.0.0.3:7946")
    assert side.hear(alive("a", 1 << 20, ELSEWHERE, epoch=6_000_000)) == [own]
    assert side.membership.conflicts() == [conflict, own]


def test_conflicts_are_bounded_and_the_oldest_goes():
    side = Side()
    side.hear(alive())
    for port in range(1, CONFLICTS_MAX + 11):
        side.hear(alive(incarnation=9, place=Endpoint(ELSEWHERE.ip, port)))
    found = side.membership.conflicts()
    assert len(found) == CONFLICTS_MAX
    assert found[0].other_address == "10.0.0.3:11"
    assert side.membership.swim.counters.conflicts == CONFLICTS_MAX + 10


# --- metas of others -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "role", "tags"),
    [
        (SERF_META, "web", {"role": "web", "dc": "east"}),
        (b"\xff\x81\xa4role\xa5agent", "serf", {"role": "agent"}),
        (b"", "serf", {}),
        (b"consul", "consul", {"role": "consul"}),
        (b"\xff\xc1 no msgpack", "serf", {}),
    ],
)
def test_a_member_of_another_application_is_listed_and_left_alone(said: bytes, role: str, tags: dict[str, str]):
    side = Side()
    assert kinds(side.hear(alive(said=said))) == [Joined]
    member = only(side.membership.members())
    assert (member.role, member.epoch, member.protocol_version, member.head) == (role, 0, 0, None)
    assert member.address == member.gossip_address == "10.0.0.2:7946"
    assert member.meta == tags
    assert side.membership.counters.malformed == 0


def test_a_meta_that_claims_to_be_ours_and_is_not_in_order_is_counted_and_its_member_listed():
    side = Side()
    broken = meta().replace(b"mesh_port\xa47000", b"mesh_port\xa470z0")
    assert kinds(side.hear(alive(said=broken))) == [Joined]
    assert side.membership.counters.malformed == 1
    side.hear(Suspect(1, "b", "c"), alive(incarnation=2, said=broken))
    assert side.membership.counters.malformed == 1, "once for each meta that is told"
    assert only(side.membership.members()).role == "serf"
    assert kinds(side.hear(alive(incarnation=3))) == [Changed, HeadTold]
    assert only(side.membership.members()).role == "agent"


# --- heads -----------------------------------------------------------------------------------------------------------


def test_whoever_joins_is_followed_at_once_whatever_its_head_is():
    found = Side().hear(alive())
    assert kinds(found) == [Joined, HeadTold], "first the member, then its head"
    assert found[1] == HeadTold("b", Head(node_id("b"), 5, 0, 0, 0))


def test_a_newer_head_is_told_and_passed_on():
    side = Side()
    side.hear(alive())
    side.heads_gossiped()
    assert side.hear(told(head(seq=3))) == [HeadTold("b", head(seq=3))]
    assert side.heads_gossiped() == {head(seq=3)}
    assert side.membership.counters.heads_taken == 1
    member = only(side.membership.members())
    assert (member.head, member.head_at) == (head(seq=3), side.now - 3.0)
    for older in (head(seq=3), head(seq=2), head(seq=9, epoch=4)):
        assert side.hear(told(older)) == []
        assert side.heads_gossiped() == set()
    assert side.hear(told(head(seq=4))) == [HeadTold("b", head(seq=4))]


def test_a_head_of_somebody_unknown_is_ignored():
    side = Side()
    side.heads_gossiped()
    assert side.hear(told(head("nobody"))) == []
    assert side.heads_gossiped() == set()
    assert side.membership.counters.heads_taken == 0


def test_nobody_tells_this_node_what_its_own_head_is():
    side = Side()
    side.hear(alive())
    side.heads_gossiped()
    side.hear(told(head("a", seq=99, epoch=9_000_000)))
    assert side.heads_gossiped() == set()
    assert Head(node_id("a"), 5_000_000, 0, 0, 1) in unpack_heads(decode_state(side.pull().user_state).own)


def test_the_head_of_a_start_that_is_not_known_yet_counts_once_it_is():
    side = Side()
    side.hear(alive())
    assert side.hear(told(head(seq=3, epoch=6))) == []
    assert only(side.membership.members()).head == Head(node_id("b"), 5, 0, 0, 0)
    found = side.hear(alive(incarnation=2, epoch=6))
    assert kinds(found) == [Changed, HeadTold]
    assert found[1] == HeadTold("b", head(seq=3, epoch=6))


def test_after_a_restart_with_the_clock_set_back_its_heads_count():
    side = Side()
    side.hear(alive(), told(head(seq=3)))
    assert kinds(side.hear(alive(incarnation=2, epoch=4))) == [Changed, HeadTold]
    assert side.hear(told(head(seq=1, epoch=4))) == [HeadTold("b", head(seq=1, epoch=4))]
    assert side.hear(told(head(seq=4))) == []


def test_of_a_member_that_is_gone_no_head_counts():
    side = Side()
    side.hear(alive(), told(head(seq=3)))
    side.hear(Dead(1, "b", "c"))
    assert side.hear(told(head(seq=4))) == []
    found = side.hear(alive(incarnation=2))
    assert found[1] == HeadTold("b", Head(node_id("b"), 5, 0, 0, 0)), "whoever follows it asks anew"


def test_heads_and_states_that_cannot_be_read_are_counted():
    side = Side()
    side.hear(alive(), User(HEAD_PREFIX + bytes(47)), User(HEAD_PREFIX))
    assert side.membership.counters.malformed == 2
    side.pull(encode_state(1, bytes(47)))
    side.pull(b"\x02 no msgpack")
    side.pull(b"another application's")
    assert side.membership.counters.malformed == 5


def test_the_own_head_is_told_at_the_start_and_when_the_journal_changed():
    side = Side()
    side.hear(alive())
    assert side.heads_gossiped() == {Head(node_id("a"), 5_000_000, 0, 0, 1)}
    side.seq = 1
    side.feed(JournalChanged())
    assert side.heads_gossiped() == {Head(node_id("a"), 5_000_000, 1, 1, 1)}
    assert side.heads_gossiped(10.0) == set()
    assert side.membership.counters.heads_told == 2


def test_a_busy_journal_tells_its_head_once_in_an_interval_and_the_last_one_always():
    side = Side()
    side.hear(alive())
    for _ in range(305):
        side.seq += 1
        side.feed(JournalChanged())
        side.run(0.01)
    assert 4 <= side.membership.counters.heads_told <= 5
    assert Head(node_id("a"), 5_000_000, 305, 305, 1) in side.heads_gossiped()
    assert side.membership.counters.heads_told == 5


@pytest.mark.parametrize("now", [1.3436424411240122, 7.887233511355132, 7.705231398308006, 1.151024984279273])
def test_the_interval_ends_when_its_timer_says_so(now: float):
    """At these times, (now + interval) - now is a little less than the interval."""
    assert (now + HEAD_INTERVAL_S) - now < HEAD_INTERVAL_S
    side = Side(now=now)
    side.feed(JournalChanged())
    side.run(HEAD_INTERVAL_S)
    assert side.membership.counters.heads_told == 2


def test_a_head_that_is_there_only_after_the_start_is_told_at_once():
    side = Side(journal=False)
    side.hear(alive())
    side.run(5.0)
    late = Head(node_id("a"), 5_000_000, 1, 1, 1)
    side.membership._head = lambda: late
    side.feed(JournalChanged())
    assert side.membership.counters.heads_told == 1
    side.run(0.1)
    assert late in side.heads_gossiped()


def test_whoever_has_no_journal_tells_no_head():
    side = Side(journal=False)
    side.hear(alive())
    side.feed(JournalChanged())
    assert side.heads_gossiped() == set()
    assert decode_state(side.pull().user_state).own == b""


def test_a_push_pull_carries_all_heads():
    side = Side()
    side.hear(alive(), alive("c", place=ELSEWHERE), told(head("b", 3)), told(head("c", 4)))
    own = Head(node_id("a"), 5_000_000, 0, 0, 1)
    assert set(unpack_heads(decode_state(side.pull().user_state).own)) == {head("b", 3), head("c", 4), own}
    side.hear(Dead(1, "c", "c"))
    assert set(unpack_heads(decode_state(side.pull().user_state).own)) == {head("b", 3), own}


def test_heads_of_a_push_pull_are_taken_and_not_gossiped():
    side = Side()
    side.hear(alive(), alive("c", place=ELSEWHERE), told(head("c", 4)))
    side.heads_gossiped()
    state = encode_state(1, pack_heads([head("b", 3), head("c", 2), head("nobody", 5)]))
    actions = side.feed(Pulled(1, THERE, PushPull(False, (), state)))
    assert events(actions) == [HeadTold("b", head("b", 3))]
    assert side.heads_gossiped() == set()


def test_members_of_a_push_pull_come_before_the_heads_that_came_with_them():
    side = Side()
    peer = Side()
    peer.hear(alive(), told(head(seq=8)))
    actions = side.feed(Pulled(1, THERE, peer.pull()))
    found = events(actions)
    assert kinds(found) == [Joined, HeadTold, HeadTold]
    assert found[2] == HeadTold("b", head(seq=8))
