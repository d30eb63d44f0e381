"""The process in which NIXL runs: ``python -m kvmesh.transport.nixl_child ROLE SOCKET ARENA BYTES LOOPBACK``.

    serve   registers the arena and answers peers' reads in NIXL's own thread. Waits for the end of the socket.
    read    copies runs from peers' arenas into ours, as the keeper says (nixl_process.py has the messages).

What is copied when is in nixl_transfers.py; here are NIXL itself, and the loop. One thread (and NIXL's own, when it
serves); the process ends with the socket, so an agent that is killed leaves no child.

NIXL's bindings are used without the Python API above them: that fixes the delay of NIXL's thread at zero, which keeps a
core busy for nothing (measured: 50 to 100 % of one, against 0.3 %), and (de)serialises descriptors with pickle. Here
the descriptors are built from numbers, and of a peer only its agent's own metadata goes to NIXL.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import resource
import secrets
import select
import signal
import socket
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from typing import Final

import msgspec
import numpy as np

from .limits import (
    NIXL_POLL_MAX_S,
    NIXL_POLL_MIN_S,
    NIXL_PROBE_BYTES,
    NIXL_SERVE_POLL_MS,
)
from .nixl_process import (
    LENGTH,
    READ,
    SERVE,
    Ready,
    ToChild,
    frame,
    installed,
)
from .nixl_transfers import Transfers, UncertainError

READ_BYTES: Final = 1 << 16


class Nixl:
    """NIXL's agent with the UCX backend. As `Engine`."""

    def __init__(self, own_thread: bool) -> None:
        found = installed()
        if found is None:
            raise ModuleNotFoundError("no package with NIXL's bindings is installed")
        module, self.package = found
        self._bindings = import_module(f"{module}._bindings")
        self.name = secrets.token_hex(16)
        """Of this process start and no other: a peer that comes back is another agent."""
        config = self._bindings.nixlAgentConfig()
        config.useProgThread = own_thread
        config.pthrDelay = NIXL_SERVE_POLL_MS * 1000
        self._agent = self._bindings.nixlAgent(self.name, config)
        self._backend = self._agent.createBackend("UCX", {})

    def register(self, address: int, size_bytes: int) -> None:
        """Let NIXL read from or write into this memory of the host's."""
        memory = self._bindings.nixlRegDList(self._bindings.DRAM_SEG, [(address, size_bytes, 0, "")])
        self._agent.registerMem(memory, [self._backend])

    def metadata(self) -> bytes:
        """What a peer needs to read what is registered."""
        data: bytes = self._agent.getLocalMD()
        return data

    def meet(self, agent: str, metadata: bytes) -> None:
        """As `Engine.meet`."""
        self._agent.loadRemoteMD(metadata)

    def read(self, agent: str, remote: Sequence[tuple[int, int]], local: Sequence[int]) -> int:
        """As `Engine.read`."""
        there = np.array([(address, length, 0) for address, length in remote], np.uint64)
        here = np.array([(address, length, 0) for address, (_, length) in zip(local, remote, strict=True)], np.uint64)
        bindings = self._bindings
        lists = [bindings.nixlXferDList(bindings.DRAM_SEG, rows) for rows in (here, there)]
        transfer: int = self._agent.createXferReq(bindings.NIXL_READ, *lists, agent, b"", [self._backend])
        self._agent.postXferReq(transfer, b"")  # done or not: the next look tells
        return transfer

    def done(self, transfer: int) -> bool:
        """As `Engine.done`."""
        if self._agent.getXferStatus(transfer) == self._bindings.NIXL_IN_PROG:
            return False
        self._agent.releaseXferReq(transfer)
        return True

    def forget(self, agent: str) -> None:
        """As `Engine.forget`."""
        with contextlib.suppress(self._bindings.nixlNotFoundError):  # NIXL forgets a peer that is gone by itself
            self._agent.invalidateRemoteMD(agent)


def read(control: socket.socket, engine: Nixl, arena: int, scratch: int) -> None:
    """Do what the keeper says, until it is gone."""
    transfers = Transfers(engine, arena, scratch, lambda message: control.sendall(frame(message)))
    decoder, received = msgspec.msgpack.Decoder(ToChild), bytearray()
    pause_s = NIXL_POLL_MIN_S
    while True:
        if select.select([control], [], [], pause_s if transfers.busy else None)[0]:
            data = control.recv(READ_BYTES)
            if not data:
                return
            received += data
            while len(received) >= LENGTH.size:
                end = LENGTH.size + LENGTH.unpack_from(received)[0]
                if len(received) < end:
                    break
                transfers.handle(decoder.decode(memoryview(received)[LENGTH.size : end].tobytes()))
                del received[:end]
            pause_s = NIXL_POLL_MIN_S
        pause_s = NIXL_POLL_MIN_S if transfers.turn() else min(2 * pause_s, NIXL_POLL_MAX_S)


def main(role: str, control_fd: str, arena_fd: str, size: str, loopback: str) -> None:
    """The life of this process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # meant for the agent, which ends us
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core would be as large as the arena
    control, size_bytes = socket.socket(fileno=int(control_fd)), int(size)
    # Over TCP a serving process is only read from: a peer that writes nevertheless ends it. Network cards register
    # memory for both, and refuse what is mapped for reading only.
    only_read = role == SERVE and loopback == "1"
    arena = mmap.mmap(int(arena_fd), size_bytes, prot=mmap.PROT_READ | (0 if only_read else mmap.PROT_WRITE))
    base = np.frombuffer(arena, np.uint8).ctypes.data
    scratch = np.zeros(NIXL_PROBE_BYTES, np.uint8)
    nixl = Nixl(own_thread=role == SERVE)
    nixl.register(base, size_bytes)
    if role == READ:
        nixl.register(scratch.ctypes.data, scratch.nbytes)
    control.sendall(frame(Ready(nixl.name, nixl.metadata(), base, nixl.package)))
    if role == READ:
        read(control, nixl, base, scratch.ctypes.data)
    else:
        control.recv(1)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except (UncertainError, ConnectionError):
        pass  # the keeper knows
    except BaseException:  # noqa: BLE001  # told, and then the same
        traceback.print_exc()
    finally:
        os._exit(0)  # no destructors: UCX has peers that may be gone, and the kernel closes all there is
