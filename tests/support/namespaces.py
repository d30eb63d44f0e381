"""A loopback network of a test's own, in which packets between processes can be dropped: real sockets, a real packet
filter, and nothing of the machine's own network touched.

    with Network() as network:
        a = subprocess.Popen([*network.prefix(2), ...])    # listens on network.address(2), 127.0.0.2
        network.cut([2, 3], [4, 5])                        # neither UDP nor TCP passes, either way
        network.cut_one_way([2], [3])                      # and nothing from 2 to 3
        network.heal()

A host is a number, and its address 127.0.0.N. A packet is dropped where it comes in, as on a real network: the sender
does not hear of it. A TCP connection that a process opens would come from 127.0.0.1, whatever address it listens on; so
every host's processes run in a group of their own, and what such a group opens is given its host's address as its
source. Replies are recognised by their connection.

Needs root, iproute2 and nftables, and a kernel that permits it: `why_not()` says what is missing.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

HOSTS_MAX = 30
_GROUP_FIRST = 72_000
"""The group of host N is this plus N: no group of the machine's own."""
_PREFIX = "kvmesh"
_NAMESPACES = Path("/run/netns")
_FILES = Path("/etc/netns")
_numbers = itertools.count()


class Network:
    """A network namespace whose only interface is loopback. Meant for one thread. Use it as a context manager."""

    def __init__(self) -> None:
        _remove_orphans()
        self.name = f"{_PREFIX}-{os.getpid()}-{next(_numbers)}"

    def __enter__(self) -> Network:
        try:
            _run("ip", "netns", "add", self.name)
            self._inside("ip", "link", "set", "lo", "up")
            self._filter(_table())
        except BaseException:
            _remove(self.name)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _remove(self.name)

    @staticmethod
    def address(host: int) -> str:
        """Where processes of a host listen."""
        assert 2 <= host < 2 + HOSTS_MAX
        return f"127.0.0.{host}"

    def prefix(self, host: int) -> list[str]:
        """What goes before a command for it to run on a host. The command takes their place: its pid is theirs."""
        return [*self._enter(), "setpriv", f"--regid={_GROUP_FIRST + host}", "--clear-groups", "--"]

    def name_hosts(self, names: Iterable[tuple[str, int]]) -> None:
        """Give names to hosts, for processes that are started from now on. A name may have several."""
        folder = _FILES / self.name
        folder.mkdir(parents=True, exist_ok=True)
        lines = ["127.0.0.1 localhost", *(f"{self.address(host)} {name}" for name, host in names)]
        (folder / "hosts").write_text("\n".join(lines) + "\n")

    def cut(self, some: Iterable[int], others: Iterable[int]) -> None:
        """Drop what passes between two groups of hosts."""
        some, others = list(some), list(others)
        self.cut_one_way(some, others)
        self.cut_one_way(others, some)

    def cut_one_way(self, senders: Iterable[int], receivers: Iterable[int]) -> None:
        """Drop what these senders send to these receivers, be it a reply."""
        sources = "{ " + ", ".join(map(self.address, senders)) + " }"
        targets = "{ " + ", ".join(map(self.address, receivers)) + " }"
        self._filter(
            f"add rule ip kvmesh filtered ip saddr {sources} ip daddr {targets} counter drop\n"
            f"add rule ip kvmesh filtered ct direction reply ct reply ip saddr {sources} "
            f"ct reply ip daddr {targets} counter drop\n"
        )

    def heal(self) -> None:
        """Let everything pass."""
        self._filter("flush chain ip kvmesh filtered\n")

    def count_packets_to(self, host: int) -> None:
        """Begin to count what is sent to a host, whether or not anybody listens there."""
        self._filter(
            f"add counter ip kvmesh to_{host}\n"
            f"add rule ip kvmesh counted ip daddr {self.address(host)} counter name to_{host}\n"
        )

    def packets_to(self, host: int) -> int:
        """How many there were since then."""
        command = [*self._enter(), "nft", "--json", "list", "counter", "ip", "kvmesh", f"to_{host}"]
        listed = json.loads(_run(*command))["nftables"]
        return int(next(entry["counter"]["packets"] for entry in listed if "counter" in entry))

    def _enter(self) -> list[str]:
        return ["ip", "netns", "exec", self.name]

    def _inside(self, *command: str) -> None:
        _run(*self._enter(), *command)

    def _filter(self, commands: str) -> None:
        _run(*self._enter(), "nft", "-f", "-", text=commands)


def _table() -> str:
    """The packet filter of a new network: nothing is dropped, and every host's connections come from its address."""
    sources = ", ".join(f"{_GROUP_FIRST + host} : {Network.address(host)}" for host in range(2, 2 + HOSTS_MAX))
    return f"""
        table ip kvmesh {{
            chain filtered {{
                type filter hook input priority filter; policy accept;
            }}
            chain counted {{
                type filter hook input priority filter - 1; policy accept;
            }}
            chain sources {{
                type nat hook postrouting priority srcnat; policy accept;
                ip protocol tcp ip saddr 127.0.0.1 snat to meta skgid map {{ {sources} }}
            }}
        }}
    """


@functools.cache
def why_not() -> str:
    """Why there can be no such network here; empty when there can be."""
    if os.geteuid():
        return "needs root"
    missing = [command for command in ("ip", "nft", "setpriv") if shutil.which(command) is None]
    if missing:
        return f"needs {' and '.join(missing)}"
    try:
        with Network() as network:
            network.cut([2], [3])
    except subprocess.CalledProcessError as error:
        return f"not permitted here: {error.cmd} said {error.stderr.strip()!r}"
    return ""


def _run(*command: str, text: str | None = None) -> str:
    return subprocess.run(command, input=text, check=True, capture_output=True, text=True, timeout=20).stdout


def _remove(name: str) -> None:
    if (_NAMESPACES / name).exists():
        _run("ip", "netns", "delete", name)
    shutil.rmtree(_FILES / name, ignore_errors=True)


def _remove_orphans() -> None:
    """Those of runs that were killed before they could remove their own."""
    for folder in (_NAMESPACES, _FILES):
        for path in folder.glob(f"{_PREFIX}-*-*"):
            if not Path("/proc", path.name.split("-")[1]).exists():
                _remove(path.name)
