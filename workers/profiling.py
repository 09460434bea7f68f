"""Tasks that measure: a latency table of a model's blocks, and whole models against the dense one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from itertools import cycle

import torch
from torch import Tensor, nn

from latency_tables.build import build_table, quick_settings, settings_for
from latency_tables.device import torch_device
from latency_tables.foreign_cpu import Patience
from latency_tables.measure import Measurement, PreparedModel, measure_models, prepared_model
from latency_tables.validate import validate_table
from prunefront.runtimes import DTYPES, SLOW_TO_PREPARE
from prunefront.training.data import DataConfig, SplitName, data_config_of
from workers.candidate_models import CandidateModels
from workers.devices import prepare_device
from workers.images import load_batches
from workers.payloads import Entry, MeasurePayload, TablePayload, parse_payload
from workers.tasks import JsonDict, TaskContext

DENSE = "dense"  # name of the canary among the subjects; candidates are numbered, so it cannot collide
MEASURED_TOGETHER = 16  # entries per interleaved run: each run's results are safe when it ends
NUM_REAL_BATCHES = 4  # batches of real images that take turns, so that one easy batch does not set the latency
IMAGE_SPLIT: SplitName = "search"  # the split that proposals may see
VALIDATION_SHARE = 0.5  # of the progress of a table task that is validated


def run_table(payload: JsonDict, context: TaskContext) -> JsonDict:
    """Build the latency table of a model's blocks on this task's device.

    Args:
        payload: See :class:`workers.payloads.TablePayload`.
        context: Device, progress and the request to stop.

    Returns:
        ``{"table": LatencyTable document}``.

    Raises:
        DisturbedError: If other processes take CPU from it and do not end; the partial file keeps what is finished.
    """
    task = parse_payload(TablePayload, payload)
    prepare_device(context.device)
    share = VALIDATION_SHARE if task.validate_schedules else 1.0
    patience = Patience.allowing(task.max_foreign_cores)
    # Where each point takes seconds to prepare, tables take few anyway.
    is_quick = task.detail == "quick" and task.runtime not in SLOW_TO_PREPARE
    settings = quick_settings() if is_quick else settings_for(torch_device(context.device), task.runtime)
    table = build_table(
        task.model,
        device=context.device,
        runtime=task.runtime,
        dtype=task.dtype,
        batch_size=task.batch_size,
        settings=replace(settings, patience=patience),
        partial_path=task.partial_path,
        progress=_part(context, 0.0, share),
        should_stop=context.should_stop,
    )
    if task.validate_schedules:
        report = validate_table(
            table,
            num_schedules=task.validate_schedules,
            seed=task.seed,
            patience=patience,
            progress=_part(context, share, 1.0),
            should_stop=context.should_stop,
        )
        table = table.evolve(validation=report)
    return {"table": table.model_dump(mode="json")}


def run_measure(payload: JsonDict, context: TaskContext) -> JsonDict:
    """Measure whole models interleaved with the dense one.

    Args:
        payload: See :class:`workers.payloads.MeasurePayload`.
        context: Device, progress and the request to stop. Items: entry key -> Measurement.

    Returns:
        ``{"dense": Measurement}``, the dense model in the last run.
    """
    task = parse_payload(MeasurePayload, payload)
    prepare_device(context.device)
    models = CandidateModels(task.model, task.weights)
    groups = [task.entries[at : at + MEASURED_TOGETHER] for at in range(0, len(task.entries), MEASURED_TOGETHER)] or [
        ()
    ]
    dense: Measurement | None = None
    for number, group in enumerate(groups):
        measured = _measure_group(
            group, models, task, context, _part(context, number / len(groups), (number + 1) / len(groups))
        )
        dense = measured.pop(DENSE)
        for index, entry in enumerate(group):
            context.item(entry.key, asdict(measured[str(index)]))
    assert dense is not None
    return {"dense": asdict(dense)}


def _measure_group(
    entries: Sequence[Entry],
    models: CandidateModels,
    task: MeasurePayload,
    context: TaskContext,
    progress: Callable[[float, float, str], None],
) -> dict[str, Measurement]:
    """Measure some entries in one interleaved run; keys are their indices and ``DENSE``."""
    input_size = data_config_of(models.dense).input_size
    subjects: dict[str, nn.Module | PreparedModel] = {DENSE: models.dense}
    for index, entry in enumerate(entries):
        model = models.build(entry)
        if data_config_of(model).input_size == input_size:
            subjects[str(index)] = model
        else:
            # Every subject is called with the dense model's images, which this one cannot take.
            subjects[str(index)] = _with_own_images(model, task, context.device)
    return measure_models(
        subjects,
        _batches(task, data_config_of(models.dense)),
        device=context.device,
        runtime=task.runtime,
        dtype=task.dtype,
        canary=DENSE,
        seed=task.seed,
        progress=progress,
        should_stop=context.should_stop,
    )


def _with_own_images(model: nn.Module, task: MeasurePayload, device: str) -> PreparedModel:
    """Return a model that runs on images of its own size, whatever it is called with."""
    batches = [batch.to(device=device, dtype=DTYPES[task.dtype]) for batch in _batches(task, data_config_of(model))]
    ready = prepared_model(model, task.runtime, task.dtype, torch.device(device))
    turns: Iterator[Tensor] = cycle(batches)
    return replace(ready, forward=lambda images: ready.forward(next(turns)))


def _batches(task: MeasurePayload, data_config: DataConfig) -> list[Tensor]:
    """Return images to measure with, each batch of shape (B, C, H, W): real ones where the payload names a dataset."""
    if task.dataset is None:
        generator = torch.Generator().manual_seed(task.seed)
        return [torch.randn(task.batch_size, *data_config.input_size, generator=generator)]
    return load_batches(
        task.dataset, IMAGE_SPLIT, data_config, batch_size=task.batch_size, num_batches=NUM_REAL_BATCHES
    )


def _part(context: TaskContext, start: float, end: float) -> Callable[[float, float, str], None]:
    """Map the progress of one step onto its share of the task's."""

    def report(done: float, total: float, message: str) -> None:
        share = done / total if total > 0 else 1.0
        context.progress(start + (end - start) * min(share, 1.0), 1.0, message)

    return report
