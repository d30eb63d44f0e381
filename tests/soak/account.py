"""The account at the end of a soak: whatever was leased, reserved, opened or started is back, or belongs to a chunk.

All of it comes from the agents' own stats and from /proc. Each check returns what is wrong, in words.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

from tests.support.cluster import Process
from tests.support.content import MIB
from tests.support.plane import Node

PRIVATE_BYTES_MAX = 256 * MIB
"""What an agent's process may have beside its arena, with Python, libzmq and what they keep."""
DESCRIPTORS_PER_PEER_MAX = 16
"""Connections to a peer and from it, for calls and for bulk, with their eventfds; and those of backends."""
DESCRIPTORS_OWN_MAX = 48
THREADS_MAX = 40


def open_things(node: Node) -> str:
    """What of a node is still leased or reserved; empty when nothing is."""
    store = node.stats("store")
    found = {name: store[name] for name in ("leases", "leased_chunks", "reserved_chunks") if store[name]}
    return str(found) if found else ""


def arena(node: Node) -> list[str]:
    """The arena's bytes: each belongs to a chunk, is out of use for good reason, or is free."""
    store = node.stats("store")
    kept = store["chunk_bytes"] + store["quarantined_bytes"]
    problems = []
    if store["used_bytes"] != kept:
        problems.append(f"{store['used_bytes']} bytes of the arena are used, and chunks have {kept}")
    if store["corrupt"]:
        problems.append(f"{store['corrupt']} chunks were taken out as changed in memory, and nobody changed them")
    return problems


def process(node: Node, peers: int) -> list[str]:
    """Descriptors, threads and private memory of a node's process."""
    pid = node.process.pid
    problems = []
    descriptors = node.descriptors()
    if descriptors > DESCRIPTORS_OWN_MAX + DESCRIPTORS_PER_PEER_MAX * peers:
        problems.append(f"{descriptors} descriptors are open: {_kinds(pid)}")
    threads = len(os.listdir(f"/proc/{pid}/task"))
    if threads > THREADS_MAX:
        problems.append(f"{threads} threads run")
    if private_bytes(pid) > PRIVATE_BYTES_MAX:
        problems.append(f"it has {private_bytes(pid) / MIB:.0f} MiB beside its arena")
    return problems


def private_bytes(pid: int) -> int:
    """Memory of a process that nobody shares: the arena, a memfd, is not in it."""
    status = Path(f"/proc/{pid}/status").read_text()
    match = re.search(r"^RssAnon:\s+(\d+) kB", status, re.MULTILINE)
    return int(match[1]) * 1024 if match else 0


def _kinds(pid: int) -> dict[str, int]:
    kinds: dict[str, int] = {}
    for name in os.listdir(f"/proc/{pid}/fd"):
        kind = re.sub(r"\d+", "N", os.readlink(f"/proc/{pid}/fd/{name}"))
        kinds[kind] = kinds.get(kind, 0) + 1
    return kinds


def logs(processes: Iterable[Process]) -> list[str]:
    """What agents said of errors of their own: whatever a peer does, there is no such line."""
    return sorted(
        {
            f"{process.name} says: {line}"
            for process in processes
            for line in process.log.splitlines()
            if " ERROR " in line or line.startswith("Traceback")
        }
    )


def strays(marker: str) -> list[str]:
    """Processes that inherited a marker of this soak's in their environment, and still run."""
    found = []
    for name in os.listdir("/proc"):
        try:
            if name.isdigit() and marker.encode() in Path(f"/proc/{name}/environ").read_bytes():
                found.append(f"process {name}: {Path(f'/proc/{name}/cmdline').read_bytes().replace(bytes(1), b' ')!r}")
        except OSError:
            continue
    return found
