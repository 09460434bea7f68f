"""CPU that other processes take from a measurement, and the patience to wait until they are done.

Whatever runs beside a model on its cores slows it, and one that runs on all threads more than one that runs on few;
no canary cancels that. What counts is what leaves less than a core to each thread: on sixteen cores four threads lose
nothing to a neighbour, as the kernel moves them out of its way.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from latency_tables.device import cgroup_cpu_quotas, usable_threads
from latency_tables.errors import DisturbedError, LatencyTableError

OBSERVED_S = 0.5  # Shortest time that says how busy the cores are: the kernel counts in hundredths of a second.


@dataclass(frozen=True, kw_only=True)
class CpuPool:
    """Cores that this process shares with others: those of its affinity, or the quota of a control group."""

    cores: float
    used_s: float  # CPU time that everybody has used of them, with what the hypervisor gave to other machines.


@dataclass(frozen=True, kw_only=True)
class CpuReading:
    """What the kernel says at one moment."""

    at_s: float
    own_s: float  # CPU time of this process, all threads.
    pools: tuple[CpuPool, ...]


class CpuWatch(Protocol):
    """Reads the kernel's counts, and lets time pass. Tests bring their own."""

    threads: int  # That measuring runs on.

    def read(self) -> CpuReading | None: ...

    def sleep(self, seconds: float) -> None: ...


class LinuxCpuWatch:
    """Of this process. Other systems give no reading, so nothing is known there and nobody waits."""

    def __init__(self, device: torch.device) -> None:
        # On a GPU it is the thread that launches kernels.
        self.threads = usable_threads() if device.type == "cpu" else 1

    def read(self) -> CpuReading | None:
        try:
            affinity = os.sched_getaffinity(0)
            used_s = used_cpu_s(Path("/proc/stat").read_text(), affinity, os.sysconf("SC_CLK_TCK"))
        except (OSError, AttributeError):
            return None
        if used_s is None:
            return None
        groups = ((quota, group_cpu_s(folder)) for folder, quota in cgroup_cpu_quotas().items())
        return CpuReading(
            at_s=time.monotonic(),
            own_s=time.process_time(),
            pools=(
                CpuPool(cores=len(affinity), used_s=used_s),
                *(CpuPool(cores=quota, used_s=group_s) for quota, group_s in groups if group_s is not None),
            ),
        )

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


def used_cpu_s(stat: str, cores: Iterable[int], ticks_per_s: int) -> float | None:
    """Seconds that some cores were not idle, by the text of ``/proc/stat`` (proc(5)); None where it lacks one of them.

    Time stolen by the hypervisor counts as used: another machine ran on the core meanwhile.
    """
    ticks: dict[str, int] = {}
    for line in stat.splitlines():
        name, *fields = line.split()
        if name.startswith("cpu") and len(fields) >= 8:
            # Guests' time, the ninth and tenth field, is part of the first two.
            user, nice, system, _idle, _iowait, irq, softirq, steal = (int(field) for field in fields[:8])
            ticks[name] = user + nice + system + irq + softirq + steal
    wanted = [f"cpu{core}" for core in cores]
    if not all(name in ticks for name in wanted):
        return None
    return sum(ticks[name] for name in wanted) / ticks_per_s


def group_cpu_s(folder: Path) -> float | None:
    """CPU time that a control group and those inside it have used; None where its folder does not tell."""
    try:
        for line in (folder / "cpu.stat").read_text().splitlines():
            if line.startswith("usage_usec "):
                return int(line.split()[1]) / 1e6
        return int((folder / "cpuacct.usage").read_text()) / 1e9  # Version 1.
    except OSError:
        return None


def foreign_cores(before: CpuReading | None, after: CpuReading | None, threads: int) -> float | None:
    """Cores that others took from ``threads`` threads of this process between two readings; None where unknown.

    Others may use what the threads leave free: of sixteen cores twelve beside four threads, of a quota of 2.5 half a
    core beside two.
    """
    if before is None or after is None or after.at_s - before.at_s < OBSERVED_S:
        return None
    if len(before.pools) != len(after.pools):
        return None
    seconds, own_s = after.at_s - before.at_s, after.own_s - before.own_s
    taken = [
        (new.used_s - old.used_s - own_s) / seconds - max(0.0, new.cores - threads)
        for old, new in zip(before.pools, after.pools, strict=True)
    ]
    return max(0.0, *taken)


@dataclass(frozen=True, kw_only=True)
class Patience:
    """Of a measurement that waits while others take CPU from it, and is refused when they go on."""

    max_foreign_cores: float = 0.25
    max_wait_s: float = 60.0  # Before each run of subjects measured against each other.

    def __post_init__(self) -> None:
        if math.isnan(self.max_foreign_cores) or self.max_foreign_cores < 0:
            raise LatencyTableError(
                f"Other processes may take 0 or more cores beside a measurement, but got {self.max_foreign_cores}."
            )

    @classmethod
    def allowing(cls, max_foreign_cores: float | None) -> Patience:
        """Patience of a user who may have said what is allowed."""
        return cls() if max_foreign_cores is None else cls(max_foreign_cores=max_foreign_cores)

    def bears(self, cores: float | None) -> bool:
        return cores is None or cores <= self.max_foreign_cores

    def wait(self, watch: CpuWatch, tell: Callable[[str], None]) -> None:
        """Return as soon as the cores are quiet for half a second.

        Args:
            tell: Told every half second what is waited for; what it raises ends the wait.

        Raises:
            DisturbedError: If they are not after ``max_wait_s``.
        """
        if math.isinf(self.max_foreign_cores):
            return
        first = before = watch.read()
        while before is not None and first is not None:
            watch.sleep(OBSERVED_S)
            after = watch.read()
            cores = foreign_cores(before, after, watch.threads)
            if after is None or cores is None or self.bears(cores):
                return
            waited_s = after.at_s - first.at_s
            if waited_s >= self.max_wait_s:
                raise self.refusal(cores, f"after waiting for {waited_s:.0f} s")
            tell(f"waiting: other processes take {cores:.2f} cores")
            before = after

    def refusal(self, cores: float, when: str) -> DisturbedError:
        """The error that gives a measurement up."""
        return DisturbedError(
            f"Other processes take {cores:.2f} cores from measuring {when}, but at most {self.max_foreign_cores:.2f} "
            "are allowed; close them and start again, or allow more with --max-foreign-cores (in Python and in jobs "
            "max_foreign_cores)."
        )
