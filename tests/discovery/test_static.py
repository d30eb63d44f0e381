"""Static membership as a table of situations: who is what, after which messages and silences."""

from __future__ import annotations

import pytest

from kvmesh.discovery import Head, Identity, MemberState, node_id
from kvmesh.discovery.actions import (
    Answered,
    Heard,
    Lost,
    Requested,
    Stopping,
    Ticked,
)
from kvmesh.discovery.membership import Changed, Conflict, Failed, HeadTold, Joined, Left
from kvmesh.discovery.messages import Done, Leave, Ping, Pong, Stale
from kvmesh.transport.limits import (
    FAILED_FORGOTTEN_S,
    FAILED_PING_INTERVAL_S,
    HEARSAY_PINGS_MAX,
    NAME_CONFLICT_S,
    PAUSE_S,
    PEERS_MAX,
    PEERS_TOLD_MAX,
    PING_INTERVAL_S,
    PING_TIMEOUT_S,
    PINGS_AT_ONCE_MAX,
    SUSPICION_S,
)
from tests.discovery.static_table import ME, Table, head, peer


def joined(*names: str) -> Table:
    """A table in which these have joined."""
    table = Table(*(f"{name}:1" for name in names))
    table.answering = {f"{name}:1": peer(name) for name in names}
    table.run(2 * PING_INTERVAL_S)
    assert table.kinds() == ["Joined"] * len(names)
    return table


def test_an_address_of_the_list_becomes_a_member_when_it_answers() -> None:
    table = Table("a:1")
    table.run(3.0)
    assert table.membership.members() == []
    table.answering["a:1"] = peer()
    table.run(FAILED_PING_INTERVAL_S)
    (member,) = table.membership.members()
    assert (member.name, member.role, member.state, member.address, member.epoch) == (
        "a", "agent", MemberState.ALIVE, "a:1", 10,
    )  # fmt: skip
    assert member.rtt_s is not None
    assert member.head == Head(node_id("a"), 10, 0, 0, 0)
    assert [type(event) for event in table.events[:2]] == [Joined, HeadTold]


def test_who_pings_us_is_a_member_and_is_pinged() -> None:
    table = Table()
    table.hear_ping(peer("b"))
    (reply,) = table.replies
    assert isinstance(reply, Pong)
    assert reply.identity == ME
    assert table.state("b") is MemberState.ALIVE
    assert table.pinged == ["b:1"]


def test_a_controller_has_no_head() -> None:
    table = Table()
    controller = peer("c", role="controller")
    table.feed(Requested(1, Ping(controller, b"")))
    assert [type(event) for event in table.events] == [Joined]
    member = table.membership.member("c")
    assert member is not None
    assert member.head is None


def test_a_head_of_somebody_else_is_no_head() -> None:
    table = Table()
    table.feed(Requested(1, Ping(peer("c"), head(peer("d")))))
    assert [type(event) for event in table.events] == [Joined]


def test_one_address_is_enough_to_find_the_others() -> None:
    table = Table("a:1")
    table.answering = {"a:1": peer(), "b:1": peer("b"), "c:1": peer("c"), "me:1": ME}
    table.known = ["b:1", "c:1", "me:1", "a:1"]
    table.run(2.0)
    assert {member.name for member in table.membership.members()} == {"a", "b", "c"}
    assert "me:1" not in table.pinged


def test_members_are_told_in_turn_by_the_addresses_that_they_gave() -> None:
    table = Table()
    count = 2 * PEERS_TOLD_MAX + 10
    for number in range(count):
        table.hear_ping(peer(f"p{number}"))
    told: set[str] = set()
    for _ in range(4):
        table.replies.clear()
        table.hear_ping(peer("p0"))
        (reply,) = table.replies
        assert isinstance(reply, Pong)
        assert len(reply.known) == PEERS_TOLD_MAX
        told |= set(reply.known)
    assert told == {f"p{number}:1" for number in range(count)}


def test_hearsay_that_nobody_confirms_is_dropped() -> None:
    table = joined("a")
    table.known = ["gone:1"]
    table.run(PING_INTERVAL_S)
    table.known = []
    table.run(30.0)
    assert table.pinged.count("gone:1") <= HEARSAY_PINGS_MAX + 1


