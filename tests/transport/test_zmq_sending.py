"""The thread that sends bulk, and the loop's way to it: order, fairness, and what becomes of a connection that ends.

Where the outcome depends on who is first, loop or thread, the test makes it so: it holds the thread in `_send`, or
where it lets go of an outbox.
"""

from __future__ import annotations

import asyncio
import errno
import itertools
import os
import random
import socket
import threading
import weakref
from collections.abc import Callable
from types import TracebackType

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmesh.transport import zmq_sending
from kvmesh.transport.limits import DIRECT_SEND_BYTES_MAX, KIB, MIB
from kvmesh.transport.zmq_sending import BUFFERS_PER_CALL, TURN_BYTES, Outbox, Sender
from kvmesh.transport.zmtp import JOINED_BYTES_MAX, Buffer, message
from tests.support.waiting import wait_until_async
from tests.transport.ends import LONG_S, pattern
from tests.transport.outboxes import LARGE, Gate, Ways, end_of, hear, in_thread, really_send, until_closed


# --- order -------------------------------------------------------------------------------------------------------
def test_bytes_keep_their_order_from_loop_to_thread_and_back() -> None:
    async def main() -> None:
        async with Ways() as made:
            outbox, reading = made.connect()
            large = pattern(1, 512 * KIB)
            made.sender.send(outbox, [b"first"])
            handed = [outbox.handed]
            made.sender.send(outbox, [b"head of the large one", large])
            made.sender.send(outbox, [b"small, behind it"])
            handed.append(outbox.handed)
            said = b"first" + b"head of the large one" + large + b"small, behind it"
            assert await hear(reading, len(said)) == said
            await wait_until_async(lambda: not outbox.handed, LONG_S, "the loop has it back")
            made.sender.send(outbox, [b"small, alone"])
            handed.append(outbox.handed)
            assert handed == [False, True, False]
            assert await hear(reading, 12) == b"small, alone"

    asyncio.run(main())


