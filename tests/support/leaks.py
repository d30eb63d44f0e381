"""Finds what a test leaves behind: processes, threads, descriptors, ZeroMQ contexts, /dev/shm entries, asyncio tasks.

The theory: a test's own fixtures are gone when it ends, so whatever the process has then and did not have before is a
leak of that test. What a fixture of wider scope starts is that fixture's: it is allowed while the fixture lives, and
looked for when it ends.

    session, module, class fixtures set up      what they start is noted as theirs
      snapshot                                  before the first function-scoped fixture
        the test and its own fixtures
      compare                                   after the last of them was torn down
    session, module, class fixtures torn down   what is left of theirs is their leak

Something that is just going (a thread in its last instructions, a child not yet reaped by its owner) gets `SETTLE_S` to
go, and one garbage collection. A library that starts something once for the life of the process is either warmed up
before the first test (`warm_up`) or stands in `ALLOWED` with a reason. The hooks are in tests/support/leak_plugin.py.

Linux only, as kvmesh is: it reads /proc.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
import threading
import time
import uuid
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

import zmq

SETTLE_S = 2.0
_marked: list[str] = []
_cancel_all_tasks = asyncio.runners._cancel_all_tasks  # type: ignore[attr-defined]
MARKER = "PYTEST_LEAK_RUN"
"""An environment variable that every descendant of this run inherits, so that an orphan is found too."""

ALLOWED = {
    "thread": {
        "TMonitor": "tqdm's monitor: one for the life of the process, started by the first progress bar",
    },
    "process": {
        "multiprocessing.resource_tracker": "one for the life of the process, started by the first lock",
    },
    "fd": {
        "/dev/null": "libraries keep it open",
        "/dev/urandom": "libraries keep it open",
        "/dev/nvidia": "NVML and CUDA keep their devices open",
        "/proc/": "psutil and NVML keep some open",
    },
}
"""What may stay: by kind, a part of its description and the reason."""


class LeakError(AssertionError):
    """A test, or a fixture of wider scope, left something behind."""


@dataclass(frozen=True, slots=True)
class Resource:
    """One thing that can leak. Two are equal only if they are the very same thing, as `identity` tells."""

    kind: str
    identity: Hashable
    description: str = field(compare=False)

    @property
    def allowed(self) -> bool:
        """Whether it is one of the libraries' things that live as long as the process."""
        return any(part in self.description for part in ALLOWED.get(self.kind, ()))

    def __str__(self) -> str:
        return f"{self.kind}: {self.description}"


@dataclass(frozen=True, slots=True)
class Process(Resource):
    """A process, which can be ended."""

    pid: int = field(compare=False)


def snapshot() -> frozenset[Resource]:
    """Everything of this process that could be leaked, now."""
    found = {*_processes(), *_threads(), *_zmq_contexts(), *_fds(), *_shared_memory()}
    return frozenset(resource for resource in found if not resource.allowed)


def left_over(pick: Callable[[frozenset[Resource]], frozenset[Resource]]) -> list[Resource]:
    """What `pick` picks of a snapshot, after what was on its way out has gone."""
    ends = time.monotonic() + SETTLE_S
    left = pick(snapshot())
    if left:
        gc.collect()
        left = pick(snapshot())
    while left and time.monotonic() < ends:
        time.sleep(0.005)
        left = pick(snapshot())
    return sorted(left, key=str)


def end_processes(resources: list[Resource]) -> None:
    """Kill the leaked processes among `resources`, so that one leak does not disturb the tests that follow."""
    for resource in resources:
        if isinstance(resource, Process):
            with contextlib.suppress(ProcessLookupError):
                os.kill(resource.pid, signal.SIGKILL)


def warm_up() -> None:
    """Start what pyzmq starts once for the life of the process: the thread and context that collect sent frames."""
    if _marked:
        return  # a run inside a run (pytester) has the same process, and so the same things that live as long
    os.environ[MARKER] = uuid.uuid4().hex
    _marked.append(os.environ[MARKER])
    with zmq.Context() as context, context.socket(zmq.PUSH) as push, context.socket(zmq.PULL) as pull:
        pull.bind("inproc://warm-up")
        push.connect("inproc://warm-up")
        push.send(bytes(1 << 20), copy=False)
        pull.recv()