def test_an_address_that_is_this_process_is_dropped() -> None:
    table = Table("me:1", "localhost:1", "a:1")
    table.answering = {"localhost:1": ME, "a:1": peer()}
    table.run(10.0)
    assert table.pinged.count("localhost:1") == 1
    assert "me:1" not in table.pinged
    assert [member.name for member in table.membership.members()] == ["a"]


def test_a_second_name_for_an_address_is_not_pinged_for_ever() -> None:
    """The list says localhost, the node calls itself by its host's name: told by others, it must not count twice."""
    table = Table("localhost:9")
    table.answering = {"localhost:9": peer(), "a:1": peer(), "b:1": peer("b")}
    table.known = ["a:1", "b:1"]
    table.run(10.0)
    member = table.membership.member("a")
    assert member is not None
    assert member.address == "localhost:9"
    assert "a:1" not in table.pinged
    assert len(table.membership.members()) == 2


def test_silence_makes_suspect_then_failed_and_an_answer_brings_back() -> None:
    table = joined("a")
    table.answering.clear()
    begin = table.now
    table.run_while(MemberState.ALIVE)
    assert table.now - begin <= PING_INTERVAL_S * 1.1 + 2 * PING_TIMEOUT_S + 0.6
    suspected = table.now
    table.run_while(MemberState.SUSPECT)
    assert SUSPICION_S <= table.now - suspected <= SUSPICION_S + PING_TIMEOUT_S + 0.1
    assert table.state() is MemberState.FAILED
    assert table.kinds() == ["Changed", "Failed"]
    table.answering["a:1"] = peer()
    table.run(FAILED_PING_INTERVAL_S + 0.5)
    assert table.kinds() == ["Joined"]


def test_a_suspect_that_answers_is_alive_again() -> None:
    table = joined("a")
    table.answering.clear()
    table.run_while(MemberState.ALIVE)
    table.answering["a:1"] = peer()
    table.run(1.0)
    assert table.state() is MemberState.ALIVE
    assert table.kinds() == ["Changed", "Changed"]


def test_a_ping_lost_soon_after_a_sign_of_life_is_no_suspicion() -> None:
    table = joined("a")
    for _ in range(20):
        table.answering.clear()
        while not table.calls:
            table.run(0.05)
        table.feed(Lost(table.calls.pop().tag))
        table.answering["a:1"] = peer()
        table.run(1.0)
    assert table.kinds() == []


@pytest.mark.slow  # a whole day passes, second by second
def test_a_failed_member_is_pinged_more_slowly_and_forgotten_in_the_end() -> None:
    table = Table()
    table.hear_ping(peer())
    table.run(20.0)
    assert table.state() is MemberState.FAILED
    table.pinged.clear()
    table.run(50.0)
    assert 5 <= len(table.pinged) <= 50 / FAILED_PING_INTERVAL_S + 2
    table.run(FAILED_FORGOTTEN_S + 61.0, step_s=1.0)
    assert table.membership.members() == []


@pytest.mark.parametrize("sign", ["ping", "answer to its follower"])
def test_a_member_that_reaches_us_stays_alive_and_does_not_flap(sign: str) -> None:
    """Fault 4: a one-way partition, at most one state change a minute."""
    table = joined("a")
    table.answering.clear()
    for _ in range(60):
        if sign == "ping":
            table.hear_ping(peer())
        else:
            table.feed(Heard("a", 10))
        table.run(PING_INTERVAL_S)
    assert table.state() is MemberState.ALIVE
    assert table.kinds() == []


def test_a_sign_of_another_epoch_or_name_is_no_sign() -> None:
    table = joined("a")
    table.answering.clear()
    for _ in range(8):
        table.run(1.0)
        table.feed(Heard("a", 9))
        table.feed(Heard("nobody", 10))
    assert table.state() is MemberState.FAILED


def test_a_pause_of_our_own_fails_nobody() -> None:
    """Fault 2: SIGSTOP for 30 s. What timed out meanwhile is told first, as a real loop would."""
    table = joined("a", "b")
    table.answering.clear()
    while not table.calls:
        table.run(0.05)
    calls = list(table.calls)
    table.now += 30.0
    for call in calls:
        table.feed(Lost(call.tag))
    table.answering = {"a:1": peer("a"), "b:1": peer("b")}
    table.run(3.0)
    assert table.kinds() == []
    assert table.membership.counters.pauses == 1


