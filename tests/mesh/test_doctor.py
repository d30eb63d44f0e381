"""The doctor's checks, each on a machine that it is given."""

import errno
import os
import re
import resource
import socket
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvmesh import doctor
from kvmesh.doctor import Addresses, Finding
from kvmesh.host import Gpu, HostFacts
from kvmesh.transport.errors import AgentUnavailableError, UnreachableError, VersionMismatchError

GIB = 1 << 30
UID = os.getuid()


class FakeMesh:
    """A connected agent."""

    node = "n1"

    address = "127.0.0.1:7950"
    gossip_address = "127.0.0.1:7951"

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.closed = False

    def nodes(self) -> dict[str, Any]:
        if self.error:
            raise self.error
        own = {"name": "n1", "address": self.address, "gossip_address": self.gossip_address}
        return {"nodes": [{"name": "n0", "address": "127.0.0.1:1"}, own]}

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def listening() -> Iterator[Path]:
    """A unix socket that accepts."""
    with tempfile.TemporaryDirectory() as directory, socket.socket(socket.AF_UNIX) as server:
        path = Path(directory) / "agent.sock"
        server.bind(str(path))
        server.listen(8)
        yield path


def refuse(error: Exception) -> Callable[[Path], FakeMesh]:
    def connect(path: Path) -> FakeMesh:
        raise error

    return connect


def test_python():
    assert doctor.check_python((3, 11, 0)).status == "ok"
    assert doctor.check_python((3, 10, 9)) == Finding(
        "python", "problem", "3.10.9 runs", "use Python 3.11 or later"
    )  # fmt: skip


@pytest.mark.parametrize(
    ("installed", "needed", "status"),
    [("2.4", True, "ok"), ("2.13.0+cpu", True, "ok"), ("2.3.9", True, "problem"), (None, True, "problem"),
     (None, False, "note"), ("1.0", False, "warning")],
)  # fmt: skip
def test_packages(installed: str | None, needed: bool, status: str):
    finding = doctor.check_package("torch", "2.4", needed, lambda name: installed)
    assert finding.status == status
    assert bool(finding.advice) == (status != "ok")


def test_versions_come_from_metadata():
    assert doctor.version_of("kvmesh")
    assert doctor.version_of("no-such-package-anywhere") is None


def test_the_socket_directory(tmp_path: Path):
    directory = tmp_path / "kvmesh"
    assert doctor.check_socket_directory(directory, UID).status == "ok"
    directory.mkdir(mode=0o700)
    assert doctor.check_socket_directory(directory, UID).status == "ok"
    directory.chmod(0o755)
    finding = doctor.check_socket_directory(directory, UID)
    assert (finding.status, "--socket in a directory that only you" in finding.advice) == ("warning", True)
    (tmp_path / "file").touch()
    assert doctor.check_socket_directory(tmp_path / "file", UID).status == "problem"
    assert doctor.check_socket_directory(tmp_path / "file" / "below", UID).status == "problem"


def test_the_socket_directory_of_another_user_is_taken_as_the_agent_takes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def owned(uid: int, mode: int) -> str:
        found = SimpleNamespace(st_uid=uid, st_mode=stat.S_IFDIR | mode)
        monkeypatch.setattr(Path, "lstat", lambda path: found)
        return doctor.check_socket_directory(tmp_path, 1000).status

    assert owned(1001, 0o755) == "problem"
    assert owned(0, 0o755) == "warning"
    assert owned(1001, 0o1777) == "warning"


def test_no_advice_changes_or_removes_a_path_that_the_user_named():
    root = doctor.check_socket_directory(Path("/"), UID)
    file, _ = doctor.check_agent(Path(__file__), UID, refuse(AgentUnavailableError("no")))
    for finding in (root, file, doctor.check_socket_directory(Path(__file__), UID)):
        assert finding.advice
        assert not re.search(r"\b(rm|chmod)\b", finding.advice)


def test_no_agent(tmp_path: Path):
    path = tmp_path / "agent.sock"
    finding, addresses = doctor.check_agent(path, UID, refuse(AssertionError()))
    assert (finding.status, finding.advice, addresses) == ("warning", "start it: kvmesh agent", None)
    path.touch()
    assert doctor.check_agent(path, UID, refuse(AssertionError()))[0].status == "problem"


def test_a_socket_that_an_agent_left_behind():
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "agent.sock"
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path))
        finding, _ = doctor.check_agent(path, UID, refuse(AssertionError()))
    assert finding.status == "warning"
    assert "left behind" in finding.what


def test_an_agent_that_answers(listening: Path):
    mesh = FakeMesh()
    finding, addresses = doctor.check_agent(listening, UID, lambda path: mesh)
    assert (finding.status, addresses) == ("ok", Addresses("127.0.0.1:7950", "127.0.0.1:7951"))
    assert "n1 answers" in finding.what
    assert mesh.closed


def test_an_agent_that_does_not(listening: Path):
    for error in (VersionMismatchError("it speaks 2, we speak 1"), AgentUnavailableError("no answer in 5 s")):
        finding, _ = doctor.check_agent(listening, UID, refuse(error))
        assert (finding.status, finding.what) == ("problem", str(error))
    mesh = FakeMesh(UnreachableError("gone"))
    assert doctor.check_agent(listening, UID, lambda path: mesh)[0].status == "problem"
    assert mesh.closed
    assert doctor.check_agent(listening, UID + 1, lambda path: mesh)[0].status == "problem"


