"""The store: which chunks this node has, where in the arena, and who keeps each from eviction.

A chunk's life: *reserved* (an owner may write the extent; nobody sees it) → *held* (immutable; its checksum known;
leased and released any number of times) → *evicted*. The rules:

| a chunk that is | may be evicted | may be read |
|---|---|---|
| reserved | no: its extent goes back when its owner commits, abandons or goes away | no |
| held | yes, least recently used first | yes |
| leased | no | yes |
| pinned | no, until unpinned or deleted | yes |
| doomed: deleted or expired while leased | at its last release | only by those who hold a lease |
| quarantined: its bytes are wrong | never: its extent stays out of use, up to a bound | no |

*Owners* are whatever takes leases and reservations: one connection of a client, one read of a peer. When an owner goes,
all that it had goes back at once. A reservation that does not fit is refused before anything is evicted for it.

Sans-IO: the time comes in as `now` (monotonic seconds), admissions and evictions go out through the two callbacks. It
never touches the bytes. Runs on the agent's loop.
"""

from __future__ import annotations

import enum
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass

from kvmesh.extents import Extents, aligned, largest_gap
from kvmesh.transport.limits import QUARANTINE_SHARE

Owner = Hashable


class Refusal(enum.IntEnum):
    """Why a reservation got no extent. Negative, so that a wire message can carry an offset or one of these."""

    EXISTS = -1
    """The chunk is held already: nothing is left to do."""
    BUSY = -2
    """Another client is writing this very chunk."""
    FULL = -3
    """What is free or can be evicted does not make room: the rest is leased, pinned or reserved."""


@dataclass(slots=True)
class Chunk:
    """One held chunk."""

    key: bytes
    space_id: bytes
    offset: int
    size_bytes: int
    checksum: int
    pinned: bool
    expires_s: float | None
    """On the monotonic clock; None for never."""
    private: bool = False
    """A part of a chunk: of use to this node alone, so others are not told."""
    leases: int = 0
    doomed: bool = False
    corrupt: bool = False
    """Its bytes do not match its checksum."""


@dataclass(frozen=True, slots=True)
class StoreStats:
    """What a store has and did. The last five count since its start."""

    capacity_bytes: int
    used_bytes: int
    """In extents, held or reserved, rounded up to pages."""
    chunks: int
    chunk_bytes: int
    leased_chunks: int
    leases: int
    """Counted: one chunk that two readers have is two."""
    pinned_chunks: int
    reserved_chunks: int
    quarantined_bytes: int
    """In extents that are out of use, because a chunk's bytes changed there."""
    admitted: int
    evicted: int
    """For room. Deleted and expired chunks count as removed."""
    removed: int
    refused: int
    """Reservations that found no room."""
    corrupt: int
    """Chunks that were taken out because their bytes did not match their checksum any more."""


@dataclass(slots=True)
class _Reservation:
    space_id: bytes
    offset: int
    size_bytes: int
    beside: bool


