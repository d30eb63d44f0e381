"""The store's rules: who may write, who may read, what goes when there is no room."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule

from kvmesh.store import Chunk, Refusal, Store

PAGE = 4096
SPACE = b"s" * 16


def key(number: int) -> bytes:
    return number.to_bytes(32, "big")


class Recorder:
    """A store with what it told."""

    def __init__(self, pages: int) -> None:
        self.told: list[tuple[str, int]] = []
        self.store = Store(pages * PAGE, on_admit=self._note("admit"), on_evict=self._note("evict"))
        self.store.add_owner("me")
        self.store.add_owner("you")

    def _note(self, what: str) -> Callable[[Chunk], None]:
        return lambda chunk: self.told.append((what, int.from_bytes(chunk.key, "big")))

    def put(self, number: int, *, pages: int = 1, owner: str = "me", pinned: bool = False) -> int:
        offset = self.store.reserve(owner, key(number), SPACE, pages * PAGE)
        if offset >= 0:
            assert self.store.commit(owner, key(number), 7, pinned=pinned) is not None
        return offset

    def held(self) -> list[int]:
        return [n for n in range(100) if self.store.get(key(n)) is not None]


def test_a_reserved_chunk_is_seen_by_nobody_until_it_is_committed() -> None:
    r = Recorder(4)
    offset = r.store.reserve("me", key(1), SPACE, PAGE)
    assert offset == 0
    assert r.store.lease("you", key(1), 0.0) is None
    assert r.store.run([key(1)]) == 0
    assert r.told == []
    chunk = r.store.commit("me", key(1), 99)
    assert chunk is not None
    assert (chunk.offset, chunk.checksum) == (0, 99)
    assert r.store.run([key(1)]) == 1
    assert r.told == [("admit", 1)]


def test_a_second_writer_of_a_chunk_is_told_so() -> None:
    r = Recorder(4)
    r.store.reserve("me", key(1), SPACE, PAGE)
    assert r.store.reserve("you", key(1), SPACE, PAGE) == Refusal.BUSY
    assert r.store.commit("you", key(1), 0) is None
    r.store.abandon("you", key(1))
    assert r.store.commit("me", key(1), 0) is not None
    assert r.store.reserve("you", key(1), SPACE, PAGE) == Refusal.EXISTS


def test_abandoned_room_comes_back() -> None:
    r = Recorder(1)
    r.store.reserve("me", key(1), SPACE, PAGE)
    assert r.store.reserve("me", key(2), SPACE, PAGE) == Refusal.FULL
    r.store.abandon("me", key(1))
    assert r.put(2) == 0


def test_a_chain_is_leased_as_chunk_by_chunk_and_touched() -> None:
    """Against `lease` and `touch`, on a store with a gap, an expired chunk and leases of before."""
    chain = [key(number) for number in (1, 9, 2, 3, 4)]
    one, all_ = Recorder(4), Recorder(4)
    for r in (one, all_):
        for number in (4, 2, 1):
            r.put(number)
        r.store.reserve("me", key(3), SPACE, PAGE)
        r.store.commit("me", key(3), 7, expires_s=5.0)
        assert r.store.lease("me", key(2), 0.0) is not None
    expected = [chunk.key for k in chain if (chunk := one.store.lease("you", k, 5.0)) is not None]
    one.store.touch(chain)
    assert [chunk.key for chunk in all_.store.lease_all("you", chain, 5.0)] == expected == [key(1), key(2), key(4)]
    assert all_.told == one.told
    assert all_.store.stats() == one.store.stats()
    assert all_.store.lease_all("nobody", chain, 0.0) == []
    for r in (one, all_):
        for owner in ("you", "me"):
            r.store.drop_owner(owner)
        r.store.add_owner("me")
        r.put(5, pages=2)
    assert all_.held() == one.held() == [1, 5], "the front is the last to go"


def test_the_least_recently_used_goes_first() -> None:
    r = Recorder(3)
    for number in (1, 2, 3):
        r.put(number)
    r.store.touch([key(1)])
    r.put(4)
    assert r.held() == [1, 3, 4]
    assert r.told[-2:] == [("evict", 2), ("admit", 4)]


def test_a_chains_front_outlives_its_end() -> None:
    r = Recorder(3)
    for number in (3, 2, 1):
        r.put(number)
    r.store.touch([key(1), key(2), key(3)])
    r.put(4)
    assert r.held() == [1, 2, 4]


@pytest.mark.parametrize("keep", ["leased", "pinned"])
def test_what_is_leased_or_pinned_stays_and_a_put_without_room_is_refused(keep: str) -> None:
    r = Recorder(2)
    for number in (1, 2):
        r.put(number, pinned=keep == "pinned")
        if keep == "leased":
            assert r.store.lease("you", key(number), 0.0) is not None
    assert r.put(3) == Refusal.FULL
    assert r.held() == [1, 2]
    assert r.store.stats().refused == 1
    if keep == "leased":
        r.store.drop_owner("you")
    else:
        assert r.store.pin(key(1), False)
    assert r.put(3) >= 0
    assert r.held() == [2, 3]


def test_nothing_is_evicted_for_a_chunk_that_cannot_fit_anyway() -> None:
    r = Recorder(4)
    for number in (1, 2, 3, 4):
        r.put(number)
    r.store.lease("you", key(2), 0.0)  # in the middle: no three pages in a row can come free
    assert r.put(5, pages=3) == Refusal.FULL
    assert r.held() == [1, 2, 3, 4]
    assert r.put(5, pages=2) == 2 * PAGE
    assert r.held() == [2, 5]


def test_leases_are_counted() -> None:
    r = Recorder(1)
    r.put(1)
    chunk = r.store.lease("me", key(1), 0.0)
    assert chunk is r.store.lease("me", key(1), 0.0)
    assert chunk is not None
    assert r.store.leased("me", chunk.offset) is chunk
    assert (r.store.leased_by("me"), r.store.leased_by("nobody")) == (1, 0)
    assert r.store.release("me", chunk)
    assert r.put(2) == Refusal.FULL
    assert r.store.release("me", chunk)
    assert not r.store.release("me", chunk)
    assert not r.store.release("you", chunk)
    assert r.put(2) == 0


def test_an_owner_that_goes_gives_everything_back() -> None:
    r = Recorder(3)
    r.put(1)
    r.store.lease("you", key(1), 0.0)
    r.store.lease("you", key(1), 0.0)
    r.store.reserve("you", key(2), SPACE, PAGE)
    r.store.drop_owner("you")
    r.store.drop_owner("you")
    stats = r.store.stats()
    assert (stats.leases, stats.reserved_chunks, stats.used_bytes) == (0, 0, PAGE)
    assert r.store.lease("you", key(1), 0.0) is None
    assert r.store.reserve("you", key(3), SPACE, PAGE) == Refusal.FULL


def test_a_deleted_chunk_that_is_leased_keeps_its_bytes_until_the_last_release() -> None:
    r = Recorder(2)
    r.put(1, pinned=True)
    old = r.store.lease("you", key(1), 0.0)
    assert old is not None
    assert r.store.delete(key(1))
    assert not r.store.delete(key(1))
    assert r.told[-1] == ("evict", 1)
    assert r.put(1) == PAGE, "the same key again goes elsewhere: the old bytes are still read"
    assert r.put(2) == 0 or r.held() == [2]
    assert r.store.stats().leased_chunks == 1
    r.store.release("you", old)
    assert r.store.stats().leases == 0


def test_chunks_expire() -> None:
    r = Recorder(2)
    for number, expires in ((1, 10.0), (2, None)):
        r.store.reserve("me", key(number), SPACE, PAGE)
        r.store.commit("me", key(number), 0, expires_s=expires)
    assert r.store.sweep(9.9) == 0
    assert r.store.lease("me", key(1), 9.9) is not None
    assert r.store.sweep(10.0) == 1
    assert r.held() == [2]
    r.store.drop_owner("me")
    assert r.store.stats().used_bytes == PAGE


def test_a_lease_after_the_end_of_a_chunks_time_is_a_miss_even_before_the_sweep() -> None:
    r = Recorder(1)
    r.store.reserve("me", key(1), SPACE, PAGE)
    r.store.commit("me", key(1), 0, expires_s=5.0)
    assert r.store.lease("me", key(1), 5.0) is None
    assert r.held() == []


def test_pin_and_delete_of_what_is_not_held_say_so() -> None:
    r = Recorder(1)
    assert not r.store.pin(key(1), True)
    assert not r.store.delete(key(1))


@given(st.lists(st.integers(0, 7), min_size=1, max_size=40))
def test_what_was_told_adds_up_to_what_is_held(numbers: list[int]) -> None:
    r = Recorder(3)
    for number in numbers:
        r.put(number)
    told: set[int] = set()
    for what, number in r.told:
        (told.add if what == "admit" else told.remove)(number)
    assert sorted(told) == r.held()


# --- two writers of one chunk, and bytes that changed -----------------------------------------------------------------
def test_a_second_writer_beside_the_first_has_an_extent_of_its_own_and_the_first_commit_counts() -> None:
    r = Recorder(4)
    mine = r.store.reserve("me", key(1), SPACE, PAGE)
    theirs = r.store.reserve("you", key(1), SPACE, PAGE, beside=True)
    assert (mine, theirs) == (0, PAGE)
    assert r.store.reserve("you", key(1), SPACE, PAGE, beside=True) == Refusal.BUSY
    chunk = r.store.commit("you", key(1), 7)
    assert chunk is not None
    assert chunk.offset == theirs
    assert r.store.commit("me", key(1), 8) is None
    assert r.store.get(key(1)) is chunk
    assert r.store.stats().reserved_chunks == 0
    assert r.store.stats().used_bytes == PAGE
    assert r.told == [("admit", 1)]


def test_a_writer_that_goes_leaves_the_one_beside_it_alone() -> None:
    r = Recorder(4)
    r.store.reserve("me", key(1), SPACE, PAGE)
    r.store.reserve("you", key(1), SPACE, PAGE, beside=True)
    r.store.drop_owner("me")
    assert r.store.stats().reserved_chunks == 1
    r.store.add_owner("me")
    assert r.store.reserve("me", key(1), SPACE, PAGE) == 0
    assert r.store.commit("you", key(1), 7) is not None
    assert r.store.commit("me", key(1), 7) is None


def test_a_chunk_whose_time_is_over_keeps_nobody_from_writing_it_anew() -> None:
    """The sweep comes once a second."""
    r = Recorder(4)
    r.store.reserve("me", key(1), SPACE, PAGE)
    r.store.commit("me", key(1), 7, expires_s=10.0)
    assert r.store.reserve("you", key(1), SPACE, PAGE, now=9.9) == Refusal.EXISTS
    assert r.store.reserve("you", key(1), SPACE, PAGE, now=10.0) >= 0
    assert r.store.commit("you", key(1), 8) is not None
    assert r.store.sweep(11.0) == 0
    assert r.told == [("admit", 1), ("evict", 1), ("admit", 1)]


def test_a_fetch_of_a_chunk_keeps_nobody_from_putting_it() -> None:
    """The fetch may fail, and its read may be in quarantine for long: a client's own copy counts as well."""
    r = Recorder(4)
    fetched = r.store.reserve("me", key(1), SPACE, PAGE, beside=True)
    put = r.store.reserve("you", key(1), SPACE, PAGE)
    assert (fetched, put) == (0, PAGE)
    r.store.add_owner("other")
    assert r.store.reserve("other", key(1), SPACE, PAGE) == Refusal.BUSY, "somebody else puts it"
    r.store.drop_owner("you")
    assert r.store.reserve("other", key(1), SPACE, PAGE) == PAGE
    assert r.store.commit("other", key(1), 7) is not None
    assert r.store.commit("me", key(1), 7) is None
    assert r.store.stats().used_bytes == PAGE


