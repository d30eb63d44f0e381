"""One client's connection, on the agent's side: its requests, its leases, its reservations.

A session is the owner of what its client reserved in the store, and has a grant for each get whose chunks it leases
(`leases.py`). When the connection closes (the client exits, crashes, is killed, or breaks the protocol) everything goes
back at once: the kernel tells us.

Requests that need no peer are answered where they arrive. A `Get` or a question that waits for peers goes on by itself,
so one slow chain never holds up the requests behind it; a connection has at most `CLIENT_REQUESTS_MAX` of them.
Runs on the agent's loop. It never touches chunk bytes.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import socket
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

from kvmesh import protocol, spaces
from kvmesh.arena import Arena
from kvmesh.fetch import Ask, Fate, Fetcher
from kvmesh.getting import Getting, report, take_local
from kvmesh.inspection import Inspector
from kvmesh.keys import Namespace
from kvmesh.leases import Grant, Grants
from kvmesh.store import Refusal, Store
from kvmesh.transport.errors import CallerError, ChunkTooLargeError, NamespaceError, ProtocolError
from kvmesh.transport.interface import Slice
from kvmesh.transport.limits import (
    AGENT_HELLO_TIMEOUT_S,
    AGENT_PROTOCOL_VERSION,
    CLIENT_REQUESTS_MAX,
    DEADLINE_MAX_S,
    GRANTS_PER_CLIENT_MAX,
    NAMESPACE_ID_BYTES,
    OWNED_CHUNKS_MAX,
    SESSION_BACKLOG_BYTES_MAX,
    SLICE_RUNS_MAX,
    SPACES_MAX,
)

log = logging.getLogger(__name__)


class Asked(Protocol):
    """Answers questions about the cluster."""

    def answer(self, body: bytes) -> bytes | Callable[[], Coroutine[Any, Any, bytes]]:
        """The JSON document that answers `body`, or what gets it from other nodes. Raises `ProtocolError`."""


@dataclass(slots=True)
class Desk:
    """What all sessions of an agent share."""

    node: str
    epoch: int
    arena: Arena
    store: Store
    grants: Grants
    inspector: Inspector
    fetcher: Fetcher
    queries: Asked
    on_space: Callable[[Namespace], list[str]]
    """Hears of each new namespace; returns what will keep it from hitting."""
    spaces: dict[bytes, Namespace]
    numbers: Iterator[int] = field(default_factory=itertools.count)
    """Of sessions."""


class Session(asyncio.Protocol):
    """One connection. The loop calls its methods; `on_gone` hears of its end."""

    def __init__(self, desk: Desk, on_gone: Callable[[Session], None]) -> None:
        self._desk = desk
        self._on_gone = on_gone
        self._number = next(desk.numbers)
        self._reader = protocol.FrameReader()
        self._transport: asyncio.Transport
        self._welcomed = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._gettings: set[Getting] = set()
        self._hello_timer: asyncio.TimerHandle

    # --- called by asyncio -----------------------------------------------------------------------------------------
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._desk.store.add_owner(self)
        self._hello_timer = asyncio.get_running_loop().call_later(AGENT_HELLO_TIMEOUT_S, self._transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        self._hello_timer.cancel()
        for task in self._tasks:
            task.cancel()
        for getting in list(self._gettings):
            getting.cancel()
        self._desk.grants.end_session(self._number)
        self._desk.store.drop_owner(self)
        self._on_gone(self)

    def data_received(self, data: bytes) -> None:
        try:
            for body in self._reader.feed(data):
                if not self._welcomed:
                    self._greet(body)
                else:
                    self._handle(protocol.decode_request(body))
                if self._transport.is_closing():
                    return
        except ProtocolError as error:
            log.warning("a client was disconnected: %s", error)
            self._send(protocol.failure(0, error))
            self._transport.close()

    def close(self) -> None:
        """End the connection, and give back what the client has."""
        self._transport.abort()

    # --- inside ----------------------------------------------------------------------------------------------------
    def _greet(self, body: bytes) -> None:
        theirs = protocol.hello_version(body)
        if theirs != AGENT_PROTOCOL_VERSION:
            self._send(protocol.failure(0, ProtocolError(protocol.version_refusal(theirs, self._desk.node))))
            self._transport.close()
            return
        self._hello_timer.cancel()
        desk = self._desk
        welcome = protocol.Welcome(
            0, AGENT_PROTOCOL_VERSION, desk.node, desk.epoch, desk.arena.size_bytes, self._number
        )
        # Nothing was written before, so the frame and the descriptor that belongs to it go out together, past asyncio.
        with self._transport.get_extra_info("socket").dup() as raw:
            socket.send_fds(raw, [protocol.frame(welcome)], [desk.arena.fileno()])
        self._welcomed = True

    def _send(self, message: protocol.Message) -> None:
        if self._transport.is_closing():
            return
        self._transport.write(protocol.frame(message))
        if self._transport.get_write_buffer_size() > SESSION_BACKLOG_BYTES_MAX:
            log.warning("a client was disconnected: it does not read its answers")
            self._transport.abort()

    def _handle(self, request: protocol.Request) -> None:
        try:
            reply = self._reply(request)
            if reply is not None:
                self._send(reply)
        except CallerError as error:  # of an answer that is too large as well
            self._send(protocol.failure(request.id, error))

    def _reply(self, request: protocol.Request) -> protocol.Message | None:
        store = self._desk.store
        match request:
            case protocol.Get():
                self._get(request)
                return None
            case protocol.Release():
                self._release(request)
                return None
            case protocol.Renew():
                renew, now = self._desk.grants.renew, time.monotonic()
                return protocol.Renewed(request.id, [renew(session, get, now) for session, get in request.gets])
            case protocol.Suspect():
                self._desk.inspector.suspect(request.key)
                return None
            case protocol.Reserve():
                return protocol.Reserved(request.id, self._reserve(request))
            case protocol.Commit():
                return protocol.Counted(request.id, self._commit(request))
            case protocol.Abandon():
                for key in protocol.unpack_keys(request.keys):
                    store.abandon(self, key)
                return None
            case protocol.OpenSpace():
                return protocol.Opened(request.id, self._open_space(request))
            case protocol.Prefetch():
                return protocol.Counted(request.id, self._prefetch(request))
            case protocol.Pin():
                keys = protocol.unpack_keys(request.keys)
                return protocol.Counted(request.id, sum(store.pin(key, request.pinned) for key in keys))
            case protocol.Delete():
                return protocol.Counted(request.id, sum(store.delete(k) for k in protocol.unpack_keys(request.keys)))
            case protocol.Query():
                answer = self._desk.queries.answer(request.body)
                if isinstance(answer, bytes):
                    return protocol.Answer(request.id, answer)
                if self._is_busy:
                    raise CallerError("this connection has too many requests open: wait for some to end")
                self._spawn(self._answer_later(request.id, answer))
                return None
            case protocol.Hello():
                raise ProtocolError("it said hello twice")

    def _open_space(self, request: protocol.OpenSpace) -> list[str]:
        space = spaces.decode(request.space)
        if space.chunk_bytes > self._desk.arena.size_bytes:
            raise ChunkTooLargeError(
                f"a chunk of this namespace has {space.chunk_bytes} bytes and the whole arena of agent "
                f"{self._desk.node!r} {self._desk.arena.size_bytes}: start the agent with more --memory"
            )
        known = self._desk.spaces
        if space.digest[:16] in known:
            return []
        if len(known) >= SPACES_MAX:
            raise NamespaceError(f"the agent knows {SPACES_MAX} namespaces already: restart it, or use fewer")
        known[space.digest[:16]] = space
        return self._desk.on_space(space)

    def _space(self, space_id: bytes) -> Namespace:
        space = self._desk.spaces.get(space_id)
        if space is None:
            raise NamespaceError(f"unknown namespace {space_id.hex()}: open it on this agent first")
        return space

    def _reserve(self, request: protocol.Reserve) -> list[int]:
        space = self._space(request.space_id)
        store, offsets, now = self._desk.store, list[int](), time.monotonic()
        for key in protocol.unpack_keys(request.keys):
            if offsets and offsets[-1] == Refusal.FULL and store.get(key) is None:
                # The front found no room: what follows is worth less, and trying again for each would only take time.
                offsets.append(Refusal.FULL)
            else:
                offsets.append(store.reserve(self, key, request.space_id, space.chunk_bytes, now=now))
        return offsets

    def _commit(self, request: protocol.Commit) -> int:
        keys = protocol.unpack_keys(request.keys)
        sums = protocol.unpack_checksums(request.checksums, len(keys))
        expires_s = None if request.ttl_s is None else time.monotonic() + request.ttl_s
        commit = self._desk.store.commit
        # From the back, so that the chain's front is the most recently used: see Store.touch.
        pairs = list(zip(keys, sums, strict=True))
        return sum(
            commit(self, key, checksum, pinned=request.pinned, expires_s=expires_s) is not None
            for key, checksum in reversed(pairs)
        )

    def _prefetch(self, request: protocol.Prefetch) -> int:
        space = self._space(request.space_id)
        keys = [k for k in _chain(request.keys) if self._desk.store.get(k) is None]
        deadline = time.monotonic() + _bounded(request.deadline_s)
        ask = _ask(space, deadline, request.prefill_tokens_per_s, None)
        flights = self._desk.fetcher.want(None, keys, ask).values()
        return sum(flight.fate is None for flight in flights)  # one that is done already was refused

    @property
    def _is_busy(self) -> bool:
        """As many requests as it may have wait for peers."""
        return len(self._tasks) + len(self._gettings) >= CLIENT_REQUESTS_MAX

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """What waits for peers is a task; it ends with the connection."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _answer_later(self, id_: int, answer: Callable[[], Coroutine[Any, Any, bytes]]) -> None:
        try:
            self._send(protocol.Answer(id_, await answer()))
        except CallerError as error:
            self._send(protocol.failure(id_, error))

    # --- get -------------------------------------------------------------------------------------------------------
    def _get(self, request: protocol.Get) -> None:
        desk = self._desk
        space = self._space(request.space_id)
        part = _slice(space, request.part)
        keys = _chain(request.keys)
        if desk.grants.count(self._number) >= GRANTS_PER_CLIENT_MAX:
            raise CallerError("this connection has too many hits open: release some before asking for more")
        now = time.monotonic()
        grant = desk.grants.open(self._number, request.id, request.lease_s, now)
        held = take_local(desk.store, grant, keys, part)
        complete = len(held) == len(keys)
        if self._leased() > OWNED_CHUNKS_MAX or (not complete and self._is_busy):
            desk.grants.end(self._number, request.id)
            raise CallerError("this connection has too many requests or leases open: wait for some to end")
        if complete:
            self._send(report(request.id, list(held.values()), part, final=True, why=Fate.LANDED.value))
            if not held:  # an empty chain: nothing will be released
                self._done(grant)
        else:
            ask = _ask(space, now + _bounded(request.deadline_s), request.prefill_tokens_per_s, part)
            getting = Getting(request.id, desk.store, desk.fetcher, self._send, self._got, grant, keys, held, ask)
            self._gettings.add(getting)
            grant.busy = True
            getting.begin()

    def _got(self, getting: Getting) -> None:
        self._gettings.discard(getting)
        getting.grant.busy = False
        self._done(getting.grant)

    def _done(self, grant: Grant) -> None:
        """A grant of which nothing is leased any more, and nothing will be, is over."""
        grants = self._desk.grants
        over = not grant.busy and not self._desk.store.leased_by(grant)
        if over and grants.find(grant.session, grant.get) is grant:  # not one that took its number
            grants.end(grant.session, grant.get)

    def _release(self, request: protocol.Release) -> None:
        grant = self._desk.grants.find(self._number, request.get)
        if grant is None:
            return  # its time was over: everything went back then
        if not grant.busy and self._desk.store.leased_at(grant) == set(request.offsets):
            self._desk.grants.end(self._number, request.get)  # all of it at once, as a hit does that is left
            return
        for offset in request.offsets:
            chunk = self._desk.store.leased(grant, offset)
            if chunk is None:
                raise ProtocolError(f"it released offset {offset}, which it has no lease of")
            self._desk.store.release(grant, chunk)
        self._done(grant)

    def _leased(self) -> int:
        return sum(self._desk.store.leased_by(grant) for grant in self._desk.grants.of(self._number))


