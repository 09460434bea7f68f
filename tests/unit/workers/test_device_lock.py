"""The folder of device locks can be used by several users of one machine."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from workers.device_lock import default_lock_dir, hold_device
from workers.tasks import TaskStopped


def test_the_lock_folder_is_open_to_all_but_protects_each_file(tmp_path: Path) -> None:
    folder = tmp_path / "locks"
    with hold_device("cuda-GPU-1", exclusive=True, lock_dir=folder, on_wait=lambda: None, should_stop=lambda: False):
        assert {path.name for path in folder.glob("*.lock")} == {"cpu.lock", "cuda-GPU-1.lock"}
    assert stat.S_IMODE(folder.stat().st_mode) == 0o1777


def test_a_lock_file_behind_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cpu.gate").symlink_to(tmp_path / "elsewhere")
    with (
        pytest.raises(OSError),
        hold_device("cpu", exclusive=True, lock_dir=tmp_path, on_wait=lambda: None, should_stop=lambda: False),
    ):
        pass
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize(
    ("first", "second", "waits"),
    [
        (("cpu", False), ("cpu", False), False),
        (("cpu", False), ("cpu", True), True),
        (("cpu", True), ("cuda-1", False), True),  # nothing of ours runs while the CPU is measured
        (("cuda-1", True), ("cuda-1", False), True),
        (("cuda-1", True), ("cuda-2", True), False),
        (("cuda-1", True), ("cpu", False), False),
        (("cuda-1", False), ("cpu", True), True),
    ],
)
def test_who_waits_for_whom(tmp_path: Path, first: tuple[str, bool], second: tuple[str, bool], waits: bool) -> None:
    waited: list[bool] = []

    def hold(device: tuple[str, bool]):
        return hold_device(
            device[0],
            exclusive=device[1],
            lock_dir=tmp_path,
            on_wait=lambda: waited.append(True),
            should_stop=lambda: bool(waited),
        )

    with hold(first):
        if waits:
            with pytest.raises(TaskStopped), hold(second):
                pass
        else:
            with hold(second):
                pass
    assert bool(waited) == waits
    with hold_device("cpu", exclusive=True, lock_dir=tmp_path, on_wait=waited.clear, should_stop=lambda: False):
        pass  # everything was given back


def test_the_environment_chooses_the_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PRUNEFRONT_LOCK_DIR", os.fspath(tmp_path))
    assert default_lock_dir() == tmp_path
