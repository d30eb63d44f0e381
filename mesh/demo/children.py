"""The demo's child processes: started, spoken to in JSON lines, and ended, whatever happens.

Children are in process groups of their own, so a Ctrl-C in the terminal reaches the demo alone, which then ends them in
order. Their stderr goes to a file each; the end of it is told when a child ends unasked. One reader thread a child;
everything else runs in the main thread, where children must be started as well: the kernel ties a child to the thread
that started it.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from kvmesh.transport.errors import KVMeshError

END_TIMEOUT_S = 5.0
LOG_LINES_SHOWN = 12
_ENVIRONMENT = {"OMP_WAIT_POLICY": "passive"}
"""What children get beside our environment. By default OpenMP's threads spin while they wait for each other: a little
quicker on an idle machine, but many times slower on one where something else wants a core. A laptop is the latter.
"""


class DemoError(KVMeshError):
    """A part of the demo failed. The message says which, with the end of its log."""


class Child:
    """One child process that prints JSON documents, one a line."""

    def __init__(self, name: str, command: Sequence[str], log: Path) -> None:
        self.name = name
        self._log = log
        self._documents: queue.Queue[dict[str, Any] | None] = queue.Queue()
        wrapper = [sys.executable, "-m", "kvmesh.demo.child", str(os.getpid())]
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                [*wrapper, sys.executable, *command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                process_group=0,
                env=_ENVIRONMENT | os.environ,
            )
        self._reader = threading.Thread(target=self._read, name=f"demo-{name}", daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    def send(self, document: dict[str, Any]) -> None:
        """Write one document to its stdin."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(document).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            raise self._ended() from None

    def receive(self, timeout_s: float) -> dict[str, Any] | None:
        """The next document that it printed; None when there is none within `timeout_s`. Raises `DemoError` at its
        end.
        """
        try:
            document = self._documents.get(timeout=timeout_s)
        except queue.Empty:
            return None
        if document is None:
            self._documents.put(None)
            raise self._ended()
        return document

    def expect(self, timeout_s: float) -> dict[str, Any]:
        """The next document, or `DemoError` when it takes longer than `timeout_s`."""
        document = self.receive(timeout_s)
        if document is None:
            raise DemoError(f"{self.name} did not answer within {timeout_s:g} s{self._log_end()}")
        return document

    def kill(self) -> None:
        """End it without warning."""
        self._process.kill()
        self._close(END_TIMEOUT_S)

    def ask_to_end(self) -> None:
        """Tell it to leave; `end` waits for that."""
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGTERM)

    def end(self, timeout_s: float) -> None:
        """Wait until it has left, at most `timeout_s`; then kill it."""
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._close(END_TIMEOUT_S)

    def _close(self, timeout_s: float) -> None:
        self._process.wait(timeout_s)
        self._reader.join(timeout_s)
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # what was written to a process that is gone
            self._process.stdin.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                with contextlib.suppress(json.JSONDecodeError):
                    self._documents.put(json.loads(line))
        self._documents.put(None)

    def _ended(self) -> DemoError:
        code = self._process.wait()
        return DemoError(f"{self.name} ended unasked with {code}{self._log_end()}")

    def _log_end(self) -> str:
        lines = self._log.read_text(errors="replace").splitlines()[-LOG_LINES_SHOWN:]
        return "; the end of its log:\n" + "\n".join(f"    {line}" for line in lines) if lines else ""


class Children:
    """All child processes and the folder of their sockets and logs. Leaving the block ends and removes them."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="kvmesh-demo-"))
        self._children: list[Child] = []

    def start(self, name: str, *command: str) -> Child:
        """Start ``python command…``."""
        child = Child(name, command, self.folder / f"{name.replace(' ', '-')}.log")
        self._children.append(child)
        return child

    def kill(self, child: Child) -> None:
        """End one child without warning."""
        child.kill()
        self._children.remove(child)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # A second Ctrl-C must not leave processes behind: what follows is bounded.
        ends = time.monotonic() + END_TIMEOUT_S
        with _signals_ignored():
            for child in self._children:
                child.ask_to_end()
            for child in reversed(self._children):
                child.end(max(0.0, ends - time.monotonic()))
            shutil.rmtree(self.folder, ignore_errors=True)


@contextlib.contextmanager
def _signals_ignored() -> Any:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
