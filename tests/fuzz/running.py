"""Runs batches of inputs, in this process or in several, and adds up what became of them.

A process of several may take only `MEMORY_ADDED_BYTES` beyond what it has once everything is imported: an input that
takes more is a `MemoryError`, and a finding.
"""

from __future__ import annotations

import itertools
import multiprocessing
import random
import resource
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

from kvmesh.transport.limits import MIB

from .checks import Checks
from .inputs import Inputs, Target

BATCH_INPUTS = 1000
BATCHES_PER_TASK = 20
MEMORY_SAMPLE = 97
"""One input in so many has its memory measured, which is slow; and each that was made to take much."""
PIECES_SAMPLE = 7
"""One stream in so many is fed in pieces as well."""
MEMORY_ADDED_BYTES = 256 * MIB


@dataclass
class Report:
    """What became of inputs."""

    inputs: int = 0
    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    """By target and outcome."""
    findings: list[str] = field(default_factory=list)
    peak_bytes: int = 0
    """The most memory of an input whose memory was measured."""
    slowest_s: float = 0.0

    def add(self, other: Report) -> None:
        """Both together."""
        self.inputs += other.inputs
        self.outcomes += other.outcomes
        self.findings += other.findings
        self.peak_bytes = max(self.peak_bytes, other.peak_bytes)
        self.slowest_s = max(self.slowest_s, other.slowest_s)


class Runner:
    """Runs batches in this process."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._inputs = Inputs(seed)
        self._checks = Checks(self._inputs)

    def run(self, batch: int, inputs: int = BATCH_INPUTS) -> Report:
        """The first `inputs` of a batch."""
        report = Report()
        rng = random.Random(batch)
        clock = time.perf_counter
        for number, given in enumerate(self._inputs.batch(batch, BATCH_INPUTS)[:inputs]):
            began = clock()
            try:
                outcome = self._checks.outcome(given)
                report.slowest_s = max(report.slowest_s, clock() - began)
                if given.target is Target.STREAM and number % PIECES_SAMPLE == 0:
                    self._checks.in_pieces(given, rng, outcome)
                if given.heavy or number % MEMORY_SAMPLE == 0:
                    report.peak_bytes = max(report.peak_bytes, self._checks.memory(given))
            except Exception:  # noqa: BLE001 - whatever it is, it is a finding
                outcome = "FINDING"
                replay = f"python -m tests.fuzz --seed {self._seed} --first-batch {batch} --inputs {BATCH_INPUTS}"
                report.findings.append(f"{replay}   # number {number}\n{given}\n{traceback.format_exc()}")
            report.inputs += 1
            report.outcomes[given.target.name.lower(), outcome] += 1
        return report


def run_here(seed: int, inputs: int, first_batch: int = 0) -> Report:
    """So many inputs, in this process."""
    runner, report, batch = Runner(seed), Report(), first_batch
    while report.inputs < inputs:
        report.add(runner.run(batch, min(BATCH_INPUTS, inputs - report.inputs)))
        batch += 1
    return report


_runner: Runner | None = None


def _prepare(seed: int) -> None:
    global _runner
    _runner = Runner(seed)
    for batch in range(2):
        _runner.run(batch)
    has = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (has + MEMORY_ADDED_BYTES,) * 2)


def _task(batches: list[int]) -> Report:
    assert _runner is not None
    report = Report()
    for batch in batches:
        report.add(_runner.run(batch))
    return report


def run_processes(seed: int, inputs: int, first_batch: int, processes: int, seconds: float | None) -> Iterator[Report]:
    """The same in processes of their own: a report each time that there is something new, of everything so far."""
    report = Report()
    ends = time.monotonic() + seconds if seconds else None
    count = -(-inputs // BATCH_INPUTS)
    tasks = iter(
        list(range(begins, min(begins + BATCHES_PER_TASK, first_batch + count)))
        for begins in range(first_batch, first_batch + count, BATCHES_PER_TASK)
    )
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, spawn, initializer=_prepare, initargs=(seed,)) as pool:
        waiting = {pool.submit(_task, task) for task in itertools.islice(tasks, 2 * processes)}
        while waiting:
            done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            for future in done:
                report.add(future.result())
                if (ends is None or time.monotonic() < ends) and (task := next(tasks, None)) is not None:
                    waiting.add(pool.submit(_task, task))
            yield report
