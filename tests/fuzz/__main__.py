"""``python -m tests.fuzz``: so many inputs, a table of what became of them, and 1 if anything was found."""

from __future__ import annotations

import argparse
import secrets
import sys
import time

from .checks import MEMORY_FACTOR
from .running import MEMORY_ADDED_BYTES, Report, run_processes

PROGRESS_S = 10.0
FINDINGS_SHOWN = 5


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Fuzz the wire of the gossip protocol.")
    parser.add_argument("--inputs", type=int, default=1_000_000, help="how many (default: 1000000), in batches of 1000")
    parser.add_argument("--seconds", type=float, help="stop after so long, with what was done by then")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, help="replays a run (default: a new one, which is printed)")
    parser.add_argument("--first-batch", type=int, default=0, help="replays from here")
    args = parser.parse_args()
    seed = secrets.randbits(32) if args.seed is None else args.seed
    print(f"fuzzing the wire with {args.inputs} inputs, seed {seed}", flush=True)
    began = told = time.monotonic()
    report = Report()
    for report in run_processes(seed, args.inputs, args.first_batch, args.processes, args.seconds):
        if time.monotonic() - told > PROGRESS_S:
            told = time.monotonic()
            print(f"{report.inputs:>12} inputs, {len(report.findings)} findings", file=sys.stderr, flush=True)
    show(report, time.monotonic() - began)
    print(f"replay: python -m tests.fuzz --seed {seed} --first-batch {args.first_batch} --inputs {report.inputs}")
    return 1 if report.findings else 0


def show(report: Report, took_s: float) -> None:
    """The table, and the first findings."""
    targets = sorted({target for target, _ in report.outcomes})
    causes = sorted({cause for _, cause in report.outcomes})
    print("\n" + f"{'outcome':<16}" + "".join(f"{target:>12}" for target in targets))
    for cause in causes:
        print(f"{cause:<16}" + "".join(f"{report.outcomes[target, cause]:>12}" for target in targets))
    print(
        f"\n{report.inputs} inputs in {took_s:.1f} s, {report.inputs / took_s:.0f}/s; "
        f"{len(report.findings)} findings; slowest {report.slowest_s * 1e3:.1f} ms; "
        f"most memory of one input {report.peak_bytes / 1024:.0f} KiB "
        f"(at most {MEMORY_FACTOR} times its length beyond the base; processes held to +{MEMORY_ADDED_BYTES >> 20} MiB)"
    )
    for finding in report.findings[:FINDINGS_SHOWN]:
        print(f"\n{finding}")


if __name__ == "__main__":
    sys.exit(main())
