"""The client: what an engine or a script uses of the mesh, through the agent on its own host.

    mesh = kvmesh.connect()
    mesh.put(space, {key: tensor})
    with mesh.get(space, space.chain(token_ids)) as hit: ...

A `Mesh` may be used from any number of threads. Each call takes a connection of its own from a small pool, so a get
that waits for peers never holds up another thread's call; a hit keeps its connection until the agent's last report.
From asyncio use `kvmesh.aio`. Bytes never pass the socket: a put copies into the arena, a get returns views of it.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from kvmesh import protocol, queries, spaces
from kvmesh.arena import Arena
from kvmesh.connection import Connection
from kvmesh.hit import Hit, Leases
from kvmesh.keys import Namespace
from kvmesh.parts import Part
from kvmesh.renewing import Renewals
from kvmesh.settings import socket_default
from kvmesh.store import Refusal
from kvmesh.transport.checksum import checksum
from kvmesh.transport.errors import (
    AgentUnavailableError,
    CallerError,
    ChunkTooLargeError,
    KVMeshError,
    NamespaceError,
    ProtocolError,
)
from kvmesh.transport.interface import Slice
from kvmesh.transport.limits import (
    AGENT_HELLO_TIMEOUT_S,
    CLIENT_CONNECTIONS_MAX,
    CLIENT_REPLY_GRACE_S,
    DEADLINE_MAX_S,
    GET_DEADLINE_DEFAULT_S,
    LEASE_S_DEFAULT,
    LEASE_S_MAX,
    LEASE_S_MIN,
    PREFETCH_DEADLINE_DEFAULT_S,
    RENEWALS_PER_MESSAGE_MAX,
)

if TYPE_CHECKING:
    from kvmesh.discovery.keying import Operation
    from kvmesh.tensors import Value

ReplyT = TypeVar("ReplyT", bound=protocol.Message)


@dataclass(frozen=True, slots=True)
class PutResult:
    """What became of the chunks of one put."""

    stored: int
    """New in this node."""
    existed: int
    """Held already, or being written by another client just now: nothing to do, nothing was copied."""
    refused: int
    """No room: the arena is full of chunks that are leased, pinned or being written. An ordinary result."""
    bytes_stored: int


def connect(
    socket: str | os.PathLike[str] | None = None,
    *,
    timeout_s: float = AGENT_HELLO_TIMEOUT_S,
    lease_s: float = LEASE_S_DEFAULT,
) -> Mesh:
    """The mesh, by the local agent at `socket` (else ``KVMESH_SOCKET``, else the default path).

    `lease_s`: how long chunks stay leased to a process that is stopped; one that runs keeps its leases.

    Raises `AgentUnavailableError` when none answers there, `VersionMismatchError` when it is of another version.
    """
    if not LEASE_S_MIN <= lease_s <= LEASE_S_MAX:
        raise CallerError(f"lease_s is {lease_s}: give {LEASE_S_MIN:g} to {LEASE_S_MAX:g} seconds")
    return Mesh(Path(socket) if socket is not None else socket_default(), timeout_s=timeout_s, lease_s=lease_s)


class Mesh:
    """The local agent, and through it everyone's chunks. Thread-safe. Close it, or use it in a ``with`` block."""

    def __init__(self, path: Path, *, timeout_s: float, lease_s: float = LEASE_S_DEFAULT) -> None:
        self.socket = path
        """Where the agent listens."""
        self._timeout_s = timeout_s
        self._lease_s = lease_s
        self._renewals = Renewals(lease_s, self._renew, self._end_renewing)
        self._renewing: Connection | None = None  # the renewals' own connection, of their thread
        self._mapping = threading.Lock()
        # A forgotten hit gives its connection back from a finaliser, which may run in the middle of any line here: so
        # the pool has no lock, only a queue and a deque whose operations are atomic and may be re-entered.
        self._places: queue.SimpleQueue[None] = queue.SimpleQueue()
        for _ in range(CLIENT_CONNECTIONS_MAX):
            self._places.put(None)
        self._idle: deque[Connection] = deque()
        self._arenas: dict[tuple[int, int], tuple[Arena, Arena]] = {}  # the newest start of the agent, and its arena
        self._closed = False
        self._pid = os.getpid()
        connection = self._take()
        self.node = connection.welcome.node
        """The agent's name."""
        self.arena_bytes = connection.welcome.arena_bytes
        """The size of the agent's arena."""
        self._put_back(connection)

    # --- chunks ----------------------------------------------------------------------------------------------------
    def put(
        self, space: Namespace, chunks: Mapping[bytes, Value], *, pin: bool = False, ttl_s: float | None = None
    ) -> PutResult:
        """Store chunks in this node; `chunks` maps keys, in the chain's order, to tensors.

        A value is a tensor of the namespace's shape and dtype (on any device), a mapping of its named tensors, or a
        function that is given the writable view(s) in the arena and fills them; it is called only for chunks that are
        new. `pin` keeps new chunks until `unpin` or `delete`; after `ttl_s` seconds they expire.

        Raises `TensorError` and `ChunkTooLargeError`. What a fill function raises goes to the caller, and that chunk is
        not stored.
        """
        from kvmesh import pinning, tensors

        self._check_size(space)
        for value in chunks.values():
            tensors.check(space, value)
        if ttl_s is not None and not ttl_s > 0:
            raise CallerError(f"ttl_s is {ttl_s}: give the seconds until the chunks expire, more than 0")
        keys = list(chunks)
        with self._connection(space) as connection:
            blob = protocol.pack_keys(keys)
            request = protocol.Reserve(connection.next_id(), space.digest[:16], blob)
            offsets = self._call(connection, request, protocol.Reserved).offsets
            new = [(key, offset) for key, offset in zip(keys, offsets, strict=True) if offset >= 0]
            arena, _ = connection.arenas
            if new and any(tensors.on_gpu(value) for value in chunks.values()):
                pinning.pin(arena, writable=True)
            sums: list[int] = []
            try:
                for key, offset in new:
                    tensors.write(tensors.views(arena, offset, space), chunks[key])
                    sums.append(checksum(arena.view(offset, space.chunk_bytes)))
            finally:
                # What is whole counts, whatever happened to the chunk after it.
                done = [key for key, _ in new[: len(sums)]]
                commit = protocol.Commit(
                    connection.next_id(), protocol.pack_keys(done), protocol.pack_checksums(sums), pin, ttl_s
                )
                stored = self._call(connection, commit, protocol.Counted).chunks if done else 0
                if left := [key for key, _ in new[len(sums) :]]:
                    connection.send(protocol.Abandon(0, protocol.pack_keys(left)))
        refused = sum(offset == Refusal.FULL for offset in offsets)
        # What came from a peer while it was written here counts as there already.
        return PutResult(stored, len(keys) - stored - refused, refused, stored * space.chunk_bytes)

    def get(
        self,
        space: Namespace,
        chain: Sequence[bytes],
        *,
        deadline_s: float = GET_DEADLINE_DEFAULT_S,
        part: Part | None = None,
        prefill_tokens_per_s: float | None = None,
        verify: bool = True,
    ) -> Hit:
        """The longest run of chunks from the front of `chain` that can be here within `deadline_s` seconds.

        Local chunks are leased at once; the rest is fetched from peers. A miss is a shorter hit, never an exception.

        `part`: of each chunk just this (`space.part(…)`); no more than that is fetched.
        `prefill_tokens_per_s`: how fast you would compute; what would take longer to fetch is then not fetched.
        `verify`: look at each chunk's checksum before its view is given out (some 25 GB/s).
        """
        _check_deadline(deadline_s)
        _check_rate(prefill_tokens_per_s)
        self._check_size(space)
        blob = protocol.pack_keys(chain)
        connection = self._take()
        try:
            self._open(connection, space)
            _, arena = connection.arenas
            id_ = connection.next_id()
            # From before the request is sent: what this client believes of its leases ends before they do.
            leases = Leases(connection, id_, time.monotonic() + self._lease_s, self._renewals.discard)
            hit = Hit(
                connection, arena, space, tuple(chain), deadline_s, self._put_back, leases, part=part, verify=verify
            )
        except BaseException:
            self._put_back(connection)
            raise
        try:
            self._renewals.add(leases)
            connection.send(
                protocol.Get(
                    id_,
                    space.digest[:16],
                    blob,
                    deadline_s,
                    self._lease_s,
                    prefill_tokens_per_s,
                    None if part is None else _numbers(part.slice),
                )
            )
        except BaseException:
            hit.close()  # and with it the connection, which it gives back
            raise
        return hit

    def prefetch(
        self,
        space: Namespace,
        chain: Sequence[bytes],
        *,
        deadline_s: float = PREFETCH_DEADLINE_DEFAULT_S,
        prefill_tokens_per_s: float | None = None,
    ) -> int:
        """Start to fetch what peers hold of the front of `chain`, and return at once: how many chunks are under way.

        `prefill_tokens_per_s`: as for `get`.
        """
        _check_deadline(deadline_s)
        _check_rate(prefill_tokens_per_s)
        self._check_size(space)
        with self._connection(space) as connection:
            blob = protocol.pack_keys(chain)
            request = protocol.Prefetch(connection.next_id(), space.digest[:16], blob, deadline_s, prefill_tokens_per_s)
            return self._call(connection, request, protocol.Counted).chunks

    def pin(self, chain: Sequence[bytes]) -> int:
        """Keep this node's copies from eviction until `unpin` or `delete`. Returns how many of `chain` it holds."""
        return self._count(lambda id_, keys: protocol.Pin(id_, keys, True), chain)

    def unpin(self, chain: Sequence[bytes]) -> int:
        """Let eviction have this node's copies again. Returns how many of `chain` it holds."""
        return self._count(lambda id_, keys: protocol.Pin(id_, keys, False), chain)

    def delete(self, chain: Sequence[bytes]) -> int:
        """Remove this node's copies, pinned or not; one that is being read goes after its last reader. Returns how
        many."""
        return self._count(protocol.Delete, chain)

    def pin_memory(self) -> bool:
        """Make the arena known to CUDA, so that copies between it and a GPU need no bounce buffer. An engine on a GPU
        calls this once; it locks the whole arena into memory. Whether it is known now, for writing and for reading.
        """
        from kvmesh import pinning

        with self._connection() as connection:
            writable, readable = connection.arenas
        # Both, whether or not the first one succeeds.
        return all([pinning.pin(writable, writable=True), pinning.pin(readable, writable=False)])

    # --- the cluster -----------------------------------------------------------------------------------------------
    def locate(self, chain: Sequence[bytes]) -> dict[str, Any]:
        """Who holds the front of `chain`, the longest run first: ``{"chunks", "holders": [{"node", "run_chunks",
        "tier"}]}``."""
        return self._query(queries.Locate(protocol.pack_keys(chain)))

    def nodes(self) -> dict[str, Any]:
        """The members of the mesh: ``{"nodes": [{"name", "role", "state", "address", "chunks", …}]}``."""
        return self._query(queries.Nodes())

    def map(self) -> dict[str, Any]:
        """What is held where: ``{"complete", "entries", "namespaces": […], "nodes": […]}``."""
        return self._query(queries.Map())

    def stats(self) -> dict[str, Any]:
        """The local agent's counters: its store, its transport, its fetches, its discovery."""
        return self._query(queries.Stats())

    def keys(self, operation: Operation, key: bytes = b"") -> dict[str, Any]:
        """The gossip keys of all nodes, or a change of them on all nodes: what ``kvmesh keys --json`` prints."""
        return self._query(queries.Keys(operation, key))

    # --- its end ---------------------------------------------------------------------------------------------------
    def close(self) -> None:
        """Disconnect. Views that are still alive stay valid: their connection closes with the last of them."""
        self._closed = True
        self._retire_idle()
        self._arenas.clear()
        self._renewals.close()

    def __enter__(self) -> Mesh:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- inside ----------------------------------------------------------------------------------------------------
    def _check_size(self, space: Namespace) -> None:
        if not isinstance(space, Namespace):
            raise NamespaceError(f"the first argument must be a kvmesh.Namespace, not {type(space).__name__}")
        if space.chunk_bytes > self.arena_bytes:
            raise ChunkTooLargeError(
                f"a chunk of this namespace has {space.chunk_bytes} bytes and the whole arena of agent {self.node!r} "
                f"{self.arena_bytes}: start the agent with more --memory, or use fewer chunk_tokens"
            )

    def _take(self) -> Connection:
        """A connection for this call alone. Waits for a free place when all are taken, as long as for an answer."""
        if self._closed or self._pid != os.getpid():
            raise AgentUnavailableError("this mesh was closed, or belongs to the parent process: call kvmesh.connect()")
        wait_s = self._timeout_s + CLIENT_REPLY_GRACE_S
        try:
            self._places.get(timeout=wait_s)
        except queue.Empty:
            raise CallerError(
                f"{CLIENT_CONNECTIONS_MAX} gets or calls of this mesh are open, and none ended within {wait_s:g} s: "
                "use or release hits before asking for more, or connect once more"
            ) from None
        try:
            while (connection := self._pop_idle()) is not None:
                if not connection.gone():
                    return connection
                connection.close()
            connection = Connection(self.socket, timeout_s=self._timeout_s)
            self._map(connection)
        except BaseException:
            self._places.put(None)
            raise
        return connection

    def _put_back(self, connection: Connection) -> None:
        if not connection.closed:
            self._idle.append(connection)
        self._places.put(None)
        if self._closed:
            self._retire_idle()

    def _pop_idle(self) -> Connection | None:
        try:
            return self._idle.pop()
        except IndexError:
            return None

    def _retire_idle(self) -> None:
        while (connection := self._pop_idle()) is not None:
            connection.close()

    def _map(self, connection: Connection) -> None:
        """Map the arena that came with the connection, once for each start of the agent."""
        welcome = connection.welcome
        try:
            with self._mapping:
                # Two starts within a millisecond, or after the clock was set back, may have one epoch: the file says.
                start = (welcome.epoch, os.fstat(connection.arena_fd).st_ino)
                arenas = self._arenas.get(start)
                if arenas is None:
                    # An agent that has started again has a new arena; views of the old one keep its mapping themselves.
                    writable = Arena(connection.arena_fd, welcome.arena_bytes, writable=True)
                    readable = Arena(connection.arena_fd, welcome.arena_bytes, writable=False)
                    arenas = (writable, readable)
                    self._arenas = {start: arenas}
                    self.arena_bytes = welcome.arena_bytes
                connection.arenas = arenas
        except BaseException:
            connection.close()
            raise
        finally:
            os.close(connection.arena_fd)

    def _open(self, connection: Connection, space: Namespace) -> None:
        if space.digest not in connection.spaces:
            request = protocol.OpenSpace(connection.next_id(), spaces.encode(space))
            self._call(connection, request, protocol.Opened)
            connection.spaces.add(space.digest)

    @contextmanager
    def _connection(self, space: Namespace | None = None) -> Iterator[Connection]:
        connection = self._take()
        connection.hold()  # another thread's note may find the agent stuck: not while this one writes to the arena
        try:
            if space is not None:
                self._open(connection, space)
            yield connection
        finally:
            connection.let_go()
            self._put_back(connection)

    def _renew(self, gets: list[tuple[int, int]]) -> tuple[int, list[bool]] | None:
        """Ask the agent to let leases last on. Called in the renewals' thread."""
        try:
            if self._renewing is None or self._renewing.gone():
                self._end_renewing()
                self._renewing = Connection(self.socket, timeout_s=self._timeout_s)
                os.close(self._renewing.arena_fd)
            connection = self._renewing
            lasting: list[bool] = []
            for start in range(0, len(gets), RENEWALS_PER_MESSAGE_MAX):
                request = protocol.Renew(connection.next_id(), gets[start : start + RENEWALS_PER_MESSAGE_MAX])
                lasting += self._call(connection, request, protocol.Renewed).lasting
        except (KVMeshError, OSError):
            return None
        return connection.welcome.epoch, lasting

    def _end_renewing(self) -> None:
        connection, self._renewing = self._renewing, None
        if connection is not None:
            connection.close()

    def _call(self, connection: Connection, request: protocol.Message, kind: type[ReplyT]) -> ReplyT:
        try:
            reply = connection.call(request, timeout_s=self._timeout_s + CLIENT_REPLY_GRACE_S)
        except CallerError:
            raise  # the agent's answer: the connection is in order
        except BaseException:
            connection.close()  # its answer may still come, and would be taken for the next one's
            raise
        if not isinstance(reply, kind):
            connection.close()
            raise ProtocolError("the agent answered with something else: its version of kvmesh differs")
        return reply

    def _count(self, make: Any, chain: Sequence[bytes]) -> int:
        with self._connection() as connection:
            request = make(connection.next_id(), protocol.pack_keys(chain))
            return self._call(connection, request, protocol.Counted).chunks

    def _query(self, question: queries.Question) -> dict[str, Any]:
        with self._connection() as connection:
            request = protocol.Query(connection.next_id(), queries.encode(question))
            answer = self._call(connection, request, protocol.Answer)
        document: dict[str, Any] = msgspec.json.decode(answer.body)
        return document


def _check_deadline(deadline_s: float) -> None:
    if not isinstance(deadline_s, (int, float)) or not 0 <= deadline_s <= DEADLINE_MAX_S:
        raise CallerError(f"deadline_s is {deadline_s!r}: give seconds, from 0 to {DEADLINE_MAX_S:g}")


def _check_rate(prefill_tokens_per_s: float | None) -> None:
    if prefill_tokens_per_s is not None and not prefill_tokens_per_s > 0:
        raise CallerError(f"prefill_tokens_per_s is {prefill_tokens_per_s}: give tokens a second, more than 0")


def _numbers(part: Slice) -> tuple[int, int, int, int]:
    return part.offset_bytes, part.run_bytes, part.stride_bytes, part.count
