"""Real agents of HashiCorp's Serf, to speak memberlist's protocol with.

    with SerfAgent("s", tmp_path) as serf:
        serf.join("127.0.0.1:7951")
        wait_until(lambda: serf.states() == {"s": "alive", "ours": "alive"}, 10, "serf sees both")
        assert serf.complaints() == []

An agent gets free ports and a file for its log. Whatever it says at the levels WARN and ERR is a complaint, and a test
ends with none but those that it provoked on purpose, and names. `Profile` has Serf's timing, to compute its bounds.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import signal
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.support.ports import free_port
from tests.support.waiting import wait_until

READY_TIMEOUT_S = 15.0
COMMAND_TIMEOUT_S = 15.0
LOG_CHARACTERS_SHOWN = 4000
UNKNOWN_USER_MESSAGE = r"serf: Received message of unknown type: 75$"
"""The one complaint that is always in order: a head of ours, a user message that begins with "K" (75)."""
_COMPLAINT = re.compile(r"\[(WARN|ERR|ERROR)\]")


@dataclass(frozen=True, slots=True)
class Profile:
    """Serf's timing. Sources: hashicorp/memberlist, config.go; serf's defaults for what memberlist leaves open."""

    name: str
    probe_interval_s: float
    suspicion_mult: int
    suspicion_max_timeout_mult: int
    push_pull_interval_s: float

    def failed_within_s(self, nodes: int) -> float:
        """The longest time from a crash until an agent says *failed*, when it is itself well.

        It comes to a node at most two rounds of its list after the last time, learns after an interval that nobody
        reaches it, and waits for the suspicion, which is long only where others could have confirmed it.
        """
        found_s = (2 * (nodes - 1) + 1) * self.probe_interval_s
        suspected_s = self.suspicion_mult * max(1.0, math.log10(nodes)) * self.probe_interval_s
        if nodes - 2 >= self.suspicion_mult - 2:
            suspected_s *= self.suspicion_max_timeout_mult
        return found_s + suspected_s


LAN = Profile("lan", 1.0, 4, 6, 30.0)
LOCAL = Profile("local", 1.0, 3, 6, 15.0)


def installed() -> bool:
    """Whether there is a `serf` to run."""
    return shutil.which("serf") is not None


class SerfAgent:
    """One `serf agent`. Use it as a context manager; meant for one thread."""

    def __init__(
        self,
        name: str,
        folder: Path,
        *,
        key: str = "",
        join: Iterable[str] = (),
        profile: Profile = LAN,
        tags: dict[str, str] | None = None,
    ) -> None:
        self.name = name
        self.profile = profile
        self.address = f"127.0.0.1:{free_port()}"
        self._rpc = f"127.0.0.1:{free_port()}"
        self._log = folder / f"serf-{name}.log"
        command = ["serf", "agent", f"-node={name}", f"-bind={self.address}", f"-rpc-addr={self._rpc}"]
        command += [f"-profile={profile.name}", "-log-level=debug"]
        command += [f"-encrypt={key}"] if key else []
        command += [f"-join={address}" for address in join]
        command += [f"-tag={tag}={value}" for tag, value in (tags or {}).items()]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def __enter__(self) -> SerfAgent:
        self.wait_ready()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    @property
    def log(self) -> str:
        """All that it said so far."""
        return self._log.read_text(errors="replace")

    @property
    def alive(self) -> bool:
        """Whether it has not ended."""
        return self._process.poll() is None

    def wait_ready(self) -> None:
        """Wait until it listens, and has joined whom it was to join."""
        wait_until(self._ready_now, READY_TIMEOUT_S, f"serf {self.name} is ready")

    def members(self) -> dict[str, dict[str, Any]]:
        """What it says of everyone, by name: "addr", "status" (alive, leaving, left, failed), "tags", ..."""
        document = json.loads(self._command("members", "-format=json"))
        return {member["name"]: member for member in document["members"]}

    def states(self) -> dict[str, str]:
        """The state of everyone, by name."""
        return {name: member["status"] for name, member in self.members().items()}

    def join(self, address: str) -> None:
        """Have it join somebody who is there."""
        self._command("join", address)

    def command(self, *arguments: str) -> str:
        """What another command of Serf's (`keys`, `event`, ...) prints when this agent performs it."""
        return self._command(*arguments)

    def leave(self) -> None:
        """Ask it to leave, and wait for its end."""
        self._process.send_signal(signal.SIGINT)
        code = self._process.wait(READY_TIMEOUT_S)
        assert code == 0, f"serf {self.name} ended with {code}; its log:\n{self._log_end()}"

    def kill(self) -> None:
        """End it without warning, paused or not."""
        self._process.kill()
        self._process.wait()

    def pause(self) -> None:
        """Stop it in its tracks."""
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on."""
        self._process.send_signal(signal.SIGCONT)

    def complaints(self, *provoked: str) -> list[str]:
        """Its warnings and errors, but for the note on unknown user messages, and those that match what this test
        provoked on purpose (regular expressions)."""
        allowed = re.compile("|".join([UNKNOWN_USER_MESSAGE, *provoked]))
        return [line for line in self.log.splitlines() if _COMPLAINT.search(line) and not allowed.search(line)]

    def says(self, pattern: str) -> int:
        """How many lines of its log match."""
        return sum(bool(re.search(pattern, line)) for line in self.log.splitlines())

    def _ready_now(self) -> bool:
        if not self.alive:
            raise AssertionError(f"serf {self.name} ended with {self._process.returncode}; its log:\n{self._log_end()}")
        return "Log data will now stream in" in self.log

    def _command(self, subcommand: str, *arguments: str) -> str:
        result = subprocess.run(
            ["serf", subcommand, f"-rpc-addr={self._rpc}", *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=COMMAND_TIMEOUT_S,
            check=False,
        )
        assert result.returncode == 0, f"serf {subcommand} said {result.stderr.strip() or result.stdout.strip()!r}"
        return result.stdout

    def _log_end(self) -> str:
        return self.log[-LOG_CHARACTERS_SHOWN:]
