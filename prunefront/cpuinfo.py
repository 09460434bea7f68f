"""What Linux tells of the CPU."""

from __future__ import annotations

from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")


def cpu_info(*keys: str, path: Path = CPUINFO) -> str:
    """Value of the first line named by one of ``keys``; empty where there is none, and on other systems."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return ""
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() in keys:
            return value.strip()
    return ""
