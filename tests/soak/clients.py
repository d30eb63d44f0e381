"""The clients of a soak: threads that get, put, prefetch and delete random chains, and look at every byte that comes.

A chunk's bytes follow from its key (tests/support/content.py), so nothing has to be remembered. What a client may meet
while its node is killed or stopped is an `AgentUnavailableError` or a lost lease; anything else, and anything while its
node is in order, is a finding.
"""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import kvmesh
from kvmesh.transport.errors import KVMeshError
from tests.support import content
from tests.support.content import KIB, MIB, chain_of, space_of

LATE_S = 2.0
"""How much later than its deadline a get may return: every core is busy, and processes are stopped and started."""
SPACES = (space_of(4 * KIB), space_of(64 * KIB), space_of(512 * KIB), space_of(2 * MIB))
CHAINS = 60
"""Chains of each namespace: few enough that nodes share them, and more than the arenas hold."""
CHUNKS_MAX = 24
FINDINGS_MAX = 20


@dataclass(slots=True)
class Seat:
    """One node as clients see it: where it listens, and whether something is done to it just now."""

    name: str
    socket: Path
    lock: threading.Lock = field(default_factory=threading.Lock)
    generation: int = 0
    """Grows when the node starts again, and when it is stopped or goes on."""
    in_trouble: bool = False

    def change(self, *, in_trouble: bool, socket: Path | None = None) -> None:
        """From now on the node is in trouble, or is not any more."""
        with self.lock:
            self.generation += 1
            self.in_trouble = in_trouble
            self.socket = socket or self.socket

    def look(self) -> tuple[int, bool]:
        """(Generation, whether in trouble): equal before and after means that nothing was done to it meanwhile."""
        with self.lock:
            return self.generation, self.in_trouble


@dataclass(slots=True)
class Tally:
    """What all clients saw together."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    counts: Counter[str] = field(default_factory=Counter)
    findings: list[str] = field(default_factory=list)

    def add(self, **more: int) -> None:
        """Count."""
        with self.lock:
            self.counts.update(more)

    def find(self, what: str) -> None:
        """Something is wrong."""
        with self.lock:
            self.counts["findings"] += 1
            if len(self.findings) < FINDINGS_MAX:
                self.findings.append(what)


class Client(threading.Thread):
    """One client. It sits down at one node after the other."""

    def __init__(self, number: int, seats: list[Seat], tally: Tally, seed: int) -> None:
        super().__init__(name=f"client-{number}")
        self._seats = seats
        self._tally = tally
        self._rng = random.Random(f"{seed} client {number}")
        self._ending = threading.Event()

    def end(self) -> None:
        """Do no more."""
        self._ending.set()

    def run(self) -> None:
        while not self._ending.is_set():
            seat = self._rng.choice(self._seats)
            before = seat.look()
            if before[1]:
                self._ending.wait(0.05)
                continue
            try:
                with kvmesh.connect(seat.socket) as mesh:
                    for _ in range(self._rng.randrange(1, 30)):
                        if self._ending.is_set() or seat.look() != before:
                            break
                        self._act(mesh, seat)
            except KVMeshError as error:
                if seat.look() == before:
                    self._tally.find(f"{seat.name}, which was in order: {type(error).__name__}: {error}")
                self._tally.add(refused=1)
            except AssertionError as error:
                self._tally.find(f"{seat.name}: {error}")
            except Exception as error:  # noqa: BLE001 - it ends this client's turn, and is told
                self._tally.find(f"{seat.name}: {type(error).__name__}: {error}")

    def _act(self, mesh: kvmesh.Mesh, seat: Seat) -> None:
        rng = self._rng
        space = rng.choice(SPACES)
        # Low numbers are asked for more often, as prompts are.
        chain = chain_of(space, int(CHAINS * rng.random() ** 2), rng.randrange(1, CHUNKS_MAX + 1))
        action = rng.random()
        if action < 0.70:
            self._get(mesh, seat, space, chain)
        elif action < 0.85:
            result = content.put(mesh, space, chain)
            self._tally.add(puts=1, chunks_put=result.stored, put_refused=result.refused)
        elif action < 0.93:
            self._tally.add(prefetches=1, chunks_prefetched=mesh.prefetch(space, chain, deadline_s=1.0))
        else:
            self._tally.add(deletes=1, chunks_deleted=mesh.delete(chain[rng.randrange(len(chain)) :]))

    def _get(self, mesh: kvmesh.Mesh, seat: Seat, space: kvmesh.Namespace, chain: list[bytes]) -> None:
        rng = self._rng
        deadline_s = rng.choice((0.02, 0.1, 0.5, 0.5, 2.0))
        before, began = seat.look(), time.monotonic()
        with mesh.get(space, chain, deadline_s=deadline_s) as hit:
            if rng.random() < 0.05:
                self._tally.add(gets=1, given_up=1)
                return  # without a look at what comes
            count = hit.count
            late_s = time.monotonic() - began - deadline_s
            if late_s > LATE_S and seat.look() == before:
                self._tally.find(f"{seat.name}: a get came back {late_s:.2f} s after its deadline of {deadline_s} s")
            self._tally.add(gets=1, chunks_got=count, chunks_fetched=hit.fetched, bytes_fetched=hit.bytes_moved)
            for key, view in zip(chain, hit, strict=False):
                if fault := content.wrong(key, view):
                    self._tally.find(f"{seat.name}: {fault}")
                    self._tally.add(wrong=1)
                del view
            if rng.random() < 0.1:
                self._ending.wait(rng.random() * 0.3)  # leases are held for a while
        if count < len(chain) and rng.random() < 0.5:
            result = content.put(mesh, space, chain[count:])
            self._tally.add(puts=1, chunks_put=result.stored, put_refused=result.refused)
