import ctypes
import gc
import statistics
from collections.abc import Sequence

import pytest
import torch
from torch import nn

from latency_tables.errors import LatencyTableError, MeasurementStoppedError
from latency_tables.measure import (
    WHOLE,
    Lap,
    LapSamples,
    MeasureSettings,
    Subject,
    WallStopwatch,
    interleave,
    measure_models,
    peak_memory_mib,
    prepared_model,
    rounds_for,
    summarise,
)
from prunefront.runtimes import _Mallinfo2
from tests.unit.latency_tables.fakes import FakeClock

IMAGES = torch.zeros(2, 3, 8, 8)
SETTINGS = MeasureSettings(min_rounds=12, max_rounds=12)


def test_laps_split_a_run_where_they_are_called() -> None:
    clock = FakeClock()

    def subject(lap: Lap) -> None:
        for _ in range(2):
            clock.work(2.0)
            lap("attention")
            clock.work(3.0)
            lap("mlp")

    laps = WallStopwatch(clock).sample(subject)
    assert [name for name, _ in laps] == ["attention", "mlp"] * 2
    assert [ms for _, ms in laps] == pytest.approx([2.0, 3.0, 2.0, 3.0])


def test_garbage_is_not_collected_while_the_watch_runs() -> None:
    seen = []

    def subject(lap: Lap) -> None:
        seen.append(gc.isenabled())
        lap(WHOLE)

    assert gc.isenabled()
    WallStopwatch().sample(subject)
    assert seen == [False]
    assert gc.isenabled()


def test_median_speedup_and_spread_of_a_steady_model() -> None:
    clock = FakeClock()
    models = {"dense": clock.model(10.0), "small": clock.model(4.0)}
    measured = measure_models(
        models, IMAGES, device="cpu", canary="dense", settings=SETTINGS, stopwatch=WallStopwatch(clock)
    )
    assert measured["small"].median_ms == pytest.approx(4.0)
    assert measured["small"].speedup == pytest.approx(2.5)
    assert measured["small"].iqr_ms == pytest.approx(0.0, abs=1e-9)
    assert measured["small"].num_samples == 12
    assert measured["small"].state == "ok"
    assert measured["dense"].speedup == pytest.approx(1.0)


def test_drift_of_the_machine_is_cancelled_by_the_canary() -> None:
    # The machine slows down steadily by a fifth over the run.
    clock = FakeClock(lambda now: 1.0 + 0.2 * min(now / 0.5, 1.0))
    subjects = {"a": clock.subject(4.0), "b": clock.subject(8.0)}
    runs = interleave(
        subjects,
        canary=clock.subject(10.0),
        stopwatch=WallStopwatch(clock),
        settings=MeasureSettings(canary_share=0.5),
        rounds={"a": 30, "b": 15},
    )
    for key, ms in (("a", 4.0), ("b", 8.0)):
        normalised = [sample / runs[key].canary_ms for sample in runs[key].laps[WHOLE]]
        assert normalised == pytest.approx([ms / 10.0] * len(normalised), rel=0.03)
    assert 0.1 < runs["a"].canary_drift < 0.2


def test_a_machine_that_changes_its_speed_between_two_runs_of_the_canary_is_cancelled() -> None:
    # Slow by half for 160 ms of every 400 ms; the canary runs every 760 ms or so.
    clock = FakeClock(lambda now: 1.5 if now % 0.4 < 0.16 else 1.0)
    ms = {"a": 4.0, "b": 8.0, "c": 2.0}
    runs = interleave(
        {key: clock.subject(time) for key, time in ms.items()},
        canary=clock.subject(10.0),
        stopwatch=WallStopwatch(clock),
        settings=MeasureSettings(min_rounds=60, canary_share=0.025),
    )
    reference = statistics.median(runs["a"].laps[WHOLE])
    for key, time in ms.items():
        within = [abs(sample / reference * 4.0 / time - 1.0) < 0.02 for sample in runs[key].laps[WHOLE]]
        assert statistics.fmean(within) > 0.8  # All but samples at a change of speed.
        assert statistics.median(runs[key].laps[WHOLE]) / runs[key].canary_ms == pytest.approx(time / 10.0, rel=0.02)


@pytest.mark.parametrize(("canary_ms", "expected_ms"), [(50.0, 4.0), (250.0, 6.0)])
def test_a_short_sample_finds_the_caches_as_its_own_model_left_them(canary_ms: float, expected_ms: float) -> None:
    """Each call that follows one of another model takes 2 ms longer; beside long ones that does not matter."""
    clock = FakeClock()
    last = ""

    def subject(name: str, ms: float) -> Subject:
        def run(lap: Lap) -> None:
            nonlocal last
            clock.work(ms if last == name else ms + 2.0)
            last = name
            lap(WHOLE)

        return run

    runs = interleave(
        {key: subject(key, 4.0) for key in "abc"},
        canary=subject("canary", canary_ms),
        stopwatch=WallStopwatch(clock),
        settings=SETTINGS,
        rounds=dict.fromkeys("abc", 60),
    )
    for key in "abc":
        assert statistics.median(runs[key].laps[WHOLE]) == pytest.approx(expected_ms, rel=0.02)
    assert runs["a"].canary_ms == pytest.approx(canary_ms + expected_ms - 4.0, rel=0.02)


