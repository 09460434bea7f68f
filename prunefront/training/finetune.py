"""Fine-tune a compressed model, with the dense model as teacher; interrupted runs end where whole ones would.

Everything random in a step is derived from (seed, step), and a checkpoint holds model, optimizer, loss scaler and
position; so on a CPU a run that was killed and resumed gives the very weights of an uninterrupted one.
"""

from __future__ import annotations

import copy
import hashlib
import io
import logging
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from timm.data import Mixup
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import Tensor, nn

from prunefront.checkpoints import save_model
from prunefront.compress import is_compressed
from prunefront.errors import CheckpointError, ConfigError, DatasetError
from prunefront.files import write_atomic
from prunefront.training.data import (
    SplitDataset,
    check_classes,
    data_config_of,
    open_split,
    training_batches,
)
from prunefront.training.errors import DivergedError, StoppedError
from prunefront.training.evaluate import DType, Progress, ShouldStop, autocast, check_labels
from prunefront.training.losses import finetuning_loss
from prunefront.training.recipes import Recipe, default_recipe

CHECKPOINT_NAME = "checkpoint.pt"
WEIGHTS_NAME = "model.safetensors"
CHECKPOINT_EVERY_S = 60.0

_CHECKPOINT_FORMAT = 1

_log = logging.getLogger(__name__)


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
    history: tuple[dict[str, float], ...]


