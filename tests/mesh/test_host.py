"""Host facts, on this machine and on ones that it is not."""
# ruff: noqa: N802 - a fake has the names of what it stands for

from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest

from kvmesh.host import META_BYTES_MAX, TIMES, Gpu, HostFacts, _cgroup_memory, host_facts, nvidia_gpus

H100 = "NVIDIA H100 80GB HBM3"


class Nvml:
    """The part of pynvml that is used, for a machine with `gpus`; None is a GPU that has fallen off the bus."""

    class NVMLError(Exception):
        """As pynvml's."""

    def __init__(self, *gpus: str | None, loads: bool = True, counts: bool = True, memory: bool = True) -> None:
        self.gpus, self.loads, self.counts, self.memory = gpus, loads, counts, memory
        self.users = 0

    def _unless(self, good: object) -> None:
        if not good:
            raise self.NVMLError

    def nvmlInit(self) -> None:
        self._unless(self.loads)
        self.users += 1

    def nvmlShutdown(self) -> None:
        self.users -= 1

    def nvmlSystemGetDriverVersion(self) -> str:
        return "580.1"

    def nvmlDeviceGetCount(self) -> int:
        self._unless(self.counts)
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetName(self, handle: int) -> str | None:
        self._unless(self.gpus[handle])
        return self.gpus[handle]

    def nvmlDeviceGetUUID(self, handle: int) -> str:
        return f"GPU-{handle}"

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> SimpleNamespace:
        self._unless(self.memory)
        return SimpleNamespace(total=80 << 30, used=1 << 30)


def facts(*names: str, hostname: str = "h1") -> HostFacts:
    gpus = tuple(Gpu(name, "GPU-0", 80 << 30, 0) for name in names)
    return HostFacts(hostname, "a" * 36, 16, 128 << 30, 64 << 30, "580.1" if names else "", gpus)


def test_this_host_is_described():
    found = host_facts()
    assert found.hostname
    assert found.cpus >= 1
    assert 0 < found.memory_available_bytes <= found.memory_total_bytes


def test_gpus_are_listed_and_nvml_is_given_back():
    nvml = Nvml(H100, H100)
    driver, gpus = nvidia_gpus(nvml)
    assert driver == "580.1"
    assert gpus == (Gpu(H100, "GPU-0", 80 << 30, 1 << 30), Gpu(H100, "GPU-1", 80 << 30, 1 << 30))
    assert nvml.users == 0


def test_what_a_machine_lacks_is_no_error():
    assert nvidia_gpus(Nvml(loads=False)) == ("", ())
    broken = Nvml(H100, counts=False)
    assert nvidia_gpus(broken) == ("", ())
    assert broken.users == 0
    assert [gpu.uuid for gpu in nvidia_gpus(Nvml(None, H100))[1]] == ["GPU-1"]
    assert nvidia_gpus(Nvml("NVIDIA GB10", memory=False))[1] == (Gpu("NVIDIA GB10", "GPU-0", None, None),)


@pytest.mark.parametrize(
    ("name", "model"),
    [
        (H100, "H100"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA A100-SXM4-40GB", "A100"),
        ("Tesla V100-SXM2-16GB", "V100"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA GH200 480GB", "GH200"),
        ("NVIDIA", "NVIDIA"),
    ],
)
def test_a_gpu_has_a_short_name(name: str, model: str):
    assert Gpu(name, "", None, None).model == model


def test_peers_are_told_small_strings():
    meta = facts(H100, H100, "NVIDIA L40S").to_meta()
    assert meta == {
        "host": "h1", "boot": "a" * 36, "cpus": "16", "memory_bytes": str(128 << 30),
        "gpus": f"2{TIMES}H100, 1{TIMES}L40S"
    }  # fmt: skip
    assert "gpus" not in facts().to_meta()


def test_the_meta_is_bounded_whatever_the_names_are():
    many = facts(*(f"NVIDIA Ünusual GPU {index} of a long name" for index in range(16)), hostname="h" * 255)
    for encode in (msgspec.json.encode, msgspec.msgpack.encode):
        assert len(encode(many.to_meta())) <= META_BYTES_MAX


def test_a_container_sees_its_own_limit(tmp_path: Path):
    assert _cgroup_memory(tmp_path) == (None, 0)
    (tmp_path / "memory.max").write_text("max\n")
    assert _cgroup_memory(tmp_path) == (None, 0)
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("400\n")
    assert _cgroup_memory(tmp_path) == (1000, 400)
    (tmp_path / "memory.max").unlink()
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    assert _cgroup_memory(tmp_path) == (None, 0)
