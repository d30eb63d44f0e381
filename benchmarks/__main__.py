"""Every benchmark, one after the other: ``python -m benchmarks``. Each runs in a process of its own, as alone."""

from __future__ import annotations

import pkgutil
import subprocess
import sys
from pathlib import Path

HARNESS = {"__main__", "agents", "figures"}


def subjects() -> list[str]:
    """The names of the benchmarks: the modules of this folder, less the harness."""
    return [found.name for found in pkgutil.iter_modules([str(Path(__file__).parent)]) if found.name not in HARNESS]


def main() -> int:
    """Run them all; the exit code is 1 if one of them failed to run."""
    codes = [
        subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], check=False).returncode for name in subjects()
    ]
    return int(any(codes))


if __name__ == "__main__":
    sys.exit(main())
