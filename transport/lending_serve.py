"""The holder's end of one-sided reads: answers the calls about offers and leases, and ends leases in time.

The table of leases (lending.py) decides; this module takes messages apart, keeps the clock, and computes what the table
may not: the checksum of a part. Before it does, it verifies the whole chunk against the checksum of its put, so that a
part is never a sound checksum of bytes that went wrong in the arena. That happens in threads of its own; the rest runs
on the loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from concurrent.futures import Executor

import xxhash

from .checksum import bound, checksum
from .counters import Counters
from .errors import ProtocolError
from .frames import CORRUPT_HERE, HELD, NOT_HELD
from .interface import ChunkSource, Loan, Slice
from .lending import Lease, LeaseTable, Wanted
from .lending_messages import (
    Ask,
    Done,
    GiveBack,
    Lend,
    Lent,
    LentItem,
    Offers,
    Renew,
    batch_of,
    decode_request,
    encode_answer,
    pack_items,
)
from .limits import LEND_RUNS_MAX
from .loans import suspect
from .onesided import OneSidedEnd
from .slices import run_count, runs


class LendingServer:
    """What this node lends."""

    def __init__(self, source: ChunkSource | None, instance: bytes, threads: Executor, counters: Counters) -> None:
        self._loop = asyncio.get_running_loop()
        self._source = source
        self._instance = instance
        self.threads = threads
        self._counters = counters
        self._ends: Mapping[str, OneSidedEnd] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False
        self.table = LeaseTable(source)

    def offer(self, ends: Mapping[str, OneSidedEnd]) -> None:
        """By which backends peers may read: those of `ends`, as it is when one asks."""
        self._ends = ends

    async def handle(self, request: bytes) -> bytes:
        """Answer one call. Raises `ProtocolError` for one that is refused."""
        try:
            message = decode_request(request)
        except ProtocolError:
            self._counters.malformed += 1
            raise
        if self._closed:
            raise ProtocolError("this node is closing")
        self._counters.expired += self.table.expire(self._loop.time())
        match message:
            case Ask():
                return encode_answer(self._introduce())
            case Lend():
                return encode_answer(await self._lend(message))
            case Renew():
                known = self.table.renew(message.reader, message.lease, message.lease_s, self._loop.time())
                return encode_answer(Done(known))
            case GiveBack():
                return encode_answer(self._take_back(message))

    def reader_gone(self, reader: bytes) -> None:
        """The reader of this name does not live any more."""
        self.table.drop(reader)

    def close(self) -> None:
        """Lend nothing more, and give every loan back to the source."""
        self._closed = True
        self.table.clear()
        if self._timer is not None:
            self._timer.cancel()

    # --- inside ----------------------------------------------------------------------------------------------------
    def _introduce(self) -> Offers:
        region = self._source.region if self._source is not None else None
        offers = {name: offer for name, end in self._ends.items() if (offer := end.offer())}
        return Offers(self._instance, 0 if region is None else region.size_bytes, offers)

    async def _lend(self, message: Lend) -> Lent:
        try:
            number, lease_s, listed = batch_of(message)
        except ProtocolError:
            self._counters.malformed += 1
            raise
        if message.instance != self._instance:
            raise ProtocolError("this is another process than the one that was asked for its offers")
        wanted = [listed[index] for index in range(listed.count)]
        if sum(run_count(part) for _, _, part in wanted) > LEND_RUNS_MAX:
            self._counters.malformed += 1
            raise ProtocolError(f"parts of more than {LEND_RUNS_MAX} runs are not lent")
        lease = self.table.lend(message.reader, number, wanted, lease_s, self._loop.time())
        if isinstance(lease, str):
            self._counters.refused += 1
            raise ProtocolError(lease)
        self._arm(lease.ends_s)
        items = list(lease.items)
        if any(part is not None for _, _, part in wanted):
            try:
                items = await self._loop.run_in_executor(self.threads, _with_parts, list(lease.loans), items, wanted)
            except asyncio.CancelledError:
                self.table.give_back(message.reader, number)
                raise
            if not lease.live:  # what was hashed may not have been the chunks any more
                raise ProtocolError("the lease ended before the parts were verified")
            self._suspect(lease, [index for index, item in enumerate(items) if item.state == CORRUPT_HERE])
        self._count(items, wanted)
        return Lent(pack_items(_bound(items, wanted)))

    def _take_back(self, message: GiveBack) -> Done:
        known = True
        for returned in message.leases:
            lease = self.table.find(message.reader, returned.lease)
            if lease is not None:
                self._suspect(lease, [index for index in returned.corrupt if index < len(lease.keys)])
            known &= self.table.give_back(message.reader, returned.lease)
        return Done(known)

    def _suspect(self, lease: Lease, indices: list[int]) -> None:
        for key in {lease.keys[index] for index in indices if lease.items[index].state == HELD}:
            suspect(self._source, key)

    def _count(self, items: list[LentItem], wanted: list[Wanted]) -> None:
        self._counters.corrupt += len(
            {key for item, (key, _, _) in zip(items, wanted, strict=True) if item.state == CORRUPT_HERE}
        )
        for item, (_, whole_bytes, part) in zip(items, wanted, strict=True):
            if item.state == HELD:
                self._counters.chunks_served += 1
                self._counters.bytes_served += whole_bytes if part is None else part.bytes
            self._counters.not_held += item.state == NOT_HELD

    # --- time ------------------------------------------------------------------------------------------------------
    def _arm(self, ends_s: float) -> None:
        if self._timer is not None:
            if self._timer.when() <= ends_s:
                return
            self._timer.cancel()
        self._timer = self._loop.call_at(ends_s, self._expire)

    def _expire(self) -> None:
        self._timer = None
        self._counters.expired += self.table.expire(self._loop.time())
        ends_s = self.table.next_end_s
        if ends_s is not None:
            self._arm(ends_s)


def _bound(items: list[LentItem], wanted: list[Wanted]) -> list[LentItem]:
    """The items as they travel."""
    return [
        item._replace(checksum=bound(item.checksum, key, part)) if item.state == HELD else item
        for item, (key, _, part) in zip(items, wanted, strict=True)
    ]


def _with_parts(loans: list[Loan | None], items: list[LentItem], wanted: list[Wanted]) -> list[LentItem]:
    """The items, with the checksums of the parts that are wanted. Runs in one of `threads`."""
    verified: tuple[Loan, bool] | None = None
    done = []
    for loan, item, (_, _, part) in zip(loans, items, wanted, strict=True):
        if loan is None or part is None:
            done.append(item)
            continue
        if verified is None or verified[0] is not loan:
            verified = loan, checksum(loan.buffer) == loan.checksum
        if verified[1]:
            done.append(item._replace(checksum=_checksum_of(loan.buffer, part)))
        else:
            done.append(LentItem(CORRUPT_HERE, 0, 0))
    return done


def _checksum_of(chunk: memoryview, part: Slice) -> int:
    digest = xxhash.xxh3_64()
    for offset, run_bytes in runs(part):
        digest.update(chunk[offset : offset + run_bytes])
    return digest.intdigest()
