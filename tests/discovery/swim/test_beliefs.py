"""What a message about a node changes."""

from __future__ import annotations

import pytest

from kvmesh.discovery.swim.base import Change
from kvmesh.discovery.swim.events import AnswerPull
from kvmesh.discovery.swim.profile import KVMESH_LAN, LAN, Profile
from kvmesh.discovery.wire.messages import VERSIONS, Alive, Dead, Message, PushedState, Suspect
from kvmesh.transport.limits import GOSSIP_NODES_MAX, INCARNATION_MAX
from tests.discovery.swim.support import (
    ME,
    WRONG_VERSIONS,
    Lone,
    accusation,
    alive,
    at,
    death,
    departure,
    of,
    only,
    pushed,
    sent,
)

ALIVE, SUSPECT, DEAD, LEFT = PushedState
SAYINGS = {"ALIVE": alive, "SUSPECT": accusation, "DEAD": death, "LEFT": departure}
"""How each state is said."""


def said(state: str, incarnation: int) -> Message:
    return SAYINGS[state]("n3", incarnation)


def knowing(state: str, incarnation: int = 5) -> Lone:
    """A machine that believes this of n3."""
    lone = Lone(others=4)
    lone.hear(alive("n3", incarnation))
    if state != "ALIVE":
        lone.hear(said(state, incarnation))
    assert lone.view("n3") == (incarnation, state)
    lone.quiet()
    lone.app.changes.clear()
    return lone


# --- the order -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("told", SAYINGS)
@pytest.mark.parametrize("incarnation", [4, 5, 6])
@pytest.mark.parametrize("believed", SAYINGS)
def test_the_larger_of_incarnation_and_state_is_believed(believed: str, told: str, incarnation: int):
    lone = knowing(believed)
    lone.hear(said(told, incarnation))
    order = list(SAYINGS)
    was, is_told = (5, order.index(believed)), (incarnation, order.index(told))
    number, state = max(was, is_told)
    assert lone.view("n3") == (number, order[state])
    is_news = is_told > was
    assert lone.swim.rumours == is_news, "news is passed on, and nothing else is"
    changes = [change for name, change in lone.app.changes if name == "n3"]
    assert changes == (expected_changes(believed, told) if is_news else [])


def expected_changes(believed: str, told: str) -> list[Change]:
    gone = believed in ("DEAD", "LEFT")
    match told:
        case "ALIVE":
            return [Change.JOINED] if gone else [Change.TRUSTED] if believed == "SUSPECT" else []
        case "SUSPECT":
            return [Change.JOINED, Change.SUSPECTED] if gone else [Change.SUSPECTED] if believed == "ALIVE" else []
        case "DEAD":
            return [Change.FAILED] if believed != "DEAD" else []
        case _:
            return [Change.LEFT] if believed != "LEFT" else []


@pytest.mark.parametrize("message", [accusation("n9"), death("n9"), departure("n9")])
def test_of_a_node_that_nobody_knows_only_its_own_word_is_believed(message: Message):
    lone = Lone(others=2)
    assert lone.hear(message) == []
    assert lone.view("n9") is None
    lone.pull(pushed("n9", 1, SUSPECT), pushed("n8", 1, DEAD), pushed("n7", 1, LEFT))
    assert len(lone.swim.table) == 3


def test_what_is_new_joins_and_is_passed_on():
    lone = Lone(others=2)
    lone.app.changes.clear()
    lone.hear(alive("n9", 7))
    assert lone.view("n9") == (7, "ALIVE")
    assert lone.app.changes == [("n9", Change.JOINED)]
    told = sent(lone.run(1.0), Alive)
    assert {message for _, message in told} == {alive("n9", 7)}


def test_another_meta_is_an_update():
    lone = Lone(others=2)
    lone.app.changes.clear()
    lone.hear(alive("n2", 2, meta=b"later"))
    assert lone.app.changes == [("n2", Change.UPDATED)]
    assert lone.node("n2").meta == b"later"
    lone.hear(accusation("n2", 2), alive("n2", 3, meta=b"last"))
    assert lone.app.changes[1:] == [("n2", Change.SUSPECTED), ("n2", Change.UPDATED)]


