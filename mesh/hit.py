"""A hit: the chunks that a get found, as views into the arena, and the leases that keep them there.

The agent reports the chunks of a chain from the front, as they land. A hit reads those reports in the caller's own
thread: `for chunk in hit` gives each as soon as it is there, `hit.count` waits for the end (bounded by the deadline).

A chunk is verified against the checksum of its put when it is first looked at, so what a fault of memory changed never
reaches an engine; the agent is told, and takes the copy out.

A view never outlives its lease: leaving the ``with`` block makes the hit unusable (`LeaseError`) and returns the leases
of all chunks that no view looks at; the lease of a chunk that some tensor still looks at goes back when the last such
tensor is gone. Leases are renewed while they live (`kvmesh.renewing`). When this process was stopped for longer than a
lease lasts, the chunks may be gone: then looking at one, and leaving the block, raises `LeaseError`.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING

from kvmesh import protocol
from kvmesh.arena import Arena
from kvmesh.connection import Connection
from kvmesh.keys import Namespace, part_key
from kvmesh.parts import Part
from kvmesh.transport.checksum import checksum
from kvmesh.transport.errors import CorruptChunkError, KVMeshError, LeaseError, ProtocolError
from kvmesh.transport.limits import CLIENT_REPLY_GRACE_S

if TYPE_CHECKING:
    from kvmesh.tensors import Views


class Hit:
    """Chunks from the front of a chain. Use it in a ``with`` block; not shared between threads.

    `wanted` is the length of the chain that was asked for.
    """

    def __init__(
        self,
        connection: Connection,
        arena: Arena,
        space: Namespace,
        chain: Sequence[bytes],
        deadline_s: float,
        on_settled: Callable[[Connection], None],
        leases: Leases,
        *,
        part: Part | None = None,
        verify: bool = True,
    ) -> None:
        """Made by `Mesh.get`. `on_settled` takes the connection back once the last report is in."""
        self.space = space
        self.part = part
        """What of each chunk was asked for; None: all of it."""
        self.wanted = len(chain)
        self._connection = connection
        self._arena = arena
        self._wait_s = deadline_s + CLIENT_REPLY_GRACE_S
        self._on_settled = on_settled
        self._chain = chain
        self._offsets: list[int] = []
        self._checksums: list[int] = []
        self._wholes: set[int] = set()
        self._verify_all = verify
        self._verified: set[int] = set()  # offsets
        self._leases = leases
        self._final: protocol.Progress | None = None
        self._failed: KVMeshError | None = None
        self._closed = False

    # --- what was found --------------------------------------------------------------------------------------------
    @property
    def count(self) -> int:
        """Chunks that are there, from the front. Waits for the agent's last word, at most about the deadline."""
        self._settle()
        return len(self._offsets)

    @property
    def tokens(self) -> int:
        """Tokens that the chunks stand for."""
        return self.count * self.space.chunk_tokens

    @property
    def fetched(self) -> int:
        """Of `count`, the chunks that came from peers for this get."""
        return self._settle().fetched

    @property
    def bytes_moved(self) -> int:
        """Bytes that came from peers for this get."""
        return self._settle().bytes_moved

    @property
    def reason(self) -> str:
        """Why the run ends where it ends: "complete", "miss", "deadline", "arena full" or "computing is faster"."""
        return self._settle().reason

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Views:
        """The chunk `index`, or what was asked of it, as a read-only zero-copy view: a tensor, or several by name.
        Writing to it is a segfault.

        Raises `CorruptChunkError` when its bytes have changed since they were put, `LeaseError` when the hit is over.
        """
        while self._final is None and (index < 0 or index >= len(self._offsets)):
            self._receive()
        if self._closed:
            raise LeaseError("this hit was released: use its chunks inside the `with` block, or copy them there")
        offset = self._offsets[index]
        end = self._leases.look_at(offset)
        try:
            self._leases.check()
            self._verify(index % len(self._offsets), offset)

            from kvmesh import tensors

            if self.part is None:
                return tensors.views(self._arena, offset, self.space, end)
            return tensors.part_view(self._arena, offset, self.space, self.part, offset in self._wholes, end)
        except BaseException:
            end()
            raise

    def __iter__(self) -> Iterator[Views]:
        """The chunks from the front, each as soon as it is there."""
        index = 0
        while True:
            while self._final is None and index >= len(self._offsets):
                self._receive()
            if index >= len(self._offsets):
                return
            yield self[index]
            index += 1

    # --- its end ---------------------------------------------------------------------------------------------------
    def close(self) -> None:
        """Release the chunks. Chunks that a tensor still looks at are released with it. A second call does nothing."""
        if self._closed:
            return
        self._closed = True
        if self._final is None and self._failed is None:
            # The agent is still at work for us, and its reports would come to nobody: it ends with the connection,
            # which stays open only for what views still look at.
            self._abort(LeaseError("this hit was released while its chunks were on the way"))
        self._leases.end(self._offsets)

    def __del__(self) -> None:
        # For a caller who forgot the `with` block: the leases must not wait for the process's end.
        if not self._closed:
            with contextlib.suppress(KVMeshError):
                self.close()

    def __enter__(self) -> Hit:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        # Beside another failure of the mesh as well: what was copied before it is worth something only if this is not.
        if self._offsets and (kind is None or (issubclass(kind, KVMeshError) and not issubclass(kind, LeaseError))):
            self._leases.check()

    def __repr__(self) -> str:
        state = "released" if self._closed else "open" if self._final else "landing"
        return f"<Hit {len(self._offsets)} of {self.wanted} chunks, {state}>"

    # --- inside ----------------------------------------------------------------------------------------------------
    def _receive(self) -> None:
        """Take in the next report."""
        if self._failed is not None:
            raise self._failed
        try:
            report = self._connection.receive(self._wait_s)
            if not isinstance(report, protocol.Progress):
                raise ProtocolError("the agent answered a get with something else: its version of kvmesh differs")
        except KVMeshError as error:
            self._abort(error)
            raise
        except BaseException:  # Ctrl-C in the middle of a wait
            self._abort(LeaseError("this hit was interrupted while its chunks were on the way"))
            raise
        self._leases.begun = True
        self._offsets.extend(report.offsets)
        self._checksums.extend(protocol.unpack_checksums(report.checksums, len(report.offsets)))
        if report.wholes:
            self._wholes.update(report.wholes)
        if report.final:
            self._final = report
            self._on_settled(self._connection)

    def _abort(self, why: KVMeshError) -> None:
        """Close the connection: what the agent still says would be taken for the answer to another request."""
        self._failed = why
        self._connection.close()
        self._on_settled(self._connection)

    def _verify(self, index: int, offset: int) -> None:
        if not self._verify_all or offset in self._verified:
            return
        by_itself = self.part is not None and offset not in self._wholes
        size_bytes = self.part.slice.bytes if self.part is not None and by_itself else self.space.chunk_bytes
        if checksum(self._arena.view(offset, size_bytes)) != self._checksums[index]:
            self._leases.check()  # over: then these are the bytes of another chunk
            key = self._chain[index]
            if self.part is not None and by_itself:
                key = part_key(key, self.part.slice)
            self._connection.note(protocol.Suspect(0, key))
            raise CorruptChunkError(
                f"chunk {index} of this hit has changed in memory since it was put: use the chunks before it, and "
                "compute the rest; the agent was told, and takes its copy out"
            )
        self._verified.add(offset)

    def _settle(self) -> protocol.Progress:
        while self._final is None:
            self._receive()
        return self._final


