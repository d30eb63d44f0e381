"""Real agents of kvmesh, each on a host of a `Network` (tests/support/namespaces.py): same ports, different addresses.

with Network() as network, HostCluster(tmp_path, network) as cluster:
    a = cluster.start("a", 2)
    b = cluster.start("b", 3, join=[cluster.seed(2)])
    network.cut([2], [3])
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from tests.support.cluster import Cluster, Process, kvmesh
from tests.support.namespaces import Network

GOSSIP_PORT = 7951
MESH_PORT = 7950


class HostCluster(Cluster):
    """The processes of one test. A name that is started again finds the state that it left, wherever it runs."""

    def __init__(self, folder: Path, network: Network) -> None:
        super().__init__(folder)
        self.network = network

    def seed(self, host: int) -> str:
        """Where a node on this host gossips, there or not."""
        return f"{self.network.address(host)}:{GOSSIP_PORT}"

    def start(
        self,
        name: str,
        host: int,
        *,
        join: Iterable[str] = (),
        flags: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> Process:
        """Start an agent, and wait until it is ready: it listens; whether it has joined is another question."""
        options = {
            "--name": name,
            "--bind": self.network.address(host),
            "--gossip-port": str(GOSSIP_PORT),
            "--mesh-port": str(MESH_PORT),
            "--memory": "16MiB",
            "--socket": str(self._sockets / f"{name}.sock"),
            "--state-dir": str(self.folder / f"{name}.state"),
        }
        pairs = [part for pair in options.items() for part in pair]
        joins = [part for address in join for part in ("--join", address)]
        command = [*self.network.prefix(host), *kvmesh("agent", "--json", *pairs, *joins, *flags)]
        process = Process(name, command, self.folder, environment or {})
        self.processes.append(process)
        process.wait_ready()
        return process