def test_the_same_word_in_another_incarnation_is_no_change():
    lone = Lone(others=2)
    lone.app.changes.clear()
    lone.hear(alive("n2", 2))
    assert lone.app.changes == []
    assert lone.view("n2") == (2, "ALIVE")


def test_no_more_nodes_than_the_bound():
    lone = Lone()
    for first in range(2, GOSSIP_NODES_MAX + 10, 100):
        lone.hear(*(alive(f"n{number}") for number in range(first, first + 100)))
    assert len(lone.swim.table) == GOSSIP_NODES_MAX
    assert lone.swim.counters.refused > 0


# --- suspicion -------------------------------------------------------------------------------------------------------


def test_confirmations_end_a_suspicion_sooner_and_are_passed_on():
    lone = Lone(others=9)  # with this one ten: 4 s at least, 24 s at most, two confirmations
    lone.hear(accusation("n3", 1, "n2"))
    lone.quiet()
    began_at = lone.node("n3").changed_at
    lone.hear(accusation("n3", 1, "n2"))
    assert lone.swim.rumours == 0, "the same accuser again"
    lone.hear(accusation("n3", 1, "n4"))
    assert lone.swim.rumours == 1
    lone.quiet()
    lone.hear(accusation("n3", 1, "n5"))
    lone.quiet()
    lone.hear(accusation("n3", 1, "n6"))
    assert lone.swim.rumours == 0, "two are enough"
    lone.run(began_at + 3.99 - lone.now, silent=[])
    assert lone.view("n3") == (1, "SUSPECT")
    lone.run(0.02, silent=[])
    assert lone.view("n3") == (1, "DEAD")
    told = sent(lone.run(1.0), Dead)
    assert {message for _, message in told} == {Dead(1, "n3", "n1")}


def test_unconfirmed_it_lasts_longest():
    lone = Lone(others=9)
    lone.hear(accusation("n3"))
    lone.run(23.99, silent=[])
    assert lone.view("n3") == (1, "SUSPECT")
    lone.run(0.02, silent=[])
    assert lone.view("n3") == (1, "DEAD")


def test_confirmed_after_its_time_it_ends_at_once():
    lone = Lone(others=9)
    lone.hear(accusation("n3"))
    lone.run(10.0, silent=[])
    lone.hear(accusation("n3", 1, "n4"), accusation("n3", 1, "n5"))
    lone.run(0.0, silent=[])
    assert lone.view("n3") == (1, "DEAD")
    assert lone.swim.counters.pauses == 0, "a deadline in the past is no sign that this process did not run"


def test_a_refuted_suspicion_buries_nobody():
    lone = Lone(others=9)
    lone.hear(accusation("n3"), alive("n3", 2))
    lone.run(10.0, silent=[])
    lone.hear(accusation("n3", 2))
    lone.run(20.0, silent=[])
    assert lone.view("n3") == (2, "SUSPECT"), "the second one lasts its own time"
    lone.run(4.1, silent=[])
    assert lone.view("n3") == (2, "DEAD")


def test_a_suspicion_of_a_newer_word_begins_again():
    """The node refuted the last one, unheard here."""
    lone = Lone(others=9)
    lone.hear(accusation("n3"))
    lone.app.changes.clear()
    lone.run(20.0, silent=[])
    lone.hear(accusation("n3", 2))
    assert lone.app.changes == []
    lone.run(20.0, silent=[])
    assert lone.view("n3") == (2, "SUSPECT")


