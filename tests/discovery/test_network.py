"""The contract of a network of gossip, over memory and over real sockets: one test file for both."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from pathlib import Path

import pytest

from kvmesh.discovery.actions import Wake
from kvmesh.discovery.network import read_members_file
from kvmesh.discovery.swim.events import (
    AnswerPull,
    Exchange,
    Exchanged,
    PacketCame,
    Pulled,
    RefusePull,
    Remember,
    Resolve,
    Resolved,
    SendPacket,
    SendUser,
    StreamFailed,
    StreamPing,
    StreamPinged,
    SwimEvent,
    UserCame,
)
from kvmesh.discovery.wire import Ack, Endpoint, Keyring, Ping, Suspect, User, overhead_bytes
from kvmesh.transport.limits import MEMBERS_REMEMBERED_MAX
from tests.discovery.network_support import WAIT_S, Place, play, state_of
from tests.support.waiting import wait_until_async

KEY, OTHER_KEY = bytes(range(32)), bytes(range(1, 33))
Scene = Callable[[Place], Awaitable[None]]


@pytest.fixture(params=["memory", "sockets"])
def at(request: pytest.FixtureRequest) -> Callable[[Scene], None]:
    return lambda scene: play(request.param, scene)


def test_packets_go_each_way_with_one_message_or_many(at: Callable[[Scene], None]) -> None:
    async def scene(here: Place) -> None:
        a, b = await here.open("a"), await here.open("b")
        one = (Ping(7, "b", a.endpoint.ip, a.endpoint.port, "a"),)
        many = (Ack(7), *(Suspect(number, f"node-{number}", "b") for number in range(254)))
        a.do(SendPacket(b.endpoint, one))
        assert await b.hears(PacketCame) == [PacketCame(a.endpoint, one)]
        b.do(SendPacket(a.endpoint, many, crc=True))
        assert await a.hears(PacketCame) == [PacketCame(b.endpoint, many)]
        counters = a.network.counters
        assert (counters.packets_sent, counters.packets_received) == (1, 1)
        assert counters.packet_bytes_sent == b.network.counters.packet_bytes_received > 0
        assert counters.packet_bytes_received == b.network.counters.packet_bytes_sent > 8000
        assert counters.refused == counters.left_out == {}

    at(scene)


def test_packets_that_come_before_the_start_are_taken_then_and_none_after_the_close(
    at: Callable[[Scene], None],
) -> None:
    async def scene(here: Place) -> None:
        a, b = await here.open("a"), await here.open("b", start=False)
        a.do(SendPacket(b.endpoint, (Ack(1),)))
        a.do(StreamPing(5, b.endpoint, Ping(1, "b"), WAIT_S))
        await asyncio.sleep(0)
        assert b.events == []
        b.start()
        await b.hears(PacketCame)
        await a.hears(StreamPinged)
        await b.network.close()
        await b.network.close()
        a.do(SendPacket(b.endpoint, (Ack(2),)))
        a.do(StreamPing(6, b.endpoint, Ping(1, "b"), WAIT_S))
        for action in (SendPacket(a.endpoint, (Ack(3),)), Exchange(1, a.endpoint, b.state, WAIT_S), Resolve("a:1")):
            b.do(action)  # nothing, once it is closed
        assert [failed.number for failed in await a.hears(StreamFailed)] == [6]
        assert len(b.events) == 1
        assert a.told(PacketCame) == []

    at(scene)


@pytest.mark.parametrize("closes", [PacketCame, Pulled])
def test_it_may_be_closed_by_what_came(at: Callable[[Scene], None], closes: type[SwimEvent]) -> None:
    async def scene(here: Place) -> None:
        a, b = await here.open("a"), await here.open("b", start=False)
        closing: list[asyncio.Task[None]] = []

        def on_event(event: SwimEvent) -> None:
            b.events.append(event)
            if isinstance(event, closes):
                closing.append(asyncio.ensure_future(b.network.close()))

        b.network.start(on_event)
        for _ in range(10):
            a.do(SendPacket(b.endpoint, (Ack(1),)))
        a.do(Exchange(3, b.endpoint, a.state, WAIT_S))
        await wait_until_async(lambda: closing, WAIT_S, "it is closed")
        await asyncio.gather(*closing)
        await a.hears(StreamFailed)
        assert a.told(Exchanged) == []

    at(scene)


@pytest.mark.parametrize("keyring", [None, Keyring([KEY])])
def test_push_pull_is_answered_by_the_protocol(at: Callable[[Scene], None], keyring: Keyring | None) -> None:
    async def scene(here: Place) -> None:
        a = await here.open("a", keyring=keyring, label="x")
        b = await here.open("b", keyring=keyring, label="x")
        assert a.network.packet_overhead_bytes == overhead_bytes(keyring is not None, "x")
        b.state = state_of("b", 1000, os.urandom(200))  # more than any buffer on the way
        a.state = state_of("a", 800, os.urandom(400))
        a.do(Exchange(11, b.endpoint, a.state, WAIT_S))
        assert await a.hears(Exchanged) == [Exchanged(11, b.state)]
        (pulled,) = await b.hears(Pulled)
        assert (pulled.state, pulled.source.ip) == (a.state, a.endpoint.ip)
        counters = a.network.counters
        assert (counters.streams_opened, counters.streams_failed) == (1, 0)
        assert (b.network.counters.streams_served, b.network.counters.streams_unread) == (1, 0)
        assert counters.stream_bytes_sent == b.network.counters.stream_bytes_received > 300_000
        assert counters.stream_bytes_received == b.network.counters.stream_bytes_sent > 200_000

    at(scene)


def test_push_pull_may_be_refused_and_the_words_of_the_peer_make_no_line_of_their_own(
    at: Callable[[Scene], None],
) -> None:
    async def scene(here: Place) -> None:
        a, b = await here.open("a"), await here.open("b")
        b.on_pulled = lambda pulled: RefusePull(pulled.token, "no\nWARNING " + "x" * 2000)
        a.do(Exchange(12, b.endpoint, a.state, WAIT_S))
        (failed,) = await a.hears(StreamFailed)
        assert failed.number == 12
        assert failed.reason.startswith(f"{b.network.address}: it refused: no?WARNING xxx")
        assert len(failed.reason) < 600
        assert a.network.counters.streams_failed == 1

    at(scene)


def test_answers_may_come_later_in_any_order_and_each_goes_to_its_own_stream(at: Callable[[Scene], None]) -> None:
    async def scene(here: Place) -> None:
        a, b = await here.open("a"), await here.open("b")
        b.on_pulled = lambda _: None
        for number in (1, 2, 3):
            a.do(Exchange(number, b.endpoint, state_of(f"a{number}"), WAIT_S))
        for pulled in reversed(await b.hears(Pulled, 3)):
            b.do(AnswerPull(pulled.token, state_of(f"to {pulled.state.nodes[0].name}")))
            b.do(AnswerPull(pulled.token, state_of("twice")))
        b.do(AnswerPull(999, state_of("nobody")))
        answers = {exchanged.number: exchanged.state.nodes[0].name for exchanged in await a.hears(Exchanged, 3)}
        assert answers == {1: "to a1-0-0", 2: "to a2-0-0", 3: "to a3-0-0"}

    at(scene)


def test_a_ping_over_a_stream_is_answered_by_the_node_of_that_name_only(at: Callable[[Scene], None]) -> None:
    async def scene(here: Place) -> None:
        a, b = await here.open("a"), await here.open("b")
        a.do(StreamPing(1, b.endpoint, Ping(21, "b"), WAIT_S))
        a.do(StreamPing(2, b.endpoint, Ping(22, "c"), WAIT_S))
        assert await a.hears(StreamPinged) == [StreamPinged(1)]
        (failed,) = await a.hears(StreamFailed)
        assert failed == StreamFailed(2, f"{b.network.address}: the stream was closed without an answer")
        assert b.events == []
        assert b.network.counters.refused == {}

    at(scene)


def test_a_user_message_over_a_stream_arrives_and_only_its_failure_is_told(at: Callable[[Scene], None]) -> None:
    async def scene(here: Place) -> None:
        a, b = await here.open("a"), await here.open("b")
        nobody = await here.nowhere()
        payload = os.urandom(100_000)
        a.do(SendUser(31, b.endpoint, payload, WAIT_S))
        a.do(SendUser(32, nobody, payload, WAIT_S))
        (came,) = await b.hears(UserCame)
        assert (came.payload, came.source.ip) == (payload, a.endpoint.ip)
        assert [failed.number for failed in await a.hears(StreamFailed)] == [32]
        assert len(a.events) == 1

    at(scene)


def test_what_is_not_there_ends_in_exactly_one_event(at: Callable[[Scene], None]) -> None:
    async def scene(here: Place) -> None:
        a = await here.open("a")
        nobody = await here.nowhere()
        strange = [Endpoint(b"\1\2\3", 7), Endpoint(b"", 7), Endpoint(bytes(16), 7), Endpoint(b"\x7f\0\0\1", 0)]
        a.do(Exchange(1, nobody, a.state, WAIT_S))
        a.do(StreamPing(2, nobody, Ping(1, "x"), WAIT_S))
        for number, target in enumerate(strange, 3):
            a.do(Exchange(number, target, a.state, WAIT_S))
            a.do(SendPacket(target, (Ack(1),)))
        a.do(SendPacket(Endpoint(b"\x7f\0\0\1", 1 << 17), (Ack(1),)))
        a.do(SendPacket(nobody, (User(bytes(70_000)),)))  # longer than a packet can be
        failed = await a.hears(StreamFailed, 6)
        assert {event.number for event in failed} == {1, 2, 3, 4, 5, 6}
        assert all("\n" not in event.reason for event in failed)
        by_number = {event.number: event.reason for event in failed}
        assert by_number[1].endswith(": Connection refused")
        assert by_number[3] == "an address of 3 bytes: not an address"
        a.do(SendPacket(nobody, (Ack(1),)))  # gets lost
        counters = a.network.counters
        assert (counters.streams_opened, counters.streams_failed, counters.unexpected_errors) == (0, 6, 0)
        assert counters.send_errors + counters.unreachable >= 3

    at(scene)


def test_no_answer_within_the_time_of_the_action_is_a_failure(at: Callable[[Scene], None]) -> None:
    async def scene(here: Place) -> None:
        a, b = await here.open("a"), await here.open("b")
        b.on_pulled = lambda _: None
        a.do(Exchange(1, b.endpoint, a.state, 0.05))
        assert await a.hears(StreamFailed) == [StreamFailed(1, f"{b.network.address}: no answer within 0.05 s")]

    at(scene)


def test_what_has_no_meaning_over_a_stream_is_refused(at: Callable[[Scene], None]) -> None:
    async def scene(here: Place) -> None:
        a, b = await here.open("a"), await here.open("b")
        a.do(StreamPing(1, b.endpoint, Ack(1), WAIT_S))  # type: ignore[arg-type]
        (failed,) = await a.hears(StreamFailed)
        assert failed.reason == f"{b.network.address}: another answer than an ack to this ping"
        assert b.network.counters.refused == {"unknown_kind": 1}
        assert b.events == []

    at(scene)


def test_keys_and_labels_of_others_are_refused_counted_and_said_once(
    at: Callable[[Scene], None], caplog: pytest.LogCaptureFixture
) -> None:
    async def scene(here: Place) -> None:
        a = await here.open("a", keyring=Keyring([KEY]))
        others = [
            await here.open("wrong", keyring=Keyring([OTHER_KEY])),
            await here.open("plain"),
            await here.open("labelled", keyring=Keyring([KEY]), label="x"),
        ]
        for other in others:
            for number in range(3):
                other.do(SendPacket(a.endpoint, (Ack(number),)))
                other.do(Exchange(number, a.endpoint, state_of("o", 1500), WAIT_S))
        for other in others:
            failed = await other.hears(StreamFailed, 3)
            assert all(a.network.address in event.reason for event in failed)
        await wait_until_async(lambda: a.network.counters.packets_received == 9, WAIT_S, "all packets came")
        assert a.network.counters.refused == {"undecryptable": 6, "plaintext": 6, "wrong_label": 6}
        assert a.events == []
        plain = others[1]
        a.do(SendPacket(plain.endpoint, (Ack(1),)))
        await wait_until_async(lambda: plain.network.counters.refused.get("encrypted"), WAIT_S, "it is refused")

    at(scene)
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    asked = [warning for warning in warnings if "the answer of" not in warning]  # the others complain of a's refusals
    for advice in ("a key that this node does not have", "is not encrypted", "with another --label"):
        assert sum(advice in warning for warning in asked) == 1
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_an_error_of_the_protocol_ends_nothing_and_each_kind_is_said_once(
    at: Callable[[Scene], None], caplog: pytest.LogCaptureFixture
) -> None:
    async def scene(here: Place) -> None:
        a, b = await here.open("a"), await here.open("b", start=False)
        fails = True

        def on_event(event: SwimEvent) -> None:
            if fails:
                raise ZeroDivisionError
            b.on_event(event)

        b.network.start(on_event)
        for number in range(3):
            a.do(SendPacket(b.endpoint, (Ack(number),)))
            a.do(Exchange(number, b.endpoint, a.state, WAIT_S))
        await a.hears(StreamFailed, 3)  # at once, not after the time of a stream
        await wait_until_async(lambda: b.network.counters.unexpected_errors == 6, WAIT_S, "all are counted")
        fails = False
        a.do(SendPacket(b.endpoint, (Ack(9),)))
        a.do(Exchange(9, b.endpoint, a.state, WAIT_S))
        await b.hears(PacketCame)
        await a.hears(Exchanged)

    at(scene)
    errors = [record for record in caplog.records if record.levelname == "ERROR"]
    assert sorted(record.getMessage().split(" failed")[0] for record in errors) == [
        "gossip's protocol, at PacketCame,",
        "gossip's protocol, at Pulled,",
    ]


def test_names_are_looked_up(at: Callable[[Scene], None]) -> None:
    async def scene(here: Place) -> None:
        a = await here.open("a")
        a.do(Resolve("127.0.0.5:7000"))
        assert await a.hears(Resolved) == [Resolved("127.0.0.5:7000", (Endpoint(b"\x7f\0\0\5", 7000),))]
        for seed in ("no-such-host.invalid:7000", "127.0.0.5:no", "127.0.0.5", "127.0.0.5:70000", "a..b:1"):
            a.events.clear()
            a.do(Resolve(seed))
            (resolved,) = await a.hears(Resolved)
            assert (resolved.seed, resolved.endpoints) == (seed, ())
            assert resolved.error
        assert a.network.counters.unexpected_errors == 0

    at(scene)


def test_members_are_remembered_until_they_are_forgotten(at: Callable[[Scene], None], tmp_path: Path) -> None:
    async def scene(here: Place) -> None:
        path = tmp_path / "state" / "a.members"
        members = [Endpoint(b"\x0a\0\0" + bytes([number]), 7000 + number) for number in range(100)]
        a = await here.open("a", members_file=path)
        for count in (1, 2, 100):
            a.do(Remember(tuple(members[:count])))
        await wait_until_async(lambda: len(read_members_file(path)) > 2, WAIT_S, "the newest are written")
        assert read_members_file(path) == members[:MEMBERS_REMEMBERED_MAX]
        a.do(Remember(tuple(members[:3])))
        await a.network.forget_members()
        a.do(Remember(tuple(members[:3])))
        await a.network.close()
        assert list(path.parent.iterdir()) == []

    at(scene)


def test_members_that_cannot_be_kept_are_counted_and_said_once(
    at: Callable[[Scene], None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def scene(here: Place) -> None:
        (tmp_path / "state").write_text("a file where the folder should be")
        a = await here.open("a", members_file=tmp_path / "state" / "a.members")
        for count in (1, 2):
            a.do(Remember((Endpoint(b"\x0a\0\0\1", count),)))
            await wait_until_async(lambda count=count: a.network.counters.file_errors == count, WAIT_S, "it is counted")
        (tmp_path / "state").unlink()
        a.do(Remember((Endpoint(b"\x0a\0\0\1", 3),)))
        await wait_until_async(lambda: read_members_file(tmp_path / "state" / "a.members"), WAIT_S, "it is kept")

    at(scene)
    assert [record.getMessage().endswith("check --state-dir") for record in caplog.records] == [True]


def test_actions_of_others_are_left_to_them_and_counters_are_json(at: Callable[[Scene], None]) -> None:
    async def scene(here: Place) -> None:
        a = await here.open("a", keyring=Keyring([KEY]))
        b = await here.open("b")
        assert not a.network.perform(Wake(1.0))
        b.do(SendPacket(a.endpoint, (Ack(1),)))
        await wait_until_async(lambda: a.network.counters.refused, WAIT_S, "it is refused")
        assert json.loads(json.dumps(asdict(a.network.counters)))["refused"] == {"plaintext": 1}
        earlier = a.network.counters
        b.do(SendPacket(a.endpoint, (Ack(1),)))
        await wait_until_async(lambda: a.network.counters.refused["plaintext"] == 2, WAIT_S, "again")
        assert earlier.refused == {"plaintext": 1}

    at(scene)
