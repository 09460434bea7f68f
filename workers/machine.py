"""What the kernel says about memory: how much a process uses, and whether one was killed for it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

CGROUP_ROOT = Path("/sys/fs/cgroup")


def count_oom_kills(proc: Path = Path("/proc/self"), root: Path = CGROUP_ROOT) -> int:
    """Return how often the kernel has killed a process for its memory, in this control group or on this machine.

    Only the difference between two calls means anything; it is 0 where the kernel does not say.
    """
    lines: list[list[str]] = []
    for folder in _group_folders("", proc, root):
        lines += _lines(folder / "memory.events")
    for folder in _group_folders("memory", proc, root):
        lines += _lines(folder / "memory.oom_control")
    lines += _lines(Path("/proc/vmstat"))
    return sum(int(words[1]) for words in lines if len(words) == 2 and words[0] == "oom_kill" and words[1].isdigit())


def resident_mib(pid: int | str = "self") -> float:
    """Return the resident memory of a process in MiB; 0 where the system has no ``/proc``."""
    words = _words(Path(f"/proc/{pid}/statm"))
    return int(words[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20 if len(words) > 1 else 0.0


def total_memory_mib() -> float:
    """Return the machine's memory in MiB."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**20


def _group_folders(controller: str, proc: Path, root: Path) -> Iterator[Path]:
    """Yield the folders of this process's control group for a v1 controller, or v2 when ``controller`` is empty.

    Inside a container the path in ``/proc/self/cgroup`` may be the host's while only the root is mounted, so the
    ancestors are looked at as well; a limit of theirs can kill us too.
    """
    for line in _text(proc / "cgroup").splitlines():
        _, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        if (names == "" and controller == "") or (controller and controller in names.split(",")):
            base = root / controller
            folder = base / path.lstrip("/")
            while True:
                if folder.is_dir():
                    yield folder
                if folder == base:
                    break
                folder = folder.parent


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # the kernel, or this system, has no such file: nothing is limited by it
        return ""


def _words(path: Path) -> list[str]:
    return _text(path).split()


def _lines(path: Path) -> list[list[str]]:
    return [line.split() for line in _text(path).splitlines()]