# --- this node -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("message", [accusation("n1"), death("n1"), departure("n1")])
@pytest.mark.parametrize("incarnation", [1, 5])
def test_what_is_said_of_this_node_it_refutes_louder(message: Suspect | Dead, incarnation: int):
    lone = Lone(others=3)
    lone.hear(type(message)(incarnation, message.node, message.accuser))
    assert lone.view("n1") == (incarnation + 1, "ALIVE")
    assert lone.swim.counters.refutations == 1
    told = sent(lone.run(2.0), Alive)
    assert {target for target, _ in told} == {at(2), at(3), at(4)}
    assert {word for _, word in told} == {alive("n1", incarnation + 1)}
    lone.hear(message)
    assert lone.swim.counters.refutations == 1, "an old accusation is refuted already"


def test_no_incarnation_is_larger_than_the_field_that_it_travels_in():
    lone = Lone(others=3)
    lone.hear(accusation("n1", INCARNATION_MAX))
    assert lone.view("n1") == (INCARNATION_MAX, "ALIVE")
    lone.run(1.0)  # and can be told


def test_its_own_words_from_elsewhere_are_no_news():
    lone = Lone(others=3)
    lone.hear(alive("n1"))
    lone.pull(pushed("n1"))
    assert (lone.swim.counters.refutations, lone.swim.rumours) == (0, 0)


@pytest.mark.parametrize(
    ("word", "incarnation"),
    [
        (alive("n1", 1, meta=b"0"), 2),  # an earlier start with the same incarnation
        (alive("n1", 1, versions=b""), 2),
        (alive("n1", 7, meta=b"0"), 8),
        (alive("n1", 7), 8),
        (alive("n1", 7, place=at(50), meta=b"0"), 8),  # an earlier start elsewhere
    ],
)
def test_words_that_are_not_its_own_it_corrects(word: Alive, incarnation: int):
    lone = Lone(others=3)
    lone.hear(word)
    assert lone.view("n1") == (incarnation, "ALIVE")
    assert lone.swim.own.alive() == alive("n1", incarnation)
    assert lone.app.conflicts == []


def test_older_words_of_an_earlier_start_are_ignored():
    lone = Lone(others=3)
    lone.hear(alive("n1", 0, meta=b"0"), alive("n1", 0, place=at(50), meta=b"0"))
    assert (lone.swim.counters.refutations, lone.swim.rumours, lone.app.conflicts) == (0, 0, [])


# --- one name, two processes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("meta", [b"1", b"2", b"of another application"])
def test_another_process_with_this_nodes_name_is_a_conflict(meta: bytes):
    lone = Lone(others=3)
    lone.hear(alive("n1", 9, place=at(50), meta=meta))
    assert lone.app.conflicts == [("n1", ME, at(50))]
    assert lone.swim.counters.conflicts == 1
    assert (lone.view("n1"), lone.swim.own.endpoint, lone.swim.rumours) == ((1, "ALIVE"), ME, 0)


@pytest.mark.parametrize("meta", [b"1", b"of another application"])
def test_another_process_with_a_known_name_is_a_conflict(meta: bytes):
    lone = Lone(others=3)
    lone.hear(alive("n3", 9, place=at(50), meta=meta))
    assert lone.app.conflicts == [("n3", at(3), at(50))]
    assert (lone.view("n3"), lone.node("n3").endpoint, lone.swim.rumours) == ((1, "ALIVE"), at(3), 0)


@pytest.mark.parametrize("state", SAYINGS)
@pytest.mark.parametrize("incarnation", [1, 5, 9])
def test_a_later_start_at_another_address_is_believed_at_once(state: str, incarnation: int):
    """The process knows nothing of the incarnation that its name had: it is believed whatever it says."""
    lone = knowing(state)
    lone.hear(alive("n3", incarnation, place=at(50), meta=b"2"))
    assert lone.view("n3") == (max(incarnation, 5), "ALIVE")
    assert (lone.node("n3").endpoint, lone.node("n3").meta) == (at(50), b"2")
    change = Change.JOINED if state in ("DEAD", "LEFT") else Change.UPDATED
    assert lone.app.changes == [("n3", change)]
    assert lone.app.conflicts == []
    assert (at(2), alive("n3", incarnation, place=at(50), meta=b"2")) in sent(lone.run(2.0), Alive)


