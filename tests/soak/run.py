"""One soak from start to end: nodes, clients and weather; then calm, and the account.

A seed decides what is done and in which order; what comes of it depends on the machine, so a run is not replayed
exactly. A finding is one of: a wrong byte, a get that was late, an error of a node that was in order, something that is
not back when all is calm, a line of ERROR in a log, a process that was left behind.
"""

from __future__ import annotations

import random
import time
import uuid
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.soak import account
from tests.soak.clients import CHAINS, CHUNKS_MAX, SPACES, Client, Seat, Tally
from tests.soak.faults import Weather
from tests.support.content import chain_of
from tests.support.plane import Node, Plane
from tests.support.waiting import wait_until

TRANSPORTS = ("zmq", "shm,zmq", "shm,nixl,zmq", "zmq", "nixl,zmq")
"""Of the nodes, in turn."""
MEMORIES = ("24MiB", "64MiB", "160MiB")
CALM_S = 30.0
"""How long after the last fault all must be back."""
TOLD_EVERY_S = 10.0
MARKER = "KVMESH_SOAK"


@dataclass(slots=True)
class Outcome:
    """What a soak found."""

    seconds: float = 0.0
    counts: dict[str, int] = field(default_factory=dict)
    faults: dict[str, int] = field(default_factory=dict)
    flips: int = 0
    moved: Counter[str] = field(default_factory=Counter)
    """What the transports of all nodes counted since their last start."""
    findings: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [
            f"clients, {self.seconds:.0f} s: {told(self.counts)}",
            f"nodes, at the end: {told(self.moved)}",
            f"faults: {told(self.faults)}; {self.flips} bits flipped",
            *(f"FOUND {finding}" for finding in self.findings),
            f"{len(self.findings)} findings",
        ]
        return "\n".join(lines)


def told(counts: Mapping[str, int]) -> str:
    """Counts as a line."""
    return ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))


def soak(
    folder: Path, seconds: float, seed: int, *, nodes: int = 5, clients: int = 6, tell: Callable[[str], None]
) -> Outcome:
    """Run one soak in `folder`."""
    rng = random.Random(f"{seed} soak")
    marker = uuid.uuid4().hex
    tally, outcome = Tally(), Outcome()
    with Plane(folder, environment={MARKER: marker}) as plane:
        names = [f"n{number}" for number in range(nodes)]
        memory = {name: MEMORIES[number % len(MEMORIES)] for number, name in enumerate(names)}
        for number, name in enumerate(names):
            plane.start(name, memory=memory[name], transports=TRANSPORTS[number % len(TRANSPORTS)])
        plane.wait_alive()
        seats = {name: Seat(name, plane.nodes[name].process.socket) for name in names}
        weather = Weather(plane, seats, rng, memory)
        threads = [Client(number, list(seats.values()), tally, seed) for number in range(clients)]
        began = time.monotonic()
        try:
            for thread in threads:
                thread.start()
            _let_pass(seconds, weather, plane, tally, tell)
        finally:
            weather.clear()
            for thread in threads:
                thread.end()
            for thread in threads:
                thread.join()
        tell("calm: faults are over, clients have gone")
        outcome.findings += _account(plane)
        outcome.seconds = time.monotonic() - began
        outcome.flips = sum(side.flips for proxy in plane.proxies.values() for side in (proxy.up, proxy.down))
        for node in plane.nodes.values():
            outcome.moved.update(node.stats("transport"))
        outcome.findings += account.logs(plane.cluster.processes)
    outcome.findings += account.strays(f"{MARKER}={marker}")
    outcome.counts, outcome.faults = dict(tally.counts), dict(weather.counts)
    outcome.findings = tally.findings + outcome.findings
    if not tally.counts["chunks_fetched"]:
        outcome.findings.append("no chunk came from a peer: the soak proves nothing")
    return outcome


def _let_pass(seconds: float, weather: Weather, plane: Plane, tally: Tally, tell: Callable[[str], None]) -> None:
    began = told = time.monotonic()
    while (now := time.monotonic()) < began + seconds:
        weather.turn()
        for process in plane.cluster.processes:
            if not process.alive and any(node.process is process for node in plane.nodes.values()):
                _died(process.name, weather, tally, process.log)
        if now - told >= TOLD_EVERY_S:
            told = now
            counts = tally.counts
            tell(
                f"{now - began:6.0f} s  gets {counts['gets']}, fetched {counts['chunks_fetched']} chunks, "
                f"faults {sum(weather.counts.values())}, findings {counts['findings']}"
            )
        time.sleep(0.02)


def _died(name: str, weather: Weather, tally: Tally, log: str) -> None:
    if weather.is_down(name):
        return
    raise AssertionError(f"{name} ended by itself; its log:\n{log[-4000:]}")


def _account(plane: Plane) -> list[str]:
    """What is not as it should be once all is calm."""
    findings: list[str] = []
    try:
        plane.wait_alive(CALM_S)
    except AssertionError as error:
        return [str(error)]
    ends = time.monotonic() + CALM_S
    for node in plane.nodes.values():
        try:
            wait_until(
                lambda node=node: not account.open_things(node), max(0.1, ends - time.monotonic()), "all is back"
            )
        except AssertionError:
            findings.append(f"{node.name} still has {account.open_things(node)}")
    for node in plane.nodes.values():
        findings += [f"{node.name}: {what}" for what in account.arena(node)]
        findings += [f"{node.name}: {what}" for what in account.process(node, len(plane.nodes) - 1)]
        findings += _all_right(node)
    for node in plane.nodes.values():
        for space in SPACES:
            for seed in range(CHAINS):
                node.mesh.delete(chain_of(space, seed, CHUNKS_MAX))
        store = node.stats("store")
        if store["chunks"] or store["used_bytes"] != store["quarantined_bytes"]:
            findings.append(f"{node.name} was emptied, and has {store}")
    return findings


def _all_right(node: Node) -> list[str]:
    """Look at every chunk that a node holds at the front of a chain."""
    try:
        for space in SPACES:
            for seed in range(CHAINS):
                chain = chain_of(space, seed, CHUNKS_MAX)
                node.get(space, chain[: node.holders(chain).get(node.name, 0)], 2.0)
    except AssertionError as error:
        return [f"{node.name}, afterwards: {error}"]
    return []
