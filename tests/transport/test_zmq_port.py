"""The mesh port: whatever connects, and however its bytes are cut.

The port is tested alone (mesh_ports.py). Time is a test's own wherever the port would wait for seconds. What goes out
of it, and how connections end, is in test_zmq_port_ends.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import random
import socket
from collections.abc import Iterator

import pytest
import zmq

from kvmesh.transport import zmq_port
from kvmesh.transport.counters import Counters
from kvmesh.transport.limits import (
    HANDSHAKE_TIMEOUT_S,
    HEADER_BYTES_MAX,
    HEARTBEAT_INTERVAL_S,
    HEARTBEAT_TIMEOUT_S,
    KIB,
    STAGE_BYTES,
)
from kvmesh.transport.zmq_port import EVENTS_PER_TURN
from kvmesh.transport.zmtp import message
from tests.support.waiting import wait_until_async
from tests.transport.ends import LONG_S
from tests.transport.mesh_ports import HELLO, PING, PONG, Clock, Node, Plain, always, narrowed
from tests.transport.strangers import GREETING, Stranger, frames


# --- what comes, however it is cut -------------------------------------------------------------------------------
def messages_of(rng: random.Random, count: int, payload_bytes: int) -> list[list[bytes]]:
    """Any messages that are allowed: a header, and at most one payload."""
    heads = (0, 1, 40, 255, 256, HEADER_BYTES_MAX - 1, HEADER_BYTES_MAX)
    payloads = (0, 1, 255, 256, STAGE_BYTES - 1, STAGE_BYTES, STAGE_BYTES + 1, payload_bytes)
    return [
        [rng.randbytes(rng.choice(heads)), *([rng.randbytes(rng.choice(payloads))] if rng.random() < 0.7 else [])]
        for _ in range(count)
    ]


@pytest.mark.parametrize("at_once", [1, 2, 3, 63, 64, 65])
def test_bytes_that_come_one_by_one_are_the_same_messages(at_once: int, rng: random.Random) -> None:
    said = [[b"no payload"], [b"", b""], [b"head", bytes(300)], [rng.randbytes(260), rng.randbytes(700)], [b"", b"x"]]

    async def main() -> None:
        async with Node(made=narrowed(lambda: always(at_once))) as node:
            with Plain(node.address) as plain:
                await plain.say(HELLO, *(frames(*parts) + PING for parts in said))
                assert [await plain.hear() for _ in said] == said
                await plain.say(frames(b"last"))
                assert await plain.hear() == [b"last"]
                assert plain.commands[1:] == [PONG] * len(said)
            assert [parts for _, parts in node.heard[:-1]] == said

    asyncio.run(main())


@pytest.mark.parametrize("largest", [300, 5000, 3 * STAGE_BYTES, 100 * KIB])
def test_messages_in_any_segments_are_whole_and_in_order(largest: int, rng: random.Random) -> None:
    """Several peers at once, each with messages of its own, of which every system call brings any number of bytes."""

    def sizes() -> Iterator[int]:
        mine = random.Random(rng.random())
        while True:
            yield mine.choice((1, 2, mine.randrange(1, 80), mine.randrange(1, largest)))

    async def main() -> None:
        async with Node(echoes=False, made=narrowed(sizes)) as node:
            with contextlib.ExitStack() as stack:
                said: dict[bytes, list[list[bytes]]] = {}
                saying = []
                for _ in range(3):
                    plain = stack.enter_context(Plain(node.address))
                    (name,) = set(await node.has(len(said) + 1)) - said.keys()
                    said[name] = messages_of(rng, 12, min(20 * largest, 200 * KIB))
                    wires = [b"".join(rng.choice((frames(*parts), *_short(parts))) for parts in said[name])]
                    saying.append(plain.say(HELLO, *wires))
                await asyncio.gather(*saying)
                count = sum(map(len, said.values()))
                await wait_until_async(lambda: len(node.heard) >= count, LONG_S, "all are heard")
                assert {name: [parts for who, parts in node.heard if who == name] for name in said} == said
                assert node.counters == Counters()

    asyncio.run(main())


def _short(parts: list[bytes]) -> list[bytes]:
    return [b"".join(message(parts))]


def test_what_is_said_with_the_greeting_is_answered_after_the_handshake() -> None:
    """A peer that says everything at once: its first message must not be answered before it is told `READY`."""

    async def main() -> None:
        async with Node() as node:
            with Plain(node.address) as plain:
                await plain.say(HELLO, frames(b"early", b"bird"))
                assert await plain.hear() == [b"early", b"bird"]
                assert [command[:6] for command in plain.commands] == [b"\x05READY"]

    asyncio.run(main())


def test_who_waits_to_be_greeted_is_greeted() -> None:
    async def main() -> None:
        async with Node() as node:
            with Plain(node.address) as plain:
                async with asyncio.timeout(LONG_S):
                    assert (await plain.exactly(len(GREETING)))[:11] == GREETING[:11]

    asyncio.run(main())


def test_garbage_behind_much_in_one_segment_costs_the_connection() -> None:
    async def main() -> None:
        async with Node() as node:
            with Plain(node.address) as plain:
                said = [[b"%d" % number] for number in range(3 * EVENTS_PER_TURN)]
                await plain.say(HELLO, *(b"".join(message(parts)) for parts in said), b"\x08\0")
                await plain.ended()
                await node.has(0)
                assert [parts for _, parts in node.heard] == said
                assert node.counters == Counters(malformed=1)

    asyncio.run(main())


def test_what_comes_before_the_end_is_heard() -> None:
    async def main() -> None:
        async with Node(echoes=False) as node:
            with Plain(node.address) as plain:
                await plain.say(
                    HELLO, frames(b"head", bytes(100 * KIB)), frames(b"last words"), frames(b"x", b"yz")[:-1]
                )
            await wait_until_async(lambda: node.gone, LONG_S, "it is gone")
            assert [parts for _, parts in node.heard] == [[b"head", bytes(100 * KIB)], [b"last words"]]
            assert node.gone == [node.heard[0][0]]
            assert node.counters == Counters()  # to go is no offence

    asyncio.run(main())


def test_who_says_much_in_one_segment_holds_no_other_up() -> None:
    async def main() -> None:
        async with Node(echoes=False) as node:
            with Plain(node.address) as busy, Plain(node.address) as brief:
                (first, second) = await node.has(2)
                for plain in (busy, brief):
                    await plain.say(HELLO)
                await wait_until_async(
                    lambda: all(node.port._peers[name].connection.ready for name in (first, second)), LONG_S, "both are"
                )
                numbers = [[b"%d" % number] for number in range(2000)]
                # The loop has no turn before all is said: what both said lies in their sockets.
                await busy.say(*(b"".join(message(parts)) for parts in numbers), b"\x00\x09cut off")
                busy.end()
                await brief.say(frames(b"one word"))
                await wait_until_async(lambda: node.gone == [first], LONG_S, "all is heard, and then the end")
                assert [parts for name, parts in node.heard if name == first] == numbers
                assert node.heard.index((second, [b"one word"])) <= 2 * EVENTS_PER_TURN

    asyncio.run(main())


# --- bounds ------------------------------------------------------------------------------------------------------
def test_one_connection_too_many_is_closed_until_a_place_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zmq_port, "CONNECTIONS_SERVED_MAX", 2)

    async def main() -> None:
        async with Node() as node:
            with Plain(node.address) as first, Plain(node.address) as second:
                await node.has(2)
                for _ in range(3):
                    with Plain(node.address) as third:
                        await third.ended()
                assert node.counters == Counters(refused=3)
                assert node.gone == []  # it was never told of
                first.end()
                await node.has(1)
                with Plain(node.address) as third:
                    await third.say(HELLO, frames(b"there is room"))
                    assert await third.hear() == [b"there is room"]
                    await second.say(HELLO, frames(b"as before"))
                    assert await second.hear() == [b"as before"]
            assert node.counters.refused == 3

    asyncio.run(main())


class Scarce(socket.socket):
    """Accepts nobody, for want of descriptors, until there are some."""

    free = False
    tries = 0

    def accept(self) -> tuple[socket.socket, object]:
        self.tries += 1
        if not self.free:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return super().accept()


@pytest.mark.parametrize("closes", [False, True])
def test_without_a_descriptor_nobody_is_accepted_until_later(closes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zmq_port, "ACCEPT_RETRY_S", LONG_S)
    ports: list[Scarce] = []

    def made(listening: socket.socket) -> Scarce:
        ports.append(Scarce(fileno=listening.detach()))
        ports[0].setblocking(False)
        return ports[0]

    async def main() -> None:
        with contextlib.ExitStack() as at_end:
            await accept(at_end)

    async def accept(at_end: contextlib.ExitStack) -> None:
        async with Node(made=made) as node:
            with Plain(node.address) as plain:
                await wait_until_async(lambda: ports[0].tries, LONG_S, "it was tried")
                for _ in range(20):
                    await asyncio.sleep(0)
                assert ports[0].tries == 1  # not again and again
                assert node.port._retry is not None
                retry = node.port._retry
                if closes:
                    at_end.callback(lambda: retry.cancelled() or pytest.fail("a closed port would accept again"))
                    return
                retry.cancel()
                monkeypatch.setattr(zmq_port, "ACCEPT_RETRY_S", 0.001)
                node.port._accept_again()
                await wait_until_async(lambda: ports[0].tries >= 4, LONG_S, "it is tried again, and again")
                ports[0].free = True
                await plain.say(HELLO, frames(b"at last"))
                assert await plain.hear() == [b"at last"]

    asyncio.run(main())


@pytest.mark.parametrize("bound", ["SEND_QUEUE_BUFFERS", "SAID_BYTES_MAX"])
def test_who_asks_and_does_not_read_is_closed(bound: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zmq_port, "SEND_QUEUE_BUFFERS", 1 << 60)
    monkeypatch.setattr(zmq_port, "SAID_BYTES_MAX", 1 << 60)
    monkeypatch.setattr(zmq_port, bound, {"SEND_QUEUE_BUFFERS": 8, "SAID_BYTES_MAX": 16 * KIB}[bound])

    async def main() -> None:
        async with Node() as node:
            with Plain(node.address, receive_bytes=4 * KIB) as asking, Plain(node.address) as good:
                (name, _) = await node.has(2)
                node.outbox(name).socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * KIB)
                with contextlib.suppress(ConnectionError):
                    await asking.say(HELLO, PING * 100_000)
                await wait_until_async(lambda: node.gone == [name], LONG_S, "it is closed")
                assert node.counters == Counters(malformed=1)
                await good.say(HELLO, PING * 1000, frames(b"who reads is answered"))
                assert await good.hear() == [b"who reads is answered"]

    asyncio.run(main())


# --- time --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("said", [b"", GREETING[:1], GREETING[:40], GREETING, HELLO[:-1], GREETING + b"\x04"])
def test_a_handshake_that_is_not_over_in_time_ends_the_connection(said: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)

    async def main() -> None:
        async with Node() as node:
            with Plain(node.address) as slow, Plain(node.address) as good:
                (name, _) = await node.has(2)
                await good.say(HELLO, frames(b"in time"))
                assert await good.hear() == [b"in time"]
                await slow.say(said)
                clock.now += HANDSHAKE_TIMEOUT_S - 0.01
                await asyncio.sleep(0.01)  # some ticks
                assert not node.gone
                clock.now += 0.02
                await slow.ended()
                await wait_until_async(lambda: node.gone == [name], LONG_S, "that it is gone is told")
                await good.say(frames(b"as before"))
                assert await good.hear() == [b"as before"]

    asyncio.run(main())


@pytest.mark.parametrize(
    ("unfinished", "taken_bytes"),
    [
        pytest.param(b"", 0, id="after a message"),
        pytest.param(b"\x01", 1, id="in a header"),
        pytest.param(frames(b"head", bytes(100 * KIB))[:-1], 100 * KIB - 1, id="in a payload"),
    ],
)
def test_a_peer_that_falls_silent_is_asked_and_then_lost(
    unfinished: bytes, taken_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)

    async def main() -> None:
        async with Node() as node:
            with Plain(node.address) as silent, Plain(node.address) as good:
                (name, other) = await node.has(2)
                for plain in (silent, good):
                    await plain.say(HELLO, frames(b"hello"))
                    assert await plain.hear() == [b"hello"]
                await silent.say(unfinished)
                peer = node.port._peers[name]
                await wait_until_async(
                    lambda: peer.filled + peer.connection._high == taken_bytes, LONG_S, "what it said is taken in"
                )
                for step in range(round(HEARTBEAT_TIMEOUT_S / HEARTBEAT_INTERVAL_S)):
                    assert not node.gone
                    clock.now += HEARTBEAT_INTERVAL_S
                    await good.say(b"\x04\x05\x04PONG", frames(b"%d" % step))
                    assert await good.hear() == [b"%d" % step]
                    await wait_until_async(
                        lambda: node.gone or peer.connection._pinged_s == clock.now, LONG_S, "it is asked, or lost"
                    )
                assert node.gone == [name]
                await silent.hear_commands_until_the_end()
                assert silent.commands[1:] == [b"\x04PING\0\x3c"] * 2
                assert node.peers == [other]
                await good.say(frames(b"the end"))
                assert await good.hear() == [b"the end"]
                assert good.commands[1:] == [b"\x04PING\0\x3c"] * 3  # who talks is told that we live

    asyncio.run(main())


# --- libzmq ------------------------------------------------------------------------------------------------------
def test_dealers_of_libzmq_beside_plain_sockets(rng: random.Random) -> None:
    async def zmq_dealer(address: str, said: list[list[bytes]]) -> None:
        with Stranger(zmq.DEALER, address) as dealer:
            for parts in said:
                await dealer.say(*parts)
            assert [await dealer.hear() for _ in said] == said

    async def plain_dealer(address: str, said: list[list[bytes]]) -> None:
        with Plain(address, receive_bytes=16 * KIB) as plain:
            saying = asyncio.create_task(plain.say(HELLO, *(frames(*parts) for parts in said)))
            assert [await plain.hear() for _ in said] == said
            await saying

    async def main() -> None:
        async with Node() as node:
            dealers = [zmq_dealer, plain_dealer] * 3
            await asyncio.gather(*(dealer(node.address, messages_of(rng, 20, 300 * KIB)) for dealer in dealers))
            await node.has(0)
            assert len(node.gone) == len(dealers)
            assert node.counters == Counters()

    asyncio.run(main())
