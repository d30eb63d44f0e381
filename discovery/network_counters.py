"""What the network of gossip counts, and the few things of it that it says aloud."""

from __future__ import annotations

import logging
import time
from collections import Counter
from dataclasses import dataclass, field

from kvmesh.transport.limits import WIRE_WARNING_INTERVAL_S

from .wire.errors import Cause, WireError

_log = logging.getLogger("kvmesh.discovery")
_ADVICE = {
    Cause.UNDECRYPTABLE: "is sealed with a key that this node does not have: check --key-file",
    Cause.PLAINTEXT: "is not encrypted, and this node has a key: check --key-file of the other one",
    Cause.ENCRYPTED: "is encrypted, and this node has no key: check --key-file",
    Cause.WRONG_LABEL: "is of a mesh with another --label",
}


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
    """Packets that could not be sent for any other reason."""
    receive_errors: int = 0
    streams_opened: int = 0
    streams_failed: int = 0
    """Streams of ours without a usable answer."""
    streams_served: int = 0
    streams_refused: int = 0
    """Streams of peers beyond the bound."""
    streams_unread: int = 0
    """Streams of peers that ended, or took too long, before their message was whole."""
    stream_bytes_sent: int = 0
    stream_bytes_received: int = 0
    unexpected_errors: int = 0
    """Exceptions that are none of the documented ones."""
    file_errors: int = 0
    """Times that the members could not be kept for the next start."""
    refused: Counter[Cause] = field(default_factory=Counter)
    """Packets and streams that could not be read, by cause."""
    left_out: Counter[Cause] = field(default_factory=Counter)
    """Messages and nodes that were left out of packets and streams whose rest was read, by cause."""


class Warner:
    """Says what an operator must know of what is refused: each cause at most once in a while."""

    def __init__(self, counters: NetworkCounters) -> None:
        self._counters = counters
        self._warned_at: dict[Cause, float] = {}

    def warn(self, error: WireError, what: str) -> None:
        """`what` was refused."""
        advice, now = _ADVICE.get(error.cause), time.monotonic()
        if advice is None:
            _log.debug("%s was dropped: %s", what, error)
        elif now - self._warned_at.get(error.cause, float("-inf")) >= WIRE_WARNING_INTERVAL_S:
            self._warned_at[error.cause] = now
            _log.warning("%s %s (%d so far)", what, advice, self._counters.refused[error.cause])
