"""``python -m tests.sim``: discovery in virtual time. Exit 1 when a seed failed, or a goal was missed.

| ``--seeds 200``         | chaos: many seeds, and a table of what they showed                              |
| ``--first N --seeds 1`` | one of them again, exactly                                                      |
| ``--figures quick``     | what gossip costs and how fast it is, for its profiles                          |
| (neither)               | 200 seeds of gossip, 60 of the static list, and the quick figures               |
| ``--short``             | 60, 20, and the quick figures of our own profile: for CI                        |
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Sequence

from kvmesh.discovery.swim.profile import PROFILES
from tests.sim.figures import FULL, QUICK, Plan, Row, figures, growth_rows
from tests.sim.measures import quantile
from tests.sim.scenario import Report, Scenario

LOSSES = (0.0, 0.1, 0.3)
GOSSIP_SEEDS, STATIC_SEEDS = 200, 60
SHORT_GOSSIP_SEEDS, SHORT_STATIC_SEEDS = 60, 20
BOTH = ("lan", "memberlist-lan")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.sim", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, help="how many of chaos, shared out over the losses")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--nodes", type=int, default=8)
    parser.add_argument("--loss", type=float, help="of all seeds; else it follows from the seed: 0, 0.1, 0.3")
    parser.add_argument("--membership", choices=("gossip", "static"), default="gossip")
    parser.add_argument("--short", action="store_true", help="less of everything")
    parser.add_argument("--figures", choices=("quick", "full"))
    parser.add_argument("--profile", choices=("both", *PROFILES), default="both", help="of the figures")
    parser.add_argument("--hours", type=float, help="of bad weather, in the figures")
    parser.add_argument("--only", default="", metavar="WORDS", help="only the jobs of the figures whose title has them")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    options = parser.parse_args(arguments)
    if options.seeds is not None:
        fine = _chaos(options.seeds, options.membership, options)
        if options.figures is not None:
            fine &= _figures(options)
    elif options.figures is not None:
        fine = _figures(options)
    else:
        gossip, static = GOSSIP_SEEDS, STATIC_SEEDS
        if options.short:
            gossip, static, options.profile = SHORT_GOSSIP_SEEDS, SHORT_STATIC_SEEDS, "lan"
        fine = _chaos(gossip, "gossip", options)
        fine &= _chaos(static, "static", options)
        fine &= _figures(options)
    return 0 if fine else 1


# --- chaos -----------------------------------------------------------------------------------------------------------


def _chaos(count: int, membership: str, options: argparse.Namespace) -> bool:
    begin = time.monotonic()
    seeds = range(options.first, options.first + count)
    jobs = [
        (seed, options.nodes, LOSSES[seed % len(LOSSES)] if options.loss is None else options.loss, membership)
        for seed in seeds
    ]
    reports = []
    for report in _each(jobs, options.processes):
        reports.append(report)
        if report.problems:
            print(f"\nseed {report.seed} ({membership}) failed: {'; '.join(report.problems[:4])}", file=sys.stderr)
            print(f"  replay: {report.replay}", file=sys.stderr)
        if len(reports) % 10 == 0 or len(reports) == len(jobs):
            print(f"\r{membership}: {len(reports)}/{len(jobs)} seeds", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    reports.sort(key=lambda report: report.seed)
    out = sys.stderr if options.json else sys.stdout
    print(f"chaos with {membership} membership", file=out)
    _print_table(_chaos_table(reports), out)
    failed = [report for report in reports if report.problems]
    for report in failed:
        print(f"seed {report.seed} failed: {'; '.join(report.problems[:4])}\n  replay: {report.replay}", file=out)
    print(f"{len(reports)} seeds in {time.monotonic() - begin:.1f} s, {len(failed)} failed\n", file=out)
    return not failed


def _each(jobs: list[tuple[int, int, float, str]], processes: int) -> Iterator[Report]:
    if processes <= 1 or len(jobs) <= 1:
        yield from map(run_seed, jobs)
        return
    with multiprocessing.get_context("fork").Pool(processes) as pool:
        yield from pool.imap_unordered(run_seed, jobs)


def run_seed(job: tuple[int, int, float, str]) -> Report:
    """One seed; an exception of the product is a problem like any other."""
    seed, nodes, loss, membership = job
    scenario = Scenario(seed, nodes=nodes, loss=loss, membership=membership)
    try:
        return scenario.run()
    except Exception as error:  # noqa: BLE001 - whatever it is, it belongs to this seed, and others go on
        scenario.report.problems.append(f"{type(error).__name__}: {error}")
        return scenario.report


def _chaos_table(reports: list[Report]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [(
        "loss", "seeds", "nodes", "virtual_s", "changes", "all_know_p50_s", "all_know_p99_s", "unseen",
        "false_failures", "messages", "failed",
    )]  # fmt: skip
    for loss in sorted({report.loss for report in reports}):
        found = [report for report in reports if report.loss == loss]
        delays = [delay for report in found for delay in report.delays_s]
        rows.append((
            f"{loss:.0%}", str(len(found)), str(found[0].nodes), f"{sum(report.virtual_s for report in found):.0f}",
            str(len(delays)), f"{quantile(delays, 0.5):.3f}", f"{quantile(delays, 0.99):.3f}",
            str(sum(report.unseen for report in found)), str(sum(report.false_failures for report in found)),
            str(sum(report.messages for report in found)), str(sum(bool(report.problems) for report in found)),
        ))  # fmt: skip
    return rows


# --- figures ---------------------------------------------------------------------------------------------------------


def _figures(options: argparse.Namespace) -> bool:
    plan: Plan = FULL if options.figures == "full" else QUICK
    if options.hours is not None:
        plan = Plan(**{name: getattr(plan, name) for name in Plan.__slots__} | {"hours": options.hours})
    profiles = BOTH if options.profile == "both" else (options.profile,)
    rows = figures(plan, profiles, processes=options.processes, only=options.only)
    rows += growth_rows(rows)
    if options.json:
        print(json.dumps({"figures": [_as_json(row) for row in rows]}, indent=2))
    else:
        _print_table(_figure_table(rows, profiles), sys.stdout)
    missed = [row for row in rows if not row.is_met]
    for row in missed:
        print(f"goal missed: {row.name} ({row.profile}): {row.value:.3g} {row.unit}, not {row.goal:g}", file=sys.stderr)
    return not missed


def _as_json(row: Row) -> dict[str, object]:
    never = row.value == float("inf")
    return {
        "name": row.name, "profile": row.profile, "value": None if never else row.value, "unit": row.unit,
        "goal": row.goal, "met": None if row.goal is None else row.is_met,
    }  # fmt: skip


def _figure_table(rows: list[Row], profiles: Sequence[str]) -> list[tuple[str, ...]]:
    table = [("figure", *profiles, "unit", "goal")]
    for name in dict.fromkeys(row.name for row in rows):
        found = {row.profile: row for row in rows if row.name == name}
        goals = [f"<= {row.goal:g}" for row in found.values() if row.goal is not None]
        cells = (f"{found[profile].value:.3g}" if profile in found else "-" for profile in profiles)
        table.append((name, *cells, next(iter(found.values())).unit, goals[0] if goals else ""))
    return table


def _print_table(rows: list[tuple[str, ...]], out: object) -> None:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        first, *rest = (cell.ljust(width) if not column else cell.rjust(width)
                        for column, (cell, width) in enumerate(zip(row, widths, strict=True)))  # fmt: skip
        print("  ".join([first, *rest]).rstrip(), file=out)  # type: ignore[call-overload]


if __name__ == "__main__":
    sys.exit(main())
