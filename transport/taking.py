"""Taking chunks out of a holder's arena: lend, move, verify, give back, batch by batch.

    wants ──▶ batches of 2, 4, 8, 16, 32, 32… MiB, front first, a few under way:
              Lend (call) ──▶ Mover.move ──▶ checksums ──▶ landings
                                                └──▶ GiveBack (call), whatever happened

A chunk lands only when its bytes have the checksum that the holder gave with the lease. A mismatch means CORRUPT while
the lease is good, and the holder is told; once it may have ended, other bytes may stand there, and the chunk is simply
not taken. A lease is renewed while its batch still moves.

`take` returns when no buffer can be written any more, however it ends: by success, failure or cancellation. It chooses
no backend and keeps no stream of landings (backends.py). Runs on the loop; hashing is done in the copy threads, or by
the mover.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Any

import xxhash

from .checksum import bound
from .counters import Counters
from .errors import ProtocolError, UnreachableError
from .frames import CORRUPT_HERE, HELD, NOT_HELD
from .interface import Landing, Outcome, Want
from .lending_messages import (
    Done,
    Lent,
    LentItem,
    Renew,
    Request,
    Returned,
    decode_answer,
    encode_request,
    lend_request,
    unpack_items,
)
from .limits import (
    CALL_TIMEOUT_S,
    COPY_ON_LOOP_BYTES_MAX,
    LEND_BATCH_BYTES_MAX,
    LEND_BATCH_BYTES_MIN,
    LEND_BATCH_CHUNKS_MAX,
    LEND_BATCHES_AT_ONCE,
    LEND_LEASE_S,
    LEND_MARGIN_S,
    LEND_RENEW_S,
    LEND_RUN_BYTES_MIN,
    LEND_RUNS_MAX,
)
from .onesided import Move, Mover, Piece
from .returning import Call, Returns
from .slices import run_count, runs

Indexed = tuple[int, Want]


@dataclass(frozen=True, slots=True)
class Tools:
    """What all takings of one transport share."""

    threads: Executor
    counters: Counters
    returns: Returns


@dataclass(slots=True, eq=False)
class Link:
    """One way to read one peer's arena, once it is open."""

    backend: str
    mover: Mover
    instance: bytes
    """The peer's."""
    reader: bytes
    """What our leases go by at the holder."""
    arena_bytes: int
    call: Call
    tools: Tools
    numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))
    """For leases."""
    users: int = 0
    """Takings under way."""
    broken: bool = False
    """The mover has failed, or the holder does not follow the protocol."""


@dataclass(slots=True, eq=False)
class _Batch:
    """What is lent together."""

    number: int
    wants: list[Indexed]
    items: list[LentItem] = field(default_factory=list)
    digests: list[xxhash.xxh3_64] = field(default_factory=list)
    """For each want; of what is not lent, unused."""
    asked_s: float = 0.0
    """When the lease was asked for, or its renewal; by our clock, so that it ends here before it does at the holder."""
    good_until_s: float = 0.0


def takeable(wants: Iterable[Indexed]) -> list[Indexed]:
    """Those that a reader takes itself. Chunks of which it wants a part in many small runs are left to a holder that
    gathers them: with all that is wanted of them, since a holder verifies a chunk for the parts of it."""
    wanted = list(wants)
    gathered = {
        want.key
        for _, want in wanted
        if want.part is not None
        and (count := run_count(want.part)) > 1
        and (count > LEND_RUNS_MAX or want.part.run_bytes < LEND_RUN_BYTES_MIN)
    }
    return [(index, want) for index, want in wanted if want.key not in gathered]


async def take(link: Link, wants: Sequence[Indexed], ends_s: float, put: Callable[[list[Landing]], None]) -> None:
    """Take all `wants` by `link`, until `ends_s` on the loop's clock. Raises `UnreachableError` or `ProtocolError` when
    the holder or the way to it fails: what was not `put` by then did not land."""
    if not wants:
        return
    link.users += 1
    try:
        await _take_batches(link, list(_batches(wants)), ends_s, put)
    finally:
        link.users -= 1


async def _take_batches(
    link: Link, batches: list[list[Indexed]], ends_s: float, put: Callable[[list[Landing]], None]
) -> None:
    line = iter(batches)
    if len(batches) == 1:
        await _take_all(link, line, ends_s, put)
        return
    takers = [asyncio.ensure_future(_take_all(link, line, ends_s, put)) for _ in batches[:LEND_BATCHES_AT_ONCE]]
    try:
        await asyncio.wait(takers, return_when=asyncio.FIRST_EXCEPTION)
    finally:
        for taker in takers:
            taker.cancel()
        await to_the_end(asyncio.gather(*takers, return_exceptions=True))
    for taker in takers:
        if not taker.cancelled():
            taker.result()


async def to_the_end(waiting: Awaitable[Any]) -> None:
    """Await what must not be abandoned, and only then be cancelled."""
    task = asyncio.ensure_future(waiting)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError as error:
            cancelled = error
    task.result()
    if cancelled is not None:
        raise cancelled


def _batches(wants: Iterable[Indexed]) -> Iterator[list[Indexed]]:
    """Parts of one chunk stay in one batch: it is lent, and verified, once."""
    batch: list[Indexed] = []
    size_bytes = counted = 0
    full_bytes = LEND_BATCH_BYTES_MIN
    for index, want in wants:
        count = run_count(want.part)
        large = size_bytes + want.into.nbytes > full_bytes and want.key != batch[-1][1].key if batch else False
        if large or (batch and counted + count > LEND_RUNS_MAX) or len(batch) == LEND_BATCH_CHUNKS_MAX:
            yield batch
            batch, size_bytes, counted = [], 0, 0
            full_bytes = min(2 * full_bytes, LEND_BATCH_BYTES_MAX)
        batch.append((index, want))
        size_bytes += want.into.nbytes
        counted += count
    if batch:
        yield batch