def test_subjects_of_few_and_of_many_samples_meet_the_machine_at_the_same_times() -> None:
    clock = FakeClock()
    taken: dict[str, list[float]] = {"few": [], "many": []}

    def subject(name: str) -> Subject:
        def run(lap: Lap) -> None:
            taken[name].append(clock.now_s)
            clock.work(4.0)
            lap(WHOLE)

        return run

    interleave(
        {name: subject(name) for name in taken},
        canary=clock.subject(250.0),
        stopwatch=WallStopwatch(clock),
        settings=SETTINGS,
        rounds={"few": 5, "many": 50},
    )
    assert [len(times) for times in taken.values()] == [5, 50]
    start, *_, end = taken["many"]
    # One in each fifth of the run.
    assert [int(5 * (at - start) / (end - start + 1e-3)) for at in taken["few"]] == pytest.approx(
        [0, 1, 2, 3, 4], abs=1
    )


def spread(samples: Sequence[float]) -> float:
    """Interquartile range over the median."""
    q1, median, q3 = statistics.quantiles(samples, n=4)
    return (q3 - q1) / median


def test_the_noise_of_a_model_of_its_own_stays_in_its_spread() -> None:
    clock = FakeClock()
    runs = interleave(
        {"steady": clock.subject(4.0), "shaky": clock.subject(4.0, 4.0, 6.0, 6.0), "other": clock.subject(3.0)},
        canary=clock.subject(10.0),
        stopwatch=WallStopwatch(clock),
        settings=SETTINGS,
    )
    assert spread(runs["shaky"].laps[WHOLE]) > 0.3
    assert spread(runs["steady"].laps[WHOLE]) < 0.02


def test_laps_of_one_name_are_averaged_within_a_run() -> None:
    clock = FakeClock()

    def chain(lap: Lap) -> None:
        for ms in (1.0, 2.0, 6.0):
            clock.work(ms)
            lap("mlp")

    runs = interleave(
        {"chain": chain},
        canary=clock.subject(1.0),
        stopwatch=WallStopwatch(clock),
        settings=MeasureSettings(min_rounds=2),
    )
    assert runs["chain"].laps == {"mlp": (pytest.approx(3.0), pytest.approx(3.0))}


def test_canary_takes_its_share_of_the_sampling_time() -> None:
    clock = FakeClock()
    runs = {"canary": 0}

    def canary(lap: Lap) -> None:
        runs["canary"] += 1
        clock.work(2.0)
        lap(WHOLE)

    interleave(
        {"a": clock.subject(1.0)},
        canary=canary,
        stopwatch=WallStopwatch(clock),
        settings=MeasureSettings(min_rounds=80, canary_share=0.2),
    )
    # 80 ms of samples and one canary of 2 ms after every 8 ms, besides the first and the last; all but the first, which
    # tells how long it takes, follow an untimed call.
    assert runs["canary"] == 1 + 11 * 2


def test_noise_that_stays_is_reported_with_its_reason_after_three_attempts() -> None:
    clock = FakeClock()
    models = {"dense": clock.model(10.0), "shaky": clock.model(4.0, 4.0, 6.0, 6.0)}
    messages: list[str] = []
    measured = measure_models(
        models,
        IMAGES,
        device="cpu",
        canary="dense",
        settings=SETTINGS,
        stopwatch=WallStopwatch(clock),
        progress=lambda done, total, message: messages.append(message),
    )
    assert measured["shaky"].state == "noisy"
    assert measured["shaky"].reason is not None
    assert measured["shaky"].reason.startswith("after 3 attempts the interquartile range is ")
    assert measured["dense"].state == "ok"
    assert any("attempt 3 of 3" in message for message in messages)


def test_a_quiet_attempt_replaces_a_noisy_one() -> None:
    clock = FakeClock()
    noisy_calls = [4.0, 6.0] * 8  # Warm-up and the first attempt.
    steady = [5.0] * 1000
    models = {"dense": clock.model(10.0), "settling": clock.model(*noisy_calls, *steady)}
    measured = measure_models(
        models, IMAGES, device="cpu", canary="dense", settings=SETTINGS, stopwatch=WallStopwatch(clock)
    )
    assert measured["settling"].state == "ok"
    assert measured["settling"].median_ms == pytest.approx(5.0)


def test_a_measurement_is_brought_to_another_speed_of_the_machine() -> None:
    clock = FakeClock()
    models = {"dense": clock.model(10.0), "small": clock.model(4.0)}
    small = measure_models(
        models, IMAGES, device="cpu", canary="dense", settings=SETTINGS, stopwatch=WallStopwatch(clock)
    )["small"].at_canary(20.0)
    assert (small.median_ms, small.p90_ms, small.canary_ms) == pytest.approx((8.0, 8.0, 20.0))
    assert small.speedup == pytest.approx(2.5)


