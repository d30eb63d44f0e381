"""What is said over the streams of gossip: one message, and at most one answer.

Serves push/pulls (the answer comes from the protocol, within a bounded time), pings (answered here: a fallback probe
asks whether the process runs at all) and user messages; opens streams for the protocol's own. Each stream has a time
for everything together. Both directions have a bound on how many there are at once, and on the bytes that all of these
hold, to read or to send; a stream beyond it is closed, or fails, at once. Every action with a number ends in exactly
one event. Knows no socket: connections come from a `Carrier`. Runs on the loop of the network.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from kvmesh.discovery.swim.events import (
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
from kvmesh.discovery.wire.errors import Cause, WireError
from kvmesh.discovery.wire.messages import Ack, Endpoint, ErrorReply, Message, Ping, PushPull, User
from kvmesh.discovery.wire.streams import StreamCodec
from kvmesh.transport.limits import (
    STREAM_BYTES_HELD_MAX,
    STREAM_LINGER_S,
    STREAM_SERVE_TIMEOUT_S,
    STREAMS_OPENED_MAX,
    STREAMS_PER_SOURCE_MAX,
    STREAMS_SERVED_MAX,
)

from .addresses import shown
from .carrier import Connection
from .counters import Account

Connect = Callable[[Endpoint], Awaitable[Connection]]


class Streams:
    """Serves and opens streams, until `close`."""

    def __init__(
        self, connect: Connect, codec: StreamCodec, account: Account, name: str, tell: Callable[[SwimEvent], bool]
    ) -> None:
        self._connect = connect
        self._codec = codec
        self._account = account
        self._name = name
        self._tell = tell
        self._tokens = itertools.count(1)
        self._answers: dict[int, asyncio.Future[Message]] = {}
        """By token: what a peer that pushed its state waits for."""
        self._served: set[asyncio.Task[None]] = set()
        self._served_bytes = _Held()
        self._sources: Counter[bytes] = Counter()
        """Streams that are served, by the peer's address."""
        self._opened: set[asyncio.Task[None]] = set()
        self._opened_bytes = _Held()

    async def close(self) -> None:
        """End all streams. None may be served or opened any more. A second call does nothing."""
        tasks = [*self._served, *self._opened]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # --- served ---------------------------------------------------------------------------------------------------

    def serve(self, connection: Connection, source: Endpoint) -> None:
        """A peer opened a stream."""
        if len(self._served) >= STREAMS_SERVED_MAX or self._sources[source.ip] >= STREAMS_PER_SOURCE_MAX:
            self._account.counters.streams_refused += 1
            connection.close()
            return
        self._account.counters.streams_served += 1
        stream = _Stream(connection, self._codec, self._account, self._served_bytes)
        task = _spawn(self._serve(stream, source), self._served)
        self._sources[source.ip] += 1
        task.add_done_callback(lambda _: self._served_one(stream, source))  # also when it was cancelled before it began

    def _served_one(self, stream: _Stream, source: Endpoint) -> None:
        stream.close()
        self._sources[source.ip] -= 1
        if not self._sources[source.ip]:
            del self._sources[source.ip]

    async def _serve(self, stream: _Stream, source: Endpoint) -> None:
        try:
            async with asyncio.timeout(STREAM_SERVE_TIMEOUT_S):
                try:
                    answer = await self._take(stream, source)
                except WireError as error:
                    self._account.refuse(error, f"a stream from {shown(source)}")
                    await stream.refuse(str(error))
                else:
                    if answer is not None:
                        await stream.send(answer, answer=True)
        except _NoRoomError:
            self._account.counters.streams_refused += 1
        except (OSError, EOFError):
            self._account.counters.streams_unread += 1
        except Exception as error:  # noqa: BLE001 - whatever a peer provokes, the node lives on
            self._account.unexpected(error, "a stream of a peer")

    async def _take(self, stream: _Stream, source: Endpoint) -> Message | None:
        """The peer's message, and the answer to it."""
        match await stream.receive(answer=False):
            case PushPull() as state:
                return await self._ask_protocol(state, source)
            case Ping(seq, node):
                # A ping for another node gets no answer: silence says that it is not here.
                return Ack(seq) if node in ("", self._name) else None
            case User(payload):
                self._tell(UserCame(source, payload))
                return None
            case message:
                raise WireError(Cause.UNKNOWN_KIND, f"{type(message).__name__} opens no stream")

    async def _ask_protocol(self, state: PushPull, source: Endpoint) -> Message | None:
        token = next(self._tokens)
        self._answers[token] = asyncio.get_running_loop().create_future()
        try:
            return await self._answers[token] if self._tell(Pulled(token, source, state)) else None
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
        if len(self._opened) >= STREAMS_OPENED_MAX:
            failed = StreamFailed(action.number, "too many streams are open")
            asyncio.get_running_loop().call_soon(self._fail, failed)  # not from within the protocol
            return
        _spawn(self._use(action), self._opened)

    def _fail(self, failed: StreamFailed) -> None:
        self._account.counters.streams_failed += 1
        self._tell(failed)

    async def _use(self, action: Exchange | StreamPing | SendUser) -> None:
        event: SwimEvent | None = None
        reason = ""
        try:
            async with asyncio.timeout(action.timeout_s):
                event = await self._exchange(action)
        except _RefusedError as refused:
            reason = str(refused)
        except TimeoutError:
            reason = f"no answer within {action.timeout_s:g} s"
        except EOFError:
            reason = "the stream was closed without an answer"
        except WireError as error:
            self._account.refuse(error, f"the answer of {shown(action.target)}")
            reason = f"its answer could not be read: {error}"
            if error.cause is Cause.UNKNOWN_KIND:
                reason += "; what listens there does not gossip: give the gossip port, not the mesh port"
        except _NoRoomError:
            reason = f"the streams under way hold more than {STREAM_BYTES_HELD_MAX} bytes"
        except OSError as error:
            reason = error.strerror or repr(error)
        except Exception as error:  # noqa: BLE001 - every action ends in an event
            self._account.unexpected(error, "a stream of this node")
            reason = "an unexpected error"
        if reason:
            self._fail(StreamFailed(action.number, f"{shown(action.target)}: {reason}"))
        elif event is not None:
            self._tell(event)

    async def _exchange(self, action: Exchange | StreamPing | SendUser) -> SwimEvent | None:
        stream = _Stream(await self._connect(action.target), self._codec, self._account, self._opened_bytes)
        with contextlib.closing(stream):
            self._account.counters.streams_opened += 1
            match action:
                case SendUser(payload=payload):
                    await stream.send(User(payload), answer=False)
                    return None
                case StreamPing(number, _, ping):
                    await stream.send(ping, answer=False)
                    if await stream.receive(answer=True) == Ack(ping.seq):
                        return StreamPinged(number)
                    raise _RefusedError("another answer than an ack to this ping")
                case Exchange(number, _, state):
                    await stream.send(state, answer=False)
                    answer = await stream.receive(answer=True)
                    if isinstance(answer, PushPull):
                        return Exchanged(number, answer)
                    if isinstance(answer, ErrorReply):
                        raise _RefusedError(f"it refused: {_printable(answer.text)}")
                    raise _RefusedError("another answer than its state")


