"""Fine-tune a candidate as the fine-tuning task does: the loop without validation, and its last weights as a file."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from prunefront.errors import ConfigError
from prunefront.training.checkpoints import CHECKPOINT_NAME, WEIGHTS_NAME, save_weights
from prunefront.training.evaluate import DType, Progress, ShouldStop
from prunefront.training.loop import CHECKPOINT_EVERY_S, Record, train
from prunefront.training.recipes import Recipe, default_recipe

__all__ = ["CHECKPOINT_NAME", "WEIGHTS_NAME", "FinetuneResult", "finetune"]


@dataclass(frozen=True, kw_only=True)
class FinetuneResult:
    """A finished fine-tuning run.

    Attributes:
        checkpoint_path: Final weights, safetensors with the config inside (plain ones for a model without a config).
        sha256: Hash of that file.
        history: Per epoch ``{"epoch", "loss", "top1", "lr"}``: means over its training batches, and the last rate.
    """

    checkpoint_path: Path
    sha256: str
    history: tuple[Record, ...]


def finetune(
    model: nn.Module,
    dataset_id: str,
    *,
    epochs: int,
    checkpoint_dir: str | os.PathLike[str],
    recipe: Recipe | None = None,
    teacher: nn.Module | None = None,
    device: str | torch.device = "cpu",
    dtype: DType = "fp32",
    num_workers: int = 0,
    seed: int = 0,
    progress: Progress | None = None,
    should_stop: ShouldStop | None = None,
    checkpoint_every_s: float = CHECKPOINT_EVERY_S,
) -> FinetuneResult:
    """Fine-tune ``model`` in place on the train split, resuming from ``checkpoint_dir`` when a run was left there.

    Args:
        model: A compressed (or plain timm) model.
        dataset_id: Dataset to train on; only its train split is read.
        epochs: Passes over the train split.
        checkpoint_dir: Folder of this run alone; ``checkpoint.pt`` while it lasts, ``model.safetensors`` at its end.
        recipe: How to train; None takes the dataset's default.
        teacher: The dense model; used when the recipe distils.
        device: Torch device.
        dtype: ``fp32``, or autocast to ``bf16`` or ``fp16`` (with loss scaling).
        num_workers: Processes that load images.
        seed: Order, augmentation and regularisation derive from it.
        progress: Called with (steps done, all steps, text) after each step.
        should_stop: Asked before each step.
        checkpoint_every_s: Seconds between checkpoints within an epoch; each epoch's end writes one anyway.

    Returns:
        The final weights and the course of the training.

    Raises:
        ConfigError: If the recipe has phases, which may leave sites out.
        PrunefrontError: As `prunefront.training.loop.train`.
    """
    if recipe is not None and recipe.phases is not None:
        raise ConfigError(
            "phases may end with fewer sites than the config has, but fine-tuning keeps its config; set phases=null, "
            "or use prunefront train."
        )
    folder = Path(checkpoint_dir)
    history = train(
        model,
        dataset_id,
        epochs=epochs,
        folder=folder,
        recipe=default_recipe(dataset_id) if recipe is None else recipe,
        teacher=teacher,
        device=device,
        dtype=dtype,
        num_workers=num_workers,
        seed=seed,
        validates=False,
        progress=progress,
        should_stop=should_stop,
        checkpoint_every_s=checkpoint_every_s,
    )
    weights_path = save_weights(model, folder / WEIGHTS_NAME)
    return FinetuneResult(
        checkpoint_path=weights_path,
        sha256=hashlib.sha256(weights_path.read_bytes()).hexdigest(),
        history=history,
    )
