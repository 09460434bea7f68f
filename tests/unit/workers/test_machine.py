"""Reading control groups of both versions, laid out in a folder as the kernel shows them."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import pytest

from workers.machine import count_oom_kills, resident_mib, total_memory_mib


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    return tmp_path / "proc"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "cgroup"


def test_out_of_memory_kills_are_counted_in_a_group_of_version_2(proc: Path, root: Path) -> None:
    write(proc / "cgroup", "0::/box/task\n")
    before = count_oom_kills(proc, root)
    write(root / "box/task/memory.events", "low 0\noom 3\noom_kill 2\noom_group_kill 0\n")
    assert count_oom_kills(proc, root) - before == 2


def test_out_of_memory_kills_are_counted_in_a_group_of_version_1(proc: Path, root: Path) -> None:
    write(proc / "cgroup", "4:memory:/box\n0::/\n")
    before = count_oom_kills(proc, root)
    write(root / "memory/box/memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill 1\n")
    assert count_oom_kills(proc, root) - before == 1


def test_a_container_that_mounts_only_its_own_group_is_understood(proc: Path, root: Path) -> None:
    write(proc / "cgroup", "0::/../../a/path/of/the/host\n")
    before = count_oom_kills(proc, root)
    write(root / "memory.events", "oom_kill 4\n")
    assert count_oom_kills(proc, root) - before == 4


def test_groups_of_other_controllers_do_not_count(proc: Path, root: Path) -> None:
    write(proc / "cgroup", "4:memory:/box\n")
    before = count_oom_kills(proc, root)
    write(root / "memory/elsewhere/memory.oom_control", "oom_kill 9\n")
    assert count_oom_kills(proc, root) == before


def test_resident_memory_grows_with_what_is_kept() -> None:
    before = resident_mib()
    # Fresh pages of the system: an ordinary object may find room in what the process has freed and still holds.
    kept = mmap.mmap(-1, 64 * 2**20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for _ in range(64):
        kept.write(bytes(2**20))
    assert 48 < resident_mib(os.getpid()) - before < 96
    assert len(kept) < total_memory_mib() * 2**20
