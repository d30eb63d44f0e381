"""Rates: how fast each peer gives bytes and how far away it is, as measured by this node's own reads.

A *path* is (peer, backend): the same peer over shared memory and over TCP are two. A path's bandwidth is measured in
*windows*: bytes that landed, of all the reads that were open on the path, over the time that at least one was. Reads at
the same time therefore add up, and a window that is too short to tell is made longer by the next landings.

| what a window says | what it does |
|---|---|
| enough bytes in enough time, or few in a long time | a sample: it moves the average by `RATE_NEW_SHARE` |
| little, and nobody waited for more (the read was complete) | nothing |
| little, and the read was given up as late | a sample: the bytes so far, and the chunk under way as if it were whole |

The average is one of seconds a byte, which is what a plan needs: one read at a hundredth of the rate weighs as much as
it costs. An estimate that is `RATE_STALE_S` old is none: a peer that was avoided is tried again, and its next sample
counts alone.

Bounded: `RATE_PATHS_MAX` paths, of which the one that was used longest ago goes first. Sans-IO: the time comes in as
`now` (monotonic seconds).
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, NamedTuple

from kvmesh.transport.limits import (
    RATE_NEW_SHARE,
    RATE_PATHS_MAX,
    RATE_SAMPLE_BYTES_MIN,
    RATE_SAMPLE_S_LONG,
    RATE_SAMPLE_S_MIN,
    RATE_STALE_S,
)


class Path(NamedTuple):
    """A way to a peer."""

    peer: str
    backend: str


class _Measured:
    """One path: its estimates, and the window that is open."""

    __slots__ = ("active", "bytes", "first", "rtt_s", "s_per_byte", "sampled_at", "total_bytes", "window_at")

    def __init__(self) -> None:
        self.s_per_byte: float | None = None
        self.sampled_at = 0.0
        self.rtt_s: float | None = None
        self.active = 0
        self.window_at = 0.0
        self.bytes = 0
        self.first = 0.0
        """When a read began that had the path for itself and has no answer yet; 0 when there is none."""
        self.total_bytes = 0


class Rates:
    """What is known of the paths to peers."""

    def __init__(self) -> None:
        self._paths: OrderedDict[Path, _Measured] = OrderedDict()  # least recently used first

    # --- what reads tell -------------------------------------------------------------------------------------------
    def began(self, path: Path, now: float) -> None:
        """A read was started. It must end by `ended`."""
        measured = self._paths.get(path)
        if measured is None:
            while len(self._paths) >= RATE_PATHS_MAX:
                self._paths.popitem(last=False)
            measured = self._paths[path] = _Measured()
        self._paths.move_to_end(path)
        measured.active += 1
        if measured.active == 1:
            measured.bytes = 0
            measured.first = now
            measured.window_at = now + (measured.rtt_s or 0.0)

    def answered(self, path: Path, size_bytes: int, now: float) -> None:
        """`size_bytes` landed; 0 for an answer without bytes."""
        measured = self._paths.get(path)
        if measured is None:
            return
        if measured.first:
            self._time_trip(measured, size_bytes, now)
        measured.bytes += size_bytes
        measured.total_bytes += size_bytes
        window_s = now - measured.window_at
        enough = measured.bytes >= RATE_SAMPLE_BYTES_MIN and window_s >= RATE_SAMPLE_S_MIN
        if measured.bytes and (enough or window_s >= RATE_SAMPLE_S_LONG):
            self._sample(measured, measured.bytes, now)

    def ended(self, path: Path, now: float, *, late_bytes: int = 0) -> None:
        """A read is over. `late_bytes`: it was given up because it took too long, with a chunk of so many bytes next to
        land; 0 for any other end."""
        measured = self._paths.get(path)
        if measured is None:
            return
        if late_bytes and now - measured.window_at >= RATE_SAMPLE_S_MIN:  # else another one said so just now
            self._sample(measured, measured.bytes + late_bytes, now)
        measured.active = max(0, measured.active - 1)
        if not measured.active:
            measured.first = 0.0

    # --- what plans ask ----------------------------------------------------------------------------------------------
    def bytes_per_s(self, path: Path, now: float) -> float | None:
        """What the path gives to all reads together; None when it is not known, or not any more."""
        measured = self._paths.get(path)
        if measured is None or measured.s_per_byte is None or now - measured.sampled_at > RATE_STALE_S:
            return None
        return 1.0 / measured.s_per_byte

    def one_more(self, path: Path, now: float) -> float | None:
        """What a further read may expect beside those that are open."""
        rate = self.bytes_per_s(path, now)
        return None if rate is None else rate / (1 + self._paths[path].active)

    def rtt_s(self, path: Path, pinged_s: float | None) -> float:
        """The round trip: the shorter of what reads took to answer and what membership measured (`pinged_s`), since
        whatever else happens only adds to either. 0 when nobody knows."""
        measured = self._paths.get(path)
        known = [s for s in (pinged_s, measured.rtt_s if measured is not None else None) if s is not None]
        return min(known, default=0.0)

    def document(self, now: float) -> list[dict[str, Any]]:
        """What is known, for people who look: one row a path, by name."""
        return [
            {
                "peer": path.peer,
                "backend": path.backend,
                "bytes_per_s": self.bytes_per_s(path, now),
                "rtt_s": measured.rtt_s,
                "age_s": now - measured.sampled_at if measured.s_per_byte is not None else None,
                "reads": measured.active,
                "bytes": measured.total_bytes,
            }
            for path, measured in sorted(self._paths.items())
        ]

    # --- inside ----------------------------------------------------------------------------------------------------
    def _time_trip(self, measured: _Measured, size_bytes: int, now: float) -> None:
        took_s = max(0.0, now - measured.first - size_bytes * (measured.s_per_byte or 0.0))
        measured.first = 0.0
        old = measured.rtt_s
        if old is None or took_s < old:
            measured.rtt_s = took_s
        else:  # one slow answer is the peer's load; many are another way there
            measured.rtt_s = old + RATE_NEW_SHARE * RATE_NEW_SHARE * (took_s - old)

    def _sample(self, measured: _Measured, size_bytes: int, now: float) -> None:
        s_per_byte = (now - measured.window_at) / size_bytes
        if measured.s_per_byte is None or now - measured.sampled_at > RATE_STALE_S:
            measured.s_per_byte = s_per_byte
        else:
            measured.s_per_byte += RATE_NEW_SHARE * (s_per_byte - measured.s_per_byte)
        measured.sampled_at = now
        measured.window_at = now
        measured.bytes = 0