class Store:
    """The chunks of one node. `on_admit(chunk)` and `on_evict(chunk)` hear of each change, in order."""

    def __init__(
        self, capacity_bytes: int, *, on_admit: Callable[[Chunk], None], on_evict: Callable[[Chunk], None]
    ) -> None:
        self._extents = Extents(capacity_bytes)
        self._chunks: OrderedDict[bytes, Chunk] = OrderedDict()  # least recently used first
        self._expiring: dict[bytes, Chunk] = {}  # of those, the ones that have a time
        self._doomed: dict[bytes, list[Chunk]] = {}
        self._reserved: dict[tuple[bytes, Owner], _Reservation] = {}
        self._writers: set[bytes] = set()  # keys of those that are not beside others: one owner each
        self._quarantined: deque[Chunk] = deque()
        self._owners: dict[Owner, _Belongings] = {}
        self._on_admit = on_admit
        self._on_evict = on_evict
        self._kept: dict[int, int] = {}  # offset -> size of what eviction may not take: leased or pinned
        self._chunk_bytes = 0
        self._counts: Counter[str] = Counter()

    @property
    def capacity_bytes(self) -> int:
        """The arena's size, in whole pages."""
        return self._extents.capacity_bytes

    # --- owners ----------------------------------------------------------------------------------------------------
    def add_owner(self, owner: Owner) -> None:
        """From now on `owner` may reserve and lease."""
        assert owner not in self._owners
        self._owners[owner] = _Belongings()

    def drop_owner(self, owner: Owner) -> None:
        """Take back all that `owner` has. An owner that is not known (any more) has nothing."""
        belongings = self._owners.pop(owner, None)
        if belongings is None:
            return
        for key in list(belongings.reserved):
            self._extents.free(self._unreserve(owner, key, belongings).offset)
        for chunk, count in belongings.leases.values():
            self._return_leases(chunk, count)

    # --- writing ---------------------------------------------------------------------------------------------------
    def reserve(
        self, owner: Owner, key: bytes, space_id: bytes, size_bytes: int, *, beside: bool = False, now: float = 0.0
    ) -> int:
        """The offset of an extent that `owner` may write, or a `Refusal`. Evicts what it must.

        `beside` others who write the chunk `key` as well, each an extent of its own: the first commit counts. That is
        how a fetch writes; it may fail, so it keeps nobody else from writing the chunk. One whose time is over by `now`
        is held no more.
        """
        belongings = self._owners.get(owner)
        held = self._chunks.get(key)
        if held is not None and held.expires_s is not None and held.expires_s <= now:
            self._remove(held)
        elif held is not None:
            return Refusal.EXISTS
        if (key, owner) in self._reserved or (key in self._writers and not beside):
            return Refusal.BUSY
        offset = self._make_room(size_bytes) if belongings is not None else None
        if belongings is None or offset is None:
            self._counts["refused"] += 1
            return Refusal.FULL
        self._reserved[key, owner] = _Reservation(space_id, offset, size_bytes, beside)
        if not beside:
            self._writers.add(key)
        belongings.reserved.add(key)
        return offset

    def commit(
        self,
        owner: Owner,
        key: bytes,
        checksum: int,
        *,
        pinned: bool = False,
        expires_s: float | None = None,
        private: bool = False,
    ) -> Chunk | None:
        """The reserved chunk `key` is written: from now on it is held. None when `owner` has no such reservation, or
        somebody beside it was first: then its extent is free again."""
        reservation = self._take_reservation(owner, key)
        if reservation is None:
            return None
        if key in self._chunks:
            self._extents.free(reservation.offset)
            return None
        chunk = Chunk(
            key, reservation.space_id, reservation.offset, reservation.size_bytes, checksum, pinned, expires_s, private
        )
        self._chunks[key] = chunk
        if expires_s is not None:
            self._expiring[key] = chunk
        self._chunk_bytes += chunk.size_bytes
        if pinned:
            self._kept[chunk.offset] = chunk.size_bytes
        self._counts["admitted"] += 1
        self._on_admit(chunk)
        return chunk

    def abandon(self, owner: Owner, key: bytes) -> None:
        """Give a reservation back unwritten. Only when nothing can write to its extent any more."""
        reservation = self._take_reservation(owner, key)
        if reservation is not None:
            self._extents.free(reservation.offset)

    # --- reading ---------------------------------------------------------------------------------------------------
    def get(self, key: bytes) -> Chunk | None:
        """The held chunk `key`, neither leased nor touched."""
        return self._chunks.get(key)

    def run(self, chain: Sequence[bytes]) -> int:
        """How many chunks of `chain` are held, from the front."""
        for count, key in enumerate(chain):
            if key not in self._chunks:
                return count
        return len(chain)

    def lease(self, owner: Owner, key: bytes, now: float) -> Chunk | None:
        """Keep the chunk `key` from eviction for `owner`, once more. None when it is not held, or the owner is gone."""
        chunk = self._chunks.get(key)
        belongings = self._owners.get(owner)
        if chunk is None or belongings is None:
            return None
        if chunk.expires_s is not None and chunk.expires_s <= now:
            self._remove(chunk)
            return None
        self._lease(chunk, belongings)
        return chunk

    def lease_all(self, owner: Owner, chain: Sequence[bytes], now: float) -> list[Chunk]:
        """`lease` what is held of `chain`, in its order, and `touch` it: one look at each chunk instead of two."""
        belongings = self._owners.get(owner)
        if belongings is None:
            return []
        chunks, lease = self._chunks, self._lease
        leased: list[Chunk] = []
        for key in reversed(chain):
            chunk = chunks.get(key)
            if chunk is None:
                continue
            if chunk.expires_s is not None and chunk.expires_s <= now:
                self._remove(chunk)
                continue
            chunks.move_to_end(key)
            lease(chunk, belongings)
            leased.append(chunk)
        leased.reverse()
        return leased

    def touch(self, chain: Iterable[bytes]) -> None:
        """The chunks of `chain` were used. The front becomes the most recent: a chain without its front is worth
        nothing."""
        for key in reversed(list(chain)):
            if key in self._chunks:
                self._chunks.move_to_end(key)

    def release(self, owner: Owner, chunk: Chunk) -> bool:
        """Give back one lease of `chunk`. False when `owner` has none."""
        belongings = self._owners.get(owner)
        held = belongings.leases.get(chunk.offset) if belongings is not None else None
        if belongings is None or held is None or held[0] is not chunk:
            return False
        if held[1] == 1:
            del belongings.leases[chunk.offset]
        else:
            belongings.leases[chunk.offset] = (chunk, held[1] - 1)
        self._return_leases(chunk, 1)
        return True

    def leased(self, owner: Owner, offset: int) -> Chunk | None:
        """The chunk at `offset` that `owner` has a lease of."""
        belongings = self._owners.get(owner)
        held = belongings.leases.get(offset) if belongings is not None else None
        return held[0] if held is not None else None

    def room_bytes(self) -> int:
        """What reservations could take now: all that is not leased, pinned, reserved or out of use."""
        reserved = sum(aligned(reservation.size_bytes) for reservation in self._reserved.values())
        return self.capacity_bytes - sum(map(aligned, self._kept.values())) - reserved

    def leased_at(self, owner: Owner) -> Collection[int]:
        """Where the chunks lie that `owner` has leases of: to look at."""
        belongings = self._owners.get(owner)
        return belongings.leases.keys() if belongings is not None else frozenset()

    def leased_by(self, owner: Owner) -> int:
        """How many chunks `owner` has leases of."""
        belongings = self._owners.get(owner)
        return len(belongings.leases) if belongings is not None else 0

    # --- keeping and removing --------------------------------------------------------------------------------------
    def pin(self, key: bytes, pinned: bool) -> bool:
        """Keep a held chunk from eviction until it is unpinned. False when it is not held."""
        chunk = self._chunks.get(key)
        if chunk is None:
            return False
        chunk.pinned = pinned
        self._update_kept(chunk)
        return True

    def delete(self, key: bytes) -> bool:
        """Remove a held chunk, pinned or not; one that is leased goes at its last release. False when it is not
        held."""
        chunk = self._chunks.get(key)
        if chunk is not None:
            self._remove(chunk)
        return chunk is not None

    def quarantine(self, chunk: Chunk) -> bool:
        """The bytes of `chunk` have changed: nobody gets it any more, and its extent stays out of use. False when it is
        not held any more."""
        if self._chunks.get(chunk.key) is not chunk:
            return False
        chunk.corrupt = True
        self._counts["corrupt"] += 1
        self._remove(chunk)
        return True

    def sweep(self, now: float) -> int:
        """Remove the chunks whose time is over. Returns how many."""
        over = [c for c in self._expiring.values() if c.expires_s is not None and c.expires_s <= now]
        for chunk in over:
            self._remove(chunk)
        return len(over)

    def stats(self) -> StoreStats:
        """A copy of the counters."""
        held = [*self._chunks.values(), *(chunk for chunks in self._doomed.values() for chunk in chunks)]
        return StoreStats(
            capacity_bytes=self._extents.capacity_bytes,
            used_bytes=self._extents.capacity_bytes - self._extents.free_bytes,
            chunks=len(self._chunks),
            chunk_bytes=self._chunk_bytes,
            leased_chunks=sum(1 for chunk in held if chunk.leases),
            leases=sum(chunk.leases for chunk in held),
            pinned_chunks=sum(1 for chunk in held if chunk.pinned),
            reserved_chunks=len(self._reserved),
            quarantined_bytes=sum(aligned(chunk.size_bytes) for chunk in self._quarantined),
            admitted=self._counts["admitted"],
            evicted=self._counts["evicted"],
            removed=self._counts["removed"],
            refused=self._counts["refused"],
            corrupt=self._counts["corrupt"],
        )

    # --- inside ----------------------------------------------------------------------------------------------------
    def _lease(self, chunk: Chunk, belongings: _Belongings) -> None:
        offset, leases = chunk.offset, belongings.leases
        chunk.leases += 1
        self._kept[offset] = chunk.size_bytes
        held = leases.get(offset)
        leases[offset] = (chunk, 1 if held is None else held[1] + 1)

    def _take_reservation(self, owner: Owner, key: bytes) -> _Reservation | None:
        if (key, owner) not in self._reserved:
            return None
        return self._unreserve(owner, key, self._owners[owner])

    def _unreserve(self, owner: Owner, key: bytes, belongings: _Belongings) -> _Reservation:
        belongings.reserved.discard(key)
        reservation = self._reserved.pop((key, owner))
        if not reservation.beside:
            self._writers.discard(key)
        return reservation

    def _make_room(self, size_bytes: int) -> int | None:
        offset = self._extents.allocate(size_bytes)
        victim = None if offset is not None else self._least_recently_used()
        if victim is not None and aligned(victim.size_bytes) < aligned(size_bytes):
            # One is not enough. Before the first goes: would all that may go make room? Else all would go for nothing.
            taken = [*self._kept.items(), *((r.offset, r.size_bytes) for r in self._reserved.values())]
            if largest_gap(self._extents.capacity_bytes, taken) < aligned(size_bytes):
                return None
        while offset is None and victim is not None:
            self._counts["evicted"] += 1
            self._forget(victim)
            self._extents.free(victim.offset)
            offset = self._extents.allocate(size_bytes)
            victim = self._least_recently_used()
        return offset

    def _least_recently_used(self) -> Chunk | None:
        """The chunk to evict next. Those that may not go count as just used, so none is passed over twice in a row."""
        gone = sum(map(len, self._doomed.values())) + len(self._quarantined)  # kept, and no chunk that could be evicted
        for _ in range(len(self._chunks) if len(self._kept) - gone < len(self._chunks) else 0):
            chunk = next(iter(self._chunks.values()))
            if chunk.offset not in self._kept:
                return chunk
            self._chunks.move_to_end(chunk.key)
        return None

    def _remove(self, chunk: Chunk) -> None:
        self._counts["removed"] += 1
        self._forget(chunk)
        chunk.pinned = False
        if chunk.leases:
            chunk.doomed = True
            self._doomed.setdefault(chunk.key, []).append(chunk)
        else:
            self._clear(chunk)

    def _clear(self, chunk: Chunk) -> None:
        """The extent of a chunk that is gone: free for others, unless its bytes went wrong there."""
        self._kept.pop(chunk.offset, None)
        if not chunk.corrupt:
            self._extents.free(chunk.offset)
            return
        self._kept[chunk.offset] = chunk.size_bytes
        self._quarantined.append(chunk)
        while sum(aligned(old.size_bytes) for old in self._quarantined) * QUARANTINE_SHARE > self.capacity_bytes:
            oldest = self._quarantined.popleft()
            del self._kept[oldest.offset]
            self._extents.free(oldest.offset)

    def _forget(self, chunk: Chunk) -> None:
        del self._chunks[chunk.key]
        self._expiring.pop(chunk.key, None)
        self._chunk_bytes -= chunk.size_bytes
        self._on_evict(chunk)

    def _return_leases(self, chunk: Chunk, count: int) -> None:
        chunk.leases -= count
        assert chunk.leases >= 0
        if chunk.leases:
            return
        self._update_kept(chunk)
        if chunk.doomed:
            siblings = self._doomed[chunk.key]
            siblings.remove(chunk)
            if not siblings:
                del self._doomed[chunk.key]
            self._clear(chunk)

    def _update_kept(self, chunk: Chunk) -> None:
        if chunk.pinned or chunk.leases:
            self._kept[chunk.offset] = chunk.size_bytes
        else:
            self._kept.pop(chunk.offset, None)


class _Belongings:
    """What one owner has: keys that it reserved; chunks that it leased, by offset, with the number of leases."""

    __slots__ = ("leases", "reserved")

    def __init__(self) -> None:
        self.reserved: set[bytes] = set()
        self.leases: dict[int, tuple[Chunk, int]] = {}
