"""What a latency was measured on: the hardware and threads that must match, and the versions worth knowing."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field

from latency_tables.errors import LatencyTableError
from prunefront.config import StrictModel
from prunefront.cpuinfo import CPUINFO, cpu_info

# Instruction sets that decide which matmul kernels a CPU runs; the rest of a CPU's flags does not move latency.
_DECISIVE_CPU_FLAGS = (
    "avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "amx_int8",
    "asimd", "asimddp", "bf16", "i8mm", "sve", "sve2",
)  # fmt: skip
_UNTELLING = re.compile(r"\((r|tm)\)|\b(cpu|processor)\b")  # in the names of CPUs
_VERSIONED_PACKAGES = ("torch", "timm", "prunefront")


class DeviceInfo(StrictModel):
    """A device as found when something was measured on it."""

    kind: Literal["cpu", "cuda", "other"]
    name: str = Field(description="CPU or GPU model.")
    logical_cores: int | None = Field(default=None, description="Cores of the machine, used or not.")
    threads: int | None = Field(default=None, description="Threads that run one forward pass (CPU).")
    cpu_features: tuple[str, ...] = Field(default=(), description="Instruction sets that choose the matmul kernels.")
    memory_gib: float | None = None
    driver: str | None = Field(default=None, description="GPU driver.")
    os: str | None = None
    versions: dict[str, str] = Field(default_factory=dict)

    def fingerprint(self) -> str:
        """Identity of hardware and threads: tables with another fingerprint must not be used here."""
        identity = [self.kind, self.name, self.threads if self.kind == "cpu" else None, sorted(self.cpu_features)]
        return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]

    def slug(self) -> str:
        """Name of a folder for what was measured on it, such as ``amd-epyc-9b45-2-threads`` or ``nvidia-h200``.

        For people: devices of one slug may differ in their instruction sets, which the fingerprint tells.
        """
        name = _UNTELLING.sub(" ", self.name.lower())
        words = [word.strip(".") for word in re.split(r"[^a-z0-9.]+", name)]
        if self.kind == "cpu" and self.threads is not None:
            words += [str(self.threads), "thread" if self.threads == 1 else "threads"]
        return "-".join(word for word in words if word) or self.kind


def describe_device(device: str = "cpu") -> DeviceInfo:
    """Describe ``cpu``, ``cuda`` or ``cuda:N`` of this machine.

    Raises:
        LatencyTableError: If this machine has no such device.
    """
    parsed = torch_device(device)
    versions = {name: version for name in _VERSIONED_PACKAGES if (version := _version(name))}
    versions["python"] = platform.python_version()
    system = f"{platform.system()} {platform.release()}"
    if parsed.type == "cpu":
        return DeviceInfo(
            kind="cpu",
            name=cpu_name(),
            logical_cores=os.cpu_count(),
            threads=usable_threads(),
            cpu_features=_cpu_features(),
            memory_gib=_memory_gib(),
            os=system,
            versions=versions,
        )
    properties = torch.cuda.get_device_properties(parsed)
    if torch.version.cuda:
        versions["cuda"] = torch.version.cuda
    return DeviceInfo(
        kind="cuda",
        name=properties.name,
        logical_cores=os.cpu_count(),
        memory_gib=round(properties.total_memory / 2**30, 1),
        driver=_gpu_driver(),
        os=system,
        versions=versions,
    )


def local_devices() -> dict[str, DeviceInfo]:
    """What this machine can measure on, by the name that `torch_device` takes."""
    names = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    return {name: describe_device(name) for name in names}


def torch_device(device: str) -> torch.device:
    """Parse a device name and make sure this machine has it.

    Raises:
        LatencyTableError: If the name means nothing here.
    """
    try:
        parsed = torch.device(device)
    except RuntimeError as error:
        raise LatencyTableError(
            f"Unknown device {device!r}; expected cpu, cuda or cuda:N, as `prunefront devices` lists them."
        ) from error
    if parsed.type == "cpu":
        return torch.device("cpu")
    if parsed.type != "cuda":
        raise LatencyTableError(f"Latency is measured on cpu and cuda devices, but got {device!r}; choose one of them.")
    available = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if (parsed.index or 0) >= available:
        raise LatencyTableError(
            f"Device {device!r} is not here: torch sees {available} CUDA device(s). Check the driver and "
            "CUDA_VISIBLE_DEVICES, or choose cpu."
        )
    return torch.device("cuda", parsed.index or 0)


def usable_threads() -> int:
    """Threads that a forward pass may really use: affinity, the cgroup's quota and ``OMP_NUM_THREADS``.

    torch counts the machine's cores, so in a container with a CPU quota it starts more threads than can run, and
    every parallel loop then waits for the ones that do not.
    """
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limits = [affinity]
    quota = cgroup_cpu_quota()
    if quota is not None:
        limits.append(max(1, int(quota)))
    wanted = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    if wanted.isdecimal() and int(wanted) > 0:
        limits.append(int(wanted))
    return min(limits)


def cgroup_cpu_quota(root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> float | None:
    """CPUs that the control group grants, or None without a limit; the tightest level of the tree counts."""
    return min(cgroup_cpu_quotas(root, membership).values(), default=None)


def cgroup_cpu_quotas(
    root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")
) -> dict[Path, float]:
    """CPUs that each level of the control group's tree grants, by its folder; levels without a limit are left out."""
    quotas: dict[Path, float] = {}
    for line in _read(membership).splitlines():
        _, controllers, path = line.split(":", 2)
        base = root if not controllers else root / "cpu"
        if controllers and "cpu" not in controllers.split(","):
            continue
        # In a container the path of the host may not exist below the mount; the mount itself is then the group.
        for folder in _with_parents(base, path):
            if not controllers:
                fields = _read(folder / "cpu.max").split()
                limit, period = (fields[0], fields[1]) if len(fields) == 2 else ("max", "1")
            else:
                limit = _read(folder / "cpu.cfs_quota_us").strip()
                period = _read(folder / "cpu.cfs_period_us").strip()
            if limit.isdecimal() and period.isdecimal() and int(limit) > 0 and int(period) > 0:
                quotas[folder] = int(limit) / int(period)
    return quotas