def test_the_earlier_start_is_ignored_then_and_is_a_conflict_if_it_speaks_up():
    lone = knowing("ALIVE")
    lone.hear(alive("n3", 1, place=at(50), meta=b"2"))
    lone.quiet()
    for incarnation in (4, 5):
        lone.hear(alive("n3", incarnation, meta=b"1"))
        assert (lone.swim.counters.stale, lone.app.conflicts) == (incarnation - 3, [])
    lone.hear(alive("n3", 6, meta=b"1"))
    assert lone.app.conflicts == [("n3", at(50), at(3))]
    assert lone.node("n3").endpoint == at(50)
    assert lone.swim.rumours == 0


@pytest.mark.parametrize(("state", "back"), [("LEFT", True), ("DEAD", True), ("ALIVE", False), ("SUSPECT", False)])
def test_an_earlier_start_counts_again_when_the_later_one_is_gone(state: str, back: bool):
    """A clock was set back before a restart; or of two processes with one name, the later one went."""
    lone = knowing(state)
    lone.hear(alive("n3", 5, place=at(50), meta=b"0"))
    assert lone.node("n3").endpoint == at(3), "but not by what was said before"
    lone.hear(alive("n3", 6, place=at(50), meta=b"0"))
    assert (lone.node("n3").endpoint == at(50)) is back
    assert (lone.view("n3") == (6, "ALIVE")) is back


@pytest.mark.parametrize("state", ["LEFT", "DEAD"])
@pytest.mark.parametrize("incarnation", [1, 5, 9])
def test_the_same_start_does_not_come_back_at_another_address(state: str, incarnation: int):
    lone = knowing(state)
    lone.hear(alive("n3", incarnation, place=at(50)))
    assert lone.view("n3") == (5, state)
    assert (lone.app.conflicts, lone.swim.rumours) == ([], 0)


RECLAIM = Profile("reclaim", dead_reclaim_s=10.0)


@pytest.mark.parametrize(
    ("profile", "state", "after_s", "taken"),
    [
        (LAN, "LEFT", 0.0, True),
        (LAN, "DEAD", 1000.0, False),
        (RECLAIM, "LEFT", 0.0, True),
        (RECLAIM, "DEAD", 9.9, False),
        (RECLAIM, "DEAD", 10.1, True),
        (RECLAIM, "SUSPECT", 10.1, False),
        (RECLAIM, "ALIVE", 1000.0, False),
    ],
)
def test_without_starts_a_name_is_free_by_memberlists_rules(profile: Profile, state: str, after_s: float, taken: bool):
    """A node that left makes room at once; one that died does when a time is set for that, and over."""
    lone = Lone(profile, others=1)
    lone.hear(alive("n3", 5, meta=b"serf"))
    if state != "ALIVE":
        lone.hear(said(state, 5))
    lone.now += after_s
    lone.hear(alive("n3", 1, place=at(50), meta=b"serf"))
    assert (lone.node("n3").endpoint == at(50)) is taken
    assert (lone.app.conflicts == []) is (taken or state == "DEAD")


def test_a_restart_at_the_same_address_is_believed_once_it_is_louder():
    """It hears in its first push/pull how loud it was before."""
    lone = knowing("LEFT")
    lone.hear(alive("n3", 5, meta=b"2"))
    assert lone.view("n3") == (5, "LEFT")
    lone.hear(alive("n3", 6, meta=b"2"))
    assert lone.view("n3") == (6, "ALIVE")


