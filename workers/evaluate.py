"""Task: accuracy of many candidates on one split, a result each as soon as it is there."""

from __future__ import annotations

import math
from collections.abc import Callable

from prunefront.training.data import DataConfig, SplitDataset, data_config_of
from prunefront.training.evaluate import evaluate, pack_correct
from workers.candidate_models import CandidateModels
from workers.devices import prepare_device
from workers.images import open_images
from workers.payloads import EvaluatePayload, parse_payload
from workers.tasks import JsonDict, TaskContext


def run_evaluate(payload: JsonDict, context: TaskContext) -> JsonDict:
    """Evaluate candidates that share a dense model.

    Args:
        payload: See :class:`workers.payloads.EvaluatePayload`. To resume, leave out the entries that are done.
        context: Device, progress and the request to stop. Items: entry key ->
            ``{num_images, top1, top5, loss, correct}``, ``correct`` being base64 of one bit per image in the order of
            the split, ``loss`` null where it overflowed.

    Returns:
        ``{"clusters": [...] or null}``: what each image was made from, for intervals.
    """
    task = parse_payload(EvaluatePayload, payload)
    prepare_device(context.device)
    models = CandidateModels(task.model, task.weights)
    opened: tuple[DataConfig, SplitDataset] | None = None
    for number, entry in enumerate(task.entries):
        context.stop_if_asked()
        model = models.build(entry)
        data_config = data_config_of(model)
        if opened is None or opened[0] != data_config:  # candidates at another resolution see other images
            opened = data_config, open_images(task.dataset, task.split, data_config, task.num_images)
        images = opened[1]
        result = evaluate(
            model,
            images,
            batch_size=task.batch_size,
            device=context.device,
            dtype=task.dtype,
            progress=_of_entry(context, number, len(task.entries), entry.key),
            should_stop=context.should_stop,
        )
        context.item(
            entry.key,
            {
                "num_images": result.num_images,
                "top1": result.top1,
                "top5": result.top5,
                "loss": result.loss if math.isfinite(result.loss) else None,  # JSON has no NaN
                "correct": pack_correct(result.correct),
            },
        )
    if opened is None or opened[1].clusters is None:
        return {"clusters": None}
    return {"clusters": opened[1].clusters.tolist()}


def _of_entry(context: TaskContext, number: int, count: int, key: str) -> Callable[[float, float, str], None]:
    """Count candidates, the current one by its share of the images."""

    def report(done: float, total: float, message: str) -> None:
        context.progress(number + (done / total if total > 0 else 1.0), count, f"evaluating {key}")

    return report