class _NoRoomError(Exception):
    """The streams hold more bytes than they may."""


class _RefusedError(Exception):
    """The peer answered, but not what was asked for."""


class _Held:
    """Bytes that all streams of one direction hold together."""

    def __init__(self) -> None:
        self.count = 0


class _Stream:
    """One message each way over a connection, and what it holds of the bytes that all may hold: a message until it is
    whole, and what is to be sent until it is sent."""

    def __init__(self, connection: Connection, codec: StreamCodec, account: Account, held: _Held) -> None:
        self._connection = connection
        self._codec = codec
        self._counters = account.counters
        self._all = held
        self._held = 0

    def close(self) -> None:
        """A second call does nothing."""
        self._release()
        self._connection.close()

    async def send(self, message: Message, *, answer: bool) -> None:
        """All of it."""
        data = self._codec.seal(message, answer=answer)
        self._hold(len(data))
        try:
            await self._connection.send(data)
        finally:
            self._release()
        self._counters.stream_bytes_sent += len(data)

    async def receive(self, *, answer: bool) -> Message:
        """One message. Raises `WireError`, `OSError`, and `EOFError` when the stream ends before it does."""
        reader = self._codec.reader(answer=answer)
        try:
            while data := await self._connection.receive():
                self._counters.stream_bytes_received += len(data)
                self._hold(len(data))
                message = reader.feed(data)
                if message is not None:
                    return message
        finally:
            self._release()
        raise EOFError

    async def refuse(self, reason: str) -> None:
        """Say why; and let the peer finish, for a while, since closing with something unread would take it back."""
        await self.send(ErrorReply(reason), answer=True)
        self._connection.end()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(STREAM_LINGER_S):
                while data := await self._connection.receive():
                    self._counters.stream_bytes_received += len(data)

    def _hold(self, count: int) -> None:
        self._held += count
        self._all.count += count
        if self._all.count > STREAM_BYTES_HELD_MAX:
            raise _NoRoomError

    def _release(self) -> None:
        self._all.count -= self._held
        self._held = 0


def _spawn(work: Coroutine[Any, Any, None], tasks: set[asyncio.Task[None]]) -> asyncio.Task[None]:
    task = asyncio.get_running_loop().create_task(work)
    tasks.add(task)
    task.add_done_callback(tasks.discard)
    return task


def _printable(text: str) -> str:
    """A peer's words, for the log: no line of their own."""
    return "".join(character if character.isprintable() else "?" for character in text)
