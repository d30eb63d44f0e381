"""The far ends of the baselines: ``python -m benchmarks.peers KIND CHUNK_BYTES COUNT [BENCH_FOLDER]``, a process each.

Each prints one JSON line with what the near end needs to reach it, serves until its stdin ends, and knows nothing of
kvmesh. Every chunk is filled with the same pattern (`pattern`), so that a near end can see that bytes really came.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from importlib import import_module
from typing import Any

import numpy as np

PATTERN_STEP = 1 << 16
TRANSFER_TIMEOUT_S = 30.0
"""A peer that was killed answers nothing, and waiting for it takes a core."""


def pattern(size: int) -> np.ndarray[Any, Any]:
    """`size` bytes in memory that is there: no two neighbours of 64 KiB are equal, and none is zero."""
    steps = np.arange(-(-size // PATTERN_STEP)) % 251 + 1
    return np.repeat(steps.astype(np.uint8), PATTERN_STEP)[:size]


def raw(chunk_bytes: int, count: int, _: str) -> None:
    """One TCP connection: a byte asks for everything, in one sendall a chunk."""
    payload = pattern(chunk_bytes * count).data
    with socket.create_server(("127.0.0.1", 0)) as server:
        _say({"port": server.getsockname()[1]})
        connection, _peer = server.accept()
        with connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while connection.recv(1):
                for at in range(0, chunk_bytes * count, chunk_bytes):
                    connection.sendall(payload[at : at + chunk_bytes])


def zmq_echo(chunk_bytes: int, count: int, _: str) -> None:
    """A ROUTER that answers each request with one frame of `chunk_bytes`; an empty request ends it."""
    import zmq

    payload = pattern(chunk_bytes * count).tobytes()
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        port = router.bind_to_random_port("tcp://127.0.0.1")
        _say({"port": port})
        while True:
            who, request = router.recv_multipart()
            if not request:
                return
            router.send_multipart([who, payload], copy=False)


def mooncake_serve(chunk_bytes: int, count: int, folder: str) -> None:
    """Mooncake's transfer engine with one registered buffer that others read."""
    engine = _mooncake(folder)
    payload = pattern(chunk_bytes * count)
    if engine.register_memory(payload.ctypes.data, payload.nbytes):
        raise SystemExit("mooncake did not register the memory")
    _say({"target": f"127.0.0.1:{engine.get_rpc_port()}", "address": payload.ctypes.data})
    sys.stdin.read()


def mooncake_read(chunk_bytes: int, count: int, folder: str) -> None:
    """Mooncake's transfer engine that reads all chunks of the other one, each time that it gets a line."""
    engine = _mooncake(folder)
    into = np.ones(chunk_bytes * count, np.uint8)
    if engine.register_memory(into.ctypes.data, into.nbytes):
        raise SystemExit("mooncake did not register the memory")
    _say({})
    peer = json.loads(sys.stdin.readline())
    at = range(0, chunk_bytes * count, chunk_bytes)
    here, there = [into.ctypes.data + start for start in at], [peer["address"] + start for start in at]
    for _ in sys.stdin:
        failed = engine.batch_transfer_sync_read(peer["target"], here, there, [chunk_bytes] * count)
        _say({"failed": failed, "sample": into[:: max(1, into.nbytes // 64)].tolist()})


def nixl_serve(chunk_bytes: int, count: int, _: str) -> None:
    """A NIXL agent with one registered buffer that others read."""
    agent = _nixl("serve", own_thread=True)
    payload = pattern(chunk_bytes * count)
    agent.register_memory([(payload.ctypes.data, payload.nbytes, 0, "")], "DRAM")
    _say({"metadata": agent.get_agent_metadata().hex(), "address": payload.ctypes.data})
    sys.stdin.read()
    os._exit(0)  # UCX's destructors wait for a peer that may be gone


def nixl_read(chunk_bytes: int, count: int, _: str) -> None:
    """A NIXL agent that reads all chunks of the other one, in one transfer, each time that it gets a line."""
    agent = _nixl("read", own_thread=False)  # asking for the state makes progress: a thread would only take a core
    into = np.ones(chunk_bytes * count, np.uint8)
    agent.register_memory([(into.ctypes.data, into.nbytes, 0, "")], "DRAM")
    _say({})
    peer = json.loads(sys.stdin.readline())
    name = agent.add_remote_agent(bytes.fromhex(peer["metadata"])).decode()
    at = range(0, chunk_bytes * count, chunk_bytes)
    here, there = (
        agent.get_xfer_descs([(base + start, chunk_bytes, 0) for start in at], "DRAM")
        for base in (into.ctypes.data, peer["address"])
    )
    for _line in sys.stdin:
        transfer = agent.initialize_xfer("READ", here, there, name)
        state, ends = agent.transfer(transfer), time.monotonic() + TRANSFER_TIMEOUT_S
        while state == "PROC" and time.monotonic() < ends:
            state = agent.check_xfer_state(transfer)
        agent.release_xfer_handle(transfer)
        _say({"failed": state != "DONE", "sample": into[:: max(1, into.nbytes // 64)].tolist()})
    os._exit(0)


def _nixl(name: str, *, own_thread: bool) -> Any:
    """An agent of NIXL's own Python API, whose UCX has nothing but TCP."""
    os.environ["UCX_TLS"] = "tcp"
    api = import_module("nixl_cu12._api")
    return api.nixl_agent(name, api.nixl_agent_config(enable_prog_thread=own_thread, backends=["UCX"]))


def _mooncake(folder: str) -> Any:
    """An engine over TCP that finds its peer by address alone, without a metadata server."""
    sys.path.append(folder)
    engine = import_module("mooncake.engine").TransferEngine()
    if engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", ""):
        raise SystemExit("mooncake did not initialise")
    return engine


def _say(facts: dict[str, Any]) -> None:
    print(json.dumps(facts), flush=True)


KINDS = {
    "raw": raw,
    "zmq": zmq_echo,
    "mooncake-serve": mooncake_serve,
    "mooncake-read": mooncake_read,
    "nixl-serve": nixl_serve,
    "nixl-read": nixl_read,
}


def main() -> None:
    """Run the end that was asked for."""
    kind, chunk_bytes, count, *folder = sys.argv[1:]
    KINDS[kind](int(chunk_bytes), int(count), folder[0] if folder else "")


if __name__ == "__main__":
    main()
