"""Timing: warm up, interleave in random order with a canary, cancel drift, report medians with their spread.

The unit is a *subject*: a callable that does its work and calls ``lap(name)`` whenever a part of it is over. A whole
model is a subject with one lap; `build` times halves of blocks inside a running chain with many.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import itertools
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, Protocol, cast

import numpy as np
import torch
from torch import Tensor, nn

from latency_tables.device import torch_device, usable_threads
from latency_tables.errors import LatencyTableError, MeasurementStoppedError
from latency_tables.foreign_cpu import CpuWatch, LinuxCpuWatch, Patience, foreign_cores
from prunefront.runtimes import DTYPES, Forward, cast_modules, freed_memory_returned, prepare

Lap = Callable[[str], None]
Subject = Callable[[Lap], object]
Progress = Callable[[float, float, str], None]
ShouldStop = Callable[[], bool]


STOPPED = "Measuring was stopped on request; start again to go on."

WHOLE = "forward"  # Name of the only lap of a whole model.
# Standard error of a median of n normal samples is 1.2533 sigma / sqrt(n), and sigma is IQR / 1.349.
MEDIAN_ERROR_PER_IQR = 1.2533 / 1.349
# Samples on either side whose median says how fast the machine is at a moment, and passes of estimating that.
NEIGHBOURS, DRIFT_PASSES = 4, 5
# A sample that a call of the same subject precedes, untimed, finds its own weights in the caches, as in a program that
# runs one model; else it finds those of the model before. That costs a few milliseconds at most: above so many per call
# of the canary it no longer matters, and would double the time.
RUN_IN_BELOW_MS = 200.0
# Cores that others took, which are told as a likely reason where a measurement is noisy otherwise.
NOTEWORTHY_FOREIGN_CORES = 0.1
MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Latency of one subject. Drift is cancelled: times are as if the machine had been as fast as in its median."""

    median_ms: float
    iqr_ms: float
    p10_ms: float
    p90_ms: float
    p99_ms: float
    num_samples: int
    canary_ms: float  # Median of the canary in the same run.
    speedup: float  # canary_ms / median_ms.
    peak_memory_mib: float | None  # Weights plus what one forward pass needs on top; None where it cannot be seen.
    state: Literal["ok", "noisy"]
    reason: str | None  # Why it is noisy.

    def at_canary(self, canary_ms: float) -> Measurement:
        """The same measurement on the machine as fast as when the canary took ``canary_ms``."""
        factor = canary_ms / self.canary_ms
        names = ("median_ms", "iqr_ms", "p10_ms", "p90_ms", "p99_ms")
        return dataclasses.replace(self, canary_ms=canary_ms, **{name: getattr(self, name) * factor for name in names})

    def less(self, ms: float) -> Measurement:
        """The same measurement with so much taken off every time, none below zero."""
        names = ("median_ms", "p10_ms", "p90_ms", "p99_ms")
        return dataclasses.replace(self, **{name: max(0.0, getattr(self, name) - ms) for name in names})


@dataclass(frozen=True, kw_only=True)
class MeasureSettings:
    """How long to measure and what counts as noise."""

    warmup_rounds: int = 3
    min_rounds: int = 10
    max_rounds: int = 50
    target_s: float = 2.0  # Sampling time per subject that is enough; bounds the rounds of fast subjects.
    canary_share: float = 0.2  # Of the sampling time goes to the canary.
    max_relative_iqr: float = 0.25  # torch.utils.benchmark calls more than this grossly variable.
    max_relative_error: float = 0.03  # Standard error of the median over the median: what a reader relies on.
    max_shift: float = 0.10  # Between the medians of both halves: drift that the canary did not cancel.
    max_canary_drift: float = 1.0  # Range of the smoothed canary over its median; more is no longer one machine.
    max_foreign_cores: float = 0.25  # That other processes took (`foreign_cpu`): a steady neighbour leaves no spread.
    attempts: int = 3


class Stopwatch(Protocol):
    """Runs a subject once and returns its laps as (name, milliseconds), in order."""

    def sample(self, subject: Subject) -> list[tuple[str, float]]: ...


