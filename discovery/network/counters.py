"""What the network of gossip counts, and the few things of it that it says aloud."""

from __future__ import annotations

import errno
import logging
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Final

from kvmesh.discovery.wire.errors import Cause, WireError
from kvmesh.transport.limits import WIRE_WARNING_INTERVAL_S

_log = logging.getLogger("kvmesh.discovery")
_ADVICE: Final = {
    Cause.UNDECRYPTABLE: "is sealed with a key that this node does not have: check --key-file and --label",
    Cause.PLAINTEXT: "is not encrypted, and this node has a key: check --key-file of the other one",
    Cause.ENCRYPTED: "is encrypted, and this node has no key: check --key-file",
    Cause.WRONG_LABEL: "is of a mesh with another --label",
}
_BUFFER_FULL: Final = frozenset({errno.EAGAIN, errno.EINTR, errno.ENOBUFS, errno.ENOMEM})
_NO_ROUTE: Final = frozenset({errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN, errno.EADDRNOTAVAIL})


@dataclass(slots=True)
class NetworkCounters:
    """Since the start."""

    packets_sent: int = 0
    packet_bytes_sent: int = 0
    packets_received: int = 0
    packet_bytes_received: int = 0
    send_buffer_full: int = 0
    """Packets that the kernel had no room for."""
    unreachable: int = 0
    """Packets to where no network leads."""
    refused_by_host: int = 0
    """Packets to a port where nothing listens, as far as the host said so."""
    send_errors: int = 0
    """Packets that could not be sent for any other reason: they are too long, or their address is none."""
    receive_errors: int = 0
    """Times that a packet or a stream could not be received."""
    streams_opened: int = 0
    streams_failed: int = 0
    """Streams of ours without a usable answer."""
    streams_served: int = 0
    streams_refused: int = 0
    """Streams of peers beyond the bounds on their number, or on the bytes that all of them hold."""
    streams_unread: int = 0
    """Streams of peers that ended, or took too long, before their message was whole or our answer was taken."""
    stream_bytes_sent: int = 0
    stream_bytes_received: int = 0
    unexpected_errors: int = 0
    """Exceptions that are none of the documented ones."""
    file_errors: int = 0
    """Times that the members could not be kept for the next start."""
    refused: dict[str, int] = field(default_factory=dict)
    """Packets and streams that could not be read, by cause (`kvmesh.discovery.wire.errors`)."""
    left_out: dict[str, int] = field(default_factory=dict)
    """Messages and nodes that were left out of packets and streams whose rest was read, by cause."""


class Account:
    """Counts, and says what an operator must know: each cause at most once in a while, each kind of unexpected error
    once."""

    def __init__(self) -> None:
        self.counters = NetworkCounters()
        self.refusals: Counter[Cause] = Counter()
        self._warned_at: dict[Cause, float] = {}
        self._unexpected: set[tuple[str, type[Exception]]] = set()

    def refuse(self, error: WireError, what: str) -> None:
        """`what` could not be read."""
        self.refusals[error.cause] += 1
        advice, now = _ADVICE.get(error.cause), time.monotonic()
        if advice is None:
            _log.debug("%s was dropped: %s", what, error)
        elif now - self._warned_at.get(error.cause, float("-inf")) >= WIRE_WARNING_INTERVAL_S:
            self._warned_at[error.cause] = now
            _log.warning("%s %s (%d so far)", what, advice, self.refusals[error.cause])

    def not_sent(self, error: OSError) -> None:
        """A packet could not be sent."""
        if error.errno in _BUFFER_FULL:
            self.counters.send_buffer_full += 1
        elif error.errno in _NO_ROUTE:
            self.counters.unreachable += 1
        elif error.errno == errno.ECONNREFUSED:
            self.counters.refused_by_host += 1
        else:
            self.counters.send_errors += 1

    def not_received(self, error: OSError) -> None:
        """A packet or a stream could not be received; or the host says so late what became of a packet of ours."""
        if error.errno == errno.ECONNREFUSED:
            self.counters.refused_by_host += 1
        elif error.errno in _NO_ROUTE:
            self.counters.unreachable += 1
        else:
            self.counters.receive_errors += 1
            _log.debug("receiving failed: %r", error)

    def unexpected(self, error: Exception, what: str) -> None:
        """An error that nobody foresaw: whatever a peer provokes, the node lives on."""
        self.counters.unexpected_errors += 1
        if (what, type(error)) not in self._unexpected:
            self._unexpected.add((what, type(error)))
            _log.error("%s failed unexpectedly; it goes on, and only counts this from now on", what, exc_info=error)
