"""``python -m tests.soak --minutes 10 --seed N``: agents, clients and faults at random. Exit 1 when anything was found.

--nodes 5 --clients 6     how many of each
--folder DIR              keep the logs there
"""

from __future__ import annotations

import argparse
import secrets
import sys
import tempfile
from pathlib import Path

from tests.soak.flips import flip_bits
from tests.soak.run import soak, told
from tests.support import leaks


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, help="of what is done (default: a new one, which is printed)")
    parser.add_argument("--nodes", type=int, default=5)
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--folder", type=Path, help="for the logs of all processes (default: thrown away)")
    parser.add_argument("--flips", type=int, help="flip so many bits instead")
    options = parser.parse_args()
    seed = secrets.randbits(32) if options.seed is None else options.seed
    if options.flips is None:
        print(
            f"soak: {options.minutes:g} min, {options.nodes} nodes, {options.clients} clients, seed {seed}", flush=True
        )
    leaks.warm_up()
    with tempfile.TemporaryDirectory(prefix="kvmesh-soak-") as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if options.flips is not None:
            return _flips(folder, options.flips, seed)
        outcome = soak(folder, 60 * options.minutes, seed, nodes=options.nodes, clients=options.clients, tell=_tell)
    print(outcome)
    print(f"again: python -m tests.soak --minutes {options.minutes:g} --seed {seed} --nodes {options.nodes}")
    return 1 if outcome.findings else 0


def _flips(folder: Path, flips: int, seed: int) -> int:
    print(f"{flips} flipped bits, seed {seed}", flush=True)
    counts, findings = flip_bits(folder, flips, seed, tell=_tell)
    print("\n".join([told(counts), *(f"FOUND {finding}" for finding in findings), f"{len(findings)} findings"]))
    return 1 if findings else 0


def _tell(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
