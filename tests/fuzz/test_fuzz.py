"""The fuzz target itself, and as much fuzzing as a test run has time for. `python -m tests.fuzz` does more."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable

import pytest

from kvmesh.discovery.wire import Cause, Ping, encode
from tests.fuzz.checks import OK, WAITING, Checks
from tests.fuzz.inputs import Input, Inputs, Target
from tests.fuzz.running import Runner, run_here

SEED = 20_260_101
INPUTS = 20_000


@pytest.mark.slow  # a second of fuzzing
def test_nothing_is_found() -> None:
    report = run_here(SEED, INPUTS)
    assert report.findings == []
    assert report.inputs == INPUTS
    outcomes = {outcome for _, outcome in report.outcomes}
    assert outcomes == {OK, WAITING, *Cause}, "every outcome is reached: the inputs are neither too wild nor too tame"
    for target in Target:
        assert report.outcomes[target.name.lower(), OK] > INPUTS // 200


def test_a_seed_gives_the_same_inputs() -> None:
    first, second = Inputs(7), Inputs(7)
    assert first.batch(3, 100) == second.batch(3, 100)
    second.batch(4, 10)
    assert first.batch(3, 100) == second.batch(3, 100)
    assert first.batch(3, 100) != first.batch(4, 100)


def test_a_finding_says_how_to_replay_it(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = Runner(SEED)

    def broken(given: Input) -> str:
        raise IndexError("out of range")

    monkeypatch.setattr(runner._checks, "outcome", broken)
    report = runner.run(5, 3)
    assert len(report.findings) == 3
    assert f"--seed {SEED} --first-batch 5" in report.findings[0]
    assert "IndexError: out of range" in report.findings[0]


@pytest.mark.parametrize(
    "takes_too_much",
    [lambda: bytes(8 << 20), lambda: [[] for _ in range(100_000)]],
    ids=["bytes", "objects"],
)
def test_memory_is_measured(monkeypatch: pytest.MonkeyPatch, takes_too_much: Callable[[], object]) -> None:
    checks = Checks(Inputs(SEED))
    given = Input(Target.DECODE, encode(Ping(1, "a")))
    assert 0 < checks.memory(given) < 100_000
    kept: list[object] = []
    monkeypatch.setattr("tests.fuzz.checks.decode", lambda data: kept.append(takes_too_much()))
    monkeypatch.setattr(checks, "_read_again", lambda message: None)
    with pytest.raises(AssertionError, match="bytes of memory"):
        checks.memory(given)


def test_pieces_must_mean_the_same() -> None:
    checks = Checks(Inputs(SEED))
    with pytest.raises(AssertionError, match="in pieces"):
        checks.in_pieces(Input(Target.STREAM, b"\x02\x81"), random.Random(1), OK)


@pytest.mark.slow  # starts two processes
def test_the_command() -> None:
    command = [sys.executable, "-m", "tests.fuzz", "--inputs", "3000", "--seed", str(SEED)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == 0, ran.stderr
    assert "3000 inputs in" in ran.stdout
    assert " 0 findings" in ran.stdout
    assert f"replay: python -m tests.fuzz --seed {SEED} --first-batch 0 --inputs 3000" in ran.stdout