# --- versions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("versions", "speaks"),
    [
        (VERSIONS, True),
        (b"", True),  # nobody knows
        (bytes([1, 5, 2, 2, 5, 4]), True),  # Serf's default for compatibility
        (bytes([5, 7, 5, 5, 9, 5]), True),
        (bytes([0, 5, 5, 2, 5, 5]), False),
        (bytes([1, 4, 4, 2, 5, 5]), False),
        (bytes([6, 7, 6, 2, 5, 5]), False),
        (bytes([1, 7, 6, 2, 5, 5]), False),
        (bytes([1, 5, 0, 2, 5, 5]), False),
        (bytes([1, 5, 5, 2, 4, 4]), False),
        (bytes([1, 5, 5, 6, 7, 6]), False),
        (bytes([1, 5, 5, 2, 7, 6]), False),
        (bytes([1, 5, 5, 1, 5, 1]), False),
    ],
)
def test_a_node_of_other_protocol_versions_is_not_taken(versions: bytes, speaks: bool):
    lone = Lone(others=2)
    lone.hear(alive("n9", versions=versions))
    assert (lone.view("n9") is not None) is speaks
    assert lone.swim.counters.incompatible == (not speaks)
    lone.hear(alive("n2", 2, versions=versions))
    assert (lone.view("n2") == (2, "ALIVE")) is speaks


# --- push/pull -------------------------------------------------------------------------------------------------------


def test_what_a_peer_believes_is_taken_over():
    lone = Lone(others=4)
    lone.quiet()
    lone.pull(pushed("n2", 3), pushed("n3", 1, SUSPECT), pushed("n4", 1, LEFT), pushed("n9"), state=b"heads")
    assert [lone.view(name) for name in ("n2", "n3", "n4", "n5", "n9")] == [
        (3, "ALIVE"), (1, "SUSPECT"), (1, "LEFT"), (1, "ALIVE"), (1, "ALIVE"),
    ]  # fmt: skip
    assert lone.app.states == [b"heads"]
    assert lone.swim.rumours == 4


def test_a_peers_dead_are_suspected_here_and_may_refute():
    lone = Lone(others=4)
    lone.pull(pushed("n3", 1, DEAD))
    assert lone.view("n3") == (1, "SUSPECT")
    lone.hear(alive("n3", 2))
    assert lone.view("n3") == (2, "ALIVE")


@pytest.mark.parametrize("state", ["DEAD", "LEFT"])
def test_of_the_dead_only_the_incarnation_is_learned(state: str):
    lone = knowing(state)
    lone.pull(pushed("n3", 5, DEAD))
    assert lone.view("n3") == (5, state)
    lone.pull(pushed("n3", 6, DEAD))
    assert lone.view("n3") == (6, "DEAD")


def test_who_is_believed_already_costs_nothing():
    lone = Lone(others=4)
    lone.quiet()
    lone.pull(*(pushed(f"n{number}") for number in range(2, 6)), pushed("n2", 0), pushed("n1"))
    assert (lone.swim.rumours, lone.swim.counters.refutations) == (0, 0)


def test_a_state_of_nothing_is_not_told_to_the_application():
    lone = Lone()
    lone.pull()
    assert lone.app.states == []


def test_the_answer_refutes_already_what_was_said_of_this_node():
    lone = Lone(others=2)
    lone.hear(accusation("n3"))
    answer = only(of(lone.pull(pushed("n1", 4, SUSPECT), pushed("n9"), token=12, join=True), AnswerPull))
    assert answer.token == 12
    assert answer.state.join
    assert answer.state.user_state == b"of n1"
    told = {node.name: (node.incarnation, node.state) for node in answer.state.nodes}
    assert told == {"n1": (5, ALIVE), "n2": (1, ALIVE), "n3": (1, SUSPECT), "n9": (1, ALIVE)}


def test_a_node_of_other_versions_among_those_that_are_gone_does_not_matter():
    lone = Lone(others=2)
    assert of(lone.pull(pushed("n9", 1, LEFT, versions=WRONG_VERSIONS)), AnswerPull)


def test_in_a_small_mesh_our_profile_gives_a_suspect_as_long_as_in_one_of_a_hundred():
    lone = Lone(KVMESH_LAN, others=2)
    lone.hear(accusation("n3", 1, "n2"), accusation("n3", 1, "n1"))
    suspicion = lone.node("n3").suspicion
    assert suspicion is not None
    assert suspicion.deadline - lone.now == pytest.approx(KVMESH_LAN.suspicion_min_s) == pytest.approx(3.0)
