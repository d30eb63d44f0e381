"""What a review by an enemy's eyes found: clocks set back, errors of our own, predicates that raise, roles that write
lines into a log, and questions about keys from somebody without one."""

from __future__ import annotations

import asyncio
import itertools
import logging
from random import Random

import msgpack
import pytest

from kvmesh.discovery.actions import Action, Answered, Event, Ticked, Wake
from kvmesh.discovery.core import Core
from kvmesh.discovery.gossip import GossipMembership
from kvmesh.discovery.head import Head, node_id
from kvmesh.discovery.keying import PAYLOAD_PREFIX, KeyManager, Operation
from kvmesh.discovery.map import ClusterMap
from kvmesh.discovery.membership import HeadTold, Member, MemberState
from kvmesh.discovery.meta import FOREIGN_ROLE, Foreign, decode_meta
from kvmesh.discovery.swim.events import SendUser
from kvmesh.discovery.wire import Keyring
from kvmesh.discovery.wire.messages import Endpoint
from kvmesh.transport.limits import FOLLOW_WAIT_S, TICK_RETRY_S
from tests.discovery.gossip_support import World, play
from tests.discovery.support import Pair, key


def test_a_restart_whose_clock_was_set_back_leaves_no_ghosts() -> None:
    async def scene(here: World) -> None:
        a = await here.start("a")
        b = await here.start("b", a, epoch=50_000)
        b.admit(1)
        await a.until_holds("b", 1)
        await b.kill()
        again = await here.start("b", a, epoch=10_000)  # nobody noticed, and its epoch is a smaller one
        again.admit(2)
        await a.until_holds("b", 2)
        assert a.sees("b").epoch == 10_000
        assert not a.discovery.map.has("b", key(1))

    play(scene)


class Membership:
    """One member, told of from outside; it fails at a tick when it shall."""

    def __init__(self) -> None:
        self.ticks = 0
        self.failing = False

    def members(self) -> list[Member]:
        return [self.member("b")]

    def member(self, name: str) -> Member:
        return Member(name, "agent", MemberState.ALIVE, "b:1", 5, 1, 0.0, None, None, {})

    def conflicts(self) -> list[object]:
        return []

    def handle(self, event: Event, now: float) -> list[object]:
        if isinstance(event, Ticked):
            self.ticks += 1
            if self.failing:
                raise ZeroDivisionError
            return [Wake(now + 1.0)]
        return [event]


def core_of(membership: Membership) -> Core:
    return Core("a", membership, ClusterMap(random=Random(0)), None, Random(0))  # type: ignore[arg-type]


def test_an_error_at_one_tick_costs_no_part_its_next_one() -> None:
    membership = Membership()
    core = core_of(membership)
    core._alarms.set("", 1.0)
    for name in ("b", "c"):
        core._alarms.set(name, 1.0)
    membership.failing = True
    with pytest.raises(ZeroDivisionError):
        core.handle(Ticked(), 1.0)
    assert core.wake_at() == 1.0  # those that were due as well
    membership.failing = False
    core.handle(Ticked(), 1.0)
    assert (membership.ticks, core.wake_at()) == (1, 1.0 + TICK_RETRY_S)
    core.handle(Ticked(), 1.0 + TICK_RETRY_S)
    assert membership.ticks == 2


def test_a_follower_is_not_begun_anew_by_a_head_that_is_only_late() -> None:
    core = core_of(Membership())
    head = Head(node_id("b"), 5, 1, 1, 1)
    core._follow("b", head, 1.0)
    follower = core._followers["b"]
    core._follow("b", Head(node_id("b"), 5, 0, 0, 0), 1.1)
    assert core._followers["b"] is follower
    core._follow("b", Head(node_id("b"), 4, 0, 0, 0), 1.2)
    assert core._followers["b"] is not follower


def test_a_head_of_what_never_was_makes_a_follower_ask_a_few_times_and_no_more() -> None:
    pair = Pair()
    pair.fill(3)
    pair.tell_head()
    pair.settle()
    real = pair.journal.head
    pair.feed(HeadTold("a", Head(real.node_id, real.epoch, 2**64 - 1, 0, 0)))
    asked_before = pair.follower.counters.lost
    for _ in range(600):  # a minute; the node answers what it held for as long as it holds
        pair.now += 0.1
        pair.feed(Ticked())
        ask = pair.asks[-1]
        if pair.now - pair.follower._asked_at >= FOLLOW_WAIT_S:
            pair.asks.remove(ask)
            pair.feed(Answered(ask.tag, pair.publisher.nothing_new()))
    assert pair.follower.counters.lost - asked_before <= 8
    assert pair.is_equal()