def test_a_chunk_whose_bytes_changed_is_held_no_more_and_its_extent_is_not_used_again() -> None:
    r = Recorder(32)
    r.put(1)
    wrong = r.store.get(key(1))
    assert wrong is not None
    assert r.store.quarantine(wrong)
    assert not r.store.quarantine(wrong)
    assert r.told == [("admit", 1), ("evict", 1)]
    assert r.store.lease("you", key(1), 0.0) is None
    for number in range(2, 40):
        assert r.put(number) != wrong.offset
    stats = r.store.stats()
    assert (stats.corrupt, stats.quarantined_bytes) == (1, PAGE)
    r.store.delete(key(39))
    assert r.store.stats().used_bytes == 31 * PAGE


def test_a_quarantined_chunk_that_is_leased_goes_out_of_use_at_its_last_release() -> None:
    r = Recorder(32)
    r.put(1)
    wrong = r.store.lease("you", key(1), 0.0)
    assert wrong is not None
    r.store.quarantine(wrong)
    assert r.store.stats().quarantined_bytes == 0
    r.store.drop_owner("you")
    assert r.store.stats().quarantined_bytes == PAGE
    assert r.put(1) != wrong.offset


def test_only_a_part_of_the_arena_stays_in_quarantine() -> None:
    r = Recorder(32)
    offsets = []
    for number in range(1, 4):
        offsets.append(r.put(number))
        chunk = r.store.get(key(number))
        assert chunk is not None
        r.store.quarantine(chunk)
    assert r.store.stats().quarantined_bytes == 2 * PAGE
    assert r.put(9) == offsets[0]
    assert r.put(10, pages=29) >= 0
    assert r.store.stats().used_bytes == 32 * PAGE


