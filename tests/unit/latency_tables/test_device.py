import os
from pathlib import Path

import pytest

from latency_tables.device import (
    DeviceInfo,
    cgroup_cpu_quota,
    cpu_name,
    describe_device,
    torch_device,
    usable_threads,
)
from latency_tables.errors import LatencyTableError
from tests.unit.latency_tables.fakes import DEVICE


def test_the_cpu_has_a_name_threads_and_versions() -> None:
    info = describe_device("cpu")
    assert info.name
    assert info.threads is not None and 1 <= info.threads <= (os.cpu_count() or 1)
    assert {"torch", "timm", "python"} <= set(info.versions)
    assert info.fingerprint() == describe_device("cpu").fingerprint()


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({"name": "Abacus 4000"}, False),
        ({"threads": 4}, False),
        ({"cpu_features": ("avx2", "avx512f")}, False),
        ({"versions": {"torch": "9.9"}}, True),
        ({"os": "Linux 1.0", "memory_gib": 3.0}, True),
    ],
)
def test_fingerprint_covers_hardware_and_threads_alone(changes: dict[str, object], same: bool) -> None:
    assert (DEVICE.model_copy(update=changes).fingerprint() == DEVICE.fingerprint()) is same


@pytest.mark.parametrize(
    ("device", "slug"),
    [
        ({"kind": "cpu", "name": "AMD EPYC 9B45", "threads": 2}, "amd-epyc-9b45-2-threads"),
        ({"kind": "cpu", "name": "Intel(R) Xeon(R) CPU @ 2.20GHz", "threads": 1}, "intel-xeon-2.20ghz-1-thread"),
        ({"kind": "cpu", "name": "AMD Ryzen 9 7950X 16-Core Processor", "threads": 16},
         "amd-ryzen-9-7950x-16-core-16-threads"),
        ({"kind": "cpu", "name": "AMD EPYC (family 25, model 17)", "threads": 2},
         "amd-epyc-family-25-model-17-2-threads"),
        ({"kind": "cuda", "name": "NVIDIA H100 80GB HBM3"}, "nvidia-h100-80gb-hbm3"),
        ({"kind": "cuda", "name": "NVIDIA H200", "threads": 16}, "nvidia-h200"),
        ({"kind": "other", "name": "../Pixel 9"}, "pixel-9"),
        ({"kind": "other", "name": "電話"}, "other"),
    ],
)  # fmt: skip
def test_the_slug_names_hardware_and_threads_and_is_one_folder(device: dict[str, object], slug: str) -> None:
    assert DeviceInfo.model_validate(device).slug() == slug


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("AMD EPYC", "AMD EPYC (family 25, model 17)"),
        ("Intel(R) Xeon(R) Processor @ 2.50GHz", "Intel(R) Xeon(R) Processor @ 2.50GHz (family 25, model 17)"),
        ("AMD EPYC 9B45", "AMD EPYC 9B45"),
        ("11th Gen Intel(R) Core(TM) i7-1165G7 @ 2.80GHz", "11th Gen Intel(R) Core(TM) i7-1165G7 @ 2.80GHz"),
    ],
)
def test_a_cpu_whose_name_hides_its_generation_is_told_by_family_and_model(
    tmp_path: Path, name: str, told: str
) -> None:
    path = tmp_path / "cpuinfo"
    path.write_text(f"vendor_id\t: X\ncpu family\t: 25\nmodel\t\t: 17\nmodel name\t: {name}\nstepping\t: 1\n")
    assert cpu_name(path) == told


def test_omp_num_threads_limits_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert usable_threads() == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "4096")
    assert usable_threads() <= (os.cpu_count() or 1)
    monkeypatch.setenv("OMP_NUM_THREADS", "many")
    assert usable_threads() >= 1


def test_the_tightest_cgroup_v2_quota_counts(tmp_path: Path) -> None:
    inner = tmp_path / "fs" / "jobs" / "one"
    inner.mkdir(parents=True)
    (inner / "cpu.max").write_text("max 100000\n")
    (inner.parent / "cpu.max").write_text("150000 100000\n")
    membership = tmp_path / "cgroup"
    membership.write_text("0::/jobs/one\n")
    assert cgroup_cpu_quota(tmp_path / "fs", membership) == 1.5


def test_a_cgroup_v1_quota_is_read(tmp_path: Path) -> None:
    group = tmp_path / "fs" / "cpu" / "docker"
    group.mkdir(parents=True)
    (group / "cpu.cfs_quota_us").write_text("200000\n")
    (group / "cpu.cfs_period_us").write_text("100000\n")
    membership = tmp_path / "cgroup"
    membership.write_text("4:memory:/docker\n1:cpu,cpuacct:/docker\n0::/docker\n")
    assert cgroup_cpu_quota(tmp_path / "fs", membership) == 2.0


def test_no_quota_is_none(tmp_path: Path) -> None:
    membership = tmp_path / "cgroup"
    membership.write_text("1:cpu:/\n0::/\n")
    assert cgroup_cpu_quota(tmp_path, membership) is None
    assert cgroup_cpu_quota(tmp_path, tmp_path / "missing") is None


@pytest.mark.parametrize(
    ("device", "sentence"),
    [("abacus", "Unknown device 'abacus'"), ("mps", "cpu and cuda"), ("cuda:64", "'cuda:64' is not here")],
)
def test_a_device_that_is_not_here_is_refused(device: str, sentence: str) -> None:
    with pytest.raises(LatencyTableError, match=sentence):
        torch_device(device)
