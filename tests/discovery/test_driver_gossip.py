"""Discovery by gossip on asyncio: several processes in one loop, over gossip in memory and over real sockets."""

from __future__ import annotations

import asyncio
import json
import logging
from dataclasses import asdict
from pathlib import Path

import pytest

from kvmesh.discovery import MemberState
from kvmesh.discovery import gossip as gossip_module
from kvmesh.discovery.network import read_members_file
from kvmesh.discovery.swim import exchanging, machine
from kvmesh.discovery.wire import Keyring, generate
from kvmesh.transport.limits import TIMER_LATE_S
from tests.discovery.gossip_support import FAST, WAIT_S, World, play
from tests.discovery.support import key
from tests.support.waiting import wait_until_async


@pytest.fixture(autouse=True)
def _short_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "LEAVE_ROUND_S", 0.005)
    monkeypatch.setattr(exchanging, "JOIN_RETRY_S", 0.02)
    monkeypatch.setattr(exchanging, "JOIN_RETRY_S_MAX", 0.04)
    monkeypatch.setattr(gossip_module, "HEAD_INTERVAL_S", 0.02)
    monkeypatch.setattr(exchanging, "REMEMBER_S", 0.01)


both = pytest.mark.parametrize("kind", ["memory", "sockets"])


@both
def test_nodes_find_each_other_and_follow_each_other(kind: str) -> None:
    async def scene(here: World) -> None:
        a = await here.start("a")
        a.admit(1)
        b, c = await here.start("b", a), await here.start("c", a, role="controller")
        await b.until_holds("a", 1)
        await c.until_holds("a", 1)
        b.admit(2)
        await a.until_holds("b", 2)
        await c.until(lambda: c.discovery.map.has("b", key(2)) and c.discovery.map.complete)
        for node in (a, b, c):
            await node.until(lambda node=node: set(node.states()) == {"a", "b", "c"})
            assert set(node.states().values()) == {"alive"}
            assert {member.name: member.role for member in node.discovery.members()}["c"] == "controller"
        assert [run.node for run in c.discovery.map.locate([key(2)])] == ["b"]
        assert a.sees("b").gossip_address == b.network.address
        assert a.sees("b").address == b.transport.address
        head = b.discovery.local_head
        await a.until(lambda: a.sees("b").head == head)
        await c.until(lambda: c.sees("b").head == head)

    play(scene, kind)


@both
def test_who_leaves_has_left_at_once_and_forgets_its_members(kind: str, tmp_path: Path) -> None:
    async def scene(here: World) -> None:
        a = await here.start("a")
        b = await here.start("b", a, members_file=tmp_path / "b.members")
        b.admit(1)
        await a.until_holds("b", 1)
        await wait_until_async(lambda: read_members_file(tmp_path / "b.members"), WAIT_S, "members are remembered")
        await b.discovery.stop()
        assert a.sees("b").state is MemberState.LEFT  # when `stop` returns, not only soon after
        assert not a.discovery.map.has("b", key(1))
        await b.discovery.stop()

    play(scene, kind)
    assert list(tmp_path.iterdir()) == []


@both
@pytest.mark.slow  # a failure takes as long as its suspicion
def test_who_is_killed_has_failed_and_is_believed_when_it_starts_again(kind: str) -> None:
    async def scene(here: World) -> None:
        a = await here.start("a", profile=FAST)
        b, _ = await here.start("b", a, profile=FAST), await here.start("c", a, profile=FAST)
        b.admit(1)
        await a.until_holds("b", 1)
        await a.until_sees(b="alive", c="alive")
        await b.kill()
        await a.until_sees(b="failed", c="alive")
        assert not a.discovery.map.has("b", key(1))
        again = await here.start("b", a, epoch=2000, profile=FAST)
        again.admit(2)
        await a.until_holds("b", 2)
        assert a.states()["b"] == "alive"
        assert not a.discovery.map.has("b", key(1))

    play(scene, kind)


@pytest.mark.parametrize("epoch", [1001, 9000])  # in the same second, and thus with the same incarnation; or later
def test_a_restart_that_nobody_noticed_drops_the_old_entries_at_once(epoch: int) -> None:
    async def scene(here: World) -> None:
        a = await here.start("a")
        b = await here.start("b", a)
        b.admit(1)
        await a.until_holds("b", 1)
        await b.kill()
        again = await here.start("b", a, epoch=epoch)
        await a.until(lambda: not a.discovery.map.has("b", key(1)))
        assert a.states()["b"] == "alive"
        again.admit(2)
        await a.until_holds("b", 2)
        assert (a.sees("b").epoch, a.discovery.conflicts()) == (epoch, [])

    play(scene)


