"""Holders that lie, refuse, or speak another version: the read ends, and nothing wrong is written."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import msgspec
import pytest

from kvmesh.transport.errors import ProtocolError
from kvmesh.transport.frames import (
    HELD,
    Answer,
    Bulk,
    Cancel,
    Item,
    Message,
    Read,
    Refusal,
    encode,
    to_holder,
)
from kvmesh.transport.interface import Outcome
from kvmesh.transport.limits import (
    MESH_PROTOCOL_VERSION,
)
from tests.support.waiting import wait_until_async
from tests.transport.ends import LONG_S, collect, outcomes, wants
from tests.transport.strangers import peer, transport

pytestmark = pytest.mark.usefixtures("receiver")
V = MESH_PROTOCOL_VERSION


def lies() -> Iterator[tuple[str, list[bytes | Message]]]:
    yield "a chunk that is not wanted", [Bulk(V, 1, [Item(7, HELD, 1, 0, 1)]), b"x"]
    yield "bytes beyond the chunk", [Bulk(V, 1, [Item(0, HELD, 1, 0, 11)]), bytes(11)]
    yield "a piece without its beginning", [Bulk(V, 1, [Item(0, HELD, 1, 5, 5)]), bytes(5)]


@pytest.mark.parametrize("lie", [pytest.param(lie, id=name) for name, lie in lies()])
def test_a_holder_that_lies_ends_the_read(lie: list[bytes | Message]) -> None:
    heard: list[Message] = []

    def reply(parts: list[bytes]) -> list[list[bytes]]:
        heard.append(to_holder(parts)[0])
        return [[encode(part) if isinstance(part, Message) else part for part in lie]]

    async def main() -> None:
        async with peer(reply) as address, transport() as reader:
            wanted = wants([0, 1], 10)
            assert await collect(reader.read(address, wanted, deadline_s=1000)) == {}
            assert all(bytes(want.into) == b"\xa5" * 10 for want in wanted)
            assert reader.stats().malformed == 1
            await wait_until_async(lambda: heard[1:] == [Cancel(V, 1)], LONG_S, "the holder was told to stop")

    asyncio.run(main())


def test_garbage_on_a_read_is_counted_and_the_rest_still_lands() -> None:
    good = [encode(Bulk(V, 1, [Item(0, 1, 0, 0, 0)]))]

    def reply(_: list[bytes]) -> list[list[bytes]]:
        return [
            [b"garbage"],
            [b""],
            [encode(Answer(V, 1)), b""],
            [encode(Bulk(V, 99, [Item(0, 1, 0, 0, 0)]))],
            good,
        ]

    async def main() -> None:
        async with peer(reply) as address, transport() as reader:
            landings = await collect(reader.read(address, wants([0], 10), deadline_s=1000))
            assert outcomes(landings) == {0: Outcome.NOT_HELD}
            assert reader.stats().malformed == 3

    asyncio.run(main())


def test_a_holder_that_refuses_ends_the_read(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with peer(lambda _: [[encode(Refusal(V, 1, "too busy"))]]) as address, transport() as reader:
            assert await collect(reader.read(address, wants([0], 10), deadline_s=1000)) == {}
            assert reader.stats().refused == 1

    asyncio.run(main())
    assert "too busy" in caplog.text


def test_a_holder_of_another_version() -> None:
    def reply(parts: list[bytes]) -> list[list[bytes]]:
        _, _, request_id, *_ = msgspec.msgpack.decode(parts[0])
        return [[msgspec.msgpack.encode([6, V + 1, request_id, "we", "speak", "otherwise"])]]

    async def main() -> None:
        async with peer(reply) as address, transport() as node:
            with pytest.raises(ProtocolError, match=f"speaks mesh protocol {V + 1} and the other {V}"):
                await node.call(address, b"", timeout_s=LONG_S)
            assert await collect(node.read(address, wants([0], 10), deadline_s=1000)) == {}
            assert node.stats().malformed == 2

    asyncio.run(main())


def test_answers_that_nobody_waits_for_and_garbage_on_a_call() -> None:
    def reply(parts: list[bytes]) -> list[list[bytes]]:
        message, _ = to_holder(parts)
        return [
            [b"garbage"],
            [encode(Answer(V, 999)), b""],
            [encode(Answer(V, message.id)), b"ok"],
        ]

    async def main() -> None:
        async with peer(reply) as address, transport() as node:
            assert await node.call(address, b"", timeout_s=LONG_S) == b"ok"
            assert node.stats().malformed == 1

    asyncio.run(main())


def test_late_pieces_of_a_cancelled_read_change_nothing() -> None:
    started = asyncio.Event()

    def reply(parts: list[bytes]) -> list[list[bytes]]:
        message, _ = to_holder(parts)
        if isinstance(message, Read) and message.id == 1:
            started.set()
            return []
        if isinstance(message, Cancel):
            return [[encode(Bulk(V, 1, [Item(0, HELD, 0, 0, 10)])), b"late bytes"]]
        return [[encode(Bulk(V, 2, [Item(0, 1, 0, 0, 0)]))]]

    async def main() -> None:
        async with peer(reply) as address, transport() as reader:
            wanted = wants([0], 10)
            reading = reader.read(address, wanted, deadline_s=1000)
            await asyncio.wait_for(started.wait(), LONG_S)
            await reading.close()
            assert len(await collect(reader.read(address, wants([1], 1), deadline_s=1000))) == 1
            assert bytes(wanted[0].into) == b"\xa5" * 10
            assert reader.stats().malformed == 0

    asyncio.run(main())
