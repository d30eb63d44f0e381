"""The harness of every benchmark: measure subject and baseline in turns, show a table, print JSON for programs.

The rules that make a figure honest:

1. Subject and baseline run in the same process, in turns, on the same bytes: what else the machine does hits both.
2. One round to warm up is thrown away; a figure is the median of the rounds that follow.
3. `ratio` is better when larger, whatever the unit, and 1 is the baseline.
4. A goal is shown with whether it was met. A missed goal is printed like any other figure, and changes no exit code.

A benchmark is a module of this folder that ends in ``main(figures, title)``; `figures` returns its rows:

    python -m benchmarks.NAME [--json]
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
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROUNDS = 15
TIME_UNITS = {"s": 1.0, "ms": 1e3, "µs": 1e6, "ns": 1e9}


@dataclass(frozen=True, slots=True)
class Figure:
    """One row: a subject's value beside its baseline's, both in `unit`."""

    name: str
    value: float
    unit: str
    baseline: str | None = None
    """What the baseline does, in words."""
    baseline_value: float | None = None
    goal: float | None = None
    """In `unit`: at most so much time, or at least so much of a rate."""

    @property
    def less_is_better(self) -> bool:
        """Times shrink, rates grow."""
        return self.unit in TIME_UNITS

    @property
    def ratio(self) -> float | None:
        """How many times better than the baseline: larger is better."""
        if self.baseline_value is None:
            return None
        pair = (self.baseline_value, self.value) if self.less_is_better else (self.value, self.baseline_value)
        return pair[0] / pair[1]

    @property
    def met(self) -> bool | None:
        """Whether the goal was reached; None without a goal."""
        if self.goal is None:
            return None
        return self.value <= self.goal if self.less_is_better else self.value >= self.goal

    def document(self) -> dict[str, Any]:
        """The row as programs read it."""
        row = asdict(self)
        goal = row.pop("goal")
        return {**row, "ratio": self.ratio, "goal": goal, "met": self.met}


def in_turns(*actions: Callable[[], object], rounds: int = ROUNDS) -> list[float]:
    """The median seconds of each action, all of them run once a round, in an order that alternates."""
    times: list[list[float]] = [[] for _ in actions]
    collecting = gc.isenabled()
    gc.disable()
    try:
        for turn in range(rounds + 1):
            order = range(len(actions)) if turn % 2 else reversed(range(len(actions)))
            for i in order:
                start = time.perf_counter()
                actions[i]()
                took = time.perf_counter() - start
                if turn:  # round 0 warms up
                    times[i].append(took)
    finally:
        if collecting:
            gc.enable()
    return [statistics.median(row) for row in times]


def timed(
    name: str,
    subject: Callable[[], object],
    baseline_name: str,
    baseline: Callable[[], object],
    *,
    unit: str = "ms",
    goal: float | None = None,
    rounds: int = ROUNDS,
) -> Figure:
    """How long `subject` takes, beside `baseline`."""
    value, base = (seconds * TIME_UNITS[unit] for seconds in in_turns(subject, baseline, rounds=rounds))
    return Figure(name, value, unit, baseline_name, base, goal)


def rated(
    name: str,
    subject: Callable[[], object],
    baseline_name: str,
    baseline: Callable[[], object],
    *,
    bytes_moved: int,
    goal: float | None = None,
    rounds: int = ROUNDS,
) -> Figure:
    """How many GB (10^9 bytes) a second `subject` moves, beside `baseline`; both move `bytes_moved` a call."""
    value, base = (bytes_moved / seconds / 1e9 for seconds in in_turns(subject, baseline, rounds=rounds))
    return Figure(name, value, "GB/s", baseline_name, base, goal)


def machine() -> dict[str, Any]:
    """Where the figures come from: a figure without its machine means nothing."""
    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def show(figures: list[Figure], title: str) -> None:
    """The table for people, on stdout."""
    table = Table(title=title, title_justify="left")
    table.add_column("figure")
    for heading in ("value", "baseline", "ratio", "goal"):
        table.add_column(heading, justify="right", no_wrap=True)
    for figure in figures:
        base = "" if figure.baseline_value is None else f"{figure.baseline_value:.4g} {figure.unit}"
        goal = "" if figure.goal is None else f"{'≤' if figure.less_is_better else '≥'} {figure.goal:g} {figure.unit}"
        met = {None: "", True: " met", False: " missed"}[figure.met]
        table.add_row(
            figure.name + (f"\n  against {figure.baseline}" if figure.baseline else ""),
            f"{figure.value:.4g} {figure.unit}",
            base,
            "" if figure.ratio is None else f"{figure.ratio:.2f} x",
            goal + met,
        )
    here = machine()
    console = Console()
    console.print(table)
    console.print(f"{here['cpu']}, {here['cores']} cores, Python {here['python']}; medians of interleaved rounds\n")


def main(figures: Callable[[], list[Figure]], title: str) -> None:
    """The command line of one benchmark."""
    parser = argparse.ArgumentParser(description=title)
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of a table")
    as_json = parser.parse_args().json
    rows = figures()
    if as_json:
        json.dump({"machine": machine(), "figures": [row.document() for row in rows]}, sys.stdout, indent=2)
        print()
    else:
        show(rows, title)


def _cpu() -> str:
    """The processor's name, as Linux tells it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