@dataclass(kw_only=True)
class _Position:
    """How far a run is; part of each checkpoint."""

    step: int = 0
    loss_sum: float = 0.0
    num_correct: int = 0
    history: list[dict[str, float]] = field(default_factory=list)


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
        teacher: The dense model; used when the recipe distils. It may share parameters with ``model``: its weights
            are copied at the start.
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
        DatasetError: If the dataset has no train split, does not fit the model, or holds less than one batch.
        CheckpointError: If the folder holds a checkpoint of another run.
        DivergedError: If the loss or gradient stops being a number; the last good checkpoint is kept.
        StoppedError: If ``should_stop`` said so; a checkpoint is written first.
        FileWriteError: If a checkpoint cannot be written.
    """
    if epochs < 1:
        raise ConfigError(f"Fine-tuning takes at least 1 epoch, but got {epochs}.")
    recipe = default_recipe(dataset_id) if recipe is None else recipe
    device = torch.device(device)
    folder = Path(checkpoint_dir)
    split = open_split(
        dataset_id,
        "train",
        data_config=data_config_of(model),
        train=True,
        augmentation=recipe.augmentation,
        seed=seed,
    )
    num_classes = getattr(model, "num_classes", split.num_classes)
    check_classes(split, num_classes)
    steps_per_epoch = len(split) // recipe.batch_size
    if steps_per_epoch == 0:
        raise DatasetError(
            f"One batch takes {recipe.batch_size} images, but the train split of {dataset_id!r} has {len(split)}. "
            "Choose a smaller batch_size in the recipe."
        )
    with _quiet_random_state():
        run = _Run(
            model=model.to(device),
            teacher=_frozen_copy(teacher, device) if teacher is not None and recipe.distillation is not None else None,
            split=split,
            recipe=recipe,
            epochs=epochs,
            steps_per_epoch=steps_per_epoch,
            device=device,
            dtype=dtype,
            seed=seed,
            checkpoint_path=folder / CHECKPOINT_NAME,
        )
        run.resume()
        run.train(num_workers, progress, should_stop, checkpoint_every_s)
    weights_path = _save_weights(model, folder / WEIGHTS_NAME)
    return FinetuneResult(
        checkpoint_path=weights_path,
        sha256=hashlib.sha256(weights_path.read_bytes()).hexdigest(),
        history=tuple(run.position.history),
    )


class _Run:
    """The state of one fine-tuning run."""

    def __init__(
        self,
        *,
        model: nn.Module,
        teacher: nn.Module | None,
        split: SplitDataset,
        recipe: Recipe,
        epochs: int,
        steps_per_epoch: int,
        device: torch.device,
        dtype: DType,
        seed: int,
        checkpoint_path: Path,
    ) -> None:
        self.model, self.teacher, self.split, self.recipe = model, teacher, split, recipe
        self.epochs, self.steps_per_epoch, self.num_steps = epochs, steps_per_epoch, epochs * steps_per_epoch
        self.device, self.dtype, self.seed = device, dtype, seed
        self.checkpoint_path = checkpoint_path
        self.position = _Position()
        self.optimizer = create_optimizer_v2(model, opt="adamw", lr=recipe.scaled_lr, weight_decay=recipe.weight_decay)
        self.scheduler, _ = create_scheduler_v2(
            self.optimizer,
            sched="cosine",
            num_epochs=epochs,
            min_lr=recipe.scaled_lr * recipe.min_lr_share,
            warmup_lr=recipe.scaled_lr * recipe.min_lr_share,
            warmup_epochs=recipe.warmup_epochs,
            step_on_epochs=False,
            updates_per_epoch=steps_per_epoch,
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == "fp16")
        self.mixup = (
            Mixup(recipe.mixup, recipe.cutmix, label_smoothing=recipe.label_smoothing, num_classes=split.num_classes)
            if recipe.mixup or recipe.cutmix
            else None
        )
        # What must be equal for a checkpoint to continue this run and not another.
        config = getattr(model, "prune_config", None)
        self.identity = {
            "config": None if config is None else config.content_hash(),
            "dataset": split.dataset_id,
            "num_images": len(split),
            "recipe": recipe.model_dump_json(),
            "epochs": epochs,
            "dtype": dtype,
            "seed": seed,
            "distils": teacher is not None,
        }

    def train(
        self,
        num_workers: int,
        progress: Progress | None,
        should_stop: ShouldStop | None,
        checkpoint_every_s: float,
    ) -> None:
        """Run the remaining steps."""
        self.model.train()
        position, saved_at = self.position, time.monotonic()
        while position.step < self.num_steps:
            epoch, place = divmod(position.step, self.steps_per_epoch)
            batches = training_batches(
                self.split,
                batch_size=self.recipe.batch_size,
                seed=self.seed,
                epoch=epoch,
                first_batch=place,
                num_workers=num_workers,
            )
            for images, labels in batches:
                if should_stop is not None and should_stop():
                    self.save()
                    raise StoppedError(
                        f"Fine-tuning was stopped after step {position.step} of {self.num_steps}; "
                        f"{self.checkpoint_path} continues it."
                    )
                self._step(images, labels)
                if progress is not None:
                    progress(position.step, self.num_steps, f"epoch {epoch + 1} of {self.epochs}")
                if time.monotonic() - saved_at >= checkpoint_every_s and position.step % self.steps_per_epoch:
                    self.save()
                    saved_at = time.monotonic()
            if position.step != (epoch + 1) * self.steps_per_epoch:
                raise DatasetError(
                    f"The train split of {self.split.dataset_id!r} promised {len(self.split)} images but ended early. "
                    "Correct num_images in its settings entry."
                )
            self._finish_epoch(epoch)
            self.save()
            saved_at = time.monotonic()

    def _step(self, images: Tensor, labels: Tensor) -> None:
        position, recipe = self.position, self.recipe
        _seed_all(self.seed, position.step)
        check_labels(labels, self.split)
        images, labels = images.to(self.device), labels.to(self.device)
        targets = labels
        if self.mixup is not None:
            images, targets = self.mixup(images, labels)
        with autocast(self.device, self.dtype):
            logits = self.model(images)
            teacher_logits = None
            if self.teacher is not None:
                with torch.no_grad():
                    teacher_logits = self.teacher(images)
        distillation = recipe.distillation
        loss = finetuning_loss(
            logits,
            targets,
            teacher_logits,
            alpha=distillation.alpha if distillation else 0.0,
            tau=distillation.tau if distillation else 1.0,
            label_smoothing=recipe.label_smoothing,
        )
        loss_value = loss.item()
        if not math.isfinite(loss_value):
            raise self._diverged("loss", loss_value)
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        self.scaler.unscale_(self.optimizer)
        limit = math.inf if recipe.clip_grad is None else recipe.clip_grad
        norm = float(nn.utils.clip_grad_norm_(self.model.parameters(), limit))
        # With loss scaling an overflow is expected now and then; the scaler skips that step.
        if not math.isfinite(norm) and not self.scaler.is_enabled():
            raise self._diverged("gradient norm", norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        position.step += 1
        self.scheduler.step_update(position.step)
        position.loss_sum += loss_value
        position.num_correct += int((logits.argmax(dim=1) == labels).sum())

    def _diverged(self, what: str, value: float) -> DivergedError:
        kept = (
            f"The last good checkpoint is {self.checkpoint_path}"
            if self.checkpoint_path.exists()
            else "No checkpoint was written yet"
        )
        return DivergedError(
            f"The {what} became {value} in step {self.position.step} of {self.num_steps}. {kept}; "
            "use a lower learning rate, a warm-up or dtype fp32."
        )

    def _finish_epoch(self, epoch: int) -> None:
        position = self.position
        record = {
            "epoch": float(epoch),
            "loss": position.loss_sum / self.steps_per_epoch,
            "top1": position.num_correct / (self.steps_per_epoch * self.recipe.batch_size),
            "lr": float(self.optimizer.param_groups[0]["lr"]),
        }
        position.history.append(record)
        position.loss_sum, position.num_correct = 0.0, 0
        _log.info("epoch finished", extra={"action": "finetune_epoch", **record})

    def save(self) -> None:
        """Write the checkpoint in one step: a crash leaves the previous one."""
        buffer = io.BytesIO()
        torch.save(
            {
                "format": _CHECKPOINT_FORMAT,
                "identity": self.identity,
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "position": vars(self.position),
            },
            buffer,
        )
        write_atomic(self.checkpoint_path, buffer.getvalue())

    def resume(self) -> None:
        """Load the folder's checkpoint, if there is one.

        Raises:
            CheckpointError: If it is damaged or belongs to another run.
        """
        if not self.checkpoint_path.exists():
            return
        try:
            state: dict[str, Any] = torch.load(self.checkpoint_path, map_location=self.device, weights_only=True)
        except Exception as error:  # a damaged archive raises errors of many libraries
            raise CheckpointError(
                f"{self.checkpoint_path} is not a readable checkpoint: {str(error).splitlines()[0]} "
                "Remove it to start this fine-tuning anew."
            ) from error
        if state.get("format") != _CHECKPOINT_FORMAT or state.get("identity") != self.identity:
            found = state.get("identity") or {}
            changed = [key for key, value in self.identity.items() if found.get(key) != value]
            raise CheckpointError(
                f"{self.checkpoint_path} belongs to another run: {', '.join(changed) or 'format'} differs. "
                "Choose another folder, or remove that file to start anew."
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.position = _Position(**state["position"])
        self.scheduler.step_update(self.position.step)
        _log.info("fine-tuning resumed", extra={"action": "finetune_resume", "step": self.position.step})


def _frozen_copy(teacher: nn.Module, device: torch.device) -> nn.Module:
    """Copy the teacher: it usually shares its parameters with the student, which are about to change."""
    return copy.deepcopy(teacher).to(device).eval().requires_grad_(False)


def _save_weights(model: nn.Module, path: Path) -> Path:
    if is_compressed(model):
        return save_model(model, path)
    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()}
    return write_atomic(path, safetensors.torch.save(state, metadata={"format": "pt"}))


def _seed_all(seed: int, step: int) -> None:
    """Seed what stochastic depth, dropout (torch) and mixup (NumPy) draw from."""
    state = np.random.SeedSequence((seed, step)).generate_state(2)
    torch.manual_seed(int(state[0]))
    np.random.seed(int(state[1]))


@contextmanager
def _quiet_random_state() -> Iterator[None]:
    """Put the global generators back afterwards: the caller's random numbers are none of our business."""
    state = np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            np.random.set_state(state)
