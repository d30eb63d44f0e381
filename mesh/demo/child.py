"""The first thing that each child process of the demo runs: it ties its life to the demo's, then becomes the real
program.

    python -m kvmesh.demo.child PARENT_PID PROGRAM ARGUMENT…

The kernel sends SIGTERM when the parent dies, even by SIGKILL, so the demo leaves no process behind.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main() -> None:
    """Ask for the signal, and become the program."""
    parent, command = int(sys.argv[1]), sys.argv[2:]
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it died before we asked
        sys.exit(1)
    os.execv(command[0], command)  # noqa: S606 - no shell is wanted


if __name__ == "__main__":
    main()
