"""The harness of the benchmarks: its arithmetic, its turns, and the document that programs read."""

from __future__ import annotations

import json
import sys

import pytest

from benchmarks.__main__ import subjects
from benchmarks.figures import Figure, in_turns, main


@pytest.mark.parametrize(
    ("figure", "ratio", "met"),
    [
        (Figure("less time is better", 2.0, "ms", "b", 4.0, goal=2.0), 2.0, True),
        (Figure("more time is worse", 8.0, "ms", "b", 4.0, goal=2.0), 0.5, False),
        (Figure("a higher rate is better", 8.0, "GB/s", "b", 4.0, goal=8.0), 2.0, True),
        (Figure("a lower rate is worse", 2.0, "GB/s", "b", 4.0, goal=8.0), 0.5, False),
        (Figure("no baseline and no goal", 2.0, "s"), None, None),
    ],
    ids=lambda value: value.name if isinstance(value, Figure) else "",
)
def test_a_ratio_is_better_when_larger_and_a_goal_is_met_or_not(
    figure: Figure, ratio: float | None, met: bool | None
) -> None:
    assert (figure.ratio, figure.met) == (ratio, met)


def test_subject_and_baseline_run_in_turns_after_a_warm_up() -> None:
    ran: list[str] = []
    assert len(in_turns(lambda: ran.append("a"), lambda: ran.append("b"), rounds=2)) == 2
    assert "".join(ran) == "baabba"


def test_programs_read_one_document(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark", "--json"])
    main(lambda: [Figure("f", 2.0, "ms", "b", 4.0, goal=3.0)], "title")
    document = json.loads(capsys.readouterr().out)
    assert set(document) == {"machine", "figures"}
    row = {"name": "f", "value": 2.0, "unit": "ms", "baseline": "b", "baseline_value": 4.0}
    assert document["figures"] == [{**row, "ratio": 2.0, "goal": 3.0, "met": True}]


def test_people_read_the_same_rows(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark"])
    main(lambda: [Figure("f", 2.0, "ms", "b", 4.0, goal=3.0), Figure("g", 1.0, "GB/s", goal=3.0)], "title")
    shown = capsys.readouterr().out
    assert "2.00 x" in shown
    assert "≤ 3 ms met" in shown
    assert "≥ 3 GB/s missed" in shown


def test_every_subject_is_found() -> None:
    assert {"keys"} <= set(subjects())
    assert not {"figures", "__main__"} & set(subjects())
