"""Predicted against measured latency of whole models that the table has never seen: the error a table may claim."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from latency_tables.device import DeviceInfo, describe_device, torch_device
from latency_tables.errors import ExceedsMemoryError, LatencyTableError
from latency_tables.foreign_cpu import CpuWatch, Patience
from latency_tables.measure import (
    Measurement,
    MeasureSettings,
    Progress,
    ShouldStop,
    Stopwatch,
    measure_models,
    relative_range,
)
from latency_tables.out_of_memory import if_it_fits
from latency_tables.predict import check_table_matches, predict, predict_latency_ms, predictor_of
from latency_tables.schedules import random_configs
from latency_tables.schema import LatencyTable, ValidationPoint, ValidationReport
from prunefront.compress import compress, create_dense
from prunefront.config import ModelSpec, PruneConfig
from prunefront.geometry import geometry_of
from prunefront.runtimes import DTYPES, RUNTIMES, cast_modules, use_shared_compile_cache
from prunefront.schedule import plan_schedule

logger = logging.getLogger(__name__)

DENSE = "dense"
REMEASURED = 5  # Every fifth schedule is measured twice.
SCHEDULES_PER_RUN = 10  # Measured against each other at once; a run is short enough for the machine to stay as it is.
SETTINGS = MeasureSettings(warmup_rounds=2, min_rounds=8, max_rounds=40, target_s=1.0)
PATIENCE = Patience()


def validate_table(
    table: LatencyTable,
    *,
    num_schedules: int = 50,
    seed: int = 0,
    device: str | None = None,
    spec: ModelSpec | None = None,
    methods: Sequence[str] | None = None,
    progress: Progress | None = None,
    should_stop: ShouldStop | None = None,
    settings: MeasureSettings = SETTINGS,
    patience: Patience | None = PATIENCE,
    stopwatch: Stopwatch | None = None,
    cpu: CpuWatch | None = None,
) -> ValidationReport:
    """Measure random schedules of all methods, spread over 30-100 % of the dense latency, and compare.

    Measured values are as they are; nothing is scaled to the table. Noisy ones count as well. Models that run out of
    memory are left out, with a warning. In the end every fifth is measured once more, which tells how far measuring
    agrees with itself.

    Args:
        table: For this machine, runtime and dtype.
        num_schedules: Whole models to measure; none of them is among those the correction saw.
        seed: Draws the schedules; below 2**32.
        device: Where to run; the kind of device of the table by default.
        spec: Another model of the same blocks; the table's own by default.
        methods: Restrict to these; all that the table has entries for by default.
        progress: Told schedules done of ``num_schedules``.
        patience: With processes that take CPU from the measurements; None measures beside them, and counts what they
            disturb as noisy.
        stopwatch, cpu: Injected by tests.

    Raises:
        LatencyTableError: If the table is not for this machine, or was made for a runtime that cannot run here; an
            `ExceedsMemoryError` if no schedule fits into memory.
        DisturbedError: If ``patience`` ended.
        MeasurementStoppedError: When stopped.
    """
    if num_schedules < 1 or not 0 <= seed < 2**32:
        raise LatencyTableError(
            f"A validation needs at least one schedule and a seed of 0 to 2**32 - 1, but got {num_schedules=}, {seed=}."
        )
    if table.runtime not in RUNTIMES:
        raise LatencyTableError(
            f"Table {table.name!r} is for runtime {table.runtime!r}, which cannot be measured here; validate it on its "
            f"device. Here it may be {' or '.join(RUNTIMES)}."
        )
    device = device or ("cuda" if table.device.kind == "cuda" else "cpu")
    info = describe_device(device)
    spec = spec or table.model
    target = torch_device(device)
    dense = cast_modules([create_dense(spec)], DTYPES[table.dtype], target)[0].eval()
    geometry = geometry_of(dense)
    check_table_matches(
        table,
        device_info=info,
        runtime=table.runtime,
        dtype=table.dtype,
        batch_size=table.batch_size,
        geometry=geometry,
    )
    if table.runtime == "compile":
        use_shared_compile_cache()
    predictor = predictor_of(table)
    configs = random_configs(
        spec,
        geometry,
        num_schedules,
        seed,
        predictor.covered_methods(geometry) if methods is None else methods,
        cost=lambda config: predictor.predict(plan_schedule(config, geometry)).latency_ms,
    )
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn((table.batch_size, geometry.in_chans, *geometry.img_size), generator=generator)

    again = range(0, len(configs), REMEASURED)
    total = len(configs) + len(again)

    def measure(start: int, chosen: Sequence[PruneConfig]) -> list[Measurement]:
        """Measurements of some schedules, interleaved; ``start`` schedules were measured before."""
        models: dict[str, nn.Module] = {DENSE: dense}
        models |= {str(number): compress(dense, config) for number, config in enumerate(chosen)}
        measured = measure_models(
            models,
            images,
            device=device,
            runtime=table.runtime,
            dtype=table.dtype,
            canary=DENSE,
            settings=settings,
            stopwatch=stopwatch,
            cpu=cpu,
            patience=patience,
            seed=start,
            progress=_shifted(progress, start, len(chosen), total),
            should_stop=should_stop,
        )
        return [measured[str(number)] for number in range(len(chosen))]

    def measure_what_fits(start: int, numbers: Sequence[int]) -> dict[int, Measurement]:
        """By number of the schedule."""
        together = if_it_fits(partial(measure, start, [configs[number] for number in numbers]), target)
        if together is not None:
            return dict(zip(numbers, together, strict=True))
        # Beside nine others there may be no room for a model that fits by itself.
        found = {}
        for place, number in enumerate(numbers, start):
            alone = if_it_fits(partial(measure, place, [configs[number]]), target)
            if alone is None:
                logger.warning(
                    "Held-out schedule %d of %d ran out of memory at batch size %d on %s and is left out",
                    number + 1, len(configs), table.batch_size, info.name,
                    extra={"action": "validate_table", "config": configs[number].to_dict()},
                )  # fmt: skip
            else:
                found[number] = alone[0]
        return found

    def measure_in_runs(start: int, numbers: Sequence[int]) -> dict[int, Measurement]:
        found: dict[int, Measurement] = {}
        for first in range(0, len(numbers), SCHEDULES_PER_RUN):
            found |= measure_what_fits(start + first, numbers[first : first + SCHEDULES_PER_RUN])
        return found

    measured = measure_in_runs(0, range(len(configs)))
    if not measured:
        raise ExceedsMemoryError(
            f"None of {len(configs)} held-out schedules of {spec.name!r} fits into memory at batch size "
            f"{table.batch_size} on {info.name}. Close what else uses it, or validate a table of a smaller batch size."
        )
    measured_again = measure_in_runs(len(configs), [number for number in again if number in measured])
    points = [
        _point(table, configs[number], measurement, measured_again.get(number))
        for number, measurement in measured.items()
    ]
    report = report_of(
        points,
        dense_predicted_ms=predict_latency_ms(table, PruneConfig(model=spec, method="hybrid")),
        seed=seed,
        device=info,
        created_at=datetime.now(UTC),
    )
    if not report.is_steady:
        logger.warning(
            "The machine's speed moved by %.0f%% during the validation: its error (%.1f%%) is in part the machine's; "
            "that of speed-ups (%.1f%%) is the table's",
            100 * (report.dense_drift or 0.0), 100 * report.mape, 100 * (report.speedup_mape or 0.0),
            extra={"action": "validate_table", "dense_drift": report.dense_drift},
        )  # fmt: skip
    return report


def predicted_anew(table: LatencyTable) -> LatencyTable:
    """The table with its validation's measurements set against what this version predicts from it.

    Predictions change as they are mended, measurements do not: a table need not be built again for it.

    Raises:
        LatencyTableError: If the table was not validated.
    """
    report = table.validation
    if report is None:
        raise LatencyTableError(f"Table {table.name!r} has no validation; run `prunefront table validate` on it.")
    points = [point.model_copy(update=_predicted(table, point.config)) for point in report.points]
    spec = points[0].config.model  # Of the same blocks as the table's, perhaps another.
    return table.evolve(
        validation=report_of(
            points,
            dense_predicted_ms=predict_latency_ms(table, PruneConfig(model=spec, method="hybrid")),
            seed=report.seed,
            device=report.device,
            created_at=report.created_at,
        )
    )


def report_of(
    points: Sequence[ValidationPoint], *, dense_predicted_ms: float, seed: int, device: DeviceInfo, created_at: datetime
) -> ValidationReport:
    """All figures of measured points, which tell the dense model's latency in their runs.

    Args:
        points: At least one.
        dense_predicted_ms: Of the table.
        seed: Drew the schedules.
        device: They were measured on.
        created_at: When.
    """
    dense_ms = np.array([point.dense_ms for point in points], dtype=float)
    predicted = np.array([point.predicted_ms for point in points])
    measured = np.array([point.measured_ms for point in points])
    of_speedups = error_figures(predicted / dense_predicted_ms, measured / dense_ms)
    twice = np.array([point.again_ms is not None for point in points])
    again = np.array([(point.again_ms, point.again_dense_ms) for point in points], dtype=float)[twice]
    return ValidationReport(
        num_schedules=len(points),
        seed=seed,
        dense_ms=float(np.median(dense_ms)),
        dense_predicted_ms=dense_predicted_ms,
        dense_drift=relative_range([*dense_ms.tolist(), *again[:, 1].tolist()]),
        speedup_mape=of_speedups["mape"],
        speedup_within_5_percent=of_speedups["within_5_percent"],
        speedup_within_10_percent=of_speedups["within_10_percent"],
        speedup_kendall_tau=of_speedups["kendall_tau"],
        remeasured_mape=_mape(again[:, 0], measured[twice]),
        remeasured_speedup_mape=_mape(again[:, 0] / again[:, 1], measured[twice] / dense_ms[twice]),
        num_remeasured=int(twice.sum()),
        memory_mape=memory_mape(points),
        num_noisy=sum(point.state == "noisy" for point in points),
        noise=statistics.median(point.iqr_ms / point.measured_ms for point in points),
        device=device,
        created_at=created_at,
        points=tuple(points),
        **error_figures(predicted, measured),
    )


def _mape(values: NDArray[np.float64], references: NDArray[np.float64]) -> float | None:
    return float(np.mean(np.abs(values / references - 1.0))) if len(values) else None


def memory_mape(points: Sequence[ValidationPoint]) -> float | None:
    """Mean absolute relative error of peak memory over the points that tell both; None where none does."""
    known = [
        (point.predicted_memory_mib, point.measured_memory_mib)
        for point in points
        if point.predicted_memory_mib is not None and point.measured_memory_mib
    ]
    return _mape(*np.array(known, dtype=float).reshape(-1, 2).T)


def error_figures(predicted: NDArray[np.float64], measured: NDArray[np.float64]) -> dict[str, float | None]:
    """``mape``, ``bias``, ``within_5_percent``, ``within_10_percent`` (0-1) and ``kendall_tau`` of predictions."""
    errors = predicted / measured - 1.0
    return {
        "mape": float(np.mean(np.abs(errors))),
        "bias": float(np.mean(errors)),
        "within_5_percent": float(np.mean(np.abs(errors) <= 0.05)),
        "within_10_percent": float(np.mean(np.abs(errors) <= 0.10)),
        "kendall_tau": kendall_tau(predicted, measured),
    }


def kendall_tau(a: NDArray[np.float64], b: NDArray[np.float64]) -> float | None:
    """Kendall's tau-b: agreement of two rankings, ties counted out; None where one of them is all ties."""
    upper = np.triu_indices(len(a), k=1)
    sign_a, sign_b = (np.sign(values[:, None] - values[None, :])[upper] for values in (a, b))
    norm = np.sqrt(np.sum(sign_a != 0) * np.sum(sign_b != 0))
    return float(np.sum(sign_a * sign_b) / norm) if norm > 0 else None


def _point(
    table: LatencyTable, config: PruneConfig, measured: Measurement, again: Measurement | None
) -> ValidationPoint:
    return ValidationPoint(
        config=config,
        measured_ms=measured.median_ms,
        iqr_ms=measured.iqr_ms,
        # The canary was sampled more often than the dense model as one of ten, and in every attempt.
        dense_ms=measured.canary_ms,
        again_ms=None if again is None else again.median_ms,
        again_dense_ms=None if again is None else again.canary_ms,
        state=measured.state,
        measured_memory_mib=measured.peak_memory_mib,
        **_predicted(table, config),
    )


def _predicted(table: LatencyTable, config: PruneConfig) -> dict[str, Any]:
    """What a point tells of the table."""
    predicted = predict(table, config)
    return {"predicted_ms": predicted.latency_ms, "predicted_memory_mib": predicted.peak_memory_mib}


def _shifted(progress: Progress | None, start: int, count: int, total: int) -> Progress | None:
    if progress is None:
        return None

    reached = 0.0

    def report(done: float, of: float, message: str) -> None:
        nonlocal reached
        reached = max(reached, done / of)  # What is measured again starts from nothing.
        progress(start + count * reached, total, message)

    return report