@pytest.mark.parametrize(("cores", "state"), [(None, "ok"), (0.1, "ok"), (0.5, "noisy")])
def test_a_steady_neighbour_makes_a_run_noisy_though_it_leaves_no_spread(cores: float | None, state: str) -> None:
    run = LapSamples(laps={}, canary_ms=10.0, canary_drift=0.0, foreign_cores=cores)
    measured = summarise([4.0] * 10, run, MeasureSettings())
    assert measured.state == state
    assert ("other processes took 0.50 cores" in (measured.reason or "")) == (state == "noisy")


def test_a_canary_that_moves_too_much_makes_a_run_noisy() -> None:
    clock = FakeClock(lambda now: 1.0 if now < 0.6 else 2.0)
    measured = measure_models(
        {"dense": clock.model(10.0)},
        IMAGES,
        device="cpu",
        canary="dense",
        settings=MeasureSettings(min_rounds=30, max_rounds=30, attempts=1),
        stopwatch=WallStopwatch(clock),
    )
    assert measured["dense"].state == "noisy"
    assert "machine's speed moved" in (measured["dense"].reason or "")


def test_batches_take_turns() -> None:
    clock = FakeClock()
    seen: list[float] = []

    def forward(x: torch.Tensor) -> None:
        seen.append(float(x[0, 0, 0, 0]))
        clock.work(1.0)

    measure_models(
        {"dense": forward},
        [torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1)],
        device="cpu",
        canary="dense",
        settings=MeasureSettings(warmup_rounds=4, min_rounds=4, max_rounds=4),
        stopwatch=WallStopwatch(clock),
    )
    assert seen[:4] == [0.0, 0.0, 1.0, 1.0]


def test_measuring_stops_when_asked() -> None:
    clock = FakeClock()
    asked = iter([False] * 5)
    with pytest.raises(MeasurementStoppedError, match="stopped on request"):
        measure_models(
            {"dense": clock.model(1.0)},
            IMAGES,
            device="cpu",
            canary="dense",
            stopwatch=WallStopwatch(clock),
            should_stop=lambda: next(asked, True),
        )


def test_the_canary_has_to_be_one_of_the_models() -> None:
    with pytest.raises(LatencyTableError, match="must be one of the models, which are a"):
        measure_models({"a": lambda x: x}, IMAGES, device="cpu", canary="dense")


def test_rounds_fill_the_target_within_the_range() -> None:
    settings = MeasureSettings(min_rounds=5, max_rounds=20, target_s=1.0)
    assert rounds_for(100.0, settings) == 10
    assert rounds_for(1000.0, settings) == 5
    assert rounds_for(0.01, settings) == 20


def test_peak_memory_counts_weights_and_what_a_run_allocates() -> None:
    model = nn.Linear(1024, 1024, bias=False)  # 4 MiB
    device = torch.device("cpu")
    small = peak_memory_mib(lambda: None, device, model)
    # Freshly written pages, so that they are resident.
    large = peak_memory_mib(lambda: torch.ones(64 * 2**18), device, model)
    if small is None or large is None:
        pytest.skip("this system does not tell the peak of resident memory")
    assert small >= 4.0
    assert large - small == pytest.approx(64.0, abs=1.0)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="it takes glibc 2.33")
def test_peak_memory_does_not_depend_on_what_the_process_freed() -> None:
    device = torch.device("cpu")

    def run() -> None:
        # Two at a time of a little more than 4 MiB each.
        kept = torch.ones(4 * 2**18)
        for size in range(1, 6):
            kept = torch.ones(len(kept) + 2**12 * size)

    before = peak_memory_mib(run, device)
    # Places of many sizes, apart from each other.
    holes = [torch.ones(2**16 * size) for size in range(8, 80)]
    del holes[::2]
    after = peak_memory_mib(run, device)
    assert before == pytest.approx(8.2, abs=0.5)
    assert after == pytest.approx(before, abs=0.3)
    # Buffers are kept again afterwards: this one is not mapped by itself.
    mapped = ctypes.CDLL(None).mallinfo2
    mapped.restype = _Mallinfo2
    num_mapped = mapped().hblks
    kept = torch.ones(2**20)
    assert mapped().hblks == num_mapped and len(kept) == 2**20


class Heavy(nn.Module):
    """16 Mi weights that do not run."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(16 * 2**20))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def test_peak_memory_counts_the_weights_of_modules_and_of_prepared_models_in_the_dtype_they_run_in() -> None:
    ready = prepared_model(Heavy(), "eager", "bf16", torch.device("cpu"))
    measured = measure_models(
        {"module": Heavy(), "prepared": ready, "callable": lambda x: x},
        IMAGES,
        device="cpu",
        dtype="bf16",
        canary="module",
        settings=MeasureSettings(warmup_rounds=1, min_rounds=2, max_rounds=2, attempts=1),
    )
    memory = {key: one.peak_memory_mib for key, one in measured.items()}
    if None in memory.values():
        pytest.skip("this system does not tell the peak of resident memory")
    assert memory == pytest.approx({"module": 32.0, "prepared": 32.0, "callable": 0.0}, abs=8.0)