def test_an_error_of_the_protocol_at_a_tick_or_a_journal_entry_is_counted_and_it_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def scene(here: World) -> None:
        a = await here.start("a")
        b = await here.start("b", a)
        await a.until_sees(b="alive")
        handle = GossipMembership.handle

        def fail(self: GossipMembership, event: Event, now: float) -> list[object]:
            raise ZeroDivisionError

        monkeypatch.setattr(GossipMembership, "handle", fail)
        b.admit(1)  # whoever stores a chunk hears nothing of it: discovery is told in the loop's next turn
        await asyncio.sleep(0)
        a.discovery._on_timer()
        monkeypatch.setattr(GossipMembership, "handle", handle)
        assert b.discovery.stats().unexpected_errors >= 1
        assert a.discovery.stats().unexpected_errors >= 1
        b.admit(2)
        await a.until_holds("b", 2)

    with caplog.at_level(logging.CRITICAL, "kvmesh.discovery"):
        play(scene)


def test_what_a_predicate_raises_is_for_whoever_waits() -> None:
    async def scene(here: World) -> None:
        a = await here.start("a")
        asked = itertools.count()
        waiting = asyncio.create_task(a.discovery.wait_for(lambda: 1 // (next(asked) - 1) > 0, timeout_s=20.0))
        await asyncio.sleep(0)
        b = await here.start("b", a)
        with pytest.raises(ZeroDivisionError):
            await waiting
        await b.until_sees(a="alive")
        assert a.network.counters.unexpected_errors == a.discovery.stats().unexpected_errors == 0

    play(scene)


def test_a_node_that_has_left_says_that_it_does_not_run() -> None:
    async def scene(here: World) -> None:
        a = await here.start("a", keyring=Keyring([b"k" * 32]))
        await a.discovery.stop()
        assert "not running" in (await a.discovery.keys("list")).error

    play(scene)


@pytest.mark.parametrize("role", ["x\nWARNING all is well", "\x1b[31mred", "x" * 65, "\u202egnp"])
def test_a_role_of_another_application_that_cannot_be_shown_is_not(role: str) -> None:
    for meta in (role.encode(), b"\xff" + msgpack.packb({"role": role}, use_bin_type=False)):
        found = decode_meta(meta)
        assert isinstance(found, Foreign)
        assert found.role == FOREIGN_ROLE


def test_who_asks_a_node_without_keys_has_none_and_does_not_choose_where_it_calls() -> None:
    asker, asked = (
        KeyManager(
            name, ring, endpoint=lambda: Endpoint(b"\xc0\x00\x02\x01", 22), numbers=lambda: 1,
            new_id=lambda: b"12345678", save=lambda: None,
        )
        for name, ring in (("a", Keyring([b"k" * 32])), ("b", None))
    )  # fmt: skip
    (question,) = asker.ask(1, "list", b"", [("b", Endpoint(b"\x7f\0\0\1", 2))], 0.0)
    assert isinstance(question, SendUser)
    assert question.payload.startswith(PAYLOAD_PREFIX)
    assert asked.on_payload(question.payload, 0.0) == []
    assert (asked.counters.questions, asked.counters.refused) == (1, 1)


def test_two_askers_at_once_do_not_cut_the_cluster() -> None:
    """a wants to use a key that c wants to remove, and their questions cross in any order."""
    old, new = b"o" * 32, b"n" * 32
    names, ids = "abcd", itertools.count(1)
    done = 0
    for order in (Random(seed) for seed in range(100)):
        rings = [Keyring([old, new]) for _ in names]
        managers = [
            KeyManager(
                name, ring, endpoint=lambda at=at: place(at), numbers=lambda: next(ids),
                new_id=lambda: next(ids).to_bytes(8, "big"), save=lambda: None,
            )
            for at, (name, ring) in enumerate(zip(names, rings, strict=True))
        ]  # fmt: skip
        waiting = [*asks(managers, 0, "use", new), *asks(managers, 2, "remove", new)]
        while waiting:
            action = waiting.pop(order.randrange(len(waiting)))
            if isinstance(action, SendUser):
                waiting += managers[action.target.port - 1].on_payload(action.payload, 0.0)
        for reader in rings:
            assert all(sender.primary in reader.keys for sender in rings)
        done += rings[0].primary == new or new not in rings[2].keys
    assert done  # now and then the first is over before the second asks


def place(at: int) -> Endpoint:
    return Endpoint(b"\x7f\0\0\1", at + 1)


def asks(managers: list[KeyManager], asker: int, operation: Operation, about: bytes) -> list[Action]:
    others = [("abcd"[at], place(at)) for at in range(len(managers)) if at != asker]
    return managers[asker].ask(asker, operation, about, others, 0.0)


def test_members_that_come_and_go_leave_no_alarm_behind() -> None:
    core = core_of(Membership())
    for number in range(100):
        core._follow(f"pod-{number}", Head(node_id(f"pod-{number}"), 5, 1, 1, 1), float(number))
        core._unfollow(f"pod-{number}")
    assert core._alarms._at == {}
    assert core.wake_at() == float("inf")
