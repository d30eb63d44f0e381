"""Peers of the ZeroMQ transport that say whatever a test wants."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable

import zmq
import zmq.asyncio

from kvmesh.transport.frames import (
    Message,
    encode,
)
from kvmesh.transport.limits import (
    MESH_PROTOCOL_VERSION,
)
from kvmesh.transport.zmq import ZmqTransport, open_zmq
from kvmesh.transport.zmq_links import Link
from kvmesh.transport.zmq_reads import Active
from tests.transport.ends import LONG_S, Chunks, echo

V = MESH_PROTOCOL_VERSION
Reply = Callable[[list[bytes]], list[list[bytes]]]


@contextlib.asynccontextmanager
async def transport(source: Chunks | None = None) -> AsyncIterator[ZmqTransport]:
    opened = await open_zmq("127.0.0.1", 0, source, echo)
    try:
        yield opened
    finally:
        await opened.close()
    assert source is None or source.out == 0


def bulk_links(reader: ZmqTransport) -> list[Link[Active]]:
    """The connections over which a transport reads, whoever receives."""
    return [*reader._bulk._links, *reader._small._links]


class Stranger:
    """A socket that speaks ZeroMQ and says what a test wants."""

    def __init__(self, kind: int, address: str = "") -> None:
        self.context = zmq.asyncio.Context()
        self.socket = self.context.socket(kind)
        self.socket.linger = 0
        if address:
            self.socket.connect(f"tcp://{address}")
        else:
            self.address = f"127.0.0.1:{self.socket.bind_to_random_port('tcp://127.0.0.1')}"

    async def say(self, *parts: bytes | Message) -> None:
        await self.socket.send_multipart([encode(part) if isinstance(part, Message) else part for part in parts])

    async def hear(self) -> list[bytes]:
        async with asyncio.timeout(LONG_S):
            parts: list[bytes] = await self.socket.recv_multipart()
            return parts

    def __enter__(self) -> Stranger:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()
        self.context.term()


@contextlib.asynccontextmanager
async def peer(reply: Reply) -> AsyncIterator[str]:
    """The address of a peer that answers each message with what `reply` makes of it."""

    async def serve(stranger: Stranger) -> None:
        while True:
            identity, *parts = await stranger.socket.recv_multipart()
            for answer in reply(parts):
                await stranger.socket.send_multipart([identity, *answer])

    with Stranger(zmq.ROUTER) as stranger:
        task = asyncio.create_task(serve(stranger))
        try:
            yield stranger.address
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task


GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x01" + b"NULL".ljust(20, b"\0") + bytes(32)
READY = b"\x04\x1c\x05READY\x0bSocket-Type\0\0\0\x06ROUTER"


def frames(*parts: bytes | Message) -> bytes:
    """One message as a ROUTER sends it over TCP."""
    wire = b""
    for index, part in enumerate(parts):
        body = encode(part) if isinstance(part, Message) else part
        wire += bytes((2 | (index < len(parts) - 1),)) + len(body).to_bytes(8, "big") + body
    return wire


@contextlib.asynccontextmanager
async def plain_peer(say: Callable[[asyncio.StreamWriter], Awaitable[None]]) -> AsyncIterator[str]:
    """The address of a peer that shakes hands over TCP, waits for the first message, and then says any bytes."""
    tasks: list[asyncio.Task[None]] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.append(task)
        try:
            writer.write(GREETING + READY)
            await reader.readexactly(len(GREETING))
            await reader.readexactly(2 + (await reader.readexactly(2))[1])  # its READY, and the next frame's flags
            await say(writer)
            await reader.read()
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await server.wait_closed()
