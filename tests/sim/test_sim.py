"""Some twenty seeds of the simulator with every test run; ``make sim`` runs hundreds."""

from __future__ import annotations

import pytest

from tests.sim.__main__ import LOSSES, main, quantile
from tests.sim.clockwork import Clockwork
from tests.sim.scenario import Scenario


@pytest.mark.slow  # 90 virtual seconds of four nodes each
@pytest.mark.parametrize("seed", range(20))
def test_all_maps_are_true_after_the_calm(seed: int) -> None:
    loss = LOSSES[seed % len(LOSSES)]
    report = Scenario(seed, nodes=4, loss=loss).run()
    assert not report.problems, f"replay: python -m tests.sim --first {seed} --seeds 1 --nodes 4"
    assert report.false_failures == 0


@pytest.mark.slow  # one seed, twice
def test_a_seed_replays_exactly() -> None:
    first, second = (Scenario(5, nodes=3, loss=0.1).run() for _ in range(2))
    assert first == second
    assert first.messages > 0


@pytest.mark.slow  # one seed
def test_the_command_prints_a_table_and_succeeds(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--seeds", "1", "--nodes", "3"]) == 0
    out = capsys.readouterr().out
    assert "all_know_p99_s" in out
    assert "1 seeds in" in out


def test_the_clockwork_runs_in_the_order_of_time() -> None:
    clockwork, seen = Clockwork(), list[str]()
    clockwork.after(2.0, lambda: seen.append("late"))
    clockwork.after(1.0, lambda: clockwork.at(0.0, lambda: seen.append("now")))
    clockwork.run_until(clockwork.now + 1.0)
    assert seen == ["now"]
    clockwork.run_until(clockwork.now + 1.0)
    assert seen == ["now", "late"]


def test_quantiles() -> None:
    assert quantile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert quantile([3.0, 1.0, 2.0], 0.99) == 3.0
    assert quantile([], 0.5) != quantile([], 0.5)
