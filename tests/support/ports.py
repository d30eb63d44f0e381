"""Ports that are free for both UDP and TCP, for programs that cannot take any free one themselves."""

from __future__ import annotations

import random
import socket

FIRST, LAST = 20_000, 32_000
"""Below those that Linux gives out by itself: nobody else gets one between the choice and its use."""
_chosen: set[int] = set()


def free_port(host: str = "127.0.0.1") -> int:
    """A port at which nobody listens, and that this process has not given out before."""
    source = random.SystemRandom()  # runs beside each other must not try the same ones
    for _ in range(1000):
        port = source.randrange(FIRST, LAST)
        if port in _chosen:
            continue
        try:
            with (
                socket.socket(socket.AF_INET, socket.SOCK_STREAM) as tcp,
                socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp,
            ):
                tcp.bind((host, port))
                udp.bind((host, port))
        except OSError:
            continue
        _chosen.add(port)
        return port
    raise AssertionError(f"no port from {FIRST} to {LAST} is free")
