"""The training loop behind `prunefront train` and the fine-tuning task; interrupted runs end where whole ones would.

Everything random in a step is derived from (seed, step, process), and a checkpoint holds model, average, optimizer,
loss scaler and position; so on a CPU a run that was killed and resumed gives the very weights of an uninterrupted one.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from timm.data import Mixup
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from prunefront.compress import compress
from prunefront.errors import CheckpointError, ConfigError, DatasetError, ModelError
from prunefront.geometry import geometry_for
from prunefront.schedule import plan_schedule
from prunefront.training.checkpoints import CHECKPOINT_NAME, load_checkpoint, save_checkpoint, save_weights
from prunefront.training.data import (
    OnCorrupt,
    SplitDataset,
    check_classes,
    data_config_of,
    open_split,
    training_batches,
)
from prunefront.training.distributed import World
from prunefront.training.errors import DivergedError, StoppedError
from prunefront.training.evaluate import DType, Progress, ShouldStop, autocast, check_labels, evaluate
from prunefront.training.examples import ExampleSelection
from prunefront.training.logs import RunLog
from prunefront.training.objectives import build_objective
from prunefront.training.optimization import Optimization, held_still, set_drop_path
from prunefront.training.recipes import Recipe, check_recipe
from prunefront.training.schedules import PhasedSites, ScheduledSites, openness

BEST_NAME = "best.safetensors"
EMA_NAME = "ema.safetensors"
CHECKPOINT_EVERY_S = 60.0

_DTYPES: dict[str, DType] = {"off": "fp32", "bf16": "bf16", "fp16": "fp16"}

_log = logging.getLogger(__name__)

Record = dict[str, float]


@dataclass(kw_only=True)
class _Position:
    """How far a run is; part of each checkpoint. Sums are those of the epoch that is under way."""

    step: int = 0
    place: int = 0  # steps of this epoch
    loss_sum: float = 0.0
    num_correct: int = 0
    num_images: int = 0
    parts: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    history: list[Record] = field(default_factory=list)
    epoch_seconds: list[float] = field(default_factory=list)


def train(
    model: nn.Module,
    dataset_id: str,
    *,
    epochs: int,
    folder: str | os.PathLike[str],
    recipe: Recipe,
    teacher: nn.Module | None = None,
    device: str | torch.device = "cpu",
    dtype: DType | None = None,
    num_workers: int = 0,
    seed: int = 0,
    world: World | None = None,
    validates: bool = True,
    on_corrupt: OnCorrupt = "refuse",
    log: RunLog | None = None,
    progress: Progress | None = None,
    on_epoch: Callable[[Record, float], None] | None = None,
    should_stop: ShouldStop | None = None,
    checkpoint_every_s: float = CHECKPOINT_EVERY_S,
    checkpoint_every_steps: int | None = None,
) -> tuple[Record, ...]:
    """Train ``model`` in place on the train split, resuming from ``folder`` when a run was left there.

    With several processes each calls this with the same arguments and its own ``world`` and ``device``; the batch size
    is per process, rank 0 alone writes, and ``folder`` must be one folder for all.

    Args:
        model: A compressed (or plain timm) model.
        dataset_id: Dataset to train on; its test split is never read.
        epochs: Passes over the train split.
        folder: Folder of this run alone: ``checkpoint.pt``, and with validation ``best.safetensors``; with an average,
            ``ema.safetensors`` at the end.
        recipe: How to train; its own ``epochs`` is only a default for whoever asks. With its ``phases`` the model
            keeps all of its selectors; `schedules.merged_config` says which of them the training ends with.
        teacher: The dense model; used when the recipe distils. It may share parameters with ``model``: its weights
            are copied at the start.
        device: Torch device.
        dtype: ``fp32``, or autocast to ``bf16`` or ``fp16`` (with loss scaling); None takes the recipe's ``amp``.
        num_workers: Processes that load images, for each process that trains.
        seed: Order, augmentation and regularisation derive from it.
        world: The processes that train together; None: this one alone.
        validates: Whether to evaluate on the search split, in the epochs that the recipe says.
        on_corrupt: What to do about images that cannot be decoded: ``refuse`` them or ``skip`` them with a warning.
        log: Takes each epoch's record, on rank 0.
        progress: Called with (steps done, all steps, text) after each step.
        on_epoch: Called with (record, seconds of training) after each epoch.
        should_stop: Asked before each step; with several processes it is enough that one says so.
        checkpoint_every_s: Seconds between checkpoints within an epoch; each epoch's end writes one anyway.
        checkpoint_every_steps: Steps between checkpoints within an epoch, so that a killed process loses no more.

    Returns:
        Per epoch ``{"epoch", "loss", "top1", "lr"}``, means over its training batches and the last rate; the parts of
        the loss; and where it was validated ``search_top1``, ``search_top5``, ``search_loss`` and ``ema_search_top1``.

    Raises:
        ConfigError: If the recipe does not fit the method or cannot be carried out.
        CorruptImageError: If an image cannot be decoded and is not to be skipped.
        DatasetError: If the dataset has no train split, does not fit the model, or holds less than one batch.
        ModelError: If the teacher knows other classes.
        CheckpointError: If the folder holds a checkpoint of another run, or of another number of processes.
        DivergedError: If the loss or gradient stops being a number; the last good checkpoint is kept.
        StoppedError: If ``should_stop`` said so; a checkpoint is written first.
        FileWriteError: If a checkpoint cannot be written.
    """
    if epochs < 1:
        raise ConfigError(f"Training takes at least 1 epoch, but got {epochs}.")
    if (recipe.mixup or recipe.cutmix) and recipe.batch_size % 2:
        raise ConfigError(
            f"Mixup and cutmix pair the images of a batch, but batch_size={recipe.batch_size} is odd. "
            "Choose an even batch_size, or set mixup=0 and cutmix=0."
        )
    config = getattr(model, "prune_config", None)
    check_recipe(recipe, None if config is None else config.method)
    world = World() if world is None else world
    device = torch.device(device)
    data_config = data_config_of(model)
    split = open_split(
        dataset_id,
        "train",
        data_config=data_config,
        train=True,
        augmentation=recipe.augmentation,
        seed=seed,
        on_corrupt=on_corrupt,
    )
    num_classes = getattr(model, "num_classes", split.num_classes)
    check_classes(split, num_classes)
    examples = None
    if recipe.examples is not None:
        if recipe.examples.scores_attention:
            _check_class_attention(model)
        examples = ExampleSelection(len(split), recipe.examples, seed=seed)
    num_images = len(split) if examples is None else len(examples.train)
    step_images = recipe.batch_size * recipe.accumulate * world.size
    steps_per_epoch = num_images // step_images
    if steps_per_epoch == 0:
        what = "One batch takes" if step_images == recipe.batch_size else "One step of all processes takes"
        raise DatasetError(
            f"{what} {step_images} images, but the train split of {dataset_id!r} has {num_images}. "
            "Choose a smaller batch_size in the recipe."
        )
    validation = None
    if validates:
        validation = open_split(dataset_id, "search", data_config=data_config, on_corrupt=on_corrupt)
    with _quiet_random_state(device), held_still(model, recipe.frozen_parameters):
        if recipe.drop_path is not None:
            set_drop_path(model, recipe.drop_path)
        run = _Run(
            model=model.to(device),
            teacher=teacher,
            split=split,
            examples=examples,
            validation=validation,
            recipe=recipe,
            epochs=epochs,
            steps_per_epoch=steps_per_epoch,
            device=device,
            dtype=_DTYPES[recipe.amp] if dtype is None else dtype,
            num_workers=num_workers,
            seed=seed,
            world=world,
            folder=Path(folder),
        )
        run.resume()
        run.train(
            progress=progress,
            on_epoch=on_epoch,
            should_stop=should_stop,
            log=log if world.is_main else None,
            checkpoint_every_s=checkpoint_every_s,
            checkpoint_every_steps=checkpoint_every_steps,
        )
    return tuple(run.position.history)


_NEEDS_ATTENTION = (
    "the score 'forgetting+cls_var' needs of every image; set examples.score=forgetting, or train a trilevel config of "
    "a model with a class token, with the objective 'classification'."
)


def _check_class_attention(model: nn.Module) -> None:
    """Refuse models whose class attention has no variance to score images by."""
    config = getattr(model, "prune_config", None)
    if config is None or config.method != "trilevel" or not geometry_for(config.model).has_class_token:
        what = "A dense model" if config is None else f"{config.model.name} with the method {config.method!r}"
        raise ConfigError(f"{what} hands out no class attention, which {_NEEDS_ATTENTION}")
    schedule = plan_schedule(config)
    left = schedule.blocks[-1].tokens_entering - schedule.num_prefix_tokens
    if left < 2:
        raise ConfigError(
            "The score 'forgetting+cls_var' is a variance over the patches of the last block, of which this config "
            f"leaves {left}; keep at least 2, or set examples.score=forgetting."
        )


class _Run:
    """The state of one training."""

    def __init__(
        self,
        *,
        model: nn.Module,
        teacher: nn.Module | None,
        split: SplitDataset,
        examples: ExampleSelection | None,
        validation: SplitDataset | None,
        recipe: Recipe,
        epochs: int,
        steps_per_epoch: int,
        device: torch.device,
        dtype: DType,
        num_workers: int,
        seed: int,
        world: World,
        folder: Path,
    ) -> None:
        self.model, self.split, self.validation, self.recipe = model, split, validation, recipe
        self.examples = examples
        self.epochs, self.steps_per_epoch, self.num_steps = epochs, steps_per_epoch, epochs * steps_per_epoch
        self.device, self.dtype, self.num_workers, self.seed, self.world = device, dtype, num_workers, seed, world
        self.folder, self.checkpoint_path = folder, folder / CHECKPOINT_NAME
        self.position = _Position()
        self.objective = build_objective(recipe, model)
        self.teacher = self._take_teacher(teacher)
        config = getattr(model, "prune_config", None)
        self.sites = None if recipe.keep_rate is None or config is None else ScheduledSites(config)
        self.phases = None if recipe.phases is None or config is None else PhasedSites(config, recipe.phases, epochs)
        self.optimization = Optimization(
            model, recipe, epochs=epochs, steps_per_epoch=steps_per_epoch, world_size=world.size
        )
        self.optimizer = self.optimization.optimizer
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == "fp16")
        self.mixup = (
            Mixup(recipe.mixup, recipe.cutmix, label_smoothing=recipe.label_smoothing, num_classes=split.num_classes)
            if recipe.mixup or recipe.cutmix
            else None
        )
        self.ema = None if recipe.ema_decay is None else ModelEmaV3(model, decay=recipe.ema_decay)
        self.parallel: nn.Module = model
        if world.size > 1:
            self.parallel = DistributedDataParallel(
                model,
                device_ids=[device] if device.type == "cuda" else None,
                find_unused_parameters=self.phases is not None,  # selectors that have yet to join
            )
        # What must be equal for a checkpoint to continue this run and not another.
        self.identity = {
            "config": None if config is None else config.content_hash(),
            "dataset": split.dataset_id,
            "num_images": len(split),
            "recipe": recipe.model_dump_json(),
            "epochs": epochs,
            "dtype": dtype,
            "seed": seed,
            "distils": self.teacher is not None,
            "validates": validation is not None,
            "world_size": world.size,
        }

    def _take_teacher(self, teacher: nn.Module | None) -> nn.Module | None:
        """A frozen copy: the teacher usually shares its parameters with the student, which are about to change."""
        if teacher is None or not self.objective.needs_teacher:
            return None
        classes, own = getattr(teacher, "num_classes", None), getattr(self.model, "num_classes", None)
        if None not in (classes, own) and classes != own:
            raise ModelError(
                f"The teacher knows {classes} classes, but the model that learns from it has {own}; "
                "use a teacher trained on the same classes."
            )
        return copy.deepcopy(teacher).to(self.device).eval().requires_grad_(False)

    # Course --------------------------------------------------------------------------------------------------------

    def train(
        self,
        *,
        progress: Progress | None,
        on_epoch: Callable[[Record, float], None] | None,
        should_stop: ShouldStop | None,
        log: RunLog | None,
        checkpoint_every_s: float,
        checkpoint_every_steps: int | None,
    ) -> None:
        """Run the remaining steps."""
        position, saved_at, saved_step = self.position, time.monotonic(), self.position.step

        def save_is_due() -> bool:
            done = position.step - saved_step
            return done > 0 and (
                time.monotonic() - saved_at >= checkpoint_every_s
                or (checkpoint_every_steps is not None and done >= checkpoint_every_steps)
            )

        while len(position.history) < self.epochs:
            epoch = len(position.history)
            self.model.train(not self.recipe.eval_mode)
            batches = self._batches(epoch) if position.place < self.steps_per_epoch else iter(())
            while position.place < self.steps_per_epoch:
                stops, saves = self.world.any(should_stop is not None and should_stop(), save_is_due())
                if stops:
                    raise self._stopped()
                if saves:
                    self.save()
                    saved_at, saved_step = time.monotonic(), position.step
                self._step(batches)
                if progress is not None:
                    progress(position.step, self.num_steps, f"epoch {epoch + 1} of {self.epochs}")
            try:
                record = self._finish_epoch(epoch, should_stop)
            except StoppedError as error:
                raise self._stopped() from error
            self.save()
            saved_at, saved_step = time.monotonic(), position.step
            if log is not None:
                step_images = self.recipe.batch_size * self.recipe.accumulate * self.world.size
                log.write(position.history, position.epoch_seconds, self.steps_per_epoch * step_images)
            if on_epoch is not None:
                on_epoch(record, position.epoch_seconds[-1])
        if self.ema is not None and self.world.is_main:
            self._save_weights(self.ema.module, EMA_NAME)

    def _batches(self, epoch: int) -> Iterator[tuple[Tensor, ...]]:
        """What is left of the epoch's batches, for this process."""
        indices = None
        if self.examples is not None:
            event = self.examples.start_epoch(epoch)
            if event is not None:
                _log.info("images exchanged", extra={"action": "examples_event", "removed": len(event.removed)})
            if not self.examples.is_collecting:
                # Nobody scores images from here on, so the forward pass need not record what they are scored by.
                self.objective = build_objective(self.recipe.model_copy(update={"examples": None}), self.model)
            indices = self.examples.train
        options: dict[str, Any] = {
            "batch_size": self.recipe.batch_size,
            "seed": self.seed,
            "epoch": epoch,
            "first_batch": self.position.place * self.recipe.accumulate,
            "num_workers": self.num_workers,
            "repeats": self.recipe.repeats,
            "rank": self.world.rank,
            "world_size": self.world.size,
        }
        if indices is None:  # a stream has no indices
            return training_batches(self.split, **options)
        return training_batches(self.split, indices=indices, with_index=True, **options)

    def _step(self, batches: Iterator[tuple[Tensor, ...]]) -> None:
        """One step of the optimizer, on ``accumulate`` batches."""
        position, recipe, started = self.position, self.recipe, time.monotonic()
        self.optimization.set_rates(position.step)
        self.optimizer.zero_grad()
        options = self._changes()
        losses, num_correct, num_images, parts = 0.0, 0, 0, dict(position.parts)
        for number in range(recipe.accumulate):
            images, labels, index = self._next(batches)
            self._seed_batch(position.step * recipe.accumulate + number)
            targets = labels
            if self.mixup is not None:
                images, targets = self.mixup(images, labels)
            is_last = number == recipe.accumulate - 1
            waits = isinstance(self.parallel, DistributedDataParallel) and not is_last
            with cast(Any, self.parallel).no_sync() if waits else contextlib.nullcontext():
                with autocast(self.device, self.dtype):
                    outputs = self.objective.forward(self.parallel, self.teacher, images, **options)
                loss = self.objective.loss(outputs, targets)
                value = loss.total.item()
                # Every process has to know before it waits for the others' gradients.
                if self.world.any(not math.isfinite(value))[0]:
                    raise self._diverged("loss", value)
                self.scaler.scale(loss.total / recipe.accumulate).backward()  # type: ignore[no-untyped-call]
            losses += value / recipe.accumulate
            hits = loss.logits.argmax(dim=1) == labels
            num_correct, num_images = num_correct + int(hits.sum()), num_images + len(hits)
            if index is not None:
                self._record_examples(index, hits, loss.class_attention)
            for name, part in loss.parts.items():
                parts[name] = parts.get(name, 0.0) + float(part.detach()) / recipe.accumulate
        self._update()
        position.step += 1
        position.place += 1
        position.loss_sum += losses
        position.num_correct += num_correct
        position.num_images += num_images
        position.parts = parts
        position.seconds += time.monotonic() - started

    def _next(self, batches: Iterator[tuple[Tensor, ...]]) -> tuple[Tensor, Tensor, Tensor | None]:
        try:
            images, labels, *rest = next(batches)
        except StopIteration:
            raise DatasetError(
                f"The train split of {self.split.dataset_id!r} promised {len(self.split)} images but ended early. "
                "Correct num_images in its settings entry."
            ) from None
        check_labels(labels, self.split)
        if self.mixup is not None and len(labels) % 2:
            # Mixup pairs images, but one that cannot be decoded may be missing.
            pairs = torch.arange(len(labels) + 1) % len(labels) if len(labels) == 1 else torch.arange(len(labels) - 1)
            images, labels, *rest = (tensor[pairs] for tensor in (images, labels, *rest))
        index = rest[0] if rest else None
        return images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True), index

    def _record_examples(self, index: Tensor, hits: Tensor, class_attention: Tensor | None) -> None:
        """Tell the example level how the model fared with each image; all processes record the same."""
        if self.examples is None or not self.examples.is_collecting:
            return
        # In double precision, which holds every id exactly.
        columns = [index.double(), hits.cpu().double()]
        if self.examples.options.scores_attention:
            if class_attention is None:
                raise ConfigError(
                    f"The objective {self.recipe.objective!r} hands out no class attention, which {_NEEDS_ATTENTION}"
                )
            columns.append(class_attention.detach().float().var(dim=1, unbiased=True).cpu().double())
        rows = self.world.gathered(torch.stack(columns, dim=1)).numpy()
        self.examples.record(rows[:, 0].astype(np.int64), rows[:, 1], rows[:, 2] if len(columns) > 2 else None)

    def _update(self) -> None:
        self.scaler.unscale_(self.optimizer)
        limit = math.inf if self.recipe.clip_grad is None else self.recipe.clip_grad
        norm = float(nn.utils.clip_grad_norm_(self.model.parameters(), limit))
        # With loss scaling an overflow is expected now and then; the scaler skips that step.
        if not math.isfinite(norm) and not self.scaler.is_enabled():
            raise self._diverged("gradient norm", norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.ema is not None:
            self.ema.update(self.model)

    def _changes(self) -> dict[str, Any]:
        """What the model is called with at present beside images."""
        if self.phases is not None:
            return self.phases.at(self.phases.phase(self.position.history))
        if self.sites is not None and self.recipe.keep_rate is not None:
            return self.sites.at(openness(self.recipe.keep_rate, self.position.step, self.steps_per_epoch))
        return {}

    def _seed_batch(self, number: int) -> None:
        """Seed what stochastic depth, dropout, decisions (torch) and mixup (NumPy) draw from."""
        key = (self.seed, number) if self.world.rank == 0 else (self.seed, number, self.world.rank)
        state = np.random.SeedSequence(key).generate_state(2)
        torch.manual_seed(int(state[0]))
        np.random.seed(int(state[1]))

    # Epochs --------------------------------------------------------------------------------------------------------

    def _finish_epoch(self, epoch: int, should_stop: ShouldStop | None) -> Record:
        position, batches = self.position, self.steps_per_epoch * self.world.size
        sums = self._sums()
        record: Record = {
            "epoch": float(epoch),
            "loss": sums["loss_sum"] / batches,
            "top1": sums["num_correct"] / sums["num_images"],
            "lr": self.optimization.lr,
            **{f"loss_{name}": part / batches for name, part in sums["parts"].items()},
        }
        if self.phases is not None:
            record["phase"] = float(self.phases.phase(position.history))
        if self.validation is not None and ((epoch + 1) % self.recipe.validate_every == 0 or epoch + 1 == self.epochs):
            record |= self._validate(self.validation, epoch, should_stop)
        position.history.append(record)
        position.epoch_seconds.append(position.seconds)
        position.place, position.seconds = 0, 0.0
        self._clear_sums()
        position.parts = {}  # the next phase may have others
        _log.info("epoch finished", extra={"action": "train_epoch", **record})
        if self.split.skipped:
            _log.warning("images skipped", extra={"action": "train", "detail": self.split.describe_skipped()})
        return record

    def _validate(self, split: SplitDataset, epoch: int, should_stop: ShouldStop | None) -> Record:
        """Accuracy on the search split; the best weights so far go to their own file."""
        keep_rate, history = self.recipe.keep_rate, self.position.history
        is_final = keep_rate is not None and (epoch + 1 == self.epochs or keep_rate.evaluate_with == "final")
        changes = {} if is_final else self._changes()
        record = self._accuracy(self.model, split, changes, should_stop)
        if not math.isfinite(record["search_loss"]):
            raise self._diverged("search loss", record["search_loss"])
        candidates = {record["search_top1"]: self.model}
        if self.ema is not None and self.recipe.evaluates_ema:
            averaged = self._accuracy(self.ema.module, split, changes, should_stop)["search_top1"]
            record["ema_search_top1"] = averaged
            candidates.setdefault(averaged, self.ema.module)
        if self.phases is not None:
            record["teacher_search_top1"] = self._teacher_top1(split, should_stop)
            phase = self.phases.phase(history)
            if not self.phases.is_last(phase):  # fewer selectors than the model will have: no rival of what comes
                return record
            history = [past for past in history if past["phase"] == phase]
        earlier = [past[name] for past in history for name in ("search_top1", "ema_search_top1") if name in past]
        top1 = max(candidates)
        if self.world.is_main and top1 > max(earlier, default=-1.0):
            self._save_weights(candidates[top1], BEST_NAME)
        return record

    def _teacher_top1(self, split: SplitDataset, should_stop: ShouldStop | None) -> float:
        """The teacher's accuracy on the search split, looked at once per run."""
        for past in self.position.history:
            if "teacher_search_top1" in past:
                return past["teacher_search_top1"]
        assert self.teacher is not None  # what learns selection has one
        return self._accuracy(self.teacher, split, {}, should_stop)["search_top1"]

    def _save_weights(self, model: nn.Module, name: str) -> None:
        """Write a model as it is left: without the selectors that merging sites left behind."""
        save_weights(model if self.phases is None else compress(model, self.phases.final), self.folder / name)

    def _accuracy(
        self, model: nn.Module, split: SplitDataset, changes: dict[str, Any], should_stop: ShouldStop | None
    ) -> Record:
        scheduled = _Scheduled(model, changes) if changes else model
        found = evaluate(
            scheduled,
            split,
            batch_size=self.recipe.batch_size,
            device=self.device,
            dtype=self.dtype,
            num_workers=self.num_workers,
            world=self.world,
            should_stop=should_stop,
        )
        return {"search_top1": found.top1, "search_top5": found.top5, "search_loss": found.loss}

    # Checkpoints ---------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write the checkpoint; all processes take part, since the sums of the epoch are spread over them."""
        sums = self._sums()
        if not self.world.is_main:
            return
        save_checkpoint(
            self.checkpoint_path,
            self.identity,
            {
                "model": self.model.state_dict(),
                "ema": None if self.ema is None else self.ema.module.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "examples": None if self.examples is None else self.examples.state_dict(),
                "position": {**vars(self.position), **sums},
            },
        )

    def _sums(self) -> dict[str, Any]:
        """The sums of this epoch over all processes."""
        position = self.position
        names = sorted(position.parts)
        loss, correct, images, *parts = self.world.total(
            [position.loss_sum, position.num_correct, position.num_images, *(position.parts[name] for name in names)]
        )
        return {
            "loss_sum": loss,
            "num_correct": int(correct),
            "num_images": int(images),
            "parts": dict(zip(names, parts, strict=True)),
        }

    def _clear_sums(self) -> None:
        position = self.position
        position.loss_sum, position.num_correct, position.num_images = 0.0, 0, 0
        position.parts = dict.fromkeys(position.parts, 0.0)

    def resume(self) -> None:
        """Load the folder's checkpoint, if there is one.

        Raises:
            CheckpointError: If it is damaged, belongs to another run, or is not there for every process.
        """
        exists = self.checkpoint_path.exists()
        if self.world.size > 1 and self.world.any(exists)[0] != (not self.world.any(not exists)[0]):
            raise CheckpointError(
                f"{self.checkpoint_path} is there for some of the {self.world.size} processes only: name a folder that "
                "all machines share."
            )
        if not exists:
            return
        state = load_checkpoint(self.checkpoint_path, self.identity, self.device)
        try:
            self.model.load_state_dict(state["model"])
            if self.ema is not None:
                self.ema.module.load_state_dict(state["ema"])
            self.optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError) as error:
            raise CheckpointError(
                f"{self.checkpoint_path} belongs to another run: its model has other parameters. "
                "Choose another folder, or remove that file to start anew."
            ) from error
        self.scaler.load_state_dict(state["scaler"])
        if self.examples is not None:
            self.examples.load_state_dict(state["examples"])
        self.position = _Position(**state["position"])
        if not self.world.is_main:  # the sums are rank 0's now
            self._clear_sums()
        _log.info("training resumed", extra={"action": "train_resume", "step": self.position.step})

    # Ends ----------------------------------------------------------------------------------------------------------

    def _stopped(self) -> StoppedError:
        self.save()
        return StoppedError(
            f"Training was stopped after step {self.position.step} of {self.num_steps}; "
            f"{self.checkpoint_path} continues it."
        )

    def _diverged(self, what: str, value: float) -> DivergedError:
        kept = (
            f"The last good checkpoint is {self.checkpoint_path}"
            if self.checkpoint_path.exists()
            else "No checkpoint was written yet"
        )
        became = f"became {value}" if not math.isfinite(value) else "stopped being a number on another process"
        return DivergedError(
            f"The {what} {became} in step {self.position.step} of {self.num_steps}. {kept}; "
            "use a lower learning rate, a warm-up or dtype fp32."
        )


class _Scheduled(nn.Module):
    """A model under another schedule than its own, for evaluation."""

    def __init__(self, model: nn.Module, changes: dict[str, Any]) -> None:
        super().__init__()
        self.model, self._changes = model, changes
        self.training = model.training

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.model(images, **self._changes)
        return logits


@contextmanager
def _quiet_random_state(device: torch.device) -> Iterator[None]:
    """Put the global generators back afterwards: the caller's random numbers are none of our business."""
    state = np.random.get_state()
    # Not those of every GPU there is: each would be woken up, and in each process.
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            np.random.set_state(state)
