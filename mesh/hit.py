"""A hit: the chunks that a get found, as views into the arena, and the leases that keep them there.

The agent reports the chunks of a chain from the front, as they land. A hit reads those reports in the caller's own
thread: `for chunk in hit` gives each as soon as it is there, `hit.count` waits for the end (bounded by the deadline).

A view never outlives its lease: leaving the ``with`` block makes the hit unusable (`LeaseError`) and returns the leases
of all chunks that no view looks at; the lease of a chunk that some tensor still looks at goes back when the last such
tensor is gone. See `kvmesh.tensors`.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING

from kvmesh import protocol
from kvmesh.arena import Arena
from kvmesh.connection import Connection
from kvmesh.keys import Namespace
from kvmesh.transport.errors import KVMeshError, LeaseError, ProtocolError
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
        wanted: int,
        deadline_s: float,
        on_settled: Callable[[Connection], None],
    ) -> None:
        """Made by `Mesh.get`. `on_settled` takes the connection back once the last report is in."""
        self.space = space
        self.wanted = wanted
        self._connection = connection
        self._arena = arena
        self._wait_s = deadline_s + CLIENT_REPLY_GRACE_S
        self._on_settled = on_settled
        self._offsets: list[int] = []
        self._leases = Leases(connection)
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
        """Why the run ends where it ends: "complete", "miss", "deadline" or "arena full"."""
        return self._settle().reason

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Views:
        """The chunk `index` as a read-only zero-copy view: a tensor, or several by name. Writing to it is a
        segfault."""
        while self._final is None and (index < 0 or index >= len(self._offsets)):
            self._receive()
        if self._closed:
            raise LeaseError("this hit was released: use its chunks inside the `with` block, or copy them there")
        offset = self._offsets[index]

        from kvmesh import tensors

        return tensors.views(self._arena, offset, self.space, self._leases.look_at(offset))

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
        with contextlib.suppress(KVMeshError):
            self.close()

    def __enter__(self) -> Hit:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

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
        self._offsets.extend(report.offsets)
        if report.final:
            self._final = report
            self._on_settled(self._connection)

    def _abort(self, why: KVMeshError) -> None:
        """Close the connection: what the agent still says would be taken for the answer to another request."""
        self._failed = why
        self._connection.close()
        self._on_settled(self._connection)

    def _settle(self) -> protocol.Progress:
        while self._final is None:
            self._receive()
        return self._final


class Leases:
    """Which leases of one hit still have to go back, and which of them a view keeps. Safe in any thread and
    finaliser."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._views: dict[int, int] = {}  # offset -> views that are alive
        self._ended: set[int] = set()  # offsets whose lease goes back with their last view
        # Re-entrant: the garbage collector may run a view's end in the middle of any line here, in this same thread.
        self._lock = threading.RLock()
        connection.hold()
        self._held = True

    def look_at(self, offset: int) -> Callable[[], None]:
        """A view of `offset` comes to be; call the result when it is gone."""
        with self._lock:
            self._views[offset] = self._views.get(offset, 0) + 1
        return functools.partial(self._gone, offset)

    def end(self, offsets: list[int]) -> None:
        """The hit is closed: return what no view looks at, and the rest as views go."""
        with self._lock:
            # A view may go between any two lines, in this very thread. So all are said to have ended first: from then
            # on an offset is taken out, and its lease returned, by its last view or here, never by both or by none.
            self._ended.update(offsets)
            free = [offset for offset in offsets if offset in self._ended and offset not in self._views]
            self._ended.difference_update(free)
        self._return(free)

    def _gone(self, offset: int) -> None:
        with self._lock:
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
            self._connection.note(protocol.Release(0, offsets))
        with self._lock:
            let_go = self._held and not self._views and not self._ended
            self._held = self._held and not let_go
        if let_go:
            self._connection.let_go()
