"""The devices of this machine that tasks can run on, and how a task takes its own into use."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prunefront.errors import PrunefrontError

if TYPE_CHECKING:
    import torch

PROBE_TIMEOUT_S = 120.0  # importing torch with CUDA libraries from a cold disk takes a while
_PROBE = """
import json
import torch
from latency_tables.device import describe_device
names = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
print(json.dumps([[name, describe_device(name).model_dump(mode="json")] for name in names]))
"""


@dataclass(frozen=True, kw_only=True)
class LocalDevice:
    """One device of this machine."""

    name: str  # "cpu", "cuda:0"
    kind: str  # "cpu" or "cuda"
    description: str  # the hardware's own name
    num_threads: int  # CPU threads that work on it uses
    fingerprint: str  # identity of hardware and threads, as latency tables carry it


def list_local_devices() -> list[LocalDevice]:
    """Return the CPU and every visible CUDA device.

    CUDA devices are described by a process of their own: asking for their properties initialises CUDA, which costs
    several hundred MiB of device memory for as long as the asking process lives.

    Raises:
        PrunefrontError: If torch finds CUDA devices but cannot use them.
    """
    from latency_tables.device import DeviceInfo, describe_device, usable_threads

    threads = usable_threads()
    described = [("cpu", describe_device("cpu"))]
    described += [(name, DeviceInfo.model_validate(info)) for name, info in _probe_cuda()]
    return [
        LocalDevice(
            name=name, kind=info.kind, description=info.name, num_threads=threads, fingerprint=info.fingerprint()
        )
        for name, info in described
    ]


def prepare_device(device: str) -> torch.device:
    """Make torch ready to work on a task's device in this process: threads, current device, compile cache.

    Raises:
        LatencyTableError: If this machine has no such device.
    """
    import torch

    from latency_tables.device import torch_device, usable_threads
    from prunefront.runtimes import use_shared_compile_cache

    use_shared_compile_cache()
    target = torch_device(device)
    torch.set_num_threads(usable_threads())
    if target.type == "cuda":
        torch.cuda.set_device(target)  # what names no device must not land on another task's
    return target


def _probe_cuda() -> list[tuple[str, dict[str, object]]]:
    """Return name and description of each CUDA device."""
    import torch

    if torch.cuda.device_count() == 0:  # counting initialises nothing
        return []
    finished = subprocess.run(
        [sys.executable, "-c", _PROBE],
        capture_output=True,
        text=True,
        timeout=PROBE_TIMEOUT_S,
        check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )
    if finished.returncode != 0:
        raise PrunefrontError(
            f"torch finds CUDA devices but cannot describe them: {finished.stderr.strip()[-300:]}. "
            "Repair the driver, or set CUDA_VISIBLE_DEVICES= to use the CPU alone."
        )
    return [(str(name), info) for name, info in json.loads(finished.stdout)]
