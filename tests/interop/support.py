"""Meshes of ours and of Serf's agents: all with one key, or all in the clear."""

from __future__ import annotations

import base64
import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import kvmesh
from tests.support.cluster import Cluster, Process
from tests.support.serf import LOCAL, SerfAgent
from tests.support.waiting import wait_until

SLACK_S = 3.0
"""What a busy machine may add to a bound."""
KINDS = ("clear", "encrypted")


class Mesh:
    """Agents of both kinds, all with one key or with none."""

    def __init__(self, folder: Path, key: str, stack: ExitStack) -> None:
        self.folder = folder
        self.key = key
        self.serfs: list[SerfAgent] = []
        self._stack = stack
        self._cluster = stack.enter_context(Cluster(folder))

    def serf(self, name: str, *, join: Sequence[str] = (), key: str | None = None, **more: Any) -> SerfAgent:
        """A Serf agent that is ready. It has Serf's faster profile: these tests wait for it to find failures."""
        key = self.key if key is None else key
        agent = SerfAgent(name, self.folder, key=key, join=join, profile=LOCAL, **more)
        self._stack.callback(agent.kill)
        self.serfs.append(agent)
        agent.wait_ready()
        return agent

    def ours(
        self, name: str, *, join: Sequence[str] = (), key: str | None = None, flags: Sequence[str] = ()
    ) -> Process:
        """An agent of ours, not yet waited for."""
        key = self.key if key is None else key
        return self._cluster.agent(
            name, memory="16MiB", join=join, flags=[*key_flags(self.folder, name, key), *flags], wait=False
        )

    def assert_no_complaints(self, *provoked: str) -> None:
        """None of the Serf agents has said a word that this test did not provoke."""
        complaints = {agent.name: agent.complaints(*provoked) for agent in self.serfs}
        assert not any(complaints.values()), complaints


def key_of(kind: str) -> str:
    """A new key for a mesh of this kind; empty for one in the clear."""
    return new_key() if kind == "encrypted" else ""


def new_key() -> str:
    return base64.b64encode(os.urandom(32)).decode()


def key_flags(folder: Path, name: str, key: str) -> list[str]:
    if not key:
        return []
    file = folder / f"{name}.key"
    file.touch(mode=0o600)
    file.write_text(f"{key}\n")
    return ["--key-file", str(file)]


def wait_serf_states(agents: Sequence[SerfAgent], wanted: dict[str, str], timeout_s: float) -> None:
    for agent in agents:
        wait_until(lambda agent=agent: agent.states() == wanted, timeout_s, f"serf {agent.name} sees {wanted}")


def counters(process: Process) -> dict[str, Any]:
    with kvmesh.connect(process.socket) as connection:
        return dict(connection.stats()["discovery"])