def _chain(blob: bytes) -> list[bytes]:
    """The keys of a chain. Raises `CallerError` when one stands there twice."""
    keys = protocol.unpack_keys(blob)
    if len(set(keys)) != len(keys):
        raise CallerError("the chain names a chunk twice: give each key once, in the order of the prompt")
    return keys


def _slice(space: Namespace, numbers: tuple[int, int, int, int] | None) -> Slice | None:
    """The part of each chunk that a client asks for. Raises `CallerError` when a chunk has no such part."""
    if numbers is None:
        return None
    offset, run, stride, count = numbers
    part = Slice(offset, run, stride if count > 1 else 0, count)  # of one run the stride may be any number
    overlaps = part.count > 1 and part.stride_bytes < part.run_bytes
    if not part.bytes or overlaps or part.count > SLICE_RUNS_MAX or part.end > space.chunk_bytes:
        raise CallerError(f"a chunk of this namespace has {space.chunk_bytes} bytes and no such part: {part}")
    return part


def _ask(space: Namespace, deadline: float, rate: float | None, part: Slice | None) -> Ask:
    rate = rate if rate and rate > 0 else None  # NaN is not > 0
    return Ask(space.digest[:NAMESPACE_ID_BYTES], space.chunk_bytes, space.chunk_tokens, deadline, rate, part)


def _bounded(deadline_s: float) -> float:
    """A client's deadline as it counts here: whatever it says, between nothing and `DEADLINE_MAX_S`."""
    return min(deadline_s, DEADLINE_MAX_S) if deadline_s > 0 else 0.0
