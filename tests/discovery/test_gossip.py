"""Membership by gossip, above the protocol: what a member is, heads, foreigners, keys."""

from __future__ import annotations

import itertools
from random import Random

import pytest

from kvmesh.discovery.actions import (
    Action,
    Event,
    Heard,
    JournalChanged,
    KeysAsked,
    Notify,
    Refuse,
    Requested,
    Started,
    Stopping,
    Ticked,
    Wake,
)
from kvmesh.discovery.gossip import HEAD_PREFIX, GossipMembership
from kvmesh.discovery.head import Head, node_id
from kvmesh.discovery.heads import pack_heads, unpack_heads
from kvmesh.discovery.keying import PAYLOAD_PREFIX, KeysAnswered, KeysResult, NodeKeys
from kvmesh.discovery.membership import Changed, Conflict, Failed, HeadTold, Joined, Left, MemberState
from kvmesh.discovery.messages import Identity, Leave, Ping
from kvmesh.discovery.meta import Meta
from kvmesh.discovery.serf import JOIN, LEAVE, Intent, decode_intent, decode_state, encode_intent, encode_state
from kvmesh.discovery.swim.events import (
    AnswerPull,
    PacketCame,
    Pulled,
    SendPacket,
    SendUser,
    StreamFailed,
    UserCame,
)
from kvmesh.discovery.wire.keyring import Keyring, fingerprint
from kvmesh.discovery.wire.messages import VERSIONS, Ack, Alive, Dead, Endpoint, Message, PushPull, Suspect, User
from kvmesh.discovery.wire.messages import Ping as SwimPing
from kvmesh.transport.limits import CONFLICTS_MAX, HEAD_INTERVAL_S, KEYS_ROUND_S
from tests.discovery.swim.support import of, only, sent

HERE = Endpoint(bytes([10, 0, 0, 1]), 7946)
THERE = Endpoint(bytes([10, 0, 0, 2]), 7946)
ELSEWHERE = Endpoint(bytes([10, 0, 0, 3]), 7946)
IDENTITY = Identity("b", "agent", 5, "10.0.0.2:7000", {})
SERF_META = b"\xff\x82\xa4role\xa3web\xa2dc\xa4east"
KEY, OTHER_KEY = bytes(16), bytes([1]) * 16


def meta(role: str = "agent", epoch: int = 5, mesh_port: int = 7000, facts: dict[str, str] | None = None) -> bytes:
    return Meta(role, mesh_port, epoch, public_key=b"k" * 32, facts=facts or {}).encode()  # type: ignore[arg-type]


def alive(
    name: str = "b", incarnation: int = 1, place: Endpoint = THERE, said: bytes | None = None, *, epoch: int = 5
) -> Alive:
    return Alive(incarnation, name, *place, meta(epoch=epoch) if said is None else said, VERSIONS)


def head(name: str = "b", seq: int = 1, epoch: int = 5) -> Head:
    return Head(node_id(name), epoch, seq, seq, 99)


def told(one: Head) -> User:
    return User(HEAD_PREFIX + one.to_bytes())