def _with_parents(base: Path, path: str) -> list[Path]:
    folder = base / path.lstrip("/")
    inside = [folder, *folder.parents]
    return [candidate for candidate in inside if candidate == base or base in candidate.parents]


def _read(path: Path) -> str:
    """Text of a kernel file; empty where this system lacks it."""
    try:
        return path.read_text()
    except OSError:
        return ""


def cpu_name(cpuinfo: Path = CPUINFO) -> str:
    """Name of the CPU's model, with family and number where the name alone does not tell the generation.

    Hypervisors like to say "AMD EPYC" of CPUs that differ by a factor of two.
    """
    name = cpu_info("model name", "Model", path=cpuinfo) or platform.processor() or platform.machine()
    family, number = (cpu_info(key, path=cpuinfo) for key in ("cpu family", "model"))
    if family and number and not re.search(r"\d", name.partition("@")[0]):
        return f"{name} (family {family}, model {number})"
    return name or "unknown CPU"


def _cpu_features() -> tuple[str, ...]:
    flags = set(cpu_info("flags", "Features").split())
    return tuple(flag for flag in _DECISIVE_CPU_FLAGS if flag in flags)


def _memory_gib() -> float | None:
    for line in _read(Path("/proc/meminfo")).splitlines():
        if line.startswith("MemTotal:"):
            return round(int(line.split()[1]) / 2**20, 1)
    return None


def _gpu_driver() -> str | None:
    try:
        answer = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    lines = answer.stdout.split()
    return lines[0] if lines else None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
