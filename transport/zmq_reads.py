"""The reads of one node at its peers, and what comes for them: bytes from the connections straight into the buffers.

A message on a bulk connection is a header, which says what follows, and bytes. The header is looked at here; the
bytes are received into the targets that the read's `Assembly` names, at most `PIECE_BYTES` with one system call, and
the last of these calls of a message brings the beginning of the next one along. Bytes for a read that has ended go
into a scratch buffer. Each connection gets a bounded share of a turn, so no peer holds up the others.

A connection that is lost, or that speaks no sense, ends its reads; a message that does not fit its read ends that read.
Runs on the bulk thread; what the loop must hear goes through `news`.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Sequence, Sized
from dataclasses import dataclass
from typing import Final

from .assembly import Assembly
from .counters import Counters
from .errors import UnreachableError
from .frames import (
    Bulk,
    Cancel,
    ForeignVersionError,
    FrameError,
    Grant,
    Message,
    Refusal,
    Suspect,
    cost,
    encode,
    encode_read,
    to_reader,
)
from .interface import Landing, Outcome, Want
from .limits import KIB, MESH_PROTOCOL_VERSION, MIB, PIECE_BYTES
from .zmq_links import Link, Links
from .zmtp import Head, Part, ZmtpError

log = logging.getLogger(__name__)

TURN_BYTES: Final = MIB
"""What one connection may bring before the others, and the loop's commands, get their turn; 4 MiB were no faster."""
FRAME_COST_BYTES: Final = KIB
"""What each frame costs of that beside its bytes: one that has none takes some microseconds as well."""
GRANTS_PER_WINDOW: Final = 4
SCRATCH_BYTES: Final = 64 * KIB
News = Callable[[Callable[[], None]], None]


@dataclass(slots=True, eq=False)
class BulkRead:
    """One read, as it goes to the thread. Both functions are called on the loop."""

    address: str
    wants: Sequence[Want]
    lease_s: float
    """For how long the holder may keep the read at most."""
    on_landed: Callable[[list[Landing]], None]
    on_ended: Callable[[], None]
    """The thread writes to no buffer of the read any more. Called exactly once."""


@dataclass(slots=True, eq=False)
class Active:
    """One read under way."""

    read: BulkRead
    id: int
    link: Link[Active]
    assembly: Assembly
    consumed_bytes: int = 0
    """Of the credit, since the last grant."""