def test_the_mesh_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen(1)
        port = taken.getsockname()[1]
        finding = doctor.check_mesh_port("127.0.0.1", port, None)
        assert (finding.status, "--mesh-port 0" in finding.advice) == ("warning", True)
        assert doctor.check_mesh_port("127.0.0.1", port, Addresses(f"127.0.0.1:{port}", None)).status == "ok"
        # Another process has the port that the agent would have by default; this agent runs on one of its own.
        other = doctor.check_mesh_port("127.0.0.1", port, Addresses("127.0.0.1:7953", None))
        assert (other.status, other.what) == ("ok", "127.0.0.1:7953 is the agent's")
    assert doctor.check_mesh_port("127.0.0.1", port, None).status == "ok"
    assert doctor.check_mesh_port("127.0.0.1", 0, None).what == "any free one"


@pytest.mark.parametrize(("kind", "called"), [(socket.SOCK_DGRAM, "UDP"), (socket.SOCK_STREAM, "TCP")])
def test_the_gossip_port(kind: socket.SocketKind, called: str):
    with socket.socket(type=kind) as taken:
        taken.bind(("127.0.0.1", 0))
        if kind == socket.SOCK_STREAM:
            taken.listen(1)
        port = taken.getsockname()[1]
        finding = doctor.check_gossip_port("127.0.0.1", port, None)
        assert (finding.status, f"cannot be used for {called}" in finding.what) == ("warning", True)
        assert "--gossip-port 0" in finding.advice
        running = doctor.check_gossip_port("127.0.0.1", port, Addresses("127.0.0.1:1", "127.0.0.1:7953"))
        assert (running.status, running.what) == ("ok", "127.0.0.1:7953 is the agent's")
        assert "static" in doctor.check_gossip_port("127.0.0.1", port, Addresses("127.0.0.1:1", None)).what
    assert doctor.check_gossip_port("127.0.0.1", port, None).status == "ok"
    assert doctor.check_gossip_port("127.0.0.1", 0, None).what == "any free one"


def test_shared_memory():
    def denied(name: str) -> int:
        raise OSError(errno.EPERM, "Operation not permitted")

    assert doctor.check_memfd(os.memfd_create).status == "ok"
    assert doctor.check_memfd(denied).status == "problem"


def test_memory():
    assert doctor.check_memory(8 * GIB, 4 * GIB, agent_runs=False).status == "ok"
    finding = doctor.check_memory(2 * GIB, 4 * GIB, agent_runs=False)
    assert (finding.status, finding.advice) == ("warning", "start the agent with --memory 1024MiB")
    assert doctor.check_memory(2 * GIB, 4 * GIB, agent_runs=True).status == "ok"


def test_limits():
    assert doctor.check_dev_shm(None).status == "note"
    assert doctor.check_dev_shm(64 << 20).advice
    assert doctor.check_dev_shm(8 * GIB).status == "ok"
    assert doctor.check_memlock(resource.RLIM_INFINITY, 4 * GIB).status == "ok"
    assert doctor.check_memlock(5 * GIB, 4 * GIB).status == "ok"
    assert doctor.check_memlock(8 << 20, 4 * GIB).status == "note"
    assert doctor.check_descriptors(resource.RLIM_INFINITY, resource.RLIM_INFINITY).status == "ok"
    assert doctor.check_descriptors(4096, 4096).status == "ok"
    assert doctor.check_descriptors(1024, 1 << 20).advice == "ulimit -n 4096"
    assert "LimitNOFILE" in doctor.check_descriptors(256, 1024).advice


@pytest.mark.parametrize(
    ("driver", "gpus", "torch", "status"),
    [("", 0, "2.13.0+cpu", "note"), ("580.1", 0, "2.13.0", "warning"), ("580.1", 2, "2.13.0+cpu", "warning"),
     ("580.1", 2, "2.13.0+cu130", "ok"), ("580.1", 1, None, "ok")],
)  # fmt: skip
def test_gpus(driver: str, gpus: int, torch: str | None, status: str):
    facts = HostFacts("h1", "", 2, GIB, GIB, driver, (Gpu("NVIDIA H100", "GPU-0", None, None),) * gpus)
    assert doctor.check_gpus(facts, torch).status == status


@pytest.mark.parametrize(
    ("missing", "rdma", "status", "says"),
    [
        ("no package", False, "note", "not installed, and not needed"),
        (None, False, "note", "installed, and not needed"),
        ("no package", True, "warning", "this host has RDMA, and no package"),
        (None, True, "ok", "this host has RDMA"),
    ],
)
def test_nixl(missing: str | None, rdma: bool, status: str, says: str):
    finding = doctor.check_nixl(missing, rdma)
    assert finding.status == status
    assert says in finding.what


def test_the_whole_examination_of_this_machine(tmp_path: Path):
    findings = doctor.examine(tmp_path / "agent.sock", "127.0.0.1", 0, 0, 1 << 20, refuse(AssertionError()))
    assert len({finding.name for finding in findings}) == len(findings)
    assert [finding for finding in findings if finding.status == "problem"] == []
