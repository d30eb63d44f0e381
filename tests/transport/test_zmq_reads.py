"""What comes over a bulk connection, byte by byte: bodies in any cut, peers that stop in the middle, and names."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import socket
import struct
import threading

import pytest
import zmq

from kvmesh.transport import zmq_links, zmq_names, zmq_reads, zmtp
from kvmesh.transport.checksum import bound, checksum
from kvmesh.transport.counters import Counters
from kvmesh.transport.frames import (
    CORRUPT_HERE,
    HELD,
    NOT_HELD,
    Bulk,
    Item,
    Message,
    Refusal,
    Suspect,
    encode,
    to_holder,
)
from kvmesh.transport.interface import Landing, Outcome, Want
from kvmesh.transport.limits import FRAME_BYTES_MAX, KIB, MESH_PROTOCOL_VERSION, MIB, PARTS_PER_MESSAGE_MAX, STAGE_BYTES
from kvmesh.transport.zmq_bulk import BulkThread
from tests.support.waiting import wait_until_async
from tests.transport.ends import LONG_S, Chunks, collect, key, outcomes, pattern, wants
from tests.transport.strangers import Stranger, bulk_links, frames, peer, plain_peer, transport

pytestmark = pytest.mark.usefixtures("receiver")
V = MESH_PROTOCOL_VERSION
CONTENT = pattern(3, 3000)
SUM = checksum(CONTENT)
UNTOUCHED = b"\xa5" * 3000


def bulk(*items: Item, read_id: int = 1) -> Bulk:
    return Bulk(V, read_id, list(items))


def whole(index: int, sum_: int = SUM) -> Item:
    return Item(index, HELD, bound(sum_, key(index), None), 0, 3000)


# --- bodies ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("piece_bytes", [1, 999, 1 << 20])
@pytest.mark.parametrize("at_once", [1, 7, 1000, 100_000])
def test_parts_need_not_match_items(piece_bytes: int, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three chunks in five parts, in packets of any size."""
    monkeypatch.setattr(zmq_reads, "PIECE_BYTES", max(piece_bytes, at_once // 10))
    stream = CONTENT * 3
    cuts = [0, 1, 2900, 3100, 3100, len(stream)]
    parts = [stream[start:end] for start, end in itertools.pairwise(cuts)]
    said = frames(bulk(whole(0), Item(3, NOT_HELD, 0, 0, 0), whole(2), whole(1)), *parts)

    async def say(writer: asyncio.StreamWriter) -> None:
        for at in range(0, len(said), at_once):
            writer.write(said[at : at + at_once])
            if at_once < 1000:
                continue  # these would be too many packets: the system joins them as it likes
            await writer.drain()
            await asyncio.sleep(0)

    async def main() -> None:
        async with plain_peer(say) as address, transport() as reader:
            wanted = wants([0, 1, 2, 3], 3000)
            landings = await collect(reader.read(address, wanted, deadline_s=LONG_S))
            landed = dict.fromkeys(range(3), Outcome.LANDED)
            assert outcomes(landings) == landed | {3: Outcome.NOT_HELD}
            assert all(want.into == CONTENT for want in wanted[:3])
            assert reader.stats().malformed == 0

    asyncio.run(main())


def test_what_is_corrupt_is_said_to_the_holder() -> None:
    heard: list[list[bytes]] = []

    def reply(parts: list[bytes]) -> list[list[bytes]]:
        heard.append(parts)
        message = bulk(whole(0, SUM ^ 1), Item(1, CORRUPT_HERE, SUM, 0, 0))
        return [[encode(message), CONTENT]] if len(heard) == 1 else []

    async def main() -> None:
        async with peer(reply) as address, transport() as reader:
            landings = await collect(reader.read(address, wants([0, 1], 3000), deadline_s=LONG_S))
            assert outcomes(landings) == {0: Outcome.CORRUPT, 1: Outcome.CORRUPT}
            assert reader.stats().corrupt == 2
            await wait_until_async(lambda: len(heard) == 2, LONG_S, "the holder was told")
            assert heard[1] == [encode(Suspect(V, 1)), key(0)]  # of its own finding it needs no telling

    asyncio.run(main())


# --- peers that stop in the middle, or go on too long --------------------------------------------------------------
def test_a_connection_cut_in_mid_frame_ends_the_read() -> None:
    async def say(writer: asyncio.StreamWriter) -> None:
        writer.write(frames(bulk(whole(1), whole(0)), CONTENT + CONTENT)[:-1500])
        await writer.drain()
        writer.close()

    async def main() -> None:
        async with plain_peer(say) as address, transport() as reader:
            wanted = wants([0, 1, 2], 3000)
            landings = await collect(reader.read(address, wanted, deadline_s=1000))
            assert landings == {1: Landing(1, Outcome.LANDED, SUM)}
            assert wanted[1].into == CONTENT
            assert bytes(wanted[0].into) == CONTENT[:1500] + UNTOUCHED[1500:]
            assert bytes(wanted[2].into) == UNTOUCHED
            assert (reader.stats().peers_lost, reader.stats().malformed) == (1, 0)

    asyncio.run(main())


def test_a_reset_ends_the_read() -> None:
    async def say(writer: asyncio.StreamWriter) -> None:
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()

    async def main() -> None:
        async with plain_peer(say) as address, transport() as reader:
            assert await collect(reader.read(address, wants([0], 3000), deadline_s=1000)) == {}
            assert reader.stats().peers_lost == 1

    asyncio.run(main())


def test_a_peer_silent_in_mid_frame_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zmtp, "HEARTBEAT_TIMEOUT_S", 0.05)
    monkeypatch.setattr(zmtp, "HEARTBEAT_INTERVAL_S", 0.02)
    monkeypatch.setattr(zmq_links, "HEARTBEAT_INTERVAL_S", 0.02)
    monkeypatch.setattr(zmq_links, "TICK_S", 0.01)

    async def say(writer: asyncio.StreamWriter) -> None:
        writer.write(frames(bulk(whole(0)), CONTENT)[:-1])

    async def main() -> None:
        async with plain_peer(say) as address, transport() as reader:
            assert await collect(reader.read(address, wants([0], 3000), deadline_s=1000)) == {}
            assert reader.stats().peers_lost == 1

    asyncio.run(main())


def test_after_close_the_rest_of_a_frame_goes_nowhere() -> None:
    """A peer stalls in mid frame; the read is given up; what comes then is dropped, and the connection goes on."""
    first = frames(bulk(whole(0)), CONTENT)
    closed = asyncio.Event()

    async def say(writer: asyncio.StreamWriter) -> None:
        writer.write(first[:-1000])
        await closed.wait()
        writer.write(first[-1000:] + frames(bulk(whole(0)), CONTENT))
        writer.write(frames(bulk(whole(0, 1), read_id=99), bytes(3000)) + frames(bulk(whole(0), read_id=2), CONTENT))

    async def main() -> None:
        async with plain_peer(say) as address, transport() as reader:
            wanted = wants([0], 3000)
            reading = reader.read(address, wanted, deadline_s=1000)
            await wait_until_async(lambda: bytes(wanted[0].into[:2000]) == CONTENT[:2000], LONG_S, "two thirds")
            await reading.close()
            wanted[0].into[:] = UNTOUCHED
            again = reader.read(address, wants([0], 3000), deadline_s=1000)
            closed.set()
            assert outcomes(await collect(again)) == {0: Outcome.LANDED}
            assert bytes(wanted[0].into) == UNTOUCHED
            assert (reader.stats().malformed, reader.stats().peers_lost) == (0, 0)

    asyncio.run(main())


MISFITS: dict[str, tuple[bytes | Message, ...]] = {
    "a payload longer than its items": (bulk(whole(0)), CONTENT + b"x"),
    "a part that goes beyond": (bulk(whole(0)), b"", CONTENT + b"x"),
    "a payload shorter than its items": (bulk(whole(0)), CONTENT[1:]),
    "no payload": (bulk(whole(0)),),
    "bytes for nothing": (bulk(Item(1, NOT_HELD, 0, 0, 0)), b"x"),
}


@pytest.mark.parametrize("message", [pytest.param(message, id=name) for name, message in MISFITS.items()])
def test_a_message_that_does_not_fit_ends_its_read_alone(message: tuple[bytes | Message, ...]) -> None:
    second = asyncio.Event()

    async def say(writer: asyncio.StreamWriter) -> None:
        writer.write(frames(*message))
        await second.wait()
        writer.write(frames(bulk(whole(0), read_id=2), CONTENT))

    async def main() -> None:
        async with plain_peer(say) as address, transport() as reader:
            wanted = wants([0, 1], 3000)
            landings = await collect(reader.read(address, wanted, deadline_s=1000))
            assert 0 not in landings
            assert all(bytes(want.into) == UNTOUCHED for want in wanted)
            assert reader.stats().malformed == 1
            again = reader.read(address, wants([0], 3000), deadline_s=1000)
            second.set()
            assert outcomes(await collect(again)) == {0: Outcome.LANDED}

    asyncio.run(main())


@pytest.mark.parametrize(
    "said",
    [
        frames(bulk(whole(0)), b"")[:-9] + b"\x02" + (FRAME_BYTES_MAX + 1).to_bytes(8, "big"),
        frames(bulk(whole(0)), *[b""] * (PARTS_PER_MESSAGE_MAX + 1)),
        frames(b"x" * 5000),
        b"\xff" * 100,
        frames(Refusal(V + 1, 1, "of another version")),
    ],
)
def test_what_is_not_ours_ends_the_connection(said: bytes) -> None:
    async def say(writer: asyncio.StreamWriter) -> None:
        writer.write(said)

    async def main() -> None:
        async with plain_peer(say) as address, transport() as reader:
            wanted = wants([0], 3000)
            assert await collect(reader.read(address, wanted, deadline_s=1000)) == {}
            assert bytes(wanted[0].into) == UNTOUCHED
            assert (reader.stats().malformed, reader.stats().peers_lost) == (1, 1)
            assert not bulk_links(reader)

    asyncio.run(main())


def test_a_payload_for_what_has_none_is_counted_and_dropped() -> None:
    async def say(writer: asyncio.StreamWriter) -> None:
        writer.write(frames(Refusal(V, 1, "no"), b"payload") + frames(bulk(whole(0)), CONTENT))

    async def main() -> None:
        async with plain_peer(say) as address, transport() as reader:
            assert len(await collect(reader.read(address, wants([0], 3000), deadline_s=1000))) == 1
            assert (reader.stats().malformed, reader.stats().refused) == (1, 0)

    asyncio.run(main())


# --- both ways: heartbeats, and peers that do not read -------------------------------------------------------------
@pytest.mark.slow  # two time-outs must pass that are long enough for a busy machine
def test_a_quiet_connection_lives_by_heartbeats_of_both_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """A real ROUTER that insists on signs of life, and a reader that does."""
    monkeypatch.setattr(zmtp, "HEARTBEAT_TIMEOUT_S", 1.0)
    monkeypatch.setattr(zmtp, "HEARTBEAT_INTERVAL_S", 0.02)
    monkeypatch.setattr(zmq_links, "HEARTBEAT_INTERVAL_S", 0.02)
    monkeypatch.setattr(zmq_links, "TICK_S", 0.01)

    async def main() -> None:
        with Stranger(zmq.ROUTER) as holder:
            holder.socket.unbind(f"tcp://{holder.address}")
            holder.socket.heartbeat_ivl, holder.socket.heartbeat_timeout = 20, 1000
            address = f"127.0.0.1:{holder.socket.bind_to_random_port('tcp://127.0.0.1')}"
            async with transport() as reader:
                task = asyncio.create_task(collect(reader.read(address, wants([0], 3000), deadline_s=LONG_S)))
                identity, *_ = await holder.hear()
                (link,) = bulk_links(reader)
                began_s = link.connection.heard_s
                await wait_until_async(
                    lambda: link.connection.heard_s > began_s + 2.5,
                    LONG_S,
                    "two time-outs passed with heartbeats alone",
                )
                await holder.socket.send_multipart([identity, encode(bulk(whole(0))), CONTENT])
                assert outcomes(await task) == {0: Outcome.LANDED}

    asyncio.run(main())


def test_what_does_not_go_out_at_once_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    small = (socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    monkeypatch.setattr(zmq_links, "OPTIONS", (*zmq_links.OPTIONS, small))

    def reply(parts: list[bytes]) -> list[list[bytes]]:
        message, _ = to_holder(parts)
        return [[encode(bulk(Item(5999, NOT_HELD, 0, 0, 0), read_id=message.id))]]

    async def main() -> None:
        into = memoryview(bytearray(1))
        many = [Want(key(number), into) for number in range(6000)]  # a list of 240 KB
        async with peer(reply) as address, transport() as reader:
            reads = [reader.read(address, many, deadline_s=1000) for _ in range(3)]
            for read in reads:
                assert await anext(read) == [Landing(5999, Outcome.NOT_HELD, 0)]
                await read.close()
            assert reader.stats().refused == 0

    asyncio.run(main())


def test_a_read_whose_list_has_no_room_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zmtp, "UNSENT_BYTES_MAX", 4 * KIB)

    async def main() -> None:
        source = Chunks()
        source.fill(1, 10)
        async with transport(source) as holder, transport() as reader:
            into = memoryview(bytearray(1))
            many = [Want(key(number), into) for number in range(200)]
            assert await collect(reader.read(holder.address, many, deadline_s=1000)) == {}
            assert reader.stats().refused == 1
            assert len(await collect(reader.read(holder.address, wants([0], 10), deadline_s=LONG_S))) == 1

    asyncio.run(main())


def test_what_has_left_the_socket_is_taken_in_the_next_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many messages come with one system call that uses the share up: nothing but memory tells of the rest."""
    monkeypatch.setattr(zmq_reads, "TURN_BYTES", 1)

    async def say(writer: asyncio.StreamWriter) -> None:
        writer.write(b"".join(frames(bulk(Item(index, NOT_HELD, 0, 0, 0))) for index in range(100)))

    async def main() -> None:
        async with plain_peer(say) as address, transport() as reader:
            assert len(await collect(reader.read(address, wants(range(100), 10), deadline_s=1000))) == 100

    asyncio.run(main())


def test_a_connection_gets_no_more_than_its_share_of_a_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zmq_reads, "TURN_BYTES", 10 * KIB)
    monkeypatch.setattr(zmq_reads, "PIECE_BYTES", 4 * KIB)
    turns: list[int] = []
    receive = zmq_reads.Reads.receive

    def counted(self: zmq_reads.Reads, link: zmq_links.Link[zmq_reads.Active]) -> bool:
        before = self._counters.bytes_read
        more = receive(self, link)
        turns.append(self._counters.bytes_read - before)
        return more

    monkeypatch.setattr(zmq_reads.Reads, "receive", counted)

    async def main() -> None:
        source = Chunks()
        source.fill(40, 4 * KIB)
        async with transport(source) as holder, transport() as reader:
            assert len(await collect(reader.read(holder.address, wants(range(40), 4 * KIB), deadline_s=LONG_S))) == 40

    asyncio.run(main())
    assert sum(turns) == 160 * KIB
    assert max(turns) <= 24 * KIB  # the share, the call that goes beyond it, and what the stage held


@pytest.mark.parametrize("said", [frames(b"") * 40_000, b"\x04\x02\x01x" * 40_000], ids=["messages", "commands"])
def test_frames_of_next_to_no_bytes_use_a_turn_up_as_well(said: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[int] = []
    receive = zmq_reads.Reads.receive

    def counted(self: zmq_reads.Reads, link: zmq_links.Link[zmq_reads.Active]) -> bool:
        before = link.connection.frames
        more = receive(self, link)
        turns.append(link.connection.frames - before)
        return more

    monkeypatch.setattr(zmq_reads.Reads, "receive", counted)

    async def say(writer: asyncio.StreamWriter) -> None:
        writer.write(said)
        writer.write(frames(bulk(whole(0)), CONTENT))

    async def main() -> None:
        async with plain_peer(say) as address, transport() as reader:
            assert len(await collect(reader.read(address, wants([0], 3000), deadline_s=LONG_S))) == 1

    asyncio.run(main())
    assert sum(turns) == 40_000 + 1 + 2  # READY; a message of two
    assert max(turns) <= zmq_reads.TURN_BYTES // zmq_reads.FRAME_COST_BYTES + STAGE_BYTES // 4


# --- names -------------------------------------------------------------------------------------------------------
def test_a_host_may_be_a_name() -> None:
    async def main() -> None:
        source = Chunks()
        source.fill(1, 10)
        async with transport(source) as holder, transport() as reader:
            port = holder.address.rsplit(":", 1)[1]
            assert len(await collect(reader.read(f"localhost:{port}", wants([0], 10), deadline_s=LONG_S))) == 1

    asyncio.run(main())


def test_a_name_that_takes_long_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = threading.Event()

    def slow(host: str, port: int) -> None:
        assert (host, port) == ("some.host", 80)
        go_on.wait(LONG_S)

    monkeypatch.setattr(zmq_names, "named", slow)
    monkeypatch.setattr(zmq_names, "NAMES_AT_ONCE_MAX", 2)

    async def main() -> None:
        source = Chunks()
        source.fill(1, MIB)
        async with transport(source) as holder, transport() as reader, contextlib.AsyncExitStack() as stack:
            stack.callback(go_on.set)
            slow_reads = [reader.read("some.host:80", wants([0], 1), deadline_s=1000) for _ in range(2)]
            assert len(await collect(reader.read(holder.address, wants([0], MIB), deadline_s=LONG_S))) == 1
            assert await collect(reader.read("third.host:80", wants([0], 1), deadline_s=1000)) == {}
            await slow_reads[0].close()
            go_on.set()
            assert await collect(slow_reads[1]) == {}

    asyncio.run(main())


def test_a_name_that_comes_after_the_end_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    go_on, asked = threading.Event(), threading.Event()

    def slow(host: str, port: int) -> None:
        asked.set()
        go_on.wait(LONG_S)

    monkeypatch.setattr(zmq_names, "named", slow)

    async def main() -> None:
        async with transport() as reader:
            reader.read("some.host:80", wants([0], 1), deadline_s=1000)
            await asyncio.to_thread(asked.wait, LONG_S)
        go_on.set()

    asyncio.run(main())


def test_the_thread_ends_when_the_loop_is_gone() -> None:
    async def main() -> BulkThread:
        return BulkThread(Counters(), lambda: None)

    thread = asyncio.run(main())
    thread._may_go.set()
    thread._tell(thread._stop)
    thread._thread.join(LONG_S)
    assert not thread._thread.is_alive()
