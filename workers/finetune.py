"""Task: fine-tune a candidate with its dense model as the teacher. Resumes from the checkpoint folder."""

from __future__ import annotations

from pydantic import ValidationError

import prunefront
from prunefront.config import describe_validation_error
from prunefront.training.finetune import finetune
from prunefront.training.recipes import Recipe, default_recipe
from workers.candidate_models import CandidateModels
from workers.devices import prepare_device
from workers.payloads import FinetunePayload, PayloadError, parse_payload
from workers.tasks import JsonDict, TaskContext


def run_finetune(payload: JsonDict, context: TaskContext) -> JsonDict:
    """Fine-tune one candidate.

    Args:
        payload: See :class:`workers.payloads.FinetunePayload`. The fields of ``recipe`` replace those of the dataset's
            default.
        context: Device, progress and the request to stop; a stopped task goes on where it was when it is submitted
            again with the same checkpoint folder.

    Returns:
        ``{"checkpoint": path, "sha256": ..., "history": [...]}``.
    """
    task = parse_payload(FinetunePayload, payload)
    try:
        recipe = Recipe.model_validate({**default_recipe(task.dataset).model_dump(), **task.recipe})
    except ValidationError as error:
        raise PayloadError(f"This recipe cannot be used: {describe_validation_error(error)}.") from error
    prepare_device(context.device)
    dense = CandidateModels(task.model, task.weights).dense_of(task.config, None)
    result = finetune(
        prunefront.compress(dense, task.config),
        task.dataset,
        epochs=task.epochs,
        recipe=recipe,
        teacher=dense,  # finetune copies it before the weights that both share move
        checkpoint_dir=task.checkpoint_dir,
        device=context.device,
        progress=context.progress,
        should_stop=context.should_stop,
        seed=task.seed,
    )
    return {"checkpoint": str(result.checkpoint_path), "sha256": result.sha256, "history": list(result.history)}
