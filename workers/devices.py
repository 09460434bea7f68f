"""The devices of this machine that tasks can run on, and what they are called."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from workers.machine import usable_threads

PROBE_TIMEOUT_S = 120.0  # importing torch with CUDA libraries from a cold disk takes a while


@dataclass(frozen=True, kw_only=True)
class LocalDevice:
    """One device of this machine."""

    name: str  # "cpu", "cuda:0"
    kind: str  # "cpu" or "cuda"
    description: str  # the hardware's own name
    num_threads: int  # CPU threads that work on it uses


def list_local_devices() -> list[LocalDevice]:
    """Return the CPU and every visible CUDA device.

    CUDA devices are looked up by a process of their own: asking for their names initialises CUDA, which costs
    several hundred MiB of device memory for as long as the asking process lives.
    """
    threads = usable_threads()
    devices = [LocalDevice(name="cpu", kind="cpu", description=cpu_name(), num_threads=threads)]
    for name, description in _probe_cuda():
        devices.append(LocalDevice(name=name, kind="cuda", description=description, num_threads=threads))
    return devices


def cpu_name() -> str:
    """Return the processor's name as the system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("model name", "Model", "Hardware") and value.strip():
                return value.strip()
    except OSError:  # not Linux
        pass
    return platform.processor() or platform.machine()


def _probe_cuda() -> list[tuple[str, str]]:
    """Return name and description of each CUDA device; none where no driver is loaded."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1") or not Path("/proc/driver/nvidia").exists():
        return []  # without a driver there is nothing to find, and importing torch would take seconds
    program = (
        "import json, torch; n = torch.cuda.device_count(); "
        "print(json.dumps([[f'cuda:{i}', torch.cuda.get_device_name(i)] for i in range(n)]))"
    )
    finished = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=PROBE_TIMEOUT_S, check=False
    )
    if finished.returncode != 0:
        from prunefront.errors import PrunefrontError

        raise PrunefrontError(
            f"An NVIDIA driver is loaded, but torch cannot list its devices: {finished.stderr.strip()[-300:]}. "
            "Repair the driver, or set CUDA_VISIBLE_DEVICES= to use the CPU alone."
        )
    return [(str(name), str(description)) for name, description in json.loads(finished.stdout)]