class LoopWatch(logging.Handler):
    """Notes what asyncio says only quietly: tasks pending when `asyncio.run` ends, and errors that nobody looked at."""

    TURNS = 10
    """Turns that the loop gets before its tasks are looked at: enough for one that was cancelled just before."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.notes: list[Resource] = []
        self._outer: list[logging.Handler] = []
        self._outer_cancel = _cancel_all_tasks

    def __enter__(self) -> LoopWatch:
        """Watch, alone: in a run inside the run (pytester) the outer watch rests."""
        logger = logging.getLogger("asyncio")
        self._outer, logger.handlers = logger.handlers, [self]
        self._outer_cancel = asyncio.runners._cancel_all_tasks  # type: ignore[attr-defined]
        asyncio.runners._cancel_all_tasks = self._note_pending  # type: ignore[attr-defined]
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger("asyncio").handlers = self._outer
        asyncio.runners._cancel_all_tasks = self._outer_cancel  # type: ignore[attr-defined]

    def emit(self, record: logging.LogRecord) -> None:
        """A message of asyncio's own at level ERROR: a destroyed task, an exception that was never retrieved."""
        text = record.getMessage()
        if record.exc_info and record.exc_info[1]:
            text += f" ({record.exc_info[1]!r})"
        self.notes.append(Resource("asyncio", len(self.notes), text))

    def take(self) -> list[Resource]:
        """The notes since the last call."""
        notes, self.notes = self.notes, []
        return notes

    def _note_pending(self, loop: asyncio.AbstractEventLoop) -> None:
        async def turns() -> set[asyncio.Task[object]]:
            for _ in range(self.TURNS):
                await asyncio.sleep(0)
            return {task for task in asyncio.all_tasks() if task is not asyncio.current_task()}

        if asyncio.all_tasks(loop):
            pending = loop.run_until_complete(turns())
            self.notes += [Resource("asyncio task", id(task), repr(task)) for task in pending]
        _cancel_all_tasks(loop)


def _processes() -> set[Resource]:
    """Children of this process, and every younger process that inherited this run's marker."""
    us, born = os.getpid(), int(_stat("self")[19])
    marker = f"{MARKER}={os.environ.get(MARKER, '')}".encode()
    found: set[Resource] = set()
    for name in os.listdir("/proc"):
        if not name.isdigit() or int(name) == us:
            continue
        try:
            stat = _stat(name)
            if int(stat[19]) < born:
                continue
            if int(stat[1]) != us and marker not in _read(f"/proc/{name}/environ").split(b"\0"):
                continue
            command = _read(f"/proc/{name}/cmdline").replace(b"\0", b" ").decode(errors="replace").strip()
        except (FileNotFoundError, PermissionError, ProcessLookupError):
            continue
        what = "ended but not waited for" if stat[0] == b"Z" else command
        found.add(Process("process", (name, stat[19]), f"pid {name}: {what}", int(name)))
    return found


def _read(path: str) -> bytes:
    with open(path, "rb", buffering=0) as file:  # not Path: this runs a few hundred times a test
        return file.read()


def _stat(pid: str) -> list[bytes]:
    """The fields of /proc/PID/stat from the third on: [0] the state, [1] the parent, [19] when it started."""
    return _read(f"/proc/{pid}/stat").rpartition(b")")[2].split()


def _threads() -> set[Resource]:
    return {
        Resource("thread", thread, f"{thread.name} ({type(thread).__name__})")
        for thread in threading.enumerate()
        if thread is not threading.current_thread()
    }


def _zmq_contexts() -> set[Resource]:
    """The background threads of libzmq: they live exactly as long as a context that was not terminated."""
    found = set()
    for entry in os.scandir("/proc/self/task"):
        try:
            name = _read(f"{entry.path}/comm").decode(errors="replace").strip()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if name.startswith("ZMQbg"):
            found.add(Resource("zmq context", entry.name, f"not terminated: its thread {name} lives"))
    return found


def _fds() -> set[Resource]:
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
            inode = os.fstat(int(name)).st_ino
        except OSError:  # the descriptor of the listing itself, or one that another thread closed meanwhile
            continue
        found.add(Resource("fd", (name, target, inode), f"{name} -> {target}"))
    return found


def _shared_memory() -> set[Resource]:
    return {Resource("/dev/shm entry", name, name) for name in os.listdir("/dev/shm")}
