"""What agent to agent gives on this machine: two agents as processes, and one chain from the one to the other.

Over TCP, since that is what two machines have between them. Some seconds, and nothing is left behind. It imports torch,
so only ``kvmesh bench crossover --measure`` imports it.
"""

from __future__ import annotations

import statistics
import time

from kvmesh.client import Mesh, connect
from kvmesh.demo.children import Children, DemoError
from kvmesh.keys import Namespace
from kvmesh.transport.limits import MIB

CHUNKS = 64
ROUNDS = 7
START_TIMEOUT_S = 30.0
KNOWN_TIMEOUT_S = 10.0
LOOK_INTERVAL_S = 0.02


def loopback_bytes_per_s(chunks: int = CHUNKS, rounds: int = ROUNDS) -> float:
    """The median rate of a get of `chunks` chunks of 1 MiB that another agent of this machine holds, over TCP."""
    import torch

    space = Namespace(
        model="bench", revision="1", dtype="float32", layers=MIB // 4096, kv_heads=2, head_dim=16, chunk_tokens=16
    )
    chain = space.chain(range(chunks * space.chunk_tokens))
    with Children() as children:
        first, gossip = _start(children, "holder")
        second, _ = _start(children, "reader", "--join", gossip)
        with connect(first) as holder, connect(second) as reader:
            (spec,) = space.tensors.values()
            holder.put(space, {key: torch.rand(spec.shape) for key in chain}, pin=True)
            _wait_until_known(reader, chain)
            taken = [_get_s(reader, space, chain) for _ in range(rounds + 1)][1:]  # the first one warms up
    return chunks * space.chunk_bytes / statistics.median(taken)


def _start(children: Children, name: str, *flags: str) -> tuple[str, str]:
    """The socket and the gossip address of a new agent."""
    socket = str(children.folder / f"{name}.sock")
    ports = ("--mesh-port", "0", "--gossip-port", "0", "--transports", "zmq")
    places = ("--socket", socket, "--state-dir", str(children.folder), "--memory", "256MiB")
    command = ("-m", "kvmesh.cli", "agent", "--json", "--name", name, "--log-level", "error", *ports, *places, *flags)
    ready = children.start(name, *command).expect(START_TIMEOUT_S)
    return socket, str(ready["gossip_address"])


def _wait_until_known(reader: Mesh, chain: list[bytes]) -> None:
    ends = time.monotonic() + KNOWN_TIMEOUT_S
    while not any(one["run_chunks"] == len(chain) for one in reader.locate(chain)["holders"]):
        if time.monotonic() > ends:
            raise DemoError("the two agents did not find each other")
        time.sleep(LOOK_INTERVAL_S)


def _get_s(reader: Mesh, space: Namespace, chain: list[bytes]) -> float:
    start = time.perf_counter()
    with reader.get(space, chain, deadline_s=60) as hit:
        if hit.count < len(chain):
            raise DemoError(f"{hit.count} of {len(chain)} chunks came: {hit.reason}")
    took = time.perf_counter() - start
    reader.delete(chain)
    return took
