"""Agents whose mesh ports lie behind proxies, for faults of the data plane.

    with Plane(tmp_path) as plane:
        a, b = plane.agents("ab")
        plane.proxies["a"].down.bytes_per_s = 1_000_000      # what others read from a is slow
        a.process.kill()

Gossip does not pass the proxies: a node whose data plane is in trouble stays a member. All figures come from the agents
themselves (their stats as JSON) or from /proc.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import kvmesh
from tests.support import content
from tests.support.cluster import Cluster, Process
from tests.support.ports import free_port
from tests.support.proxy import Proxy
from tests.support.waiting import wait_until

LATE_S = 1.0
"""How much later than its deadline a get may return here: two cores, shared by all that a test runs."""


@dataclass(slots=True)
class Node:
    """One agent, and a client of it."""

    name: str
    process: Process
    mesh: kvmesh.Mesh
    proxy: Proxy
    port: int
    transports: str

    def stats(self, *path: str) -> Any:
        """The agent's counters, or a part of them."""
        found: Any = self.mesh.stats()
        for name in path:
            found = found[name]
        return found

    def put(self, space: kvmesh.Namespace, chain: Sequence[bytes]) -> list[bytes]:
        """Have the node hold a chain."""
        assert content.put(self.mesh, space, chain).refused == 0
        return list(chain)

    def get(self, space: kvmesh.Namespace, chain: Sequence[bytes], deadline_s: float) -> Got:
        """What of a chain comes within the deadline; every chunk is checked, and so is the time."""
        began = time.monotonic()
        count, reason = content.get(self.mesh, space, chain, deadline_s)
        took_s = time.monotonic() - began
        assert took_s <= deadline_s + LATE_S, f"{self.name} waited {took_s:.2f} s with a deadline of {deadline_s} s"
        return Got(count, reason, took_s)

    def holders(self, chain: Sequence[bytes]) -> dict[str, int]:
        """By node, how much of the chain's front it has, as this node knows."""
        return {holder["node"]: holder["run_chunks"] for holder in self.mesh.locate(chain)["holders"]}

    def quiet(self) -> bool:
        """Whether nothing is leased or reserved in its store."""
        store = self.stats("store")
        return bool(store["leases"] == 0 and store["reserved_chunks"] == 0)

    def wait_quiet(self, timeout_s: float) -> None:
        """Wait until all leases and reservations are back."""
        wait_until(self.quiet, timeout_s, f"{self.name} leases and reserves nothing")

    def descriptors(self) -> int:
        """Files and sockets that its process has open."""
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))


@dataclass(frozen=True, slots=True)
class Got:
    """How a get went."""

    count: int
    reason: str
    took_s: float


class Plane:
    """The agents of one test, by name. Use it as a context manager."""

    def __init__(self, folder: Path, *, transports: str = "zmq", environment: Mapping[str, str] | None = None) -> None:
        self.cluster = Cluster(folder, environment)
        self.transports = transports
        self.nodes: dict[str, Node] = {}
        self.proxies: dict[str, Proxy] = {}
        self._seeds = itertools.count(1)

    def __enter__(self) -> Plane:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for node in self.nodes.values():
            node.mesh.close()
        self.cluster.__exit__(kind, error, trace)
        for proxy in self.proxies.values():
            proxy.close()

    def agents(self, names: str, *, memory: str = "64MiB") -> list[Node]:
        """Start agents, one for each letter, and wait until all agents see each other."""
        for name in names:
            self.start(name, memory=memory)
        self.wait_alive()
        return [self.nodes[name] for name in names]

    def start(self, name: str, *, memory: str = "64MiB", transports: str = "") -> Node:
        """Start one agent, or start it again: at the same address, behind the same proxy."""
        before = self.nodes.get(name)
        port = free_port() if before is None else before.port
        if name not in self.proxies:
            self.proxies[name] = Proxy(f"127.0.0.1:{port}", seed=next(self._seeds))
        proxy = self.proxies[name]
        flags = ["--mesh-port", str(port), "--advertise-mesh-port", str(proxy.port)]
        flags += ["--transports", transports or self.transports]
        join = [node.process.gossip_address for node in self.nodes.values() if node.process.alive]
        process = self.cluster.agent(name, memory=memory, join=join, flags=flags)
        if before is not None:
            before.mesh.close()
        mesh = kvmesh.connect(process.socket)
        self.nodes[name] = Node(name, process, mesh, proxy, port, transports or self.transports)
        return self.nodes[name]

    def wait_alive(self, timeout_s: float = 20.0) -> None:
        """Wait until the agents that run see each other alive."""
        running = {name for name, node in self.nodes.items() if node.process.alive}
        for name in running:
            mesh = self.nodes[name].mesh
            wait_until(lambda mesh=mesh: running <= _alive(mesh), timeout_s, f"{name} sees {running} alive")

    def wait_known(self, chain: Sequence[bytes], holders: dict[str, int], *, to: str = "") -> None:
        """Wait until the nodes `to` (each letter one; else all) know that just these hold so much of a chain."""
        for name in to or self.nodes:
            node = self.nodes[name]
            try:
                wait_until(lambda node=node: node.holders(chain) == holders, 15, f"{name} knows that {holders} hold it")
            except AssertionError as error:
                raise AssertionError(f"{error}: it knows of {node.holders(chain)}; {node.mesh.map()}") from None


def _alive(mesh: kvmesh.Mesh) -> set[str]:
    return {node["name"] for node in mesh.nodes()["nodes"] if node["state"] == "alive"}


@contextmanager
def beside(work: Any, *arguments: Any) -> Iterator[Future[Any]]:
    """Do some work in a thread while the block runs; the block may ask for its result. What it raises is raised at the
    end of the block."""
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(work, *arguments)
        yield future
        future.result()