class StoreMachine(RuleBasedStateMachine):
    """Any order of everything: leased bytes never move, room is never lost."""

    owners = Bundle("owners")

    def __init__(self) -> None:
        super().__init__()
        self.recorder = Recorder(16)  # one page may stay in quarantine
        self.store = self.recorder.store
        self.leases: dict[str, list[Chunk]] = {}
        self.names = itertools.count()

    @rule(target=owners)
    def come(self) -> str:
        name = f"owner {next(self.names)}"
        self.store.add_owner(name)
        self.leases[name] = []
        return name

    @rule(owner=owners)
    def go(self, owner: str) -> None:
        self.store.drop_owner(owner)
        self.leases.pop(owner, None)

    @rule(owner=owners, number=st.integers(0, 9), pages=st.sampled_from([1, 1, 3, 8]), beside=st.booleans())
    def reserve(self, owner: str, number: int, pages: int, beside: bool) -> None:
        self.store.reserve(owner, key(number), SPACE, pages * PAGE, beside=beside)

    @rule(number=st.integers(0, 9))
    def quarantine(self, number: int) -> None:
        chunk = self.store.get(key(number))
        if chunk is not None:
            self.store.quarantine(chunk)

    @rule(owner=owners, number=st.integers(0, 9), pinned=st.booleans())
    def commit(self, owner: str, number: int, pinned: bool) -> None:
        self.store.commit(owner, key(number), number, pinned=pinned)

    @rule(owner=owners, number=st.integers(0, 9))
    def abandon(self, owner: str, number: int) -> None:
        self.store.abandon(owner, key(number))

    @rule(owner=owners, number=st.integers(0, 9))
    def lease(self, owner: str, number: int) -> None:
        chunk = self.store.lease(owner, key(number), 0.0)
        if chunk is not None:
            self.leases[owner].append(chunk)

    @rule(owner=owners)
    def release(self, owner: str) -> None:
        if self.leases.get(owner):
            assert self.store.release(owner, self.leases[owner].pop())

    @rule(number=st.integers(0, 9), pinned=st.booleans())
    def pin(self, number: int, pinned: bool) -> None:
        self.store.pin(key(number), pinned)

    @rule(number=st.integers(0, 9))
    def delete(self, number: int) -> None:
        self.store.delete(key(number))

    @invariant()
    def leased_bytes_belong_to_one_chunk(self) -> None:
        leased = {id(c): c for chunks in self.leases.values() for c in chunks}.values()
        held = [c for c in (self.store.get(key(n)) for n in range(10)) if c is not None]
        regions = sorted({(c.offset, c.offset + c.size_bytes, id(c)) for c in [*leased, *held]})
        assert all(end <= start for (_, end, _), (start, _, _) in itertools.pairwise(regions))

    @invariant()
    def leases_add_up(self) -> None:
        assert self.store.stats().leases == sum(map(len, self.leases.values()))

    def teardown(self) -> None:
        for owner in ("me", "you", *self.leases):
            self.store.drop_owner(owner)
        for number in range(10):
            self.store.delete(key(number))
        stats = self.store.stats()
        assert stats.used_bytes == stats.quarantined_bytes <= PAGE
        assert stats.reserved_chunks == 0


TestStoreMachine = StoreMachine.TestCase


def test_a_release_gives_back_the_lease_of_this_chunk_and_of_no_other_at_its_place() -> None:
    r = Recorder(1)
    r.put(1)
    gone = r.store.get(key(1))
    assert gone is not None
    r.put(2)
    held = r.store.lease("me", key(2), 0.0)
    assert held is not None
    assert held.offset == gone.offset
    assert not r.store.release("me", gone)
    assert held.leases == 1
