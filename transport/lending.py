"""The table of what is lent to readers that take the bytes themselves: who has which chunks, and until when.

A *lease* here is one batch of chunks, named by its reader. It ends when the reader gives it back, when the reader is
gone, or when its time is over by this node's monotonic clock, whichever comes first; then all of its loans go back to
the source at once. The holder cannot see whether a reader still copies: the reader's checksums catch what it copied too
late.

Refused, and counted by the caller, is what would exceed the bounds of one reader or of all (`limits.LEASES_...`,
`LENT_...`): a refused batch leases nothing. Sans-IO: knows no clock, no message, and hashes nothing. Runs on the loop.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from .frames import HELD, NOT_HELD, WRONG_SIZE
from .interface import ChunkSource, Loan, Slice
from .lending_messages import LentItem
from .limits import LEASES_MAX, LEASES_PER_READER_MAX, LENT_BYTES_PER_READER_MAX, LENT_CHUNKS_MAX
from .loans import lend

Wanted = tuple[bytes, int, Slice | None]
"""Key, the size that the whole chunk must have, and the part that is wanted of it."""


@dataclass(slots=True, eq=False)
class Lease:
    """One batch of chunks, lent to one reader."""

    reader: bytes
    number: int
    ends_s: float
    keys: list[bytes] = field(default_factory=list)
    """Of all that was wanted, in its order."""
    loans: list[Loan | None] = field(default_factory=list)
    """The same; None for what is not lent. Adjacent parts of one chunk share a loan."""
    items: list[LentItem] = field(default_factory=list)
    """The same; with the checksum of the chunk even where a part is wanted."""
    bytes: int = 0
    """Of the chunks that it keeps."""
    live: bool = True
    """Its loans are not given back yet."""


class LeaseTable:
    """All leases of one holder."""

    def __init__(self, source: ChunkSource | None) -> None:
        self._source = source
        self._leases: dict[tuple[bytes, int], Lease] = {}
        self._numbers: dict[bytes, set[int]] = {}
        self._bytes: Counter[bytes] = Counter()
        self._chunks = 0

    @property
    def leases(self) -> int:
        """How many there are."""
        return len(self._leases)

    @property
    def next_end_s(self) -> float | None:
        """When the first of them ends if nobody renews it."""
        return min((lease.ends_s for lease in self._leases.values()), default=None)

    def lend(self, reader: bytes, number: int, wanted: Sequence[Wanted], lease_s: float, now: float) -> Lease | str:
        """Lease what there is of `wanted`; or lease nothing, and say why."""
        self.expire(now)
        refused = self._refused(reader, number, len(wanted))
        if refused is not None:
            return refused
        lease = Lease(reader, number, now + lease_s)
        last: Loan | None = None
        for key, whole_bytes, part in wanted:
            loan = None
            if part is not None and last is not None and (key, whole_bytes) == (lease.keys[-1], last.buffer.nbytes):
                loan = last
            else:
                loan = lend(self._source, key)
                if loan is not None and loan.buffer.nbytes == whole_bytes:
                    lease.bytes += whole_bytes
            lease.keys.append(key)
            last = self._add(lease, loan, whole_bytes)
            if self._bytes[reader] + lease.bytes > LENT_BYTES_PER_READER_MAX:
                self._release(lease)
                return "too many bytes are lent to this reader"
        self._leases[reader, number] = lease
        self._numbers.setdefault(reader, set()).add(number)
        self._bytes[reader] += lease.bytes
        self._chunks += len(lease.keys)
        return lease

    def renew(self, reader: bytes, number: int, lease_s: float, now: float) -> bool:
        """The lease ends so long after now. False when it has ended already."""
        self.expire(now)
        lease = self._leases.get((reader, number))
        if lease is None:
            return False
        lease.ends_s = now + lease_s
        return True

    def find(self, reader: bytes, number: int) -> Lease | None:
        """A lease that has not ended."""
        return self._leases.get((reader, number))

    def give_back(self, reader: bytes, number: int) -> bool:
        """End one lease. False when it has ended already."""
        lease = self._leases.pop((reader, number), None)
        if lease is None:
            return False
        numbers = self._numbers[reader]
        numbers.discard(number)
        self._bytes[reader] -= lease.bytes
        if not numbers:
            del self._numbers[reader], self._bytes[reader]
        self._chunks -= len(lease.keys)
        self._release(lease)
        return True

    def expire(self, now: float) -> int:
        """End the leases whose time is over. Returns how many."""
        return self._end(lease for lease in self._leases.values() if lease.ends_s <= now)

    def drop(self, reader: bytes) -> int:
        """The reader is gone: end all of its leases. Returns how many."""
        return self._end(self._leases[reader, number] for number in self._numbers.get(reader, ()))

    def clear(self) -> int:
        """End all leases. Returns how many."""
        return self._end(self._leases.values())

    # --- inside ----------------------------------------------------------------------------------------------------
    def _refused(self, reader: bytes, number: int, count: int) -> str | None:
        numbers = self._numbers.get(reader, ())
        if number in numbers:
            return "this reader has a lease of that number already"
        if len(numbers) >= LEASES_PER_READER_MAX or len(self._leases) >= LEASES_MAX:
            return "too many leases at once"
        if self._chunks + count > LENT_CHUNKS_MAX:
            return "too many chunks are lent"
        return None

    def _add(self, lease: Lease, loan: Loan | None, whole_bytes: int) -> Loan | None:
        """Note what became of one wanted chunk. Returns the loan when it stays."""
        if loan is None:
            lease.items.append(LentItem(NOT_HELD, 0, 0))
        elif loan.buffer.nbytes != whole_bytes:
            lease.items.append(LentItem(WRONG_SIZE, loan.checksum, 0))
            loan.release()
            loan = None
        else:
            lease.items.append(LentItem(HELD, loan.checksum, loan.offset))
        lease.loans.append(loan)
        return loan

    def _end(self, leases: Iterable[Lease]) -> int:
        ended = list(leases)
        for lease in ended:
            self.give_back(lease.reader, lease.number)
        return len(ended)

    def _release(self, lease: Lease) -> None:
        lease.live = False
        for loan in lease.loans:
            if loan is not None:
                loan.release()
        lease.loans.clear()
