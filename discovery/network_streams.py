"""The TCP side of gossip: one message a stream, and at most one answer.

Serves push/pulls (the answer comes from the protocol, within a bounded time), pings (answered here: a fallback probe
asks whether the process runs at all) and user messages; opens streams for the protocol's own. Each stream has a time
for everything together, and both directions have a bound on how many there are at once; a stream beyond it is closed,
or fails, at once. Every action with a number ends in exactly one event.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import socket
from collections.abc import Callable

from kvmesh.transport.limits import (
    STREAM_READ_BYTES,
    STREAM_SERVE_TIMEOUT_S,
    STREAMS_OPENED_MAX,
    STREAMS_SERVED_MAX,
)

from .network_counters import NetworkCounters, Warner
from .network_packets import address_of, endpoint_of
from .swim.events import (
    AnswerPull,
    Exchange,
    Exchanged,
    Pulled,
    RefusePull,
    SendUser,
    StreamFailed,
    StreamPing,
    StreamPinged,
    SwimEvent,
    UserCame,
)
from .wire.errors import Cause, WireError
from .wire.messages import Ack, Endpoint, ErrorReply, Message, Ping, PushPull, User
from .wire.streams import StreamCodec

_log = logging.getLogger("kvmesh.discovery")


class Streams:
    """Serves and opens streams, until `close`."""

    def __init__(self, sock: socket.socket, codec: StreamCodec, counters: NetworkCounters, name: str) -> None:
        self._socket = sock
        self._is_v6 = sock.family is socket.AF_INET6
        self._codec = codec
        self._counters = counters
        self._warner = Warner(counters)
        self._name = name
        self._on_event: Callable[[SwimEvent], None] | None = None
        self._tokens = itertools.count(1)
        self._answers: dict[int, asyncio.Future[Message]] = {}
        """By token: what a peer that pushed its state waits for."""
        self._served: set[asyncio.Task[None]] = set()
        self._opened: set[asyncio.Task[None]] = set()
        self._accepting: asyncio.Task[None] | None = None

    def start(self, on_event: Callable[[SwimEvent], None]) -> None:
        """Accept streams from now on."""
        self._on_event = on_event
        self._accepting = asyncio.get_running_loop().create_task(self._accept())

    async def close(self) -> None:
        """End all streams. A second call does nothing."""
        self._on_event = None
        tasks = [*self._served, *self._opened, *([self._accepting] if self._accepting else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._socket.close()

    # --- served ---------------------------------------------------------------------------------------------------

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, address = await loop.sock_accept(self._socket)
            except OSError as error:  # out of file descriptors, most likely: some come back
                self._counters.receive_errors += 1
                _log.debug("a stream could not be accepted: %r", error)
                await asyncio.sleep(0.1)
                continue
            if len(self._served) >= STREAMS_SERVED_MAX:
                self._counters.streams_refused += 1
                connection.close()
                continue
            task = loop.create_task(self._serve(connection, endpoint_of(address)))
            self._served.add(task)
            task.add_done_callback(self._served.discard)

    async def _serve(self, connection: socket.socket, source: Endpoint) -> None:
        self._counters.streams_served += 1
        with connection:
            try:
                async with asyncio.timeout(STREAM_SERVE_TIMEOUT_S):
                    await self._answer(connection, source)
            except (OSError, TimeoutError, EOFError):
                self._counters.streams_unread += 1
            except Exception:  # noqa: BLE001 - whatever a peer provokes, the node lives on
                self._counters.unexpected_errors += 1
                _log.exception("a stream of a peer failed unexpectedly")

    async def _answer(self, connection: socket.socket, source: Endpoint) -> None:
        connection.setblocking(False)
        try:
            message = await self._receive(connection, answer=False)
        except WireError as error:
            self._counters.refused[error.cause] += 1
            self._warner.warn(error, f"a stream from {address_of(source, is_v6=False)[0]}")
            await self._send(connection, ErrorReply(str(error)), answer=True)
            return
        match message:
            case PushPull():
                await self._send(connection, await self._ask_protocol(message, source), answer=True)
            case Ping(seq, node) if not node or node == self._name:
                await self._send(connection, Ack(seq), answer=True)
            case User(payload):
                self._tell(UserCame(source, payload))
            case _:  # a ping for another node: silence says that it is not here
                self._counters.refused[Cause.UNKNOWN_KIND] += not isinstance(message, Ping)

    async def _ask_protocol(self, state: PushPull, source: Endpoint) -> Message:
        token = next(self._tokens)
        self._answers[token] = asyncio.get_running_loop().create_future()
        try:
            self._tell(Pulled(token, source, state))
            return await self._answers[token]
        finally:
            del self._answers[token]

    def answer(self, action: AnswerPull | RefusePull) -> None:
        """The protocol's answer to a push/pull."""
        answer = self._answers.get(action.token)
        if answer is not None and not answer.done():
            answer.set_result(action.state if isinstance(action, AnswerPull) else ErrorReply(action.reason))

    # --- opened ---------------------------------------------------------------------------------------------------

    def open(self, action: Exchange | StreamPing | SendUser) -> None:
        """Open a stream for the protocol."""
        loop = asyncio.get_running_loop()
        if len(self._opened) >= STREAMS_OPENED_MAX:
            self._counters.streams_failed += 1
            loop.call_soon(self._tell, StreamFailed(action.number, "too many streams are open"))
            return
        task = loop.create_task(self._use(action))
        self._opened.add(task)
        task.add_done_callback(self._opened.discard)

    async def _use(self, action: Exchange | StreamPing | SendUser) -> None:
        host, port = address_of(action.target, is_v6=self._is_v6)
        event: SwimEvent | None
        try:
            async with asyncio.timeout(action.timeout_s):
                event = await self._exchange(action, (host, port))
        except TimeoutError:
            event = StreamFailed(action.number, f"{host}:{port}: no answer within {action.timeout_s:g} s")
        except EOFError:
            event = StreamFailed(action.number, f"{host}:{port}: the stream was closed without an answer")
        except WireError as error:
            self._counters.refused[error.cause] += 1
            event = StreamFailed(action.number, f"{host}:{port}: its answer could not be read: {error}")
        except OSError as error:
            event = StreamFailed(action.number, f"{host}:{port}: {error.strerror or error}")
        except Exception:  # noqa: BLE001 - as above
            self._counters.unexpected_errors += 1
            _log.exception("a stream to %s:%d failed unexpectedly", host, port)
            event = StreamFailed(action.number, f"{host}:{port}: an unexpected error")
        if event is not None:
            self._counters.streams_failed += isinstance(event, StreamFailed)
            self._tell(event)

    async def _exchange(self, action: Exchange | StreamPing | SendUser, address: tuple[str, int]) -> SwimEvent | None:
        with socket.socket(self._socket.family, socket.SOCK_STREAM) as connection:
            connection.setblocking(False)
            await asyncio.get_running_loop().sock_connect(connection, address)
            self._counters.streams_opened += 1
            match action:
                case SendUser(payload=payload):
                    await self._send(connection, User(payload), answer=False)
                    return None
                case StreamPing(number, _, ping):
                    await self._send(connection, ping, answer=False)
                    if await self._receive(connection, answer=True) == Ack(ping.seq):
                        return StreamPinged(number)
                    return StreamFailed(number, "another answer than an ack to this ping")
                case Exchange(number, _, state):
                    await self._send(connection, state, answer=False)
                    answer = await self._receive(connection, answer=True)
                    if isinstance(answer, PushPull):
                        return Exchanged(number, answer)
                    why = answer.text if isinstance(answer, ErrorReply) else "another answer than its state"
                    return StreamFailed(number, f"{address[0]}:{address[1]} refused: {why}")

    # --- both -----------------------------------------------------------------------------------------------------

    async def _send(self, connection: socket.socket, message: Message, *, answer: bool) -> None:
        data = self._codec.seal(message, answer=answer)
        await asyncio.get_running_loop().sock_sendall(connection, data)
        self._counters.stream_bytes_sent += len(data)

    async def _receive(self, connection: socket.socket, *, answer: bool) -> Message:
        """One message. Raises `WireError`, `OSError`, and `EOFError` when the stream ends before it does."""
        loop, reader = asyncio.get_running_loop(), self._codec.reader(answer=answer)
        while True:
            data = await loop.sock_recv(connection, STREAM_READ_BYTES)
            if not data:
                raise EOFError
            self._counters.stream_bytes_received += len(data)
            message = reader.feed(data)
            if message is not None:
                return message

    def _tell(self, event: SwimEvent) -> None:
        if self._on_event is not None:
            with contextlib.suppress(asyncio.InvalidStateError):
                self._on_event(event)
