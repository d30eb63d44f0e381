"""The demo's mesh: a controller, three agents and two engines on loopback, as child processes.

Engines load while agents start: an engine needs its agent only when the first question comes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kvmesh.demo.account import UnderWay
from kvmesh.demo.children import Child, Children, DemoError

CHUNK_TOKENS = 128
"""Half of the default: less of the document's end is computed again, which counts with a document of this length."""
MEMORY = "512MiB"
READY_S = 60.0
LOAD_SILENCE_S = 300.0
ANSWER_SILENCE_S = 300.0
"""The longest time between two events of an engine: a prefill on a slow machine tells each layer."""
POLL_S = 0.05


class Cluster:
    """The running processes. `agents` and `engines` by their node's name."""

    def __init__(self, children: Children) -> None:
        self._children = children
        self.controller_address = ""
        """Its mesh address, where it answers questions."""
        self.agents: dict[str, Child] = {}
        self.engines: dict[str, Child] = {}

    def start(self, model: Path, name: str, under_way: UnderWay) -> None:
        """Start everything, and wait until everything is ready."""
        controller = self._start("controller", "--name", "controller")
        for node in ("A", "B"):
            self.engines[node] = self._children.start(
                f"engine {node}",
                "-m",
                "kvmesh.demo.engine",
                str(model),
                name,
                str(self.socket(node)),
                str(CHUNK_TOKENS),
            )
        ready = controller.expect(READY_S)
        self.controller_address = str(ready["mesh_address"])
        for node in ("A", "B", "C"):
            place = ("--memory", MEMORY, "--socket", str(self.socket(node)))
            self.agents[node] = self._start("agent", "--name", node, *place, "--join", str(ready["gossip_address"]))
        for agent in self.agents.values():
            agent.expect(READY_S)
        self._load(under_way)

    def socket(self, node: str) -> Path:
        """Where the agent of `node` listens."""
        return self._children.folder / f"{node}.sock"

    def ask(
        self, node: str, document: str, question: str, *, mesh: bool, new_tokens: int, under_way: UnderWay
    ) -> dict[str, Any]:
        """Ask the engine of `node`, and return its answer event."""
        engine = self.engines[node]
        engine.send({"do": "ask", "document": document, "question": question, "mesh": mesh, "new_tokens": new_tokens})
        while True:
            event = engine.expect(ANSWER_SILENCE_S)
            if event["event"] == "answer":
                return event
            if event["event"] == "layer":
                under_way.step(
                    event["done"], event["of"], f"node {node} reads the prompt: layer {event['done']} of {event['of']}"
                )
            else:
                under_way.text(event["text"])

    def prefetch(self, node: str, document: str, question: str, *, by: str) -> int:
        """Ask the agent of `node`, from the engine of `by`, to fetch a prompt's chunks. Returns how many it will."""
        self.engines[by].send(
            {"do": "prefetch", "socket": str(self.socket(node)), "document": document, "question": question}
        )
        return int(self.engines[by].expect(ANSWER_SILENCE_S)["chunks"])

    def kill(self, node: str) -> None:
        """End a node's agent and engine without warning, as a power cut would."""
        self._children.kill(self.agents.pop(node))
        self._children.kill(self.engines.pop(node))

    def _start(self, role: str, *flags: str) -> Child:
        name = f"agent {flags[1]}" if role == "agent" else role
        place = ("--mesh-port", "0", "--gossip-port", "0", "--state-dir", str(self._children.folder))
        return self._children.start(name, "-m", "kvmesh.cli", role, "--json", *place, *flags)

    def _load(self, under_way: UnderWay) -> None:
        """Follow both engines until they are ready."""
        done = dict.fromkeys(self.engines, 0)
        steps = 1
        heard = time.monotonic()
        while any(done[node] < steps for node in done):
            for node, engine in self.engines.items():
                event = engine.receive(POLL_S)
                if event is None:
                    continue
                heard = time.monotonic()
                steps = event.get("of", steps)
                done[node] = steps if event["event"] == "ready" else event["done"]
                under_way.step(sum(done.values()), steps * len(done), f"engine {node}: {event.get('what', 'ready')}")
            if time.monotonic() - heard > LOAD_SILENCE_S:
                raise DemoError(f"the engines did not load their model within {LOAD_SILENCE_S:g} s")


def wait_for(condition: Callable[[], bool], timeout_s: float) -> float | None:
    """Wait until `condition()`; returns how long that took, or None when it did not come within `timeout_s`."""
    start = time.monotonic()
    while not condition():
        if time.monotonic() - start > timeout_s:
            return None
        time.sleep(POLL_S)
    return time.monotonic() - start
