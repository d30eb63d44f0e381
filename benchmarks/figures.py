"""The harness of every benchmark: measure subject and baseline in turns, show a table, print JSON for programs.

The rules that make a figure honest:

1. Subject and baseline run in the same run, in turns, on the same bytes: what else the machine does hits both.
2. One round to warm up is thrown away; a figure is the median of the rounds that follow.
3. What has to be undone between two rounds is a `prepare` step of its own, and no clock runs meanwhile.
4. `ratio` is better when larger, whatever the unit, and 1 is the baseline.
5. A goal is of the value (`goal`) or of the ratio (`goal_ratio`), and is shown with whether it was met. A missed goal
   is printed like any other figure, and changes no exit code.
6. A row that could not be measured stays, and says why.

A benchmark is a module of this folder that ends in ``main(sections, title)``. A section is a name and a function that
takes the number of rounds and returns its rows; each section runs on its own, and one that fails ends no other:

    python -m benchmarks.NAME [--json] [--rounds N] [--only SECTION]…
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROUNDS = 15
TIME_UNITS = {"s": 1.0, "ms": 1e3, "µs": 1e6, "ns": 1e9}
LESS_IS_BETTER = (*TIME_UNITS, "MiB", "tokens")
COLUMNS = 100
"""What a table takes at most."""

Call = Callable[[], object]
Section = Callable[[int], "list[Figure]"]


class Skip(Exception):  # noqa: N818 - nobody erred
    """What a section needs is not on this machine; the message says what."""


@dataclass(frozen=True, slots=True)
class Figure:
    """One row: a subject's value beside its baseline's, both in `unit`."""

    name: str
    value: float | None
    unit: str
    baseline: str | None = None
    """What the baseline does, in words."""
    baseline_value: float | None = None
    goal: float | None = None
    """In `unit`: at most so much time or memory, or at least so much of a rate."""
    goal_ratio: float | None = None
    """At least so many times as good as the baseline."""
    skipped: str | None = None
    """Why there is no value."""

    @property
    def less_is_better(self) -> bool:
        """Times and sizes shrink, rates grow."""
        return self.unit in LESS_IS_BETTER

    @property
    def ratio(self) -> float | None:
        """How many times better than the baseline: larger is better."""
        if self.value is None or self.baseline_value is None:
            return None
        above, below = (self.baseline_value, self.value) if self.less_is_better else (self.value, self.baseline_value)
        return above / below if below else None

    @property
    def met(self) -> bool | None:
        """Whether all that is a goal was reached; None without a goal, or without a value."""
        met = []
        if self.goal is not None and self.value is not None:
            met.append(self.value <= self.goal if self.less_is_better else self.value >= self.goal)
        if self.goal_ratio is not None and self.ratio is not None:
            met.append(self.ratio >= self.goal_ratio)
        return all(met) if met else None

    def document(self) -> dict[str, Any]:
        """The row as programs read it."""
        row = asdict(self)
        goals = {name: row.pop(name) for name in ("goal", "goal_ratio", "skipped")}
        return {**row, "ratio": self.ratio, **goals, "met": self.met}


def skipped(name: str, unit: str, baseline: str, why: object, *, goal_ratio: float | None = None) -> Figure:
    """The row of a comparison that this machine cannot make."""
    return Figure(name, None, unit, baseline, goal_ratio=goal_ratio, skipped=str(why))


@dataclass(frozen=True, slots=True)
class Prepared:
    """An action that needs something done before each of its turns, outside of its time."""

    action: Call
    prepare: Call


def samples(*actions: Call | Prepared, rounds: int = ROUNDS) -> list[list[float]]:
    """The seconds of each action in each round, all of them run once a round, in an order that alternates."""
    turns = [one if isinstance(one, Prepared) else Prepared(one, _nothing) for one in actions]
    times: list[list[float]] = [[] for _ in turns]
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for turn in range(rounds + 1):
            order = range(len(turns)) if turn % 2 else reversed(range(len(turns)))
            for i in order:
                turns[i].prepare()
                start = time.perf_counter()
                turns[i].action()
                took = time.perf_counter() - start
                if turn:  # round 0 warms up
                    times[i].append(took)
    finally:
        if collecting:
            gc.enable()
    return times


def in_turns(*actions: Call | Prepared, rounds: int = ROUNDS) -> list[float]:
    """The median seconds of each action."""
    return [statistics.median(times) for times in samples(*actions, rounds=rounds)]


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of the values do not exceed."""
    ranked = sorted(values)
    return ranked[min(len(ranked) - 1, max(0, -int(-share * len(ranked) // 1) - 1))]


def timed(
    name: str,
    subject: Call | Prepared,
    baseline_name: str,
    baseline: Call | Prepared,
    *,
    unit: str = "ms",
    goal: float | None = None,
    goal_ratio: float | None = None,
    rounds: int = ROUNDS,
) -> Figure:
    """How long `subject` takes, beside `baseline`."""
    value, base = (seconds * TIME_UNITS[unit] for seconds in in_turns(subject, baseline, rounds=rounds))
    return Figure(name, value, unit, baseline_name, base, goal, goal_ratio)


def rated(
    name: str,
    subject: Call | Prepared,
    baseline_name: str,
    baseline: Call | Prepared,
    *,
    bytes_moved: int,
    goal: float | None = None,
    goal_ratio: float | None = None,
    rounds: int = ROUNDS,
) -> Figure:
    """How many GB (10^9 bytes) a second `subject` moves, beside `baseline`; both move `bytes_moved` a call."""
    value, base = (bytes_moved / seconds / 1e9 for seconds in in_turns(subject, baseline, rounds=rounds))
    return Figure(name, value, "GB/s", baseline_name, base, goal, goal_ratio)


def machine() -> dict[str, Any]:
    """Where the figures come from: a figure without its machine means nothing. Asked before the first of them: `load`
    is how many threads wanted a core in the minute before, so a machine that did something else says so."""
    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "load": round(os.getloadavg()[0], 1),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def goal_text(row: Mapping[str, Any]) -> str:
    """The goal of a row's document, and whether it was met: ``≥ 0.9 x met``."""
    parts = []
    if row.get("goal") is not None:
        parts.append(f"{'≤' if row['unit'] in LESS_IS_BETTER else '≥'} {row['goal']:g} {row['unit']}")
    if row.get("goal_ratio") is not None:
        parts.append(f"≥ {row['goal_ratio']:g} x")
    return ", ".join(parts) + {None: "", True: " met", False: " missed"}[row["met"]]


def value_text(row: Mapping[str, Any], name: str = "value") -> str:
    """A row's value, or its baseline's, with the unit; nothing where there is none."""
    return "" if row[name] is None else f"{row[name]:.4g} {row['unit']}"


def ratio_text(row: Mapping[str, Any]) -> str:
    """A row's ratio; nothing where there is none."""
    return "" if row["ratio"] is None else f"{row['ratio']:.2f} x"


def where_text(here: Mapping[str, Any]) -> str:
    """A machine's document in a line."""
    return (
        f"{here['cpu']}, {here['cores']} cores, {here['memory_bytes'] / 2**30:.0f} GiB, Python {here['python']}; "
        f"load before: {here['load']:g}"
    )


def show(figures: Sequence[Figure], title: str, here: Mapping[str, Any]) -> None:
    """The table for people, on stdout."""
    table = Table(title=title, title_justify="left")
    table.add_column("figure")
    for heading in ("value", "baseline", "ratio", "goal"):
        table.add_column(heading, justify="right", no_wrap=True)
    for figure in figures:
        row = figure.document()
        lines = [figure.name]
        if figure.baseline:
            lines.append(f"  against {figure.baseline}")
        if figure.skipped:
            lines.append(f"  not measured: {figure.skipped}")
        table.add_row(
            "\n".join(lines), value_text(row), value_text(row, "baseline_value"), ratio_text(row), goal_text(row)
        )
    console = Console(width=None if sys.stdout.isatty() else COLUMNS, highlight=False, markup=False)
    console.print(table)
    console.print(f"{where_text(here)}; medians of interleaved rounds\n")


def arguments(description: str) -> argparse.ArgumentParser:
    """What every benchmark can be told."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of a table")
    parser.add_argument("--rounds", type=int, default=ROUNDS, metavar="N", help=f"per figure (default {ROUNDS})")
    return parser


def measure(sections: Mapping[str, Section], rounds: int) -> tuple[list[Figure], bool]:
    """The rows of the sections in turn, and whether all of them ran: what failed is a row that says so."""
    rows: list[Figure] = []
    whole = True
    for name, section in sections.items():
        try:
            rows += section(rounds)
        except Skip as reason:
            rows.append(Figure(name, None, "", skipped=str(reason)))
        except Exception as error:  # noqa: BLE001 - one broken section must not take the figures of the others along
            traceback.print_exc()
            rows.append(Figure(name, None, "", skipped=f"it failed: {type(error).__name__}: {error}"))
            whole = False
    return rows, whole


def main(sections: Mapping[str, Section], title: str) -> None:
    """The command line of one benchmark. Exits with 1 when a section failed."""
    parser = arguments(title)
    parser.add_argument("--only", action="append", metavar="SECTION", choices=list(sections), help=", ".join(sections))
    told = parser.parse_args()
    if told.rounds < 1:
        parser.error("--rounds: at least 1")
    chosen = {name: section for name, section in sections.items() if not told.only or name in told.only}
    here = machine()
    rows, whole = measure(chosen, told.rounds)
    if told.json:
        json.dump({"machine": here, "figures": [row.document() for row in rows]}, sys.stdout, indent=2)
        print()
    else:
        show(rows, title, here)
    if not whole:
        sys.exit(1)


def _nothing() -> None:
    """Most actions need no preparation."""


def _cpu() -> str:
    """The processor's name, as Linux tells it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
