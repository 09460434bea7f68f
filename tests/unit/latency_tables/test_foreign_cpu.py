"""What other processes take from a measurement, and how long it waits for them."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from latency_tables.errors import DisturbedError, LatencyTableError, MeasurementStoppedError
from latency_tables.foreign_cpu import CpuPool, CpuReading, Patience, foreign_cores, group_cpu_s, used_cpu_s
from latency_tables.measure import WHOLE, MeasureSettings, WallStopwatch, measure_subjects
from tests.unit.latency_tables.fakes import FakeClock, FakeCpu

# Fields of a core: user, nice, system, idle, iowait, irq, softirq, steal, guest, guest_nice; hundredths of a second.
STAT = """cpu  1000 20 300 9000 40 5 6 70 8 9
cpu0 100 1 30 5000 7 2 3 40 50 0
cpu1 900 19 270 4000 33 3 3 30 0 0
cpu10 7000 0 0 0 0 0 0 0 0 0
intr 12345 0 0
"""
ONCE = MeasureSettings(min_rounds=12, max_rounds=12)


def reading(at_s: float, own_s: float, *pools: tuple[float, float]) -> CpuReading:
    return CpuReading(at_s=at_s, own_s=own_s, pools=tuple(CpuPool(cores=cores, used_s=used) for cores, used in pools))


def test_the_cores_of_the_affinity_are_counted_with_what_was_stolen_and_without_idling() -> None:
    assert used_cpu_s(STAT, {0}, 100) == pytest.approx((100 + 1 + 30 + 2 + 3 + 40) / 100)
    assert used_cpu_s(STAT, {0, 10}, 100) == pytest.approx((176 + 7000) / 100)


def test_nothing_is_known_of_a_core_that_the_kernel_does_not_list() -> None:
    assert used_cpu_s(STAT, {0, 2}, 100) is None
    assert used_cpu_s("cpu0 100 1 30 5000\n", {0}, 100) is None


def test_a_control_group_tells_its_use_in_either_version(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    (first / "cpu.stat").write_text("nr_periods 3\nnr_throttled 0\n")
    (first / "cpuacct.usage").write_text("2500000000\n")
    (second / "cpu.stat").write_text("usage_usec 1500000\nuser_usec 1400000\n")
    assert group_cpu_s(first) == 2.5
    assert group_cpu_s(second) == 1.5
    assert group_cpu_s(tmp_path) is None


@pytest.mark.parametrize(
    ("cores", "threads", "others", "taken"),
    [
        (2, 2, 0.5, 0.5),  # a busy loop that shares a core with a thread
        (16, 16, 0.5, 0.5),  # the same: the other threads wait for that one
        (16, 4, 11.0, 0.0),  # they find cores that nobody needs
        (16, 4, 13.5, 1.5),
        (2, 2, -0.01, 0.0),  # the kernel counts in ticks
    ],
)
def test_what_the_threads_leave_free_is_not_taken_from_them(
    cores: int, threads: int, others: float, taken: float
) -> None:
    own = 1.5
    before, after = reading(10.0, 4.0, (cores, 50.0)), reading(12.0, 4.0 + 2 * own, (cores, 50.0 + 2 * (own + others)))
    assert foreign_cores(before, after, threads) == pytest.approx(taken)


def test_a_neighbour_inside_the_same_quota_takes_from_it_however_idle_the_machine_is() -> None:
    before, after = reading(0.0, 0.0, (64, 0.0), (2.5, 0.0)), reading(1.0, 1.5, (64, 12.5), (2.5, 2.5))
    assert foreign_cores(before, after, 2) == pytest.approx(1.0 - 0.5)


def test_others_outside_the_quota_take_nothing_while_the_machine_has_free_cores() -> None:
    before, after = reading(0.0, 0.0, (64, 0.0), (2.0, 0.0)), reading(1.0, 2.0, (64, 62.0), (2.0, 2.0))
    assert foreign_cores(before, after, 2) == 0.0


def test_a_moment_is_too_short_to_tell_and_other_systems_tell_nothing() -> None:
    assert foreign_cores(reading(0.0, 0.0, (2, 0.0)), reading(0.3, 0.0, (2, 0.3)), 2) is None
    assert foreign_cores(None, reading(1.0, 0.0, (2, 0.0)), 2) is None


def test_waiting_ends_when_the_others_do_and_says_what_it_waits_for() -> None:
    clock = FakeClock()
    told: list[str] = []
    Patience().wait(FakeCpu(clock, lambda now: 0.98 if now < 10.0 else 0.1), told.append)
    assert 10.0 < clock.now_s < 11.0
    assert set(told) == {"waiting: other processes take 0.98 cores"}


def test_waiting_ends_at_once_where_nobody_disturbs() -> None:
    clock = FakeClock()
    told: list[str] = []
    Patience().wait(FakeCpu(clock, lambda now: 0.2), told.append)
    assert clock.now_s < 1.0
    assert not told


def test_patience_ends_with_what_was_taken_and_what_to_do() -> None:
    clock = FakeClock()
    with pytest.raises(
        DisturbedError,
        match=r"take 0.98 cores from measuring after waiting for 20 s, but at most 0.25 are allowed; close them.*"
        "--max-foreign-cores",
    ):
        Patience(max_wait_s=20.0).wait(FakeCpu(clock, lambda now: 0.98), lambda message: None)
    assert 20.0 <= clock.now_s < 21.0


def test_who_allows_more_does_not_wait() -> None:
    clock = FakeClock()
    Patience.allowing(1.0).wait(FakeCpu(clock, lambda now: 0.98), pytest.fail)
    Patience(max_foreign_cores=math.inf).wait(FakeCpu(clock, lambda now: 2.0), pytest.fail)
    assert Patience.allowing(None) == Patience()


def test_a_system_that_tells_nothing_is_not_waited_for() -> None:
    class Blind:
        threads = 2

        def read(self) -> None:
            return None

        def sleep(self, seconds: float) -> None:
            pytest.fail("waited")

    Patience().wait(Blind(), pytest.fail)


@pytest.mark.parametrize("cores", [-0.1, math.nan])
def test_less_than_nothing_cannot_be_allowed(cores: float) -> None:
    with pytest.raises(LatencyTableError, match="0 or more cores"):
        Patience(max_foreign_cores=cores)


def test_a_disturbed_run_is_dropped_and_run_again_once_it_is_quiet() -> None:
    # From 1 s on a neighbour doubles the time of one model alone, which no canary cancels; it leaves after 9 s.
    clock = FakeClock()
    told: list[str] = []

    def is_busy(now: float) -> bool:
        return 1.0 <= now < 9.0

    def subject(lap: object) -> None:
        clock.work(200.0 if is_busy(clock.now_s) else 100.0)
        lap(WHOLE)  # type: ignore[operator]

    measured = measure_subjects(
        {"a": subject},
        canary=clock.subject(10.0),
        stopwatch=WallStopwatch(clock),
        settings=ONCE,
        cpu=FakeCpu(clock, lambda now: 0.5 if is_busy(now) else 0.0),
        patience=Patience(),
        progress=lambda done, total, message: told.append(message),
    )["a"][WHOLE]
    assert measured.state == "ok"
    assert measured.median_ms == pytest.approx(100.0)
    assert measured.num_samples == 12
    assert "waiting: other processes take 0.50 cores" in told


def test_a_neighbour_who_is_there_whenever_something_runs_is_not_put_up_with() -> None:
    clock = FakeClock()
    running = False

    def subject(lap: object) -> None:
        nonlocal running
        running = True
        clock.work(100.0)
        lap(WHOLE)  # type: ignore[operator]

    class OnlyBesideRuns(FakeCpu):
        def sleep(self, seconds: float) -> None:
            nonlocal running
            running = False
            super().sleep(seconds)

    with pytest.raises(DisturbedError, match="take 0.80 cores from measuring in each of 3 runs"):
        measure_subjects(
            {"a": subject},
            canary=clock.subject(10.0),
            stopwatch=WallStopwatch(clock),
            settings=ONCE,
            cpu=OnlyBesideRuns(clock, lambda now: 0.8 if running else 0.0),
            patience=Patience(),
        )


def test_without_patience_a_disturbed_run_is_noisy() -> None:
    clock = FakeClock()
    measured = measure_subjects(
        {"a": clock.subject(100.0)},
        canary=clock.subject(10.0),
        stopwatch=WallStopwatch(clock),
        settings=ONCE,
        cpu=FakeCpu(clock, lambda now: 0.5),
    )["a"][WHOLE]
    assert measured.state == "noisy"
    assert measured.reason == "after 3 attempts other processes took 0.50 cores; close them and measure again"


def test_measuring_stops_while_it_waits() -> None:
    clock = FakeClock()
    with pytest.raises(MeasurementStoppedError):
        measure_subjects(
            {"a": clock.subject(1.0)},
            canary=clock.subject(10.0),
            stopwatch=WallStopwatch(clock),
            settings=ONCE,
            cpu=FakeCpu(clock, lambda now: 1.0),
            patience=Patience(),
            should_stop=lambda: clock.now_s > 5.0,
        )
    assert clock.now_s < 6.0