class Side:
    """The membership of ``a``, with a clock. The tests play the others."""

    def __init__(self, keys: list[bytes] | None = None, *, journal: bool = True, now: float = 100.0) -> None:
        self.now = now
        self.seq = 0
        self.saved = 0
        self.done: list[Action] = []
        self.wake_at = float("inf")
        self.membership = GossipMembership(
            Identity("a", "agent", 5_000_000, "10.0.0.1:7000", {}),
            HERE,
            head=lambda: Head(node_id("a"), 5_000_000, self.seq, self.seq, 1) if journal else None,
            random=Random(0),
            keyring=Keyring(keys) if keys else None,
            save_keys=self._save,
        )
        self.feed(Started())

    def _save(self) -> None:
        self.saved += 1

    def feed(self, event: Event) -> list[Action]:
        if self.wake_at <= self.now:
            self.wake_at = float("inf")
        actions = self.membership.handle(event, self.now)
        for action in actions:
            if isinstance(action, Wake):
                self.wake_at = action.at
        self.done += actions
        return actions

    def hear(self, *messages: Message, source: Endpoint = THERE) -> list[object]:
        """A packet comes; the events of the membership that it leads to."""
        return events(self.feed(PacketCame(source, messages)))

    def pull(self, state: bytes = b"") -> PushPull:
        """A peer begins a push/pull; the answer."""
        return only(of(self.feed(Pulled(1, THERE, PushPull(False, (), state))), AnswerPull)).state

    def run(self, seconds: float) -> list[Action]:
        until, before = self.now + seconds, len(self.done)
        for rings in itertools.count():
            if self.wake_at > until:
                break
            assert rings < 1000, "alarms without end"
            self.now = max(self.now, self.wake_at)
            for target, ping in sent(self.feed(Ticked()), SwimPing):
                self.hear(Ack(ping.seq), source=target)  # whoever is pinged is there
        self.now = until
        return self.done[before:]

    def heads_gossiped(self, seconds: float = 3.0) -> set[Head]:
        """The heads in the packets of this time."""
        payloads = {word.payload for _, word in sent(self.run(seconds), User)}
        size = len(HEAD_PREFIX)
        return {Head.from_bytes(one[size:]) for one in payloads if one.startswith(HEAD_PREFIX)}


def events(actions: list[Action]) -> list[object]:
    return [action.event for action in of(actions, Notify)]


def kinds(told_events: list[object]) -> list[type]:
    return [type(one) for one in told_events]


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
    assert side.membership.protocol_counters.conflicts == CONFLICTS_MAX + 10


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


# --- Serf ------------------------------------------------------------------------------------------------------------


def words_gossiped(side: Side, seconds: float = 3.0) -> list[Intent | None]:
    payloads = sorted({word.payload for _, word in sent(side.run(seconds), User)})
    return [decode_intent(one) for one in payloads if one[0] <= 1]


def test_a_foreigner_hears_that_this_node_is_here_on_purpose():
    side = Side()
    side.hear(alive())
    assert words_gossiped(side) == []
    side.hear(alive("s", place=ELSEWHERE, said=SERF_META))
    assert words_gossiped(side) == [Intent(JOIN, 1, "a")]
    side.hear(alive("t", place=Endpoint(ELSEWHERE.ip, 1), said=SERF_META))
    assert words_gossiped(side) == [], "once"


def test_a_word_of_serf_is_passed_on_once():
    side = Side()
    side.hear(alive("s", said=SERF_META))
    words_gossiped(side)
    word = User(encode_intent(Intent(LEAVE, 7, "s")))
    side.hear(word)
    assert words_gossiped(side) == [Intent(LEAVE, 7, "s")]
    side.hear(word)
    side.hear(User(encode_intent(Intent(LEAVE, 6, "s"))))
    assert words_gossiped(side) == []
    side.hear(User(b"\x01 no msgpack"))
    assert side.membership.counters.malformed == 1


def test_a_leave_of_this_node_is_refuted_while_it_stays():
    side = Side()
    side.hear(alive("s", said=SERF_META))
    words_gossiped(side)
    side.hear(User(encode_intent(Intent(LEAVE, 7, "a"))))
    assert words_gossiped(side) == [Intent(JOIN, 8, "a")]


def test_words_that_a_push_pull_calls_for_are_gossiped():
    side = Side()
    side.hear(alive())
    words_gossiped(side)
    left = b"\x02\x82\xa5LTime\x09\xabLeftMembers\x91\xa1a"
    side.pull(left)
    assert words_gossiped(side) == [Intent(JOIN, 9, "a")]