def test_who_cannot_join_says_so_once_a_round_and_joins_when_the_seed_is_there(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def scene(here: World) -> None:
        assert here.gossip is not None
        b = await here.start("b", "a:7951", "seed.mesh:7951")
        here.gossip.name_hosts("seed.mesh", ["nobody"])

        def said() -> list[str]:
            messages = [record.getMessage() for record in caplog.records]
            return [message for message in messages if "no node answers that is to be joined" in message]

        await wait_until_async(lambda: len(said()) >= 3, WAIT_S, "it was said in three rounds")
        stats = b.discovery.stats().gossip
        assert stats is not None
        assert len(said()) == stats.protocol.joins_failed
        assert "a:7951: Name or service not known" in said()[0]
        assert "10.0.0.2:7951: Connection refused" in said()[-1]
        await here.start("a")
        await b.until_sees(a="alive")

    play(scene)


def test_a_node_that_crashed_finds_the_others_by_the_members_of_its_last_run(tmp_path: Path) -> None:
    async def scene(here: World) -> None:
        path = tmp_path / "b.members"
        a = await here.start("a")
        b = await here.start("b", a, members_file=path)
        await wait_until_async(lambda: read_members_file(path) == [a.network.endpoint], WAIT_S, "a is remembered")
        await b.kill()
        assert read_members_file(path) == [a.network.endpoint]
        again = await here.start("b", epoch=2000, members_file=path, known=read_members_file(path))
        await again.until_sees(a="alive")
        await a.until(lambda: a.sees("b").epoch == 2000)

    play(scene)


@both
def test_gossip_keys_are_rotated_on_all_nodes(kind: str, tmp_path: Path) -> None:
    async def scene(here: World) -> None:
        old, new = generate(), generate()
        files = [tmp_path / f"{name}.keys" for name in "abc"]
        rings = [Keyring([old]) for _ in files]
        a = await here.start("a", keyring=rings[0], key_file=files[0])
        b, c = [
            await here.start(name, a, keyring=ring, key_file=file)
            for name, ring, file in zip("bc", rings[1:], files[1:], strict=True)
        ]
        for node in (a, b, c):
            await node.until(lambda node=node: len(node.states()) == 3)

        listed = await b.discovery.keys("list")
        assert listed.is_done
        assert {node.name for node in listed.nodes} == {"a", "b", "c"}
        refused = await b.discovery.keys("use", new)
        assert not refused.is_done
        assert [ring.keys for ring in rings] == [(old,)] * 3
        assert (await b.discovery.keys("install", new)).is_done
        assert [ring.keys for ring in rings] == [(old, new)] * 3
        assert not (await c.discovery.keys("remove", old)).is_done
        assert (await a.discovery.keys("use", new)).is_done
        assert [ring.primary for ring in rings] == [new] * 3
        assert (await c.discovery.keys("remove", old)).is_done
        assert [ring.keys for ring in rings] == [(new,)] * 3
        assert [Keyring.load(file).keys for file in files] == [(new,)] * 3
        a.admit(1)
        for node in (b, c):
            await node.until_holds("a", 1)
            assert set(node.states().values()) == {"alive"}
            assert node.network.counters.refused == {}
        both_ask = await asyncio.gather(a.discovery.keys("list"), a.discovery.keys("list"))
        assert sorted(result.is_done for result in both_ask) == [False, True]

    play(scene, kind)


@both
def test_a_wrong_key_is_refused_counted_and_said(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    async def scene(here: World) -> None:
        a = await here.start("a", keyring=Keyring([generate()]))
        b = await here.start("b", a, keyring=Keyring([generate()]))
        c = await here.start("c", a)
        for node in (b, c):
            await node.until(lambda node=node: node.discovery.stats().gossip.protocol.joins_failed > 0)
        assert a.network.counters.refused["undecryptable"] > 0
        assert a.network.counters.refused["plaintext"] > 0
        assert [node.states() for node in (a, b, c)] == [{name: "alive"} for name in "abc"]

    play(scene, kind)
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert any("sealed with a key that this node does not have: check --key-file" in message for message in said)
    assert any("is not encrypted, and this node has a key" in message for message in said)


def test_a_process_that_was_stopped_for_a_while_holds_nobody_for_dead() -> None:
    async def scene(here: World) -> None:
        a = await here.start("a", profile=FAST)
        b, c = await here.start("b", a, profile=FAST), await here.start("c", a, profile=FAST)
        for node in (a, b, c):
            await node.until(lambda node=node: len(node.states()) == 3)
        exchanges = a.discovery.stats().gossip.protocol.exchanges
        a.ahead_s += 30 + TIMER_LATE_S
        await a.until(lambda: a.discovery.stats().gossip.protocol.pauses > 0)
        await a.until(lambda: a.discovery.stats().gossip.protocol.exchanges > exchanges)  # what was missed is asked for
        protocol = a.discovery.stats().gossip.protocol
        assert (protocol.deaths, protocol.suspicions) == (0, 0)
        for node in (a, b, c):
            assert set(node.states().values()) == {"alive"}

    play(scene)


@pytest.mark.slow  # a failure takes as long as its suspicion
def test_who_is_stalled_or_cut_off_comes_back() -> None:
    async def scene(here: World) -> None:
        assert here.gossip is not None
        a = await here.start("a", profile=FAST)
        b = await here.start("b", a, profile=FAST)
        await a.until_sees(b="alive")
        here.gossip.stall("b")
        await a.until_sees(b="failed")
        here.gossip.resume("b")
        await a.until_sees(b="alive")
        await b.until_sees(a="alive")
        here.gossip.cut("a", "b")
        await a.until_sees(b="failed")
        await b.until_sees(a="failed")
        here.gossip.heal("a", "b")
        await a.until_sees(b="alive")
        await b.until_sees(a="alive")

    play(scene)


def test_two_processes_with_one_name_are_reported_with_both_addresses(caplog: pytest.LogCaptureFixture) -> None:
    async def scene(here: World) -> None:
        a = await here.start("a")
        first = await here.start("b", a, host="b1")
        await a.until_sees(b="alive")
        second = await here.start("b", a, host="b2")
        await a.until(lambda: bool(a.discovery.conflicts()))
        conflict = a.discovery.conflicts()[0]
        assert {conflict.address, conflict.other_address} == {first.network.address, second.network.address}

    play(scene)
    said = [record.getMessage() for record in caplog.records if "two processes are called b" in record.getMessage()]
    assert said
    assert all("10.0.0.2:7951" in message and "10.0.0.3:7951" in message for message in said)


def test_gossip_goes_on_when_packets_get_lost() -> None:
    async def scene(here: World) -> None:
        assert here.gossip is not None
        a = await here.start("a")
        b, c = await here.start("b", a), await here.start("c", a)
        await a.until_sees(b="alive", c="alive")
        here.gossip.lose(0.3)
        for number in range(1, 4):
            b.admit(number)
            await c.until_holds("b", number)
        assert a.states() == {"a": "alive", "b": "alive", "c": "alive"}

    play(scene)


def test_its_statistics_are_whole_and_json() -> None:
    async def scene(here: World) -> None:
        a = await here.start("a", keyring=Keyring([bytes(32)]))
        b = await here.start("b", a, keyring=Keyring([bytes(32)]))
        stranger = await here.start("c", a)
        await b.until_sees(a="alive")
        await stranger.until(lambda: stranger.discovery.stats().gossip.protocol.joins_failed > 0)
        stats = a.discovery.stats()
        document = json.loads(json.dumps(asdict(stats)))
        assert document["pings"] is None
        gossip = document["gossip"]
        assert gossip["network"]["refused"]["plaintext"] > 0
        assert gossip["network"]["streams_served"] > 0
        assert gossip["network"]["unexpected_errors"] == 0
        assert gossip["protocol"]["exchanges"] >= 1
        assert set(gossip) == {"protocol", "members", "network", "keys", "rumours", "health"}
        b.admit(1)
        await a.until_holds("b", 1)
        assert stats.gossip is not None
        assert asdict(stats)["map_entries"] == 0  # a copy

    play(scene)


def test_without_gossip_keys_it_says_how_to_have_some() -> None:
    async def scene(here: World) -> None:
        a = await here.start("a")
        assert (await a.discovery.keys("list")).error.startswith("a: it runs without gossip keys")

    play(scene)
