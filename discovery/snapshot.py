"""The reader's side of a fuzzy snapshot: checks its pages, and remembers as of which seq each of them is.

A page covers a range of keys in the asked buckets, and was taken at a seq of its own. When the journal is followed
afterwards from the seq S of the comparison, an entry about a key whose page is younger than the entry is in the page
already. Passing it over is not needed for the end (entries replay to the same result) but keeps copies that are long
gone from showing up meanwhile.

Plain data and checks; used by `kvmesh.discovery.following` alone.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable
from itertools import pairwise

from kvmesh.transport.errors import ProtocolError
from kvmesh.transport.limits import KEY_BYTES, NAMESPACE_ID_BYTES

from .holdings import Record
from .map import NodeTable
from .messages import Descriptions, Page
from .packing import HELD, unpack

_PAST_ALL_KEYS = b"\xff" * KEY_BYTES
_PAGE_KINDS = frozenset({HELD})


class Snapshot:
    """The buckets that are being fetched."""

    def __init__(self, buckets: bytes, seq: int) -> None:
        self.buckets = buckets
        self.seq = seq
        """The comparison's at first, then the newest page's."""
        self.after = b""
        """The last key of the newest page: where the next one goes on."""
        self.complete = not buckets
        self._uptos: list[bytes] = []
        self._seqs: list[int] = []

    def take(self, page: Page, seq: int, table: NodeTable) -> int:
        """Write the next page, taken at `seq`, into the table; its number of chunks. Raises `ProtocolError`."""
        shapes, index, keys = unpack(page.packed, _PAGE_KINDS)
        if seq < self.seq:
            raise ProtocolError("a page is older than the one before it")
        if page.upto and (not keys or page.upto != keys[-1]):
            raise ProtocolError("a page does not end with its last key")
        _check_ascending(self.after, keys)
        if not {key[0] for key in keys} <= set(self.buckets):
            raise ProtocolError("a page has keys of other buckets")
        records = [Record(shape.namespace_id, shape.size_bytes, shape.tiers) for shape in shapes]
        pairs = [(key, records[number]) for number, key in zip(index, keys, strict=True)]
        table.replace(self.buckets, self.after, page.upto, pairs)
        self._uptos.append(page.upto or _PAST_ALL_KEYS)
        self._seqs.append(seq)
        self.seq, self.after, self.complete = seq, page.upto, not page.upto
        return len(keys)

    def knows(self, key: bytes, seq: int) -> bool:
        """Whether the entry `seq` about `key` is in a page already."""
        if key[0] not in self.buckets:
            return False
        place = bisect.bisect_left(self._uptos, key)
        return place < len(self._seqs) and seq <= self._seqs[place]


def described(page: Descriptions, after: bytes) -> list[tuple[bytes, bytes]]:
    """(namespace id, description) of a page that follows the id `after`. Raises `ProtocolError`."""
    blob = page.namespace_ids
    ids = [blob[start : start + NAMESPACE_ID_BYTES] for start in range(0, len(blob), NAMESPACE_ID_BYTES)]
    if len(blob) % NAMESPACE_ID_BYTES or len(ids) != len(page.texts):
        raise ProtocolError("a page of descriptions is not whole")
    if page.upto and (not ids or page.upto != ids[-1]):
        raise ProtocolError("a page does not end with its last description")
    _check_ascending(after, ids)
    return list(zip(ids, page.texts, strict=True))


def _check_ascending(after: bytes, names: Iterable[bytes]) -> None:
    if any(first >= second for first, second in pairwise((after, *names))):
        raise ProtocolError("a page is not in ascending order")
