"""What goes out of the mesh port, and connections that end while much is under way."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading

import pytest

from kvmesh.transport import zmq_sending
from kvmesh.transport.errors import KVMeshError
from kvmesh.transport.frames import encode_read
from kvmesh.transport.limits import (
    DIRECT_SEND_BYTES_MAX,
    KIB,
    MIB,
    READ_WINDOW_BYTES,
    SEND_QUEUE_BUFFERS,
)
from kvmesh.transport.zmq_port import FullError
from kvmesh.transport.zmq_sending import Outbox
from kvmesh.transport.zmtp import Buffer
from tests.support.waiting import wait_until_async
from tests.transport.ends import LONG_S, Chunks, pattern, wants
from tests.transport.mesh_ports import HELLO, Lent, Node, Plain
from tests.transport.strangers import frames, transport

ends = pytest.mark.parametrize("resets", [False, True], ids=["FIN", "RST"])


# --- what goes ---------------------------------------------------------------------------------------------------
def test_messages_to_a_slow_reader_keep_their_order() -> None:
    async def main() -> None:
        async with Node(echoes=False) as node:
            with Plain(node.address, receive_bytes=4 * KIB) as plain:
                await plain.say(HELLO)
                (name,) = await node.has(1)
                assert plain.socket.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) < 64 * KIB
                said: list[list[Buffer]] = [
                    [b"small"],
                    [b"large", pattern(1, 8 * MIB)],  # more than the kernel buffers
                    [b"small, behind it"],
                    [b"with a payload", pattern(2, DIRECT_SEND_BYTES_MAX // 2), b"", pattern(3, 5 * KIB)],
                ]
                await wait_until_async(lambda: node.port._peers[name].connection.ready, LONG_S, "hands are shaken")
                for parts in said:
                    node.port.send(name, parts)
                assert node.outbox(name).handed
                for parts in said:
                    assert await plain.hear() == parts
                await wait_until_async(lambda: not node.outbox(name).handed, LONG_S, "the loop has it back")
                node.port.send(name, [b"small, alone"])
                assert await plain.hear() == [b"small, alone"]

    asyncio.run(main())


@ends
def test_a_peer_that_reads_nothing_costs_references_until_it_ends(resets: bool) -> None:
    async def main() -> None:
        async with Node(echoes=False) as node:
            with Plain(node.address, receive_bytes=4 * KIB) as plain, Plain(node.address) as good:
                (name, other) = await node.has(2)
                await good.say(HELLO)
                lent = Lent(4 * MIB)
                outbox = node.outbox(name)
                with contextlib.suppress(FullError):
                    for _ in range(2 * SEND_QUEUE_BUFFERS):
                        node.port.send(name, [b"head", lent.take()])
                with pytest.raises(FullError):
                    node.port.send(name, [b"one more"])
                assert SEND_QUEUE_BUFFERS <= outbox.waiting <= SEND_QUEUE_BUFFERS + 2
                own_bytes = sum(len(kept) for kept in outbox.queue if kept is not lent.view)
                assert own_bytes < 64 * SEND_QUEUE_BUFFERS
                await wait_until_async(lambda: node.port._peers[other].connection.ready, LONG_S, "hands are shaken")
                node.port.send(other, [b"to another"])
                assert await good.hear() == [b"to another"]
                assert not lent.is_back
                plain.end(resets=resets)
                await wait_until_async(lambda: lent.is_back, LONG_S, "what was lent is let go of")
                await wait_until_async(lambda: node.gone == [name], LONG_S, "that it is gone is told")
                await wait_until_async(lambda: outbox.socket.fileno() == -1, LONG_S, "its socket is closed")

    asyncio.run(main())


@ends
def test_loans_to_a_reader_that_reads_nothing_come_back_when_it_ends(resets: bool) -> None:
    async def main() -> None:
        source = Chunks()
        source.fill(60, MIB)
        async with transport(source) as node:
            with Plain(node.address, receive_bytes=4 * KIB) as plain:
                await plain.say(HELLO, frames(*encode_read(1, READ_WINDOW_BYTES, LONG_S, wants(range(60), MIB))))
                await wait_until_async(lambda: node.stats().bytes_served == 15 * MIB, LONG_S, "the window is used up")
                assert source.out > 5  # a part of them is in the kernel's buffers
                plain.end(resets=resets)
                await wait_until_async(lambda: source.out == 0, LONG_S, "its loans are back")
            assert node.stats().malformed == 0

    asyncio.run(main())


@ends
def test_a_peer_that_ends_while_it_is_sent_to_leaves_nothing(resets: bool) -> None:
    """With luck, at a moment that no other test thinks of; test_zmq_sending.py has those that are known."""

    async def main() -> None:
        async with Node(echoes=False) as node:
            with contextlib.ExitStack() as stack:
                outboxes, lents = [], []
                for round_ in range(10):
                    with Plain(node.address, receive_bytes=4 * KIB << round_ % 5) as plain:
                        await plain.say(HELLO)
                        (name,) = await node.has(1)
                        lent = Lent(MIB)
                        lents.append(lent)
                        outboxes.append(node.outbox(name))
                        stack.callback(outboxes[-1].socket.close)  # should the test fail
                        for _ in range(32):
                            node.port.send(name, [b"head", lent.take()])
                        await plain.exactly(1 + 50_000 * round_)
                        plain.end(resets=resets)
                    await node.has(0)
                assert len(node.gone) == 10
                await wait_until_async(
                    lambda: all(lent.is_back for lent in lents) and all(box.socket.fileno() == -1 for box in outboxes),
                    2.0,
                    "all is let go of, and closed",
                )

    asyncio.run(main())


def test_closing_with_much_unsent_waits_for_nobody() -> None:
    async def main() -> None:
        with contextlib.ExitStack() as stack:
            async with Node(echoes=False) as node:
                plains = [stack.enter_context(Plain(node.address, receive_bytes=4 * KIB)) for _ in range(8)]
                names = await node.has(8)
                lent = Lent(MIB)
                outboxes = [node.outbox(name) for name in names]
                for name in names[:6]:
                    for _ in range(20):
                        node.port.send(name, [b"head", lent.take()])
            assert lent.is_back
            assert node.gone == names
            assert all(outbox.socket.fileno() == -1 for outbox in outboxes)
            for plain in plains:
                await plain.ended()
            host, port = node.address.split(":")
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection((host, int(port)))

    asyncio.run(main())


# --- a failure of our own ----------------------------------------------------------------------------------------
def test_an_error_of_our_own_in_sending_ends_connections_and_not_the_node(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    really_send = zmq_sending._send

    def send(outbox: Outbox) -> None:
        if threading.current_thread().name == "kvmesh-send":
            raise ZeroDivisionError
        really_send(outbox)

    monkeypatch.setattr(zmq_sending, "_send", send)

    async def main() -> None:
        source = Chunks()
        source.fill(8, MIB)
        async with transport(source) as node, transport() as caller, transport() as other:
            reading = caller.read(node.address, wants(range(8), MIB), deadline_s=LONG_S)
            assert [landed async for landed in reading] == []  # and not at the deadline
            await reading.close()
            await wait_until_async(lambda: source.out == 0, LONG_S, "its loans are back")
            assert await caller.call(node.address, b"small", timeout_s=LONG_S) == b"small"
            with pytest.raises(KVMeshError):
                await caller.call(node.address, bytes(2 * DIRECT_SEND_BYTES_MAX), timeout_s=0.02)
            assert await other.call(node.address, b"small", timeout_s=LONG_S) == b"small"

    asyncio.run(main())
    assert "an error of our own" in caplog.text