def test_a_pause_during_a_suspicion_begins_it_again() -> None:
    table = joined("a")
    table.answering.clear()
    table.run_while(MemberState.ALIVE)
    table.calls.clear()
    table.now += PAUSE_S + 30.0
    table.feed(Ticked())
    table.run(SUSPICION_S - 0.2)
    assert table.state() is MemberState.SUSPECT
    table.run(1.0)
    assert table.state() is MemberState.FAILED


def test_a_newer_epoch_takes_its_new_address_and_the_old_one_is_dropped() -> None:
    """Fault 4 of the first list: the old address stays in use."""
    table = Table()
    table.hear_ping(peer())
    table.hear_ping(peer(epoch=11, address="elsewhere:1"))
    member = table.membership.member("a")
    assert member is not None
    assert (member.epoch, member.address) == (11, "elsewhere:1")
    table.pinged.clear()
    table.answering["elsewhere:1"] = peer(epoch=11, address="elsewhere:1")
    table.run(10.0)
    assert set(table.pinged) == {"elsewhere:1"}
    assert table.kinds() == ["Joined", "Changed"]


def test_an_older_epoch_is_ignored_and_a_late_packet_is_no_conflict() -> None:
    table = joined("a")
    table.hear_ping(peer(epoch=9, address="old:1"))
    assert table.kinds() == []
    member = table.membership.member("a")
    assert member is not None
    assert (member.epoch, member.address) == (10, "a:1")
    assert table.membership.counters.stale == 1
    assert table.membership.conflicts() == []


def test_an_older_epoch_that_goes_on_speaking_is_a_conflict_of_names() -> None:
    table = joined("a")
    table.run(NAME_CONFLICT_S)
    for _ in range(3):
        table.hear_ping(peer(epoch=9, address="old:1"))
    assert table.membership.conflicts() == [Conflict("a", "a:1", "old:1")]
    assert table.kinds() == ["Conflict"]
    assert table.membership.counters.conflicts == 1


def test_one_start_at_two_addresses_is_a_conflict() -> None:
    table = joined("a")
    table.hear_ping(peer(address="copy:1"))
    assert table.membership.conflicts() == [Conflict("a", "a:1", "copy:1")]


def test_another_process_with_our_name_is_a_conflict_and_no_member() -> None:
    table = Table("twin:1")
    table.hear_ping(Identity("me", "agent", 49, "me:1"))  # a late ping of our own earlier start
    assert table.membership.conflicts() == []
    table.answering["twin:1"] = Identity("me", "agent", 49, "twin:1")
    table.run(NAME_CONFLICT_S + 1.0)
    assert table.membership.conflicts() == [Conflict("me", "me:1", "twin:1")]
    table.hear_ping(Identity("me", "agent", 60, "third:1"))
    assert Conflict("me", "me:1", "third:1") in table.membership.conflicts()
    assert table.membership.members() == []


def test_conflicts_are_remembered_up_to_a_bound() -> None:
    table = joined("a")
    for number in range(100):
        table.hear_ping(peer(address=f"copy:{number}"))
    assert len(table.membership.conflicts()) == 64
    assert table.membership.counters.conflicts == 100


def test_another_name_at_a_members_address_is_another_member() -> None:
    table = joined("a")
    table.answering["a:1"] = peer("b", address="a:1")
    table.run(10.0)
    assert table.state("a") is MemberState.FAILED
    assert table.state("b") is MemberState.ALIVE


def test_a_member_that_answers_at_another_of_its_addresses_is_reached_there() -> None:
    table = Table("nat:1")
    table.hear_ping(peer(address="inside:1"))
    table.answering["nat:1"] = peer(address="inside:1")
    table.run(8.0)
    member = table.membership.member("a")
    assert member is not None
    assert (member.state, member.address) == (MemberState.ALIVE, "nat:1")


def test_a_leave_counts_at_once_and_only_a_new_start_undoes_it() -> None:
    table = joined("a")
    table.feed(Requested(2, Leave("a", 9)))
    assert table.state() is MemberState.ALIVE
    table.feed(Requested(2, Leave("a", 10)))
    table.feed(Requested(2, Leave("a", 10)))
    table.feed(Requested(2, Leave("nobody", 10)))
    assert table.state() is MemberState.LEFT
    assert isinstance(table.replies[-1], Done)
    table.hear_ping(peer())  # a ping that was under way
    table.feed(Heard("a", 10))
    table.run(10.0)
    assert table.state() is MemberState.LEFT
    assert table.kinds() == ["Left"]
    table.hear_ping(peer(epoch=11))
    assert table.kinds() == ["Joined"]