async def _take_all(
    link: Link, batches: Iterator[list[Indexed]], ends_s: float, put: Callable[[list[Landing]], None]
) -> None:
    for wants in batches:
        batch = _Batch(next(link.numbers), wants)
        corrupt: list[int] = []
        try:
            await _lend(link, batch, ends_s)
            await _move(link, batch)
            put(_landings(link, batch, corrupt))
        finally:
            # Also when no answer came: it may have been lent.
            link.tools.returns.add(link.call, link.reader, Returned(batch.number, corrupt))


async def _lend(link: Link, batch: _Batch, ends_s: float) -> None:
    loop = asyncio.get_running_loop()
    wants = [want for _, want in batch.wants]
    left_s = max(ends_s - loop.time(), LEND_MARGIN_S)
    lease_s = min(left_s + 2 * LEND_MARGIN_S, LEND_LEASE_S)
    batch.asked_s = loop.time()
    batch.good_until_s = batch.asked_s + lease_s - LEND_MARGIN_S
    request = lend_request(link.instance, link.reader, batch.number, lease_s, wants)
    lent = await _ask(link, Lent, request, min(left_s, CALL_TIMEOUT_S))
    try:
        batch.items = unpack_items(lent.items, wants, link.arena_bytes)
    except ProtocolError:
        link.tools.counters.malformed += 1
        link.broken = True
        raise


async def _move(link: Link, batch: _Batch) -> None:
    """Copy what was lent, and hash it."""
    pieces: list[Piece] = []
    for (_, want), item in zip(batch.wants, batch.items, strict=True):
        digest = xxhash.xxh3_64()
        batch.digests.append(digest)
        if item.state == HELD:
            pieces += _pieces(want, item.offset, digest)
    if not pieces:
        return
    move = _start(link, pieces)
    try:
        await _moved(link, batch, move)
    except BaseException:
        await to_the_end(move.stop())
        raise
    if not link.mover.hashes:
        await _hash(link.tools.threads, pieces)


def _pieces(want: Want, offset: int, digest: xxhash.xxh3_64) -> Iterator[Piece]:
    if want.part is None:
        yield Piece(offset, want.into, digest)
        return
    into = want.into.cast("B")
    at = 0
    for run_offset, run_bytes in runs(want.part):
        yield Piece(offset + run_offset, into[at : at + run_bytes], digest)
        at += run_bytes


def _start(link: Link, pieces: Sequence[Piece]) -> Move:
    try:
        return link.mover.move(pieces)
    except UnreachableError:
        link.broken = True
        raise


async def _moved(link: Link, batch: _Batch, move: Move) -> None:
    """Wait for the move, and keep the lease meanwhile."""
    loop = asyncio.get_running_loop()
    while True:
        try:
            async with asyncio.timeout_at(batch.asked_s + LEND_RENEW_S):  # a shorter lease outlasts the deadline
                await move.wait()
            return
        except UnreachableError:
            link.broken = True
            raise
        except TimeoutError:
            batch.asked_s = loop.time()
            answer = await _ask(link, Done, Renew(link.reader, batch.number, LEND_LEASE_S), CALL_TIMEOUT_S)
            if not answer.known:
                raise UnreachableError("the lease ended while its chunks were moved") from None
            batch.good_until_s = batch.asked_s + LEND_LEASE_S - LEND_MARGIN_S


async def _hash(threads: Executor, pieces: Sequence[Piece]) -> None:
    if sum(piece.into.nbytes for piece in pieces) <= COPY_ON_LOOP_BYTES_MAX:
        _feed(pieces)
    else:
        await to_the_end(asyncio.get_running_loop().run_in_executor(threads, _feed, pieces))


def _feed(pieces: Sequence[Piece]) -> None:
    """Runs in a copy thread."""
    for piece in pieces:
        assert piece.digest is not None
        piece.digest.update(piece.into)


def _landings(link: Link, batch: _Batch, corrupt: list[int]) -> list[Landing]:
    """What became of the batch; notes in `corrupt` what the holder should look at."""
    good = asyncio.get_running_loop().time() < batch.good_until_s
    landings: list[Landing] = []
    counters = link.tools.counters
    for at, ((index, want), item) in enumerate(zip(batch.wants, batch.items, strict=True)):
        if item.state == NOT_HELD:
            counters.not_held += 1
            landings.append(Landing(index, Outcome.NOT_HELD, 0))
        elif item.state == CORRUPT_HERE:
            counters.corrupt += 1
            landings.append(Landing(index, Outcome.CORRUPT, 0))
        elif item.state != HELD:
            landings.append(Landing(index, Outcome.WRONG_SIZE, item.checksum))
        elif (found := batch.digests[at].intdigest()) == bound(item.checksum, want.key, want.part):
            counters.chunks_read += 1
            counters.bytes_read += want.into.nbytes
            if link.backend == "shm":
                counters.bytes_read_shm += want.into.nbytes
            else:
                counters.bytes_read_nixl += want.into.nbytes
            landings.append(Landing(index, Outcome.LANDED, found))
        elif good:
            counters.corrupt += 1
            corrupt.append(at)
            landings.append(Landing(index, Outcome.CORRUPT, bound(item.checksum, want.key, want.part)))
    return landings


async def _ask(link: Link, kind: type[Any], request: Request, timeout_s: float) -> Any:
    return decode_answer(kind, await link.call(encode_request(request), timeout_s))
