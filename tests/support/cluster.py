"""Real processes for tests: ``kvmesh agent`` and ``kvmesh controller``, started, stopped, killed and paused.

    with Cluster(tmp_path) as cluster:
        controller = cluster.controller("c")
        a = cluster.agent("a", join=[controller.gossip_address])
        b = cluster.agent("b", join=[controller.gossip_address, a.gossip_address])
        a.kill()

Every process gets free ports, a socket and a state folder of its own, and files for what it prints: no pipe can fill up
and stop it. A process that does not become ready, or does not end, fails the test with the end of its log. Leaving the
block ends what is left, by process id, whatever state it is in. Meant for one thread.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.support.waiting import wait_until

READY_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 15.0
COMMAND_TIMEOUT_S = 60.0
LOG_CHARACTERS_SHOWN = 4000


def kvmesh(*arguments: str) -> list[str]:
    """The command line of the CLI, run by the interpreter that runs the tests."""
    return [sys.executable, "-m", "kvmesh.cli", *arguments]


class Process:
    """One long-running ``kvmesh`` command. `ready` is the JSON document that it printed when it was."""

    def __init__(self, name: str, command: Sequence[str], folder: Path, environment: Mapping[str, str]) -> None:
        self.name = name
        self.ready: dict[str, Any] = {}
        self._out = folder / f"{name}.out"
        self._log = folder / f"{name}.log"
        with self._out.open("wb") as out, self._log.open("ab") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=log, env={**os.environ, **environment}
            )

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    @property
    def address(self) -> str:
        """Where peers reach its transport: ``HOST:PORT``."""
        return str(self.ready["mesh_address"])

    @property
    def gossip_address(self) -> str:
        """Where peers gossip with it: ``HOST:PORT``. With a static membership there is none."""
        return str(self.ready["gossip_address"])

    @property
    def socket(self) -> Path:
        """An agent's unix socket."""
        return Path(self.ready["socket"])

    @property
    def alive(self) -> bool:
        """Whether it has not ended."""
        return self._process.poll() is None

    @property
    def log(self) -> str:
        """What it wrote to stderr so far."""
        return self._log.read_text(errors="replace")

    def wait_ready(self, timeout_s: float = READY_TIMEOUT_S) -> None:
        """Wait for the document that says it is ready."""
        self.ready = self._wait(self._ready_now, timeout_s, "is ready")

    def wait_ended(self, timeout_s: float = STOP_TIMEOUT_S) -> int:
        """Wait for its end, and return the exit code (``-N``: ended by signal N)."""
        self._wait(lambda: not self.alive, timeout_s, "has ended")
        return self._process.wait()

    def stop(self, timeout_s: float = STOP_TIMEOUT_S) -> None:
        """Ask it to leave (SIGTERM), and check that it did so with exit code 0."""
        self._process.send_signal(signal.SIGTERM)
        code = self.wait_ended(timeout_s)
        assert code == 0, f"{self.name} ended with {code} after SIGTERM; its log:\n{self._log_end()}"

    def kill(self) -> None:
        """End it without warning (SIGKILL), paused or not; one that has ended already is left alone."""
        self._process.kill()
        self._process.wait()

    def pause(self) -> None:
        """Stop it in its tracks (SIGSTOP): it is there, and answers nothing."""
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on (SIGCONT)."""
        self._process.send_signal(signal.SIGCONT)

    def _ready_now(self) -> dict[str, Any]:
        if not self.alive:
            raise AssertionError(f"{self.name} ended with {self._process.returncode}; its log:\n{self._log_end()}")
        with contextlib.suppress(json.JSONDecodeError):  # nothing yet, or half of the document
            return dict(json.loads(self._out.read_text()))
        return {}

    def _wait(self, condition: Any, timeout_s: float, what: str) -> Any:
        try:
            return wait_until(condition, timeout_s, f"{self.name} {what}")
        except AssertionError as error:
            raise AssertionError(f"{error}\nits log:\n{self._log_end()}") from None

    def _log_end(self) -> str:
        return self.log[-LOG_CHARACTERS_SHOWN:] or "(empty)"


class Cluster:
    """The processes of one test. Use it as a context manager; names are unique, and can be used again after the end.

    With `membership` "static", ``join=`` takes mesh addresses (`Process.address`) instead of gossip addresses.
    """

    def __init__(
        self, folder: Path, environment: Mapping[str, str] | None = None, *, membership: str = "gossip"
    ) -> None:
        self.folder = folder
        self._membership = membership
        self.processes: list[Process] = []
        self._environment = dict(environment or {})
        # A unix socket's path may have 107 bytes, and pytest's folders are long.
        self._sockets = Path(tempfile.mkdtemp(prefix="kvmesh-"))

    def __enter__(self) -> Cluster:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self.processes:
            process.kill()
        shutil.rmtree(self._sockets)

    def agent(
        self,
        name: str,
        *,
        memory: str = "64MiB",
        join: Iterable[str] = (),
        flags: Sequence[str] = (),
        wait: bool = True,
    ) -> Process:
        """Start an agent that joins the addresses `join`, and wait until it is ready (unless `wait` is false)."""
        own = ("--memory", memory, "--socket", str(self._sockets / f"{name}.sock"))
        return self._start("agent", name, join, [*own, *flags], wait)

    def controller(
        self, name: str, *, join: Iterable[str] = (), flags: Sequence[str] = (), wait: bool = True
    ) -> Process:
        """Start a controller, and wait until it is ready (unless `wait` is false)."""
        return self._start("controller", name, join, flags, wait)

    def command(self, *arguments: str, timeout_s: float = COMMAND_TIMEOUT_S) -> subprocess.CompletedProcess[str]:
        """Run one ``kvmesh`` command to its end, whatever its exit code."""
        return subprocess.run(
            kvmesh(*arguments),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
            env={**os.environ, **self._environment},
        )

    def _start(self, role: str, name: str, join: Iterable[str], flags: Sequence[str], wait: bool) -> Process:
        joins = [part for address in join for part in ("--join", address)]
        place = ("--mesh-port", "0", "--gossip-port", "0", "--state-dir", str(self.folder / f"{name}.state"))
        command = kvmesh(role, "--json", "--name", name, "--membership", self._membership, *place, *joins, *flags)
        process = Process(name, command, self.folder, self._environment)
        self.processes.append(process)
        if wait:
            process.wait_ready()
        return process