def test_leaving_tells_everyone_who_is_there_and_ends_the_pings() -> None:
    table = joined("a", "b")
    table.feed(Requested(2, Leave("b", 10)))
    table.calls.clear()
    table.feed(Stopping())
    assert [(call.address, call.message) for call in table.calls] == [("a:1", Leave("me", 50))]
    table.feed(Answered(table.calls.pop().tag, Done()))
    table.now += 10.0
    table.feed(Ticked())
    assert table.calls == []
    assert table.membership.counters.malformed == 0


def test_an_answer_that_is_no_pong_is_a_lost_ping() -> None:
    table = joined("a")
    table.answering.clear()
    while not table.calls:
        table.run(0.05)
    counters = table.membership.counters
    before = counters.pings_lost
    table.feed(Answered(table.calls.pop().tag, Stale(head(peer()))))
    assert (counters.malformed, counters.pings_lost) == (1, before + 1)


def test_pings_under_way_are_bounded_and_each_address_has_its_turn() -> None:
    table = Table(*(f"p{number}:1" for number in range(3 * PINGS_AT_ONCE_MAX)))
    assert len(table.calls) == PINGS_AT_ONCE_MAX
    table.run(3.0)
    assert len(table.calls) <= PINGS_AT_ONCE_MAX
    assert len(set(table.pinged)) == 3 * PINGS_AT_ONCE_MAX


@pytest.mark.slow  # 4,096 members are the bound that is tested
def test_members_are_bounded_and_the_longest_gone_makes_way() -> None:
    table = Table()
    for number in range(PEERS_MAX):
        table.hear_ping(peer(f"p{number}"))
    table.hear_ping(peer("more"))
    assert table.state("more") is None
    assert table.membership.counters.refused == 1
    table.feed(Requested(1, Leave("p7", 10)))
    table.hear_ping(peer("more"))
    assert table.state("more") is MemberState.ALIVE
    assert table.state("p7") is None
    assert len(table.membership.members()) == PEERS_MAX


def test_events_carry_the_member() -> None:
    table = joined("a")
    table.answering.clear()
    table.run(10.0)
    changed, failed = table.events
    assert isinstance(changed, Changed)
    assert isinstance(failed, Failed)
    assert (changed.member.state, failed.member.state) == (MemberState.SUSPECT, MemberState.FAILED)
    table.hear_ping(peer(epoch=11))
    table.feed(Requested(2, Leave("a", 11)))
    left = table.events[-1]
    assert isinstance(left, Left)
    assert left.member.state is MemberState.LEFT


@pytest.mark.parametrize("end", ["leaves", "fails"])
def test_when_the_newer_of_two_with_one_name_is_gone_the_older_counts_again(end: str) -> None:
    table = Table()  # no list: the older one came by itself, and its address is not pinged any more once it has moved
    older, newer = peer(epoch=10), peer(epoch=20, address="a:2")
    table.answering = {"a:1": older}
    table.feed(Requested(0, Ping(older, head(older))))
    table.run(2)
    table.answering["a:2"] = newer
    table.feed(Requested(1, Ping(newer, head(newer))))
    assert table.membership.member("a").epoch == 20  # type: ignore[union-attr]
    del table.answering["a:2"]
    if end == "leaves":
        table.feed(Requested(2, Leave("a", 20)))
    table.run(12)
    assert table.state() in (MemberState.LEFT, MemberState.FAILED)
    table.feed(Requested(3, Ping(older, head(older))))  # the older one goes on pinging
    table.run(2)
    member = table.membership.member("a")
    assert member is not None
    assert (member.state, member.epoch, member.address) == (MemberState.ALIVE, 10, "a:1")


def test_a_late_ping_of_an_earlier_start_brings_nobody_back() -> None:
    table = Table("a:1")
    table.answering = {"a:1": peer(epoch=20, address="a:1")}
    table.run(2)
    table.answering.clear()
    table.run(12)
    assert table.state() is MemberState.FAILED
    table.feed(Requested(1, Ping(peer(epoch=10, address="a:9"), b"")))
    table.run(5)
    assert table.state() is MemberState.FAILED