def test_bytes_keep_their_order_whatever_their_sizes(rng: random.Random) -> None:
    sizes = (1, 100, 4 * KIB, 20 * KIB, LARGE)

    async def main() -> None:
        async with Ways() as made:
            outbox, reading = made.connect(receive_bytes=64 * KIB)
            said = heard = b""
            for number in range(40):
                count = rng.randrange(1, 4)
                buffers: list[Buffer] = [pattern(number, rng.choice(sizes) + rng.randrange(8)) for _ in range(count)]
                made.sender.send(outbox, buffers)
                said += b"".join(buffers)
                if rng.random() < 0.5:  # sometimes it runs empty, sometimes in the middle of a buffer
                    count = len(said) - len(heard)
                    heard += await hear(reading, rng.choice((count, count // 2)))
            heard += await hear(reading, len(said) - len(heard))
            assert heard == said

    asyncio.run(main())


def test_little_is_sent_by_the_loop_and_more_by_the_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    senders: list[bool] = []
    takes: list[int] = []

    def send(outbox: Outbox) -> None:
        """A socket that takes so many bytes of a buffer, and then all."""
        senders.append(in_thread())
        if takes:
            outbox.sending[0] = memoryview(outbox.sending[0])[takes.pop() :]
        else:
            outbox.sending.clear()

    monkeypatch.setattr(zmq_sending, "_send", send)

    async def main() -> None:
        async with Ways() as made:
            outbox, _ = made.connect()

            async def who_sends(size_bytes: int, *taken_bytes: int) -> list[bool]:
                senders.clear()
                takes.extend(taken_bytes)
                made.sender.send(outbox, [bytes(size_bytes - 1), b"x"])
                await wait_until_async(lambda: not outbox.handed and not outbox.waiting, LONG_S, "all has gone out")
                return senders

            assert await who_sends(2) == [False]
            assert await who_sends(DIRECT_SEND_BYTES_MAX) == [False]
            assert await who_sends(LARGE) == [True]
            assert await who_sends(LARGE, 1000) == [True, True]
            assert await who_sends(DIRECT_SEND_BYTES_MAX, 1000) == [False, True]
            assert await who_sends(2) == [False]

    asyncio.run(main())


def test_what_the_socket_does_not_take_at_all_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    refused: list[bool] = []

    def send(outbox: Outbox) -> None:
        if in_thread() and not refused:
            refused.append(True)
            raise BlockingIOError
        really_send(outbox)

    monkeypatch.setattr(zmq_sending, "_send", send)

    async def main() -> None:
        async with Ways() as made:
            outbox, reading = made.connect(receive_bytes=MIB)
            outbox.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, MIB)
            large = pattern(1, LARGE)
            made.sender.send(outbox, [large])
            assert await hear(reading, LARGE) == large
            assert outbox.registered  # and was not tried again and again

    asyncio.run(main())


def test_nobody_sends_what_is_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop says more in the very moment in which the thread lets go of the outbox."""
    pushes: list[bool] = []

    class Letting:
        """A lock that holds the thread up right after it has let go."""

        def __init__(self) -> None:
            self.lock = threading.Lock()
            self.gate = Gate()

        def __enter__(self) -> None:
            self.lock.acquire()

        def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
            self.lock.release()
            if in_thread() and not self.gate.reached.is_set():
                self.gate.hold()

    really_push = Sender._push

    def push(sender: Sender, outbox: Outbox) -> bool:
        pushes.append(outbox.handed)
        return really_push(sender, outbox)

    async def main() -> None:
        async with Ways() as made:
            outbox, reading = made.connect(receive_bytes=MIB)
            outbox.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, MIB)
            lock = Letting()
            outbox.lock = lock  # type: ignore[assignment]
            with lock.gate as gate:
                made.sender.send(outbox, [bytes(LARGE)])
                reader = asyncio.create_task(hear(reading, 2 * LARGE))
                await gate.is_reached()
                made.sender.send(outbox, [bytes(LARGE)])
            await reader
            await wait_until_async(lambda: not outbox.handed, LONG_S, "all has gone out")
            made.close(outbox)
            await made.stop()  # the thread has had its last turn
            assert all(pushes)

    monkeypatch.setattr(Sender, "_push", push)
    asyncio.run(main())


# --- fairness ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("buffer_bytes", [64 * KIB, 1, 3 * MIB])
def test_connections_are_sent_to_in_turn(buffer_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[tuple[Outbox, list[Buffer]]] = []

    async def main() -> None:
        with Gate() as gate:

            def send(outbox: Outbox) -> None:
                """As if the sockets took all."""
                if not in_thread():
                    raise BlockingIOError
                gate.hold()
                turns.append((outbox, list(outbox.sending)))
                outbox.sending.clear()

            monkeypatch.setattr(zmq_sending, "_send", send)
            async with Ways() as made:
                one, another = made.connect()[0], made.connect()[0]
                buffers = [bytes(buffer_bytes)] * 3 * BUFFERS_PER_CALL
                for outbox in (one, another):
                    made.sender.send(outbox, [b"first"])
                    made.sender.send(outbox, buffers)
                await gate.is_reached()
                gate.open()
                await wait_until_async(lambda: not one.handed and not another.handed, LONG_S, "all is sent")

                order = [outbox for outbox, _ in turns]
                order = order[order.index(another) :]  # it may have been told of later than `one`
                assert order[:4] == [another, one] * 2
                assert abs(order.count(one) - order.count(another)) <= 2
                for outbox in (one, another):
                    sent = [turn for sender, turn in turns if sender is outbox]
                    assert sum(map(len, sent)) == 1 + len(buffers)
                    assert all(len(turn) <= BUFFERS_PER_CALL for turn in sent)
                    assert all(sum(map(len, turn[:-1])) < TURN_BYTES for turn in sent)

    asyncio.run(main())


def test_a_connection_that_takes_nothing_holds_no_other_up() -> None:
    async def main() -> None:
        async with Ways() as made:
            stuck, _ = made.connect()
            good, reading = made.connect(receive_bytes=MIB)
            made.sender.send(stuck, [bytes(4 * MIB)])
            await wait_until_async(lambda: stuck.registered, LONG_S, "it takes no more")
            large = pattern(2, MIB)
            made.sender.send(good, [large])
            assert await hear(reading, len(large)) == large
            assert stuck.handed

    asyncio.run(main())


# --- connections that end ----------------------------------------------------------------------------------------
def test_what_waits_is_kept_by_reference_until_the_connection_ends() -> None:
    async def main() -> None:
        async with Ways() as made:
            outbox, _ = made.connect()
            lent = np.zeros(MIB, np.uint8)
            back = threading.Event()
            weakref.finalize(lent, back.set).atexit = False
            buffer = lent.data
            del lent
            for _ in range(1000):
                made.sender.send(outbox, [b"head", buffer])
            await wait_until_async(lambda: outbox.registered, LONG_S, "it takes no more")
            assert outbox.waiting > 1900
            assert all(len(kept) == 4 or kept is buffer for kept in outbox.queue)
            del buffer
            assert not back.is_set()
            made.close(outbox)
            await until_closed(outbox)
            assert back.is_set()

    asyncio.run(main())


@pytest.mark.parametrize("how", ["all goes out", "some goes out", "nothing goes out", "the connection has failed"])
def test_a_connection_is_closed_that_ends_while_the_thread_sends(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with Ways() as made:
            outbox, _ = made.connect()
            with Gate() as gate:

                def send(outbox: Outbox) -> None:
                    """The system call, in which the thread is when the loop hears that the connection is over."""
                    if not in_thread():
                        really_send(outbox)
                        return
                    gate.hold()
                    if how == "all goes out":
                        outbox.sending.clear()
                    elif how == "nothing goes out":
                        raise BlockingIOError
                    elif how == "the connection has failed":
                        raise BrokenPipeError

                monkeypatch.setattr(zmq_sending, "_send", send)
                made.sender.send(outbox, [bytes(LARGE)])
                await gate.is_reached()
                made.close(outbox)
                assert outbox.socket.fileno() != -1, "closed under a system call"
            await until_closed(outbox)

    asyncio.run(main())


@pytest.mark.parametrize("resets", [False, True], ids=["FIN", "RST"])
def test_a_peer_that_goes_leaves_nothing(resets: bool) -> None:
    async def main() -> None:
        async with Ways() as made:
            for size_bytes in (100, 100 * KIB, 8 * MIB):
                outbox, reading = made.connect()
                made.sender.send(outbox, [bytes(size_bytes)])
                await hear(reading, 100)
                if resets:
                    reading.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                reading.close()
                await wait_until_async(lambda box=outbox: not box.waiting, LONG_S, "nothing waits for it")  # type: ignore[misc]
                made.sender.send(outbox, [bytes(100)])
                made.sender.send(outbox, [bytes(LARGE)])
                made.close(outbox)
                await until_closed(outbox)
                for late in (b"late", bytes(LARGE)):
                    made.sender.send(outbox, [late])
                assert not outbox.waiting

    asyncio.run(main())


@pytest.mark.parametrize("who", ["loop", "thread"])
def test_after_an_error_in_mid_frame_nothing_more_is_said(who: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error that is not the connection's end (no memory; a page that cannot be read) leaves a hole in the bytes."""
    failed = threading.Event()

    def send(outbox: Outbox) -> None:
        if in_thread() == (who == "thread") and not failed.is_set():
            outbox.socket.send(b"half of")
            failed.set()
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        really_send(outbox)

    async def main() -> None:
        async with Ways() as made:
            outbox, reading = made.connect()
            monkeypatch.setattr(zmq_sending, "_send", send)
            made.sender.send(outbox, [bytes(LARGE if who == "thread" else 10)])
            await wait_until_async(lambda: failed.is_set() and not outbox.handed, LONG_S, "it has failed")
            made.sender.send(outbox, [b"the next frame"])
            if await hear(reading, 7) != b"half of" or b"next" in await hear(reading, 14):
                pytest.fail("the next frame was said as if all before it had been")

    asyncio.run(main())


def test_a_descriptor_that_is_used_again_is_the_new_connections() -> None:
    async def main() -> None:
        async with Ways() as made:
            for round_ in range(4):
                outbox, reading = made.connect()
                large = pattern(round_, 256 * KIB)
                made.sender.send(outbox, [large, large])
                assert await hear(reading, 2 * len(large)) == large + large
                assert outbox.registered
                if round_ % 2:
                    await wait_until_async(lambda box=outbox: not box.handed, LONG_S, "the loop has it")  # type: ignore[misc]
                made.close(outbox)
                reading.close()
                await until_closed(outbox)

    asyncio.run(main())


def test_stopping_with_much_unsent_waits_for_nobody() -> None:
    async def main() -> None:
        async with Ways() as made:
            made.connect()  # to which nothing was said
            readings = []
            for number in range(8):
                outbox, reading = made.connect()
                made.sender.send(outbox, [pattern(number, 64 * KIB)] * 100)
                readings.append(reading)
            await made.stop()
            for number, reading in enumerate(readings):
                heard = await end_of(reading)
                assert (pattern(number, 64 * KIB) * 100).startswith(heard)

    asyncio.run(main())


# --- a failure of our own ----------------------------------------------------------------------------------------
def test_an_error_of_our_own_costs_one_connection(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with Ways() as made:
            outbox, reading = made.connect()
            other, hearing = made.connect(receive_bytes=MIB)

            def send(sending: Outbox) -> None:
                if sending is outbox and in_thread():
                    raise ZeroDivisionError
                really_send(sending)

            monkeypatch.setattr(zmq_sending, "_send", send)
            made.sender.send(outbox, [b"head", bytes(LARGE)])
            assert await end_of(reading) == b""
            made.sender.send(outbox, [b"too late"])
            assert not outbox.waiting
            large = pattern(1, MIB)
            made.sender.send(other, [large])
            assert await hear(hearing, len(large)) == large
            made.close(outbox)
            await until_closed(outbox)

    asyncio.run(main())
    assert "an error of our own" in caplog.text


@pytest.mark.parametrize("closes_first", [False, True])
def test_when_the_thread_itself_fails_the_loop_still_sends_and_stops(
    closes_first: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    really_turn = Sender._turn

    def turn(sender: Sender) -> None:
        really_turn(sender)
        raise ZeroDivisionError

    monkeypatch.setattr(Sender, "_turn", turn)

    async def main() -> None:
        async with Ways() as made:
            outbox, _ = made.connect()
            other, reading = made.connect()
            unheard, _ = made.connect()
            made.sender.send(outbox, [bytes(8 * MIB)])
            await wait_until_async(lambda: not made.sender._thread.is_alive(), LONG_S, "the thread has failed")
            made.sender.send(other, [b"small"])
            assert await hear(reading, 5) == b"small"
            made.sender.send(outbox, [b"into the queue"])
            made.sender.send(unheard, [bytes(LARGE)])
            if closes_first:
                for box in (outbox, unheard):
                    made.close(box)
            await made.stop()
            await until_closed(outbox, other, unheard)

    asyncio.run(main())
    assert "the sending thread failed" in caplog.text


# --- one message as bytes ----------------------------------------------------------------------------------------
SIZES = st.sampled_from(
    [0, 1, 2, 254, 255, 256, 257, JOINED_BYTES_MAX - 1, JOINED_BYTES_MAX, JOINED_BYTES_MAX + 1, 70_000]
) | st.integers(0, 2 * JOINED_BYTES_MAX)


def parts_of(wire: bytes) -> list[bytes]:
    """The one message that `wire` is: by RFC 23, and nothing of ours."""
    parts, more = [], True
    while more:
        flags, wire = wire[0], wire[1:]
        assert flags in (0, 1, 2, 3)
        width = 8 if flags & 2 else 1
        size, wire = int.from_bytes(wire[:width], "big"), wire[width:]
        assert (size > 255) == bool(flags & 2)  # else it is right, but longer than need be
        assert len(wire) >= size
        parts.append(wire[:size])
        wire, more = wire[size:], bool(flags & 1)
    assert not wire
    return parts


@given(st.lists(SIZES, min_size=1, max_size=8), st.sampled_from([bytes, bytearray, memoryview]))
def test_a_message_is_its_parts_again(sizes: list[int], kind: Callable[[bytes], Buffer]) -> None:
    parts = [kind(pattern(number, size)) for number, size in enumerate(sizes)]
    buffers = message(parts)
    assert parts_of(b"".join(buffers)) == [bytes(part) for part in parts]
    large = [part for part in parts if len(part) > JOINED_BYTES_MAX]
    sent = [buffer for buffer in buffers if any(buffer is part for part in large)]
    assert [*map(id, sent)] == [*map(id, large)]  # without a copy
    assert all(buffers)
    joined = [any(buffer is part for part in large) for buffer in buffers]
    assert all(one or other for one, other in itertools.pairwise(joined))  # no two small ones in a row
