"""Membership by gossip: Serf agents in the same gossip, and the keys."""

from __future__ import annotations

import pytest

from kvmesh.discovery.actions import (
    KeysAsked,
    Stopping,
)
from kvmesh.discovery.keying import PAYLOAD_PREFIX, KeysAnswered, KeysResult, NodeKeys
from kvmesh.discovery.serf import JOIN, LEAVE, Intent, decode_intent, encode_intent
from kvmesh.discovery.swim.events import (
    SendPacket,
    SendUser,
    StreamFailed,
    UserCame,
)
from kvmesh.discovery.wire.keyring import fingerprint
from kvmesh.discovery.wire.messages import Dead, Endpoint, User
from kvmesh.transport.limits import KEYS_ROUND_S
from tests.discovery.gossip_side import (
    ELSEWHERE,
    HERE,
    KEY,
    OTHER_KEY,
    SERF_META,
    THERE,
    Side,
    alive,
    events,
    meta,
)
from tests.discovery.swim.support import of, only, sent

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
