"""``python -m tests.sim --seeds 200``: many seeds of the simulator, and a table of what they showed. Exit 1 when one
failed."""

from __future__ import annotations

import argparse
import sys
import time

from tests.sim.scenario import Report, Scenario

LOSSES = (0.0, 0.1, 0.3)


def quantile(values: list[float], share: float) -> float:
    """The nearest-rank quantile; NaN of nothing."""
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)] if ordered else float("nan")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sim", description=__doc__)
    parser.add_argument("--seeds", type=int, default=200, help="how many, shared out over the losses")
    parser.add_argument("--first", type=int, default=0, help="the first seed (to replay one: --first N --seeds 1)")
    parser.add_argument("--nodes", type=int, default=8)
    options = parser.parse_args(arguments)
    begin, show = time.monotonic(), sys.stderr.isatty()
    reports: dict[float, list[Report]] = {loss: [] for loss in LOSSES}
    seeds = range(options.first, options.first + options.seeds)
    for number, seed in enumerate(seeds, 1):
        loss = LOSSES[seed % len(LOSSES)]
        reports[loss].append(Scenario(seed, nodes=options.nodes, loss=loss).run())
        if show:
            print(f"\r{number}/{len(seeds)} seeds", end="", file=sys.stderr, flush=True)
    if show:
        print("\r" + " " * 24 + "\r", end="", file=sys.stderr)
    print_table(reports)
    failed = [report for found in reports.values() for report in found if report.problems]
    for report in sorted(failed, key=lambda report: report.seed):
        print(f"seed {report.seed} failed: {'; '.join(report.problems[:4])}")
        print(f"  replay: python -m tests.sim --first {report.seed} --seeds 1 --nodes {report.nodes}")
    print(f"{len(seeds)} seeds in {time.monotonic() - begin:.1f} s, {len(failed)} failed")
    return 1 if failed else 0


def print_table(reports: dict[float, list[Report]]) -> None:
    head = (
        "loss", "seeds", "nodes", "virtual_s", "changes", "all_know_p50_s", "all_know_p99_s", "unseen",
        "false_failures", "messages", "failed",
    )  # fmt: skip
    rows = [head]
    for loss, found in reports.items():
        if not found:
            continue
        delays = [delay for report in found for delay in report.delays_s]
        rows.append((
            f"{loss:.0%}", str(len(found)), str(found[0].nodes), f"{sum(report.virtual_s for report in found):.0f}",
            str(len(delays)), f"{quantile(delays, 0.5):.3f}", f"{quantile(delays, 0.99):.3f}",
            str(sum(report.unseen for report in found)), str(sum(report.false_failures for report in found)),
            str(sum(report.messages for report in found)), str(sum(bool(report.problems) for report in found)),
        ))  # fmt: skip
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    for row in rows:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))


if __name__ == "__main__":
    sys.exit(main())
