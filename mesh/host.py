"""What this host is: its name, processors, memory and GPUs. A node tells its peers a short form of it.

Read once when asked, by the caller's thread; takes some milliseconds. A host without an NVIDIA driver simply has no
GPUs: nothing here fails for what a machine lacks. Knows nothing of agents or of the mesh.
"""

from __future__ import annotations

import os
import platform
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pynvml

META_BYTES_MAX = 256
"""What `HostFacts.to_meta` may take of a membership message, keys and values with a few bytes for each."""
META_TEXT_BYTES_MAX = 64
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
CGROUP = Path("/sys/fs/cgroup")
TIMES = "\N{MULTIPLICATION SIGN}"
BRANDS = ("NVIDIA", "Tesla", "GeForce", "Quadro")


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU, as its driver names it."""

    name: str
    uuid: str
    memory_total_bytes: int | None
    """None where the GPU has no memory of its own, or does not say."""
    memory_used_bytes: int | None

    @property
    def model(self) -> str:
        """The name without maker, memory and socket: ``H100`` of ``NVIDIA H100 80GB HBM3``."""
        words = [word for word in self.name.split("-")[0].split() if word not in BRANDS]
        kept: list[str] = []
        for word in words:
            if word.upper().endswith("GB") and word[0].isdigit():
                break
            kept.append(word)
        return " ".join(kept) or self.name


@dataclass(frozen=True, slots=True)
class HostFacts:
    """This host, at the moment of asking."""

    hostname: str
    boot_id: str
    """The same for all processes until the kernel starts again: peers that share a host see it. Empty when unknown."""
    cpus: int
    """The processors that this process may use."""
    memory_total_bytes: int
    """The host's, or the control group's limit where that is lower."""
    memory_available_bytes: int
    driver: str
    """The NVIDIA driver's version; empty without one."""
    gpus: tuple[Gpu, ...]

    @property
    def gpu_summary(self) -> str:
        """The GPUs by model, with how many of each; empty without GPUs."""
        models = Counter(gpu.model for gpu in self.gpus)
        return ", ".join(f"{count}{TIMES}{model}" for model, count in models.items())

    def to_meta(self) -> dict[str, str]:
        """What peers are told: small strings, at most `META_BYTES_MAX` bytes in all."""
        meta = {
            "host": _cut(self.hostname),
            "boot": self.boot_id[:36],
            "cpus": str(self.cpus),
            "memory_bytes": str(self.memory_total_bytes),
            "gpus": _cut(self.gpu_summary),
        }
        return {name: value for name, value in meta.items() if value}


def host_facts() -> HostFacts:
    """Look at this host."""
    memory = psutil.virtual_memory()
    limit, used = _cgroup_memory(CGROUP)
    driver, gpus = nvidia_gpus()
    return HostFacts(
        hostname=platform.node(),
        boot_id=_read(BOOT_ID),
        cpus=len(os.sched_getaffinity(0)),
        memory_total_bytes=min(memory.total, limit) if limit is not None else memory.total,
        memory_available_bytes=min(memory.available, max(0, limit - used)) if limit is not None else memory.available,
        driver=driver,
        gpus=gpus,
    )


def nvidia_gpus(nvml: Any = pynvml) -> tuple[str, tuple[Gpu, ...]]:
    """The driver's version and its GPUs; ("", ()) without a driver. `nvml` is the binding; a test has its own."""
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return "", ()
    try:
        driver = str(nvml.nvmlSystemGetDriverVersion())
        found = [_gpu(nvml, index) for index in range(nvml.nvmlDeviceGetCount())]
    except nvml.NVMLError:
        return "", ()
    finally:
        # NVML counts its users: what an engine in this process has opened stays open.
        nvml.nvmlShutdown()
    return driver, tuple(gpu for gpu in found if gpu is not None)


def _gpu(nvml: Any, index: int) -> Gpu | None:
    """One GPU; None for one that has fallen off the bus or may not be seen."""
    try:
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        name, uuid = str(nvml.nvmlDeviceGetName(handle)), str(nvml.nvmlDeviceGetUUID(handle))
    except nvml.NVMLError:
        return None
    try:
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    except nvml.NVMLError:
        return Gpu(name, uuid, None, None)
    return Gpu(name, uuid, int(memory.total), int(memory.used))


def _cgroup_memory(root: Path) -> tuple[int | None, int]:
    """(limit, used) of the control group that a container sees as its root; (None, 0) when it has no limit."""
    for limit_name, used_name in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        limit, used = _read(root / limit_name), _read(root / used_name)
        # Version 1 writes "no limit" as a number near 2^63.
        if limit.isdigit() and int(limit) < 1 << 60:
            return int(limit), int(used) if used.isdigit() else 0
    return None, 0


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _cut(text: str) -> str:
    """The text's front, of at most `META_TEXT_BYTES_MAX` bytes."""
    return text.encode()[:META_TEXT_BYTES_MAX].decode(errors="ignore")
