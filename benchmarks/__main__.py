"""Every benchmark, one after the other: ``python -m benchmarks``. Each runs in a process of its own, as alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent


def subjects() -> list[str]:
    """The names of the benchmarks: the modules of this folder that can be run, less this one."""
    runnable = (path.stem for path in FOLDER.glob("*.py") if '__name__ == "__main__"' in path.read_text())
    return sorted(set(runnable) - {"__main__"})


def main() -> int:
    """Run them all; the exit code is 1 if one of them failed to run."""
    codes = [
        subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], check=False).returncode for name in subjects()
    ]
    return int(any(codes))


if __name__ == "__main__":
    sys.exit(main())
