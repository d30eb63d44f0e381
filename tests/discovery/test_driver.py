"""Discovery on asyncio, over the memory transport: two or three processes in one loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from random import Random

import pytest

from kvmesh.discovery import CALL_PREFIX, Discovery, Identity, Journal, Member, MemberState
from kvmesh.discovery.messages import Entries, Follow, decode_answer, encode
from kvmesh.transport.errors import ProtocolError, UnreachableError
from kvmesh.transport.limits import FOLLOWS_HELD_MAX
from kvmesh.transport.memory import MemoryNetwork, MemoryTransport
from tests.discovery.support import SIZE, SPACE, key

WAIT_S = 20.0
"""A bound for what takes milliseconds on a quiet machine."""


class Node:
    """A transport, a journal and a `Discovery`, wired as an agent wires them."""

    def __init__(self, network: MemoryNetwork, name: str, peers: Sequence[str], *, epoch: int = 1, role: str = "agent"):
        self.transport: MemoryTransport = network.open(name, None, self._on_call)
        self.journal = Journal(name, epoch) if role == "agent" else None
        identity = Identity(name, role, epoch, self.transport.address)  # type: ignore[arg-type]
        self.discovery = Discovery(identity, self.transport.call, self.journal, peers, random=Random(1))

    async def _on_call(self, request: bytes) -> bytes:
        assert request[:1] == CALL_PREFIX
        return await self.discovery.handle(request[1:])

    def admit(self, number: int) -> None:
        assert self.journal is not None
        self.journal.admit(key(number), SPACE, SIZE, "ram")

    def sees(self, name: str) -> Member | None:
        return self.discovery.member(name)

    async def until(self, seen: Callable[[], bool]) -> None:
        assert await self.discovery.wait_for(seen, timeout_s=WAIT_S)

    async def until_holds(self, name: str, number: int) -> None:
        await self.until(lambda: self.discovery.map.has(name, key(number)))


@asynccontextmanager
async def running(*nodes: Node) -> AsyncIterator[None]:
    for node in nodes:
        await node.discovery.start()
    try:
        yield
    finally:
        for node in nodes:
            await node.discovery.stop()
            await node.transport.close()


def run(scene: Callable[[MemoryNetwork], Awaitable[None]]) -> None:
    async def play() -> None:
        await scene(MemoryNetwork())

    asyncio.run(play())


def test_nodes_find_each_other_and_follow_each_other() -> None:
    async def scene(network: MemoryNetwork) -> None:
        a = Node(network, "a", [])
        b = Node(network, "b", ["a:1"])
        c = Node(network, "c", ["a:1"], role="controller")
        a.admit(1)
        async with running(a, b, c):
            await b.until_holds("a", 1)
            await c.until_holds("a", 1)
            b.admit(2)
            await a.until_holds("b", 2)
            await c.until(lambda: c.discovery.map.has("b", key(2)) and c.discovery.map.complete)
            await b.until(lambda: b.sees("c") is not None)
            a.admit(3)
            assert a.journal is not None
            a.journal.evict(key(1), "ram")
            await b.until(lambda: not b.discovery.map.has("a", key(1)) and b.discovery.map.has("a", key(3)))
            assert [run.node for run in c.discovery.map.locate([key(2)])] == ["b"]
            assert {member.name: member.role for member in b.discovery.members()} == {
                "b": "agent", "a": "agent", "c": "controller",
            }  # fmt: skip
            assert b.discovery.rtt_s("a") is not None
            assert b.discovery.rtt_s("nobody") is None
            assert c.discovery.local_head is None
            assert a.discovery.local_head == a.journal.head
            assert a.discovery.conflicts() == []
            stats = c.discovery.stats()
            assert (stats.followers, stats.map_entries) == (2, 2)
            assert stats.pings.pings_sent > 0
            assert (stats.protocol_errors, stats.unexpected_errors) == (0, 0)

    run(scene)


def test_the_own_chunks_are_in_the_own_map() -> None:
    async def scene(network: MemoryNetwork) -> None:
        a = Node(network, "a", [])
        async with running(a):
            a.admit(1)
            assert [run.node for run in a.discovery.map.locate([key(1)])] == ["a"]

    run(scene)


def test_who_leaves_has_left_at_once() -> None:
    async def scene(network: MemoryNetwork) -> None:
        a, b = Node(network, "a", []), Node(network, "b", ["a:1"])
        async with running(a, b):
            b.admit(1)
            await a.until_holds("b", 1)
            await b.discovery.stop()
            await b.discovery.stop()
            member = a.sees("b")
            assert member is not None
            assert member.state is MemberState.LEFT
            assert not a.discovery.map.has("b", key(1))
            with pytest.raises(ProtocolError):
                await b.discovery.handle(b"")

    run(scene)


@pytest.mark.slow  # a failure takes as long as the bounds say: some 5 s
def test_a_killed_node_fails_and_nobody_believes_its_old_entries_after_a_restart() -> None:
    async def scene(network: MemoryNetwork) -> None:
        a, b = Node(network, "a", ["b:1"]), Node(network, "b", ["a:1"])
        async with running(a, b):
            b.admit(1)
            await a.until_holds("b", 1)
            await network.stop("b")
            await a.until(lambda: (member := a.sees("b")) is not None and member.state is MemberState.FAILED)
            assert not a.discovery.map.has("b", key(1))
            again = Node(network, "b", ["a:1"], epoch=2)
            async with running(again):
                again.admit(2)
                await a.until_holds("b", 2)
                assert not a.discovery.map.has("b", key(1))

    run(scene)


def test_a_restart_that_nobody_noticed_drops_the_old_entries() -> None:
    async def scene(network: MemoryNetwork) -> None:
        a, b = Node(network, "a", ["b:1"]), Node(network, "b", ["a:1"])
        async with running(a, b):
            b.admit(1)
            await a.until_holds("b", 1)
            await network.stop("b")
            again = Node(network, "b", ["a:1"], epoch=2)
            async with running(again):
                await a.until(lambda: not a.discovery.map.has("b", key(1)))
                again.admit(2)
                await a.until_holds("b", 2)

    run(scene)


@pytest.mark.slow  # pings that fail are sent again after a while
@pytest.mark.parametrize(
    "error", [UnreachableError("no"), ProtocolError("%s {} \x00"), OSError("broken"), RuntimeError("%d" * 9)]
)
def test_it_outlives_any_error_of_a_peer(error: Exception) -> None:
    async def scene(network: MemoryNetwork) -> None:
        calls = 0
        real = Node(network, "b", [])

        async def call(address: str, request: bytes, *, timeout_s: float) -> bytes:
            nonlocal calls
            calls += 1
            if calls == 1:
                raise error
            if calls == 2:
                return b"\xff nonsense"
            return await real.transport.call(address, request, timeout_s=timeout_s)

        lonely = Discovery(Identity("a", "controller", 1, "a:1"), call, None, ["b:1"], random=Random(1))
        async with running(real):
            await lonely.start()
            assert await lonely.wait_for(lambda: lonely.member("b") is not None, timeout_s=WAIT_S)
            stats = lonely.stats()
            assert stats.calls_failed + stats.protocol_errors + stats.unexpected_errors >= 2
            await lonely.stop()

    run(scene)


def test_requests_that_cannot_be_read_or_answered_are_errors_and_counted() -> None:
    async def scene(network: MemoryNetwork) -> None:
        c = Node(network, "c", [], role="controller")
        async with running(c):
            for request in (b"", b"\xffnonsense", encode(Follow("x", 1, 0, 1))):
                with pytest.raises(ProtocolError):
                    await c.discovery.handle(request)
            assert c.discovery.stats().protocol_errors == 3

    run(scene)


@pytest.mark.slow  # 512 questions, and the time in which entries gather for so many
def test_questions_without_an_answer_yet_are_held_up_to_a_bound_and_forgotten_when_withdrawn() -> None:
    async def scene(network: MemoryNetwork) -> None:
        a = Node(network, "a", [])
        question = encode(Follow("x", 1, 0, 100))
        async with running(a):
            async with asyncio.TaskGroup() as group:
                held = [group.create_task(a.discovery.handle(question)) for _ in range(FOLLOWS_HELD_MAX)]
                await asyncio.sleep(0)
                at_once = decode_answer(await a.discovery.handle(question))
                assert isinstance(at_once, Entries)
                assert at_once.packed.keys == b""
                held[0].cancel()
                await asyncio.sleep(0)
                late = group.create_task(a.discovery.handle(question))
                await asyncio.sleep(0)
                assert not late.done()
                a.admit(1)
            for task in [*held[1:], late]:
                answer = decode_answer(task.result())
                assert isinstance(answer, Entries)
                assert answer.packed.keys == key(1)

    run(scene)


def test_stopping_answers_the_questions_that_are_held() -> None:
    async def scene(network: MemoryNetwork) -> None:
        a = Node(network, "a", [])
        async with running(a):
            held = asyncio.ensure_future(a.discovery.handle(encode(Follow("x", 1, 0, 100))))
            await asyncio.sleep(0)
            await a.discovery.stop()
            assert isinstance(decode_answer(await held), Entries)

    run(scene)


def test_waiting_in_vain_says_so() -> None:
    async def scene(network: MemoryNetwork) -> None:
        a = Node(network, "a", [])
        async with running(a):
            assert not await a.discovery.wait_for(lambda: False, timeout_s=0.01)
            assert await a.discovery.wait_for(lambda: True, timeout_s=0.0)

    run(scene)


@pytest.mark.slow  # the leave waits for its answer as long as the bound says
def test_stopping_ends_every_task_even_when_a_peer_hangs() -> None:
    async def scene(network: MemoryNetwork) -> None:
        a, b = Node(network, "a", []), Node(network, "b", ["a:1"])
        async with running(a, b):
            await b.until(lambda: b.sees("a") is not None)
            await a.until(lambda: a.sees("b") is not None)
            network.stall("a")
            await b.discovery.stop()
            assert not b.discovery._tasks
            network.resume("a")

    run(scene)


def test_an_address_to_join_that_never_answers_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> None:
        network = MemoryNetwork()
        b = Node(network, "b", [])
        a = Node(network, "a", ["b:1", "nobody:1"])
        async with running(a, b):
            await a.until(lambda: any("nobody:1" in record.message for record in caplog.records))
            await a.until(lambda: a.discovery.stats().calls_failed > 4)
            await a.until(lambda: a.sees("b") is not None)

    with caplog.at_level("WARNING", logger="kvmesh.discovery"):
        asyncio.run(run())
    (said,) = [record.message for record in caplog.records if "to be joined" in record.message]
    assert said.startswith("no node answers at nobody:1")
