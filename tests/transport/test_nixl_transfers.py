"""What the reading process of NIXL copies when (nixl_transfers.py), on an engine of the tests' own."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmesh.transport.limits import MIB, NIXL_PROBE_BYTES, NIXL_TRANSFER_BYTES_MAX, NIXL_WINDOW_BYTES
from kvmesh.transport.nixl_process import Copy, Ended, Forget, FromChild, Lost, Meet, Met, Stop
from kvmesh.transport.nixl_transfers import Transfers, UncertainError

ARENA, SCRATCH, BASE = 1 << 20, 7, 1 << 40


class FakeEngine:
    """Completes what it is let complete."""

    def __init__(self) -> None:
        self.known: set[str] = set()
        self.under_way: dict[int, tuple[list[tuple[int, int]], list[int]]] = {}
        self.complete: set[int] = set()
        self.failing = ""
        self.log: list[tuple[list[tuple[int, int]], list[int]]] = []
        self.peak_bytes = 0

    def meet(self, agent: str, metadata: bytes) -> None:
        if metadata == b"bad":
            raise ValueError("no metadata")
        self.known.add(agent)

    def read(self, agent: str, remote: Sequence[tuple[int, int]], local: Sequence[int]) -> int:
        assert agent in self.known
        assert len(remote) == len(local)
        if self.failing == "read":
            raise RuntimeError("disconnected")
        self.log.append((list(remote), list(local)))
        self.under_way[len(self.log)] = self.log[-1]
        self.peak_bytes = max(self.peak_bytes, sum(sum(n for _, n in remote) for remote, _ in self.under_way.values()))
        return len(self.log)

    def done(self, transfer: int) -> bool:
        if self.failing == "done":
            raise RuntimeError("disconnected")
        if transfer not in self.complete:
            return False
        del self.under_way[transfer]
        return True

    def forget(self, agent: str) -> None:
        self.known.discard(agent)

    def let_all(self) -> None:
        self.complete |= set(self.under_way)


class Bench:
    """Transfers with one peer that is met."""

    def __init__(self) -> None:
        self.engine = FakeEngine()
        self.told: list[FromChild] = []
        self.transfers = Transfers(self.engine, ARENA, SCRATCH, self.told.append)
        self.transfers.handle(Meet(1, "a", b"good", BASE, 1 << 30))
        self.engine.let_all()
        assert self.transfers.turn()
        assert self.told == [Met(1)]
        self.told.clear()

    def copy(self, move: int, *runs: tuple[int, int, int], last: bool = True) -> None:
        self.transfers.handle(Copy(move, 1, list(runs), last))

    def finish(self) -> list[tuple[int, int, int]]:
        """Let everything complete; returns all runs that the engine ever got, in order."""
        while self.engine.under_way:
            self.engine.let_all()
            self.transfers.turn()
        return [
            (there - BASE, here - ARENA, n)
            for remote, local in self.engine.log[1:]
            for (there, n), here in zip(remote, local, strict=True)
        ]


def test_a_peer_is_met_by_reading_a_few_bytes_into_the_scratch_memory() -> None:
    engine, told = FakeEngine(), []
    transfers = Transfers(engine, ARENA, SCRATCH, told.append)
    transfers.handle(Meet(1, "a", b"good", BASE, 1 << 30))
    assert engine.under_way == {1: ([(BASE, NIXL_PROBE_BYTES)], [SCRATCH])}
    assert transfers.busy
    assert not transfers.turn()
    assert told == []
    engine.let_all()
    assert transfers.turn()
    assert told == [Met(1)]
    assert not transfers.busy


def test_a_probe_reads_no_more_than_the_arena_has() -> None:
    engine = FakeEngine()
    Transfers(engine, ARENA, SCRATCH, [].append).handle(Meet(1, "a", b"good", BASE, 3))
    assert engine.under_way == {1: ([(BASE, 3)], [SCRATCH])}


@pytest.mark.parametrize("failing", ["read", "done"])
def test_a_probe_that_fails_costs_the_peer_and_not_the_process(failing: str) -> None:
    bench = Bench()
    bench.engine.failing = failing
    bench.transfers.handle(Meet(2, "b", b"good", BASE, 1 << 30))
    bench.transfers.turn()
    assert bench.told == [Lost(2, "disconnected")]
    assert bench.engine.known == {"a"}


def test_metadata_that_nixl_does_not_take_costs_the_peer_alone() -> None:
    bench = Bench()
    bench.transfers.handle(Meet(2, "b", b"bad", BASE, 1 << 30))
    assert bench.told == [Lost(2, "NIXL does not take its metadata: no metadata")]
    bench.transfers.handle(Copy(9, 2, [(0, 0, 1)], True))
    assert bench.told[1:] == [Ended(9, False)]


def test_a_long_run_is_cut_and_the_window_is_kept() -> None:
    bench = Bench()
    size = 3 * NIXL_WINDOW_BYTES + 5
    bench.copy(1, (100, 200, size))
    assert len(bench.engine.under_way) == NIXL_WINDOW_BYTES // NIXL_TRANSFER_BYTES_MAX
    runs = bench.finish()
    assert bench.told == [Ended(1, True)]
    assert bench.engine.peak_bytes == NIXL_WINDOW_BYTES
    at = 0
    for there, here, length in runs:
        assert (there, here) == (100 + at, 200 + at)
        assert length <= NIXL_TRANSFER_BYTES_MAX
        at += length
    assert at == size


def test_a_move_that_comes_in_parts_ends_with_the_last() -> None:
    bench = Bench()
    bench.copy(1, (0, 0, 10), last=False)
    bench.finish()
    assert bench.told == []
    bench.copy(1, (10, 10, 10))
    bench.finish()
    assert bench.told == [Ended(1, True)]


def test_a_stop_ends_when_nothing_is_under_way() -> None:
    bench = Bench()
    bench.copy(1, (0, 0, 10 * NIXL_WINDOW_BYTES))
    bench.copy(2, (0, 0, MIB))
    started = len(bench.engine.log)
    bench.transfers.handle(Stop(1))
    assert bench.told == []
    bench.transfers.turn()
    assert bench.told == []
    bench.engine.let_all()
    bench.transfers.turn()
    assert bench.told == [Ended(1, False)]
    bench.finish()
    assert bench.told == [Ended(1, False), Ended(2, True)]
    assert len(bench.engine.log) == started + 1, "of the first move nothing more was started"


def test_a_stop_of_what_is_not_there_is_answered() -> None:
    bench = Bench()
    bench.transfers.handle(Stop(5))
    assert bench.told == [Ended(5, False)]


@pytest.mark.parametrize("failing", ["read", "done"])
def test_a_transfer_into_the_arena_that_fails_ends_the_process(failing: str) -> None:
    bench = Bench()
    bench.copy(1, (0, 0, 10))
    bench.engine.failing = failing
    steps = {"read": lambda: bench.copy(2, (0, 0, 10)), "done": bench.transfers.turn}
    with pytest.raises(UncertainError):
        steps[failing]()
    assert bench.told == [Lost(1, "disconnected")]


def test_a_peer_that_is_forgotten_is_forgotten_by_nixl() -> None:
    bench = Bench()
    bench.transfers.handle(Forget(1))
    bench.transfers.handle(Forget(1))
    assert bench.engine.known == set()
    bench.copy(1, (0, 0, 10))
    assert bench.told == [Ended(1, False)]


@settings(max_examples=25)
@given(st.lists(st.lists(st.integers(1, 9 * MIB), min_size=1, max_size=6), min_size=1, max_size=4), st.data())
def test_every_byte_of_every_move_is_copied_once(moves: list[list[int]], data: st.DataObject) -> None:
    bench, at, expected = Bench(), 0, []
    for number, lengths in enumerate(moves):
        runs = []
        for length in lengths:
            runs.append((at, 3 * at, length))
            at += length
        expected += runs
        bench.copy(number, *runs)
        bench.engine.complete |= data.draw(st.sets(st.sampled_from(sorted(bench.engine.under_way) or [0])))
        bench.transfers.turn()
    whole = iter(bench.finish())
    assert bench.engine.peak_bytes < NIXL_WINDOW_BYTES + NIXL_TRANSFER_BYTES_MAX
    for there, here, length in expected:
        got = 0
        while got < length:
            piece = next(whole)
            assert piece[:2] == (there + got, here + got)
            got += piece[2]
        assert got == length
    assert next(whole, None) is None
    assert sorted(bench.told, key=repr) == [Ended(number, True) for number in range(len(moves))]
