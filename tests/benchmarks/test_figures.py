"""The harness of the benchmarks: its arithmetic, its turns, and the document that programs read."""

from __future__ import annotations

import json
import sys
import time

import pytest

from benchmarks import figures
from benchmarks.figures import Figure, Prepared, Skip, in_turns, main, percentile, rated, samples, skipped


@pytest.mark.parametrize(
    ("figure", "ratio", "met"),
    [
        (Figure("less time is better", 2.0, "ms", "b", 4.0, goal=2.0), 2.0, True),
        (Figure("more time is worse", 8.0, "ms", "b", 4.0, goal=2.0), 0.5, False),
        (Figure("a higher rate is better", 8.0, "GB/s", "b", 4.0, goal=8.0), 2.0, True),
        (Figure("a lower rate is worse", 2.0, "GB/s", "b", 4.0, goal=8.0), 0.5, False),
        (Figure("less memory is better", 2.0, "MiB", "b", 4.0, goal=2.0), 2.0, True),
        (Figure("a ratio that is reached", 8.0, "GB/s", "b", 4.0, goal_ratio=2.0), 2.0, True),
        (Figure("a ratio that is missed", 7.9, "GB/s", "b", 4.0, goal_ratio=2.0), 1.975, False),
        (Figure("a ratio of times", 8.0, "µs", "b", 4.0, goal_ratio=0.5), 0.5, True),
        (Figure("both goals count", 8.0, "GB/s", "b", 4.0, goal=9.0, goal_ratio=2.0), 2.0, False),
        (Figure("no baseline and no goal", 2.0, "s"), None, None),
        (Figure("nothing measured", None, "s", "b", goal=1.0, goal_ratio=1.0, skipped="why"), None, None),
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


def test_what_prepares_a_turn_comes_before_it_and_has_no_part_in_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def pass_time(seconds: float) -> None:
        nonlocal now
        now += seconds

    monkeypatch.setattr(time, "perf_counter", lambda: now)
    ran: list[str] = []
    subject = Prepared(lambda: (ran.append("run"), pass_time(1)), lambda: (ran.append("prepare"), pass_time(100)))
    assert samples(subject, lambda: pass_time(2), rounds=3) == [[1.0] * 3, [2.0] * 3]
    assert ran == ["prepare", "run"] * 4
    figure = rated("f", subject, "b", lambda: pass_time(2), bytes_moved=2 * 10**9, goal_ratio=2.0, rounds=3)
    assert (figure.value, figure.baseline_value, figure.met) == (2.0, 1.0, True)


def test_a_percentile_is_one_of_the_values() -> None:
    values = [float(value) for value in range(100, 0, -1)]
    assert [percentile(values, share) for share in (0.0, 0.5, 0.99, 1.0)] == [1.0, 50.0, 99.0, 100.0]
    assert percentile([7.0], 0.99) == 7.0


def test_programs_read_one_document(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark", "--json", "--rounds", "3"])
    asked: list[int] = []
    main({"one": lambda rounds: asked.append(rounds) or [Figure("f", 2.0, "ms", "b", 4.0, goal=3.0)]}, "title")
    document = json.loads(capsys.readouterr().out)
    assert set(document) == {"machine", "figures"}
    row = {"name": "f", "value": 2.0, "unit": "ms", "baseline": "b", "baseline_value": 4.0, "ratio": 2.0}
    assert document["figures"] == [{**row, "goal": 3.0, "goal_ratio": None, "skipped": None, "met": True}]
    assert asked == [3]


def test_people_read_the_same_rows(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark"])
    rows = [
        Figure("f" * 90, 2.0, "ms", "what it is measured against, in many words " * 2, 4.0, goal=3.0),
        Figure("g", 1.0, "GB/s", goal=3.0),
        Figure("h", 1.0, "GB/s", "b", 2.0, goal_ratio=0.5),
        skipped("i", "GB/s", "b", "no redis-server here", goal_ratio=4.0),
    ]
    main({"one": lambda _: rows}, "title")
    shown = capsys.readouterr().out
    for text in (
        "2.00 x",
        "≤ 3 ms met",
        "≥ 3 GB/s missed",
        "≥ 0.5 x met",
        "≥ 4 x",
        "not measured: no redis-server here",
    ):
        assert text in shown
    assert max(map(len, shown.splitlines())) <= figures.COLUMNS


def test_a_section_that_cannot_run_is_a_row_that_says_why_and_ends_no_other(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def absent(_: int) -> list[Figure]:
        raise Skip("there is no such thing here")

    def broken(_: int) -> list[Figure]:
        raise ValueError("a bug")

    sections = {"absent": absent, "fine": lambda _: [Figure("f", 1.0, "s")]}
    monkeypatch.setattr(sys, "argv", ["benchmark", "--json"])
    main(sections, "title")  # what is absent is no failure
    assert [row["skipped"] for row in json.loads(capsys.readouterr().out)["figures"]] == [
        "there is no such thing here",
        None,
    ]
    with pytest.raises(SystemExit) as left:
        main({"broken": broken, **sections}, "title")
    told = capsys.readouterr()
    assert left.value.code == 1
    assert [row["name"] for row in json.loads(told.out)["figures"]] == ["broken", "absent", "f"]
    assert "ValueError: a bug" in told.err


def test_sections_can_be_chosen(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    sections = {name: lambda _, name=name: [Figure(name, 1.0, "s")] for name in ("a", "b", "c")}
    monkeypatch.setattr(sys, "argv", ["benchmark", "--json", "--only", "c", "--only", "a"])
    main(sections, "title")
    assert [row["name"] for row in json.loads(capsys.readouterr().out)["figures"]] == ["a", "c"]
    monkeypatch.setattr(sys, "argv", ["benchmark", "--only", "nope"])
    with pytest.raises(SystemExit):
        main(sections, "title")
    assert "nope" in capsys.readouterr().err
