"""The networks of the fault tests, with small processes that are none of ours."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.namespaces import Network, why_not

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not() or "-")

ECHO = """
import socket, sys, threading
host = sys.argv[1]
udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
udp.bind((host, 7000))
tcp = socket.create_server((host, 7000))
def packets():
    while True:
        data, source = udp.recvfrom(100)
        udp.sendto(data + source[0].encode(), source)
threading.Thread(target=packets, daemon=True).start()
print("ready", flush=True)
kept = []
while True:
    connection, source = tcp.accept()
    kept.append(connection)
    connection.sendall(source[0].encode())
    def serve(connection=connection):
        while data := connection.recv(100):
            connection.sendall(data)
    threading.Thread(target=serve, daemon=True).start()
"""
"""Echoes packets and streams, and says where they come from."""

ASK = """
import socket, sys
own, target = sys.argv[1:]
udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
udp.bind((own, 0))
udp.settimeout(0.25)
for line in sys.stdin:
    answer = ""
    try:
        match line.strip():
            case "packet":
                udp.sendto(b"from ", (target, 7000))
                answer = udp.recv(100).decode()
            case "connect":
                tcp = socket.create_connection((target, 7000), timeout=0.25)
                answer = tcp.recv(100).decode()
            case "stream":
                tcp.sendall(b"x")
                answer = tcp.recv(1).decode()
    except TimeoutError:
        answer = "silence"
    print(answer, flush=True)
"""


@contextmanager
def run(network: Network, host: int, source: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    command = [*network.prefix(host), sys.executable, "-S", "-c", source, network.address(host), *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def ask(process: subprocess.Popen[str], question: str) -> str:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(question + "\n")
    process.stdin.flush()
    return process.stdout.readline().strip()


@pytest.mark.slow  # it waits for what does not come
def test_packets_and_streams_are_dropped_either_way_or_one_way_and_pass_again_after_healing() -> None:
    with (
        Network() as network,
        run(network, 3, ECHO) as echo,
        run(network, 2, ASK, network.address(3)) as asker,
        run(network, 4, ASK, network.address(3)) as other,
    ):
        assert echo.stdout is not None
        assert echo.stdout.readline() == "ready\n"
        assert ask(asker, "packet") == "from 127.0.0.2"
        assert ask(asker, "connect") == "127.0.0.2"  # not 127.0.0.1, though the asker did not bind it
        assert ask(asker, "stream") == "x"

        network.count_packets_to(3)
        network.cut([2], [3])
        assert [ask(asker, what) for what in ("packet", "stream", "connect")] == ["silence"] * 3
        assert ask(other, "packet") == "from 127.0.0.4"
        assert network.packets_to(3) >= 3
        assert ask(other, "connect") == "127.0.0.4"

        network.heal()
        assert ask(asker, "packet") == "from 127.0.0.2"
        assert ask(asker, "connect") == "127.0.0.2"

        network.cut_one_way([3], [2])  # questions pass, answers do not: also those of a stream that was open before
        assert [ask(asker, what) for what in ("packet", "stream", "connect")] == ["silence"] * 3
        network.heal()
        network.cut_one_way([3], [4])
        assert ask(asker, "connect") == "127.0.0.2"


def test_a_name_may_have_several_addresses() -> None:
    with Network() as network:
        network.name_hosts([("seed", 2), ("seed", 3)])
        source = "import socket; print(*sorted({i[4][0] for i in socket.getaddrinfo('seed', 1)}))"
        found = subprocess.run(
            [*network.prefix(2), sys.executable, "-S", "-c", source], capture_output=True, text=True, check=True
        )
        assert found.stdout == "127.0.0.2 127.0.0.3\n"


def test_nothing_is_left_of_a_network_nor_of_those_of_runs_that_were_killed() -> None:
    with Network() as network:
        folder = Path("/run/netns", network.name)
        assert folder.exists()
        network.name_hosts([("seed", 2)])
    orphan = f"kvmesh-{pid_that_nobody_has()}-0"
    subprocess.run(["ip", "netns", "add", orphan], check=True)
    with Network():
        left = {path.name for path in (*Path("/run/netns").iterdir(), *Path("/etc/netns").iterdir())}
    assert not {network.name, orphan} & left


def pid_that_nobody_has() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    assert not Path("/proc", str(process.pid)).exists() or process.pid != os.getpid()
    return process.pid