class Leases:
    """Which leases of one hit still have to go back, and which of them a view keeps. Safe in any thread and
    finaliser."""

    def __init__(
        self, connection: Connection, get: int, expires_s: float, on_over: Callable[[Leases], None] = lambda _: None
    ) -> None:
        """Of the get `get` on `connection`; they last until `expires_s`. `on_over`: nothing is left to give back."""
        self.epoch = connection.welcome.epoch
        self.session = connection.welcome.session
        self.get = get
        self.begun = False
        self._connection = connection
        self._expires_s = expires_s
        self._on_over = on_over
        self._views: dict[int, int] = {}  # offset -> views that are alive
        self._ended: set[int] = set()  # offsets whose lease goes back with their last view
        # Re-entrant: the garbage collector may run a view's end in the middle of any line here, in this same thread.
        self._lock = threading.RLock()
        connection.hold()
        self._held = True

    def last_until(self, expires_s: float) -> None:
        """See `kvmesh.renewing.Renewable`. What is over does not begin again."""
        if self._expires_s > time.monotonic():
            self._expires_s = expires_s

    def check(self) -> None:
        """Raises `LeaseError` when the leases are over: the bytes may be another chunk's by now."""
        if time.monotonic() >= self._expires_s:
            raise LeaseError(
                "the leases of this hit ran out, because this process was stopped or the agent did not answer for too "
                "long: throw away what was copied from it, and get the chain again"
            )

    def look_at(self, offset: int) -> Callable[[], None]:
        """A view of `offset` comes to be; call the result when it is gone."""
        with self._lock:
            self._views[offset] = self._views.get(offset, 0) + 1
        return functools.partial(self._gone, [offset])

    def end(self, offsets: list[int]) -> None:
        """The hit is closed: return what no view looks at, and the rest as views go."""
        with self._lock:
            if not self._views:
                free = offsets  # nothing looks at anything, and nothing more will
            else:
                # A view may go between any two lines, in this very thread. So all are said to have ended first: from
                # then on an offset is taken out, and its lease returned, by its last view or here, never by both or by
                # none.
                self._ended.update(offsets)
                free = [offset for offset in offsets if offset in self._ended and offset not in self._views]
                self._ended.difference_update(free)
        self._return(free)

    def _gone(self, view: list[int]) -> None:
        with self._lock:
            if not view:
                return  # a view that could not be made may end twice
            offset = view.pop()
            self._views[offset] -= 1
            if self._views[offset]:
                return
            del self._views[offset]
            ended = offset in self._ended
            self._ended.discard(offset)
        if ended:
            self._return([offset])

    def _return(self, offsets: list[int]) -> None:
        if offsets:
            self._connection.note(protocol.Release(0, self.get, offsets))
        with self._lock:
            let_go = self._held and not self._views and not self._ended
            self._held = self._held and not let_go
        if let_go:
            self._on_over(self)
            self._connection.let_go()