@pytest.mark.parametrize("is_foreign", [True, False])
def test_foreigners_hear_a_leave_intent_before_the_last_word(is_foreign: bool):
    side = Side()
    side.hear(alive("s", said=SERF_META if is_foreign else meta()))
    side.run(3.0)
    packet = next(one for one in of(side.feed(Stopping()), SendPacket) if isinstance(one.messages[-1], Dead))
    words = [decode_intent(word.payload) for word in packet.messages[:-1] if isinstance(word, User)]
    assert words == ([Intent(LEAVE, 2, "a")] if is_foreign else [])
    assert packet.messages[-1] == Dead(5000, "a", "a")


def test_words_of_nobody_knows_whom_are_counted():
    side = Side()
    side.hear(User(b"unknown"), User(b""), User(PAYLOAD_PREFIX + b"\x01 in a packet"))
    assert side.membership.counters.foreign == 3
    assert side.membership.keys.counters.malformed == 0, "keys are changed over streams only"


# --- keys ------------------------------------------------------------------------------------------------------------


def with_members(keys: list[bytes] | None = None) -> Side:
    side = Side([KEY] if keys is None else keys)
    side.hear(alive(), alive("c", place=ELSEWHERE), alive("s", place=Endpoint(ELSEWHERE.ip, 9), said=SERF_META))
    side.hear(alive("d", place=Endpoint(ELSEWHERE.ip, 8)), Dead(1, "d", "d"))
    return side


def asked(side: Side, operation: str = "list", key: bytes = b"") -> list[SendUser]:
    return of(side.feed(KeysAsked(3, operation, key)), SendUser)  # type: ignore[arg-type]


def test_all_members_that_are_there_and_ours_are_asked_about_keys():
    questions = asked(with_members())
    assert {one.target for one in questions} == {THERE, ELSEWHERE}
    assert all(one.payload.startswith(PAYLOAD_PREFIX) for one in questions)
    assert len({one.number for one in questions}) == 2


def test_a_question_about_keys_is_answered_over_a_stream_and_the_result_is_told():
    side, peer = with_members(), Side([KEY, OTHER_KEY])
    peer.membership.keys._name = "b"
    peer.hear(alive("a", place=HERE), source=HERE)
    to_b, to_c = sorted(asked(side), key=lambda one: one.target)
    answer = only(of(peer.feed(UserCame(HERE, to_b.payload)), SendUser))
    assert answer.target == HERE
    assert side.feed(UserCame(THERE, answer.payload)) == []
    result = only(events(side.feed(StreamFailed(to_c.number, "refused"))))
    assert isinstance(result, KeysAnswered)
    assert result.token == 3
    assert sorted(result.result.nodes, key=lambda node: node.name) == [
        NodeKeys("a", "ok", "", (fingerprint(KEY),)),
        NodeKeys("b", "ok", "", (fingerprint(KEY), fingerprint(OTHER_KEY))),
        NodeKeys("c", "silent", "it cannot be reached"),
    ]


def test_who_is_silent_ends_the_round_when_its_time_is_over():
    side = with_members()
    asked(side)
    assert not [one for one in events(side.run(KEYS_ROUND_S - 0.01)) if isinstance(one, KeysAnswered)]
    result = only([one for one in events(side.run(0.02)) if isinstance(one, KeysAnswered)])
    assert [node.status for node in result.result.nodes] == ["ok", "silent", "silent"]


def test_a_key_is_installed_and_kept():
    side = Side([KEY])
    result = only(events(side.feed(KeysAsked(3, "install", OTHER_KEY))))
    shown = (fingerprint(KEY), fingerprint(OTHER_KEY))
    assert result == KeysAnswered(3, KeysResult("install", fingerprint(OTHER_KEY), (NodeKeys("a", "ok", "", shown),)))
    assert side.saved == 1


def test_without_keys_that_is_said():
    result = only(events(Side().feed(KeysAsked(3, "list", b""))))
    assert isinstance(result, KeysAnswered)
    assert "--key-file" in result.result.error


def test_a_stream_that_failed_for_another_reason_ends_no_round():
    side = with_members()
    numbers = {one.number for one in asked(side)}
    assert events(side.feed(StreamFailed(max(numbers) + 1000, "of an exchange"))) == []