class WallStopwatch:
    """Wall clock, for devices that work synchronously."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock

    def sample(self, subject: Subject) -> list[tuple[str, float]]:
        marks: list[tuple[str, float]] = []
        clock = self._clock

        def lap(name: str) -> None:
            marks.append((name, clock()))

        with _no_garbage_collection():
            start = clock()
            subject(lap)
        laps = []
        for name, at in marks:
            laps.append((name, (at - start) * 1e3))
            start = at
        return laps


class CudaStopwatch:
    """CUDA events on the current stream; the queue is empty before the start and drained at the end."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def sample(self, subject: Subject) -> list[tuple[str, float]]:
        marks: list[tuple[str, torch.cuda.Event]] = []

        def record() -> torch.cuda.Event:
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(self._device))
            return event

        torch.cuda.synchronize(self._device)
        with _no_garbage_collection():
            previous = record()
            subject(lambda name: marks.append((name, record())))
        torch.cuda.synchronize(self._device)
        laps = []
        for name, event in marks:
            laps.append((name, previous.elapsed_time(event)))
            previous = event
        return laps


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """As `timeit` does: a collection of the interpreter's garbage is not the subject's time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def stopwatch_for(device: torch.device) -> Stopwatch:
    return CudaStopwatch(device) if device.type == "cuda" else WallStopwatch()


@contextlib.contextmanager
def measuring(device: torch.device) -> Iterator[None]:
    """Inference mode, with as many threads as may really run."""
    threads = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(usable_threads())
    try:
        with torch.inference_mode():
            yield
    finally:
        torch.set_num_threads(threads)


# --- sampling ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class LapSamples:
    """Drift-cancelled samples of one subject, by lap name, and how the run around them went."""

    laps: dict[str, tuple[float, ...]]  # Milliseconds, one value per run; laps of one name within a run are averaged.
    totals: tuple[float, ...] = ()  # Of all laps together, one value per run.
    canary_ms: float
    canary_drift: float  # Range of the machine's slowness while it ran: 0.5 where it was once half as fast again.
    foreign_cores: float | None  # That other processes took from the run; None where unknown.


def interleave(
    subjects: Mapping[str, Subject],
    *,
    canary: Subject,
    stopwatch: Stopwatch,
    settings: MeasureSettings,
    rounds: Mapping[str, int] | None = None,
    seed: int = 0,
    cpu: CpuWatch | None = None,
    progress: Progress | None = None,
    should_stop: ShouldStop | None = None,
) -> dict[str, LapSamples]:
    """Sample every subject over the whole run in random order, the canary between them, and cancel drift.

    A sample is divided by how slow the machine was around it (`_slowness`). Subjects are assumed to be warm; short ones
    are called once more before every sample (`RUN_IN_BELOW_MS`).

    Args:
        rounds: Samples per subject; ``settings.min_rounds`` where it says nothing.
        cpu: Tells what other processes took meanwhile.

    Raises:
        MeasurementStoppedError: As soon as ``should_stop`` says so; the samples are dropped.
    """
    counts = {key: (rounds or {}).get(key, settings.min_rounds) for key in subjects}
    total = sum(counts.values())
    # Each subject is sampled once in every of `count` equal stretches of the run, so that all meet the same machine.
    draw = random.Random(seed)
    order = sorted(((number + draw.random()) / count, key) for key, count in counts.items() for number in range(count))
    taken: list[tuple[str | None, dict[str, float], float]] = []  # Subject (None: the canary), laps, sum of them.
    before = cpu.read() if cpu is not None else None

    runs_in = False

    def sample(key: str | None) -> float:
        subject = canary if key is None else subjects[key]
        if runs_in:
            subject(_untimed)
        laps = stopwatch.sample(subject)
        total_ms = sum(ms for _, ms in laps)
        taken.append((key, _mean_by_name(laps), total_ms))
        return total_ms

    last_canary_ms = sample(None)
    runs_in = last_canary_ms < RUN_IN_BELOW_MS
    since_canary_ms = 0.0
    for done, (_, key) in enumerate(order, start=1):
        if should_stop is not None and should_stop():
            raise MeasurementStoppedError(STOPPED)
        since_canary_ms += sample(key)
        if since_canary_ms * settings.canary_share >= last_canary_ms * (1.0 - settings.canary_share):
            last_canary_ms = sample(None)
            since_canary_ms = 0.0
        if progress is not None:
            progress(done, total, key)
    sample(None)
    foreign = foreign_cores(before, cpu.read(), cpu.threads) if cpu is not None else None

    slowness = _slowness([key for key, _, _ in taken], [total_ms for _, _, total_ms in taken])
    samples: dict[str, dict[str, list[float]]] = {key: {} for key in subjects}
    totals: dict[str, list[float]] = {key: [] for key in subjects}
    canary_ms = []
    for (taken_key, means, total_ms), factor in zip(taken, slowness, strict=True):
        if taken_key is None:
            canary_ms.append(total_ms / factor)
            continue
        totals[taken_key].append(total_ms / factor)
        for name, ms in means.items():
            samples[taken_key].setdefault(name, []).append(ms / factor)
    drift = max(slowness) - min(slowness)
    return {
        key: LapSamples(
            laps={name: tuple(values) for name, values in by_name.items()},
            totals=tuple(totals[key]),
            canary_ms=statistics.median(canary_ms),
            canary_drift=drift,
            foreign_cores=foreign,
        )
        for key, by_name in samples.items()
    }


def _untimed(name: str) -> None:
    """A lap that nobody times."""


def _slowness(keys: Sequence[str | None], times_ms: Sequence[float]) -> list[float]:
    """How slow the machine was at every sample of a run, relative to its median; all subjects bear witness.

    A sample that took longer than its subject does on the median says that the machine was slow; the neighbours of a
    sample tell how slow, itself left out, or its own noise would vanish. Medians and slowness are estimated in turns.
    The dense model alone is a coarse witness: on a large batch it runs every few seconds, and a core that shares its
    hardware with others changes its speed as often.
    """
    logs = np.log(np.maximum(np.asarray(times_ms, dtype=float), 1e-9))
    members: dict[str | None, list[int]] = {}
    for at, key in enumerate(keys):
        members.setdefault(key, []).append(at)
    slow = np.zeros(len(logs))
    for _ in range(DRIFT_PASSES):
        surplus = logs.copy()
        for places in members.values():
            surplus[places] -= np.median((logs - slow)[places])
        slow = np.array(
            [
                np.median(
                    np.concatenate((surplus[max(0, at - NEIGHBOURS) : at], surplus[at + 1 : at + 1 + NEIGHBOURS]))
                )
                for at in range(len(logs))
            ]
        )
    return [float(factor) for factor in np.exp(slow - np.median(slow))]


def relative_range(canaries_ms: Sequence[float]) -> float:
    """How far the machine's speed moved between runs: range of the dense model's latencies over their median."""
    return (max(canaries_ms) - min(canaries_ms)) / statistics.median(canaries_ms)


def _mean_by_name(laps: Sequence[tuple[str, float]]) -> dict[str, float]:
    """Mean, not median: what makes one block of a chain slow makes it slow in a whole model as well."""
    groups: dict[str, list[float]] = {}
    for name, ms in laps:
        groups.setdefault(name, []).append(ms)
    return {name: statistics.fmean(values) for name, values in groups.items()}


def summarise(
    samples: Sequence[float],
    run: LapSamples,
    settings: MeasureSettings,
    *,
    peak_memory_mib: float | None = None,
    negligible_ms: float = 0.0,
) -> Measurement:
    """Median, spread and percentiles of one lap's samples, and whether they are too noisy to be used.

    Where a subject has several laps, the mean over the middle half of its runs, by their totals, stands for the median:
    laps then add up to what the whole takes. Medians do not, as each leaves out the disturbances of its own runs, and
    some part of a whole model is disturbed in every run.

    Args:
        negligible_ms: A spread that does not matter however large it is beside the median.
    """
    p10, q1, median, q3, p90, p99 = (float(q) for q in np.percentile(samples, (10, 25, 50, 75, 90, 99)))
    if len(run.laps) > 1:
        ranked = sorted(range(len(samples)), key=run.totals.__getitem__)
        outer = len(ranked) // 4
        median = statistics.fmean(samples[at] for at in ranked[outer : len(ranked) - outer])
    reasons = []
    if q3 - q1 > max(settings.max_relative_iqr * median, negligible_ms):
        reasons.append(
            f"the interquartile range is {(q3 - q1) / median:.0%} of the median (at most "
            f"{settings.max_relative_iqr:.0%} is allowed)"
        )
    error = MEDIAN_ERROR_PER_IQR * (q3 - q1) / math.sqrt(len(samples))
    if error > max(settings.max_relative_error * median, negligible_ms):
        reasons.append(
            f"the median is uncertain by {error / median:.0%} after {len(samples)} samples (at most "
            f"{settings.max_relative_error:.0%} is allowed)"
        )
    half = len(samples) // 2
    shift = abs(float(np.median(samples[:half])) - float(np.median(samples[half:]))) if half else 0.0
    if shift > max(settings.max_shift * median, negligible_ms):
        reasons.append(
            f"it moved by {shift / median:.0%} against the other models between both halves of the run (at most "
            f"{settings.max_shift:.0%} is allowed)"
        )
    if run.canary_drift > settings.max_canary_drift:
        reasons.append(
            f"the machine's speed moved by {run.canary_drift:.0%} meanwhile (at most "
            f"{settings.max_canary_drift:.0%} is allowed)"
        )
    allowed = NOTEWORTHY_FOREIGN_CORES if reasons else settings.max_foreign_cores
    if run.foreign_cores is not None and run.foreign_cores > allowed:
        reasons.append(f"other processes took {run.foreign_cores:.2f} cores; close them and measure again")
    return Measurement(
        median_ms=median,
        iqr_ms=q3 - q1,
        p10_ms=p10,
        p90_ms=p90,
        p99_ms=p99,
        num_samples=len(samples),
        canary_ms=run.canary_ms,
        speedup=run.canary_ms / median if median > 0 else math.inf,
        peak_memory_mib=peak_memory_mib,
        state="noisy" if reasons else "ok",
        reason="; ".join(reasons) or None,
    )


def rounds_for(sample_ms: float, settings: MeasureSettings) -> int:
    """Rounds that fill ``target_s``, within the allowed range."""
    return max(settings.min_rounds, min(settings.max_rounds, math.ceil(settings.target_s * 1e3 / max(sample_ms, 1e-3))))


def measure_subjects(
    subjects: Mapping[str, Subject],
    *,
    canary: Subject,
    stopwatch: Stopwatch,
    settings: MeasureSettings,
    rounds: Mapping[str, int] | None = None,
    peak_memory: Mapping[str, float | None] | None = None,
    negligible_ms: float = 0.0,
    seed: int = 0,
    cpu: CpuWatch | None = None,
    patience: Patience | None = None,
    progress: Progress | None = None,
    should_stop: ShouldStop | None = None,
) -> dict[str, dict[str, Measurement]]:
    """Interleave warm subjects, and again those that were noisy, up to ``settings.attempts`` times.

    Args:
        cpu: Tells what other processes take.
        patience: Wait until they are quiet, and drop runs that they disturbed; without it they make a run noisy.

    Returns:
        Per subject a measurement per lap name: its first quiet attempt, or the least noisy one, with the reason.

    Raises:
        DisturbedError: If ``patience`` ended, or others disturbed ``settings.attempts`` runs in turn.
        MeasurementStoppedError: As soon as ``should_stop`` says so.
    """
    best: dict[str, dict[str, Measurement]] = {}
    todo = list(subjects)
    for attempt in range(settings.attempts):
        run = partial(
            interleave,
            {key: subjects[key] for key in todo},
            canary=canary,
            stopwatch=stopwatch,
            settings=settings,
            rounds=rounds,
            seed=seed + attempt,
            cpu=cpu,
            progress=_attempt_progress(progress, settings.attempts, attempt),
            should_stop=should_stop,
        )
        if cpu is None or patience is None:
            runs = run()
        else:
            runs = _undisturbed(run, cpu, patience, settings.attempts, progress, should_stop)
        for key, sampled in runs.items():
            for lap, samples in sampled.laps.items():
                measured = summarise(
                    samples, sampled, settings,
                    peak_memory_mib=(peak_memory or {}).get(key), negligible_ms=negligible_ms,
                )  # fmt: skip
                known = best.setdefault(key, {}).get(lap)
                best[key][lap] = measured if known is None else _quieter(known, measured)
        todo = [key for key in todo if any(measured.state == "noisy" for measured in best[key].values())]
        if not todo:
            break
    return {
        key: {
            lap: dataclasses.replace(m, reason=f"after {settings.attempts} attempts {m.reason}") if m.reason else m
            for lap, m in best[key].items()
        }
        for key in subjects
    }


def _undisturbed(
    run: Callable[[], dict[str, LapSamples]],
    cpu: CpuWatch,
    patience: Patience,
    attempts: int,
    progress: Progress | None,
    should_stop: ShouldStop | None,
) -> dict[str, LapSamples]:
    """Run while other processes are quiet, and again if they were not after all."""

    def tell(message: str) -> None:
        if should_stop is not None and should_stop():
            raise MeasurementStoppedError(STOPPED)
        if progress is not None:
            progress(0.0, 1.0, message)

    cores: float | None = None
    for _ in range(attempts):
        patience.wait(cpu, tell)
        runs = run()
        cores = next((one.foreign_cores for one in runs.values()), None)
        if cores is None or patience.bears(cores):
            return runs
    assert cores is not None
    raise patience.refusal(cores, f"in each of {attempts} runs")


def _quieter(known: Measurement, new: Measurement) -> Measurement:
    """The attempt to keep: a quiet one over a noisy one, then the one with less spread."""
    if known.state != new.state:
        return known if known.state == "ok" else new
    return known if known.iqr_ms * new.median_ms <= new.iqr_ms * known.median_ms else new


@dataclass(frozen=True)
class PreparedModel:
    """A model behind a runtime already, for what `measure_models` does not prepare itself."""

    forward: Forward
    module: nn.Module  # What runs, in its dtype: its weights count in the peak memory.
    runtime: str


def prepared_model(module: nn.Module, runtime: str, dtype: str, device: torch.device) -> PreparedModel:
    """A module behind a runtime as `prunefront.runtimes.prepare` gives it, and what its memory is told with.

    Raises:
        PrunefrontError: As `prepare` does.
    """
    (cast_module,) = cast_modules([module], DTYPES[dtype], device)
    return PreparedModel(prepare(cast_module, runtime, dtype, device), cast_module, runtime)


def measure_models(
    models: Mapping[str, nn.Module | PreparedModel | Forward],
    example_inputs: Tensor | Sequence[Tensor],
    *,
    device: str,
    runtime: str = "eager",
    dtype: str = "fp32",
    canary: str,
    settings: MeasureSettings | None = None,
    stopwatch: Stopwatch | None = None,
    cpu: CpuWatch | None = None,
    patience: Patience | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    should_stop: ShouldStop | None = None,
) -> dict[str, Measurement]:
    """Measure whole models against each other, interleaved, on one device.

    What is still noisy after an attempt is measured again, up to three times; then its least noisy attempt is
    returned with state ``noisy`` and the reason.

    Args:
        models: Models by key. Modules are prepared (`prunefront.runtimes.prepare`) for ``runtime``; other callables
            must be ready, and have no weights that peak memory could count.
        example_inputs: One batch of images, shape (B, C, H, W), or several of one shape that take turns (methods that
            look at the image are as fast as the images let them be). Cast to device and dtype.
        canary: Key of the model that cancels drift and that speed-ups refer to, normally the dense one.
        stopwatch: Injected by tests; chosen by device otherwise.
        cpu: Injected by tests; this process's otherwise.
        patience: Wait until other processes are quiet; without it a run that they disturbed is noisy.
        progress: Told the share done (of 1.0): warm-up is the first half, as compiling happens there.

    Returns:
        A measurement per key, the canary's included.

    Raises:
        LatencyTableError: If the canary is not among the models.
        DisturbedError: If ``patience`` ended while other processes took CPU.
        MeasurementStoppedError: As soon as ``should_stop`` says so.
    """
    if canary not in models:
        raise LatencyTableError(f"The canary {canary!r} must be one of the models, which are {', '.join(models)}.")
    settings = settings or MeasureSettings()
    target = torch_device(device)
    watch = stopwatch or stopwatch_for(target)
    batches = [example_inputs] if isinstance(example_inputs, Tensor) else list(example_inputs)
    with measuring(target):
        inputs = [batch.to(device=target, dtype=DTYPES[dtype]) for batch in batches]
        # Every warm-up, and so every compilation, is over before the first sample is taken.
        modules = {key: model for key, model in models.items() if isinstance(model, nn.Module)}
        cast_models = dict(zip(modules, cast_modules([*modules.values()], DTYPES[dtype], target), strict=True))
        subjects: dict[str, Subject] = {}
        memory: dict[str, float | None] = {}
        rounds: dict[str, int] = {}
        for number, (key, model) in enumerate(models.items()):
            if should_stop is not None and should_stop():
                raise MeasurementStoppedError(STOPPED)
            if progress is not None:
                progress(0.5 * number / len(models), 1.0, f"warming up {key}")
            ready = prepared_model(cast_models[key], runtime, dtype, target) if key in cast_models else model
            forward = ready.forward if isinstance(ready, PreparedModel) else cast(Forward, ready)
            subjects[key] = whole_model(forward, inputs)
            sample_ms = warm_up(subjects[key], watch, settings)
            run = partial(forward, inputs[0])
            if isinstance(ready, PreparedModel):
                memory[key] = peak_memory_mib(run, target, ready.module, ready.runtime)
            else:
                memory[key] = peak_memory_mib(run, target)
            rounds[key] = rounds_for(sample_ms, settings)

        def second_half(done: float, total: float, message: str) -> None:
            if progress is not None:
                progress(0.5 + 0.5 * done / total, 1.0, message)

        measured = measure_subjects(
            subjects,
            canary=subjects[canary],
            stopwatch=watch,
            settings=settings,
            rounds=rounds,
            peak_memory=memory,
            seed=seed,
            cpu=cpu or LinuxCpuWatch(target),
            patience=patience,
            progress=second_half,
            should_stop=should_stop,
        )
    return {key: measured[key][WHOLE] for key in models}


def warm_up(subject: Subject, stopwatch: Stopwatch, settings: MeasureSettings) -> float:
    """Run a subject until it is warm; milliseconds of its last run."""
    last = 0.0
    for _ in range(max(1, settings.warmup_rounds)):
        last = sum(ms for _, ms in stopwatch.sample(subject))
    return last


def whole_model(forward: Forward, inputs: Sequence[Tensor]) -> Subject:
    """A subject of one lap; several batches take turns, each for two calls: an untimed one may precede each sample."""
    turns = itertools.cycle([batch for batch in inputs for _ in range(2)])

    def subject(lap: Lap) -> None:
        forward(next(turns))
        lap(WHOLE)

    return subject


def _attempt_progress(progress: Progress | None, attempts: int, attempt: int) -> Progress | None:
    if progress is None:
        return None

    def report(done: float, total: float, message: str) -> None:
        if attempt == 0:
            progress(done, total, f"measuring {message}")
        else:
            progress(total, total, f"measuring {message} again, attempt {attempt + 1} of {attempts}: it was noisy")

    return report


# --- memory and the machine --------------------------------------------------------------------------------------


def peak_memory_mib(
    run: Callable[[], object], device: torch.device, model: nn.Module | None = None, runtime: str = "eager"
) -> float | None:
    """Weights of ``model`` plus the most memory that one ``run`` needs on top of what was in use, in MiB.

    On the CPU this is resident memory as Linux counts it (the peak is reset before the run, and what is freed goes
    back to the system meanwhile), elsewhere None; None too for ONNX Runtime on a GPU, whose allocator torch does not
    see.
    """
    weights = weights_mib(model) if model is not None else 0.0
    if device.type == "cuda":
        if runtime == "onnxruntime":
            return None
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return weights + (torch.cuda.max_memory_allocated(device) - before) / MIB
    try:
        with freed_memory_returned():
            # "5" resets the peak resident size of this process (proc(5)).
            Path("/proc/self/clear_refs").write_text("5")
            before_kib = _status_kib("VmRSS")
            run()
            peak_kib = _status_kib("VmHWM")
    except OSError:
        return None
    if before_kib is None or peak_kib is None:
        return None
    return weights + max(0, peak_kib - before_kib) / 1024


def weights_mib(model: nn.Module) -> float:
    """Parameters and buffers, MiB."""
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())) / MIB


def _status_kib(field: str) -> int | None:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1])
    return None
