"""Builds beside other processes, and on a machine that changes its speed. Time passes where a model does work."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from latency_tables.build import build_table
from latency_tables.errors import DisturbedError, MeasurementStoppedError
from latency_tables.foreign_cpu import Patience
from latency_tables.measure import MeasureSettings, Subject, measure_models
from latency_tables.schema import LatencyTable
from latency_tables.validate import validate_table
from tests.integration.latency_tables.test_build import FEW_REDUCTIONS, ONCE, WorkStopwatch
from tests.unit.latency_tables.fakes import TINY, FakeClock, FakeCpu

BUSY, QUIET = 0.98, 0.0


class PassingStopwatch(WorkStopwatch):
    """Work takes its time from a clock, and longer on a slow machine: 1 ms per 10⁵ operations."""

    def __init__(self, clock: FakeClock, slowness: Callable[[float], float] = lambda now: 1.0) -> None:
        super().__init__()
        self._clock, self._slowness = clock, slowness

    def sample(self, subject: Subject) -> list[tuple[str, float]]:
        factor = self._slowness(self._clock.now_s)
        laps = [(name, ms * factor) for name, ms in super().sample(subject)]
        self._clock.now_s += sum(ms for _, ms in laps) * 1e-3
        return laps


def build(
    taken: Callable[[float], float],
    *,
    clock: FakeClock | None = None,
    partial_path: Path | None = None,
    told: list[str] | None = None,
    should_stop: Callable[[], bool] | None = None,
    slowness: Callable[[float], float] = lambda now: 1.0,
) -> LatencyTable:
    clock = clock or FakeClock()
    return build_table(
        TINY, batch_size=2, partial_path=partial_path, should_stop=should_stop,
        progress=None if told is None else lambda done, total, message: told.append(message),
        settings=dataclasses.replace(FEW_REDUCTIONS, patience=Patience(max_wait_s=20.0)),
        stopwatch=PassingStopwatch(clock, slowness), cpu=FakeCpu(clock, taken),
    )  # fmt: skip


@pytest.fixture(scope="module")
def quiet_end_s() -> float:
    """When a build ends that nobody disturbs."""
    clock = FakeClock()
    build(lambda now: QUIET, clock=clock)
    return clock.now_s


def test_a_build_waits_until_others_are_quiet_and_says_so() -> None:
    told: list[str] = []
    table = build(lambda now: BUSY if now < 15.0 else QUIET, told=told)
    assert table.entries and not table.noisy_entries
    assert any(message.startswith("waiting: other processes take 0.98 cores") for message in told)


def test_a_build_beside_a_neighbour_who_stays_is_refused_and_goes_on_later(quiet_end_s: float, tmp_path: Path) -> None:
    path = tmp_path / "table.partial"
    with pytest.raises(DisturbedError) as refused:
        build(lambda now: QUIET if now < 0.6 * quiet_end_s else BUSY, partial_path=path)
    sentence = str(refused.value)
    assert "Other processes take 0.98 cores from measuring after waiting for 20 s" in sentence
    assert f"Finished entries are kept in {path}; the same build goes on there." in sentence
    lines = path.read_text().splitlines()
    assert len(lines) > 1, "groups that were finished before"

    clock = FakeClock()
    resumed = build(lambda now: QUIET, clock=clock, partial_path=path)
    assert path.read_text().splitlines()[: len(lines)] == lines
    assert clock.now_s < quiet_end_s
    expected = build(lambda now: QUIET)
    assert [(entry.key, entry.median_ms) for entry in resumed.entries] == [
        (entry.key, pytest.approx(entry.median_ms)) for entry in expected.entries
    ]


def test_nothing_is_kept_of_a_build_that_was_never_quiet(tmp_path: Path) -> None:
    path = tmp_path / "table.partial"
    with pytest.raises(DisturbedError):
        build(lambda now: BUSY, partial_path=path)
    assert len(path.read_text().splitlines()) == 1, "the header"


def test_a_build_is_stopped_while_it_waits(tmp_path: Path) -> None:
    clock = FakeClock()
    with pytest.raises(MeasurementStoppedError):
        build(lambda now: BUSY, clock=clock, should_stop=lambda: clock.now_s > 5.0)
    assert clock.now_s < 6.0


def test_a_validation_beside_a_neighbour_is_refused() -> None:
    table = build(lambda now: QUIET)
    clock = FakeClock()
    with pytest.raises(DisturbedError, match="after waiting for 60 s"):
        validate_table(
            table, num_schedules=1, methods=["tome"], settings=ONCE, stopwatch=PassingStopwatch(clock),
            cpu=FakeCpu(clock, lambda now: BUSY),
        )  # fmt: skip


def test_parts_of_another_speed_than_the_machine_has_in_the_end_are_measured_again(
    quiet_end_s: float, tmp_path: Path
) -> None:
    path, told = tmp_path / "table.partial", list[str]()
    expected = build(lambda now: QUIET)
    assert expected.canary_drift == pytest.approx(0.0, abs=1e-6)

    def slowness(now: float) -> float:
        return 1.0 if now < 0.5 * quiet_end_s else 1.6

    table = build(lambda now: QUIET, slowness=slowness, partial_path=path, told=told)
    assert table.canary_drift == pytest.approx(0.0, abs=0.01)
    assert any("the machine changed its speed" in message for message in told)
    times = {entry.key: entry.median_ms for entry in expected.entries}
    assert len(table.entries) == len(times)
    assert table.correction.num_models == expected.correction.num_models
    for entry in table.entries:
        assert entry.median_ms == pytest.approx(1.6 * (times[entry.key] or 0.0), rel=0.01)
    # A build that goes on with the file knows which of its lines no longer count.
    again = build(lambda now: QUIET, partial_path=path)
    assert again.entries == table.entries


def test_a_machine_that_keeps_changing_its_speed_is_told(quiet_end_s: float, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="latency_tables.build"):
        table = build(lambda now: QUIET, slowness=lambda now: 1.0 + 2.0 * now / quiet_end_s)
    assert table.canary_drift is not None and table.canary_drift > 0.25
    assert "the machine's speed moved by" in caplog.text


@pytest.fixture
def busy_core() -> Iterator[int]:
    """The only core that this thread may use, and a busy loop on it."""
    torch.rand(2**20).sqrt()  # torch's threads keep the affinity that they start with.
    cores = os.sched_getaffinity(0)
    core = min(cores)
    loop = "import os, sys\nos.sched_setaffinity(0, {int(sys.argv[1])})\nprint(flush=True)\nwhile True: pass"
    os.sched_setaffinity(0, {core})
    try:
        with subprocess.Popen([sys.executable, "-c", loop, str(core)], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            try:
                yield core
            finally:
                process.kill()
    finally:
        os.sched_setaffinity(0, cores)


def test_a_busy_loop_on_one_of_our_cores_is_seen(busy_core: int, tmp_path: Path) -> None:
    path = tmp_path / "table.partial"
    settings = dataclasses.replace(FEW_REDUCTIONS, patience=Patience(max_wait_s=1.0))
    with pytest.raises(DisturbedError, match=r"Other processes take [01]\.\d\d cores from measuring after waiting"):
        build_table(TINY, batch_size=1, partial_path=path, settings=settings)
    assert len(path.read_text().splitlines()) == 1


def test_a_busy_loop_makes_a_measurement_noisy(busy_core: int) -> None:
    def spin(x: torch.Tensor) -> None:
        end = time.perf_counter() + 1e-3
        while time.perf_counter() < end:
            pass

    # Any spread is allowed, so that only the neighbour is left as a reason; a second is enough for the kernel's counts.
    settings = MeasureSettings(
        min_rounds=1000, max_rounds=1000, max_relative_iqr=math.inf, max_relative_error=math.inf, max_shift=math.inf,
        max_canary_drift=math.inf, attempts=1,
    )  # fmt: skip
    measured = measure_models({"dense": spin}, torch.zeros(1), device="cpu", canary="dense", settings=settings)["dense"]
    assert measured.state == "noisy"
    assert "other processes took" in (measured.reason or "")