class Reads:
    """All reads that are under way."""

    def __init__(
        self, links: Links[Active], counters: Counters, news: News, commands: Sized, window_bytes: int
    ) -> None:
        """While there are `commands`, nothing more is received."""
        self._links = links
        self._counters = counters
        self._news = news
        self._commands = commands
        self._window_bytes = window_bytes
        self._active: dict[BulkRead, Active] = {}
        self._ids = itertools.count(1)
        self.ended = False
        """A read has ended since somebody set this to False."""
        self._scratch = memoryview(bytearray(SCRATCH_BYTES))

    # --- reads -----------------------------------------------------------------------------------------------------
    def start(self, read: BulkRead) -> None:
        """Ask the peer. Whatever happens, `read.on_ended` is told in the end."""
        try:
            link = self._links.to(read.address)
        except UnreachableError:
            self._counters.peers_lost += 1
            self._news(read.on_ended)
            self.ended = True
            return
        active = Active(read, next(self._ids), link, Assembly(read.wants))
        self._active[read] = link.reads[active.id] = active
        if link.connection.send(*encode_read(active.id, self._window_bytes, read.lease_s, read.wants)):
            self._links.flush(link)
        else:
            self._counters.refused += 1
            self.end(read)

    def end(self, read: BulkRead, *, tell_peer: bool = False) -> None:
        """Forget the read, if it has not ended. Nothing is written to its buffers from here on."""
        active = self._active.pop(read, None)
        if active is None:
            return
        link = active.link
        del link.reads[active.id]
        self._links.unused(link)
        if link.coming is active:
            link.coming = None
        if tell_peer:
            self._say(link, Cancel(MESH_PROTOCOL_VERSION, active.id))
            self._links.flush(link)
        self._news(read.on_ended)
        self.ended = True

    def end_all(self) -> None:
        """End every read."""
        for read in list(self._active):
            self.end(read)

    def lose(self, link: Link[Active]) -> None:
        """The connection carries nothing more."""
        if link.closed:
            return
        self._counters.peers_lost += len(link.reads)
        self._links.close(link)
        for active in list(link.reads.values()):
            self.end(active.read)

    def _say(self, link: Link[Active], message: Message, *payload: bytes) -> None:
        if not link.connection.send(encode(message), *payload):
            self._links.give_up(link)  # it has not read for long

    # --- what comes ------------------------------------------------------------------------------------------------
    def receive(self, link: Link[Active]) -> bool:
        """Take in what has come on a connection, as far as its share goes. Whether there may be more: some of it may
        have left the socket already, so nothing else would tell."""
        if link.closed:
            return False
        connection = link.connection
        connection.heard_s = time.monotonic()
        share = TURN_BYTES
        try:
            while share > 0 and not self._commands:
                if connection.left:
                    count = self._fill(link)
                else:
                    frames = connection.frames
                    event = connection.next()
                    share -= FRAME_COST_BYTES * (connection.frames - frames)
                    if event is not None:
                        self._accept(link, event)
                        continue
                    count = link.receive([connection.room()])
                    connection.received(count)
                if not count:
                    self._links.flush(link)
                    return False
                share -= count
        except ForeignVersionError as error:
            self._counters.malformed += 1
            log.warning("%s: %s", link.address, error)
            self.lose(link)
        except ZmtpError as error:
            self._counters.malformed += 1
            log.warning("the connection to %s is closed: %s", link.address, error)
            self.lose(link)
        except OSError:
            self.lose(link)
        else:
            self._links.flush(link)
            return True
        return False

    def _fill(self, link: Link[Active]) -> int:
        """Receive bytes of a part. Returns how many, of whatever, were received."""
        connection, active = link.connection, link.coming
        most = min(connection.left, PIECE_BYTES if active is not None else SCRATCH_BYTES)
        targets = [self._scratch[:most]] if active is None else active.assembly.targets(most)
        staged = connection.take(len(targets[0]))
        if staged:
            count = filled = len(staged)
            targets[0][:filled] = staged
        else:
            if most == connection.left:
                targets.append(connection.room())
            count = link.receive(targets)
            filled = min(count, most)
            connection.passed(filled)
            connection.received(count - filled)
        if active is not None and filled:
            landings = active.assembly.filled(filled)
            if landings:
                self._suspect(active, landings)
                self._landed(active, landings)
        return count

    def _accept(self, link: Link[Active], event: Head | Part) -> None:
        if isinstance(event, Part):
            active = link.coming
            if active is not None:
                expected = active.assembly.expected
                if event.size_bytes > expected or (event.size_bytes < expected and not event.more):
                    self._broke(active, "a payload that is not of the size that its items add up to")
            return
        link.coming = None
        try:
            message = to_reader(event.data)
            if event.more and not isinstance(message, Bulk):
                raise FrameError(f"a payload for a {type(message).__name__}")
        except ForeignVersionError:
            raise
        except FrameError:
            self._counters.malformed += 1
            return
        active = link.reads.get(message.id)
        if active is None:
            return  # a late message of a read that has ended
        if isinstance(message, Bulk):
            self._announced(active, message, event.more)
        elif isinstance(message, Refusal):
            self._counters.refused += 1
            log.warning("%s ended a read: %s", link.address, message.text)
            self.end(active.read)

    def _announced(self, active: Active, message: Bulk, more: bool) -> None:
        try:
            landings = active.assembly.announce(message.items)
            if active.assembly.expected and not more:
                raise FrameError("items without their bytes")
        except FrameError as error:
            self._broke(active, str(error))
            return
        link = active.link
        link.coming = active if more else None
        active.consumed_bytes += cost(message.items)
        if active.consumed_bytes * GRANTS_PER_WINDOW >= self._window_bytes:
            self._say(link, Grant(MESH_PROTOCOL_VERSION, active.id, active.consumed_bytes))
            active.consumed_bytes = 0
        if landings:
            self._landed(active, landings)

    def _broke(self, active: Active, why: str) -> None:
        self._counters.malformed += 1
        log.warning("%s broke a read: %s", active.link.address, why)
        self.end(active.read, tell_peer=True)

    def _suspect(self, active: Active, landings: list[Landing]) -> None:
        """Tell the holder of bytes that came from it with a wrong checksum: its own copy may be at fault."""
        for landing in landings:
            if landing.outcome is Outcome.CORRUPT:
                key = active.read.wants[landing.index].key
                self._say(active.link, Suspect(MESH_PROTOCOL_VERSION, active.id), key)

    def _landed(self, active: Active, landings: list[Landing]) -> None:
        counters = self._counters
        for landing in landings:
            match landing.outcome:
                case Outcome.LANDED:
                    counters.chunks_read += 1
                    counters.bytes_read += active.read.wants[landing.index].into.nbytes
                case Outcome.NOT_HELD:
                    counters.not_held += 1
                case Outcome.CORRUPT:
                    counters.corrupt += 1
        self._news(lambda: active.read.on_landed(landings))
        if active.assembly.complete:
            self.end(active.read)
