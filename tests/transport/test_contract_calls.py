"""What calls are on every transport (interface.py)."""

from __future__ import annotations

import asyncio
import time

import pytest

from kvmesh.transport.errors import KVMeshError, ProtocolError, UnreachableError
from kvmesh.transport.limits import (
    KIB,
    MESSAGE_BYTES_MAX,
)
from tests.transport.ends import (
    LONG_S,
    Endless,
    Ends,
)


def test_a_call_is_answered(backend: str) -> None:
    async def main() -> None:
        async with Ends(backend) as ends:
            a, b = await ends.open(), await ends.open()
            for request in (b"", b"hello", bytes(100 * KIB), bytes(MESSAGE_BYTES_MAX)):
                assert await a.call(b.address, request, timeout_s=LONG_S) == request
            assert await a.call(a.address, b"myself", timeout_s=LONG_S) == b"myself"

    asyncio.run(main())


def test_many_calls_at_once(backend: str) -> None:
    async def main() -> None:
        async with Ends(backend) as ends:
            a, b = await ends.open(), await ends.open()
            requests = [str(number).encode() for number in range(200)]
            answers = await asyncio.gather(*(a.call(b.address, request, timeout_s=LONG_S) for request in requests))
            assert answers == requests

    asyncio.run(main())


def test_a_call_without_an_answer_times_out(backend: str) -> None:
    async def main() -> None:
        async with Ends(backend) as ends:
            a, stalled = await ends.open(), await ends.stalled()
            with pytest.raises(UnreachableError, match=r"did not answer within 0\.05 s"):
                await a.call(stalled, b"?", timeout_s=0.05)

    asyncio.run(main())


def test_a_call_to_nobody_fails_at_once(backend: str) -> None:
    async def main() -> None:
        async with Ends(backend) as ends:
            a, nobody = await ends.open(), await ends.nobody()
            began = time.monotonic()
            with pytest.raises(UnreachableError):
                await a.call(nobody, b"?", timeout_s=LONG_S)
            assert time.monotonic() - began < LONG_S / 2

    asyncio.run(main())


def test_a_long_poll_blocks_no_other_call(backend: str) -> None:
    async def main() -> None:
        news = asyncio.Event()

        async def handler(request: bytes) -> bytes:
            if request == b"wait":
                await news.wait()
            return request

        async with Ends(backend) as ends:
            a, b = await ends.open(), await ends.open(handler=handler)
            waiting = asyncio.create_task(a.call(b.address, b"wait", timeout_s=LONG_S))
            assert await a.call(b.address, b"quick", timeout_s=LONG_S) == b"quick"
            assert not waiting.done()
            news.set()
            assert await waiting == b"wait"

    asyncio.run(main())


@pytest.mark.parametrize(
    ("error", "says"), [(KVMeshError("what to do"), "what to do"), (ZeroDivisionError("secret"), "internal error")]
)
def test_an_error_of_the_handler_answers_the_caller(
    backend: str, error: Exception, says: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async def handler(_: bytes) -> bytes:
            raise type(error)(*error.args)  # pytest keeps `error`, and with it all that its traceback would refer to

        async with Ends(backend) as ends:
            a, b = await ends.open(), await ends.open(handler=handler)
            with pytest.raises(ProtocolError, match=says) as raised:
                await a.call(b.address, b"?", timeout_s=LONG_S)
            assert "secret" not in str(raised.value)

    asyncio.run(main())
    assert ("secret" in caplog.text) == (says == "internal error")


def test_messages_beyond_the_bound_are_refused(backend: str) -> None:
    async def main() -> None:
        async def handler(_: bytes) -> bytes:
            return bytes(MESSAGE_BYTES_MAX + 1)

        async with Ends(backend) as ends:
            a, b = await ends.open(), await ends.open(handler=handler)
            with pytest.raises(ProtocolError, match="at most"):
                await a.call(b.address, bytes(MESSAGE_BYTES_MAX + 1), timeout_s=LONG_S)
            with pytest.raises(ProtocolError, match="internal error"):
                await a.call(b.address, b"", timeout_s=LONG_S)

    asyncio.run(main())


def test_a_call_given_up_ends_at_the_other_end(backend: str) -> None:
    async def main() -> None:
        handler = Endless()
        async with Ends(backend) as ends:
            a, b = await ends.open(), await ends.open(handler=handler)
            call = asyncio.create_task(a.call(b.address, b"", timeout_s=LONG_S))
            await asyncio.wait_for(handler.began.wait(), LONG_S)
            call.cancel()
            await asyncio.wait_for(handler.ended.wait(), LONG_S)

    asyncio.run(main())


def test_closing_ends_calls_on_both_sides(backend: str) -> None:
    async def main() -> None:
        began = asyncio.Event()

        async def handler(_: bytes) -> bytes:
            began.set()
            await asyncio.Event().wait()
            return b""

        async with Ends(backend) as ends:
            a, b, c = await ends.open(), await ends.open(handler=handler), await ends.open()
            calls = [asyncio.create_task(end.call(b.address, b"", timeout_s=LONG_S)) for end in (a, c)]
            await asyncio.wait_for(began.wait(), LONG_S)
            await a.close()
            await b.close()
            for call in calls:
                with pytest.raises(UnreachableError):
                    await call
            with pytest.raises(UnreachableError, match="closed"):
                await a.call(c.address, b"", timeout_s=LONG_S)

    asyncio.run(main())
