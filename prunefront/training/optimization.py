"""Optimizer, learning-rate schedule and parameter groups of a recipe, built from timm."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from timm.layers import DropPath
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import nn

from prunefront.checkpoints import PREDICTORS
from prunefront.errors import ConfigError
from prunefront.training.recipes import Recipe


def parameter_groups(model: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    """Sort the trainable parameters by rate and decay.

    Args:
        model: The model to train; the parameters of its predictors begin with ``score_predictor.``.
        recipe: Says which parts decay and how fast the backbone learns.

    Returns:
        Groups for a torch optimizer. ``lr_scale`` is what timm's schedulers multiply the group's rate by;
        ``is_backbone`` tells ``set_rates`` what the frozen epochs hold still.
    """
    no_decay_names = cast(Callable[[], Any], getattr(model, "no_weight_decay", set))()
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        is_predictor = name.startswith(f"{PREDICTORS}.")
        is_exempt = parameter.ndim <= 1 or name.endswith(".bias") or name in no_decay_names
        decays = not is_exempt or (is_predictor and recipe.predictor_decays_all)
        groups.setdefault((is_predictor, decays), []).append(parameter)
    scale = recipe.backbone_lr_factor if recipe.backbone_lr_rule == "scaled" else 1.0
    return [
        {
            "params": parameters,
            "weight_decay": recipe.weight_decay if decays else 0.0,
            "lr_scale": 1.0 if is_predictor else scale,
            "is_backbone": not is_predictor,
        }
        for (is_predictor, decays), parameters in groups.items()
    ]


class Optimization:
    """The optimizer of a run and the rates it uses, a pure function of the step.

    Attributes:
        optimizer: timm's.
    """

    def __init__(self, model: nn.Module, recipe: Recipe, *, epochs: int, steps_per_epoch: int, world_size: int) -> None:
        """Build both.

        Args:
            model: The model to train, on its device, frozen parameters marked.
            recipe: How.
            epochs: Length of the training.
            steps_per_epoch: Optimizer steps of one epoch.
            world_size: Processes that train together; they share the step's images.

        Raises:
            ConfigError: If there is nothing to train, or timm does not know the optimizer.
        """
        scale = recipe.lr_scale(world_size)
        self._recipe, self._steps_per_epoch, self._peak = recipe, steps_per_epoch, recipe.lr * scale
        groups = parameter_groups(model, recipe)
        if not any(not group["is_backbone"] for group in groups) and recipe.frozen_epochs >= epochs:
            raise ConfigError(
                f"frozen_epochs={recipe.frozen_epochs} holds the whole model still for all {epochs} epochs, since it "
                "has no predictors; set frozen_epochs=0."
            )
        try:
            self.optimizer: torch.optim.Optimizer = create_optimizer_v2(groups, opt=recipe.optimizer, lr=self._peak)
        except (ValueError, AssertionError, RuntimeError) as error:
            raise ConfigError(
                f"timm cannot build the optimizer {recipe.optimizer!r} ({' '.join(str(error).split())}); "
                "choose another, such as adamw, sgd or lamb."
            ) from error
        floor_scale = scale if recipe.scale_min_lr else 1.0
        min_lr = self._peak * recipe.min_lr_share if recipe.min_lr is None else recipe.min_lr * floor_scale
        warmup_lr = min_lr if recipe.warmup_lr is None else recipe.warmup_lr * floor_scale
        num_epochs: float = epochs
        if recipe.warmup_prefix:
            num_epochs = max(epochs - recipe.warmup_epochs, 1 / steps_per_epoch if recipe.lr_steps == "step" else 1)
        # An epoch may be one step; timm would warn that its cosine then does nothing.
        self._scheduler, _ = create_scheduler_v2(
            self.optimizer,
            sched="cosine",
            num_epochs=num_epochs,
            min_lr=min_lr,
            warmup_lr=warmup_lr,
            warmup_epochs=recipe.warmup_epochs,
            warmup_prefix=recipe.warmup_prefix,
            step_on_epochs=recipe.lr_steps == "epoch",
            updates_per_epoch=steps_per_epoch,
        )

    def set_rates(self, step: int) -> None:
        """Set the rates of the step with that number, from 0.

        timm's scripts step an epoch-wise schedule after the epoch, so that the second epoch repeats the first one's
        rate; here epoch e trains with the rate of e.
        """
        epoch = step // self._steps_per_epoch
        if self._recipe.lr_steps == "epoch":
            self._scheduler.step(epoch)
        else:
            self._scheduler.step_update(step)
        for group in self.optimizer.param_groups:
            if not group["is_backbone"]:
                continue
            if epoch < self._recipe.frozen_epochs:
                # As in the official code: gradients are taken and moments kept, but nothing moves.
                group["lr"] = 0.0
            elif self._recipe.backbone_lr_rule == "capped":
                group["lr"] = min(group["lr"], self._recipe.backbone_lr_factor * self._peak)

    @property
    def lr(self) -> float:
        """The highest rate of the present step."""
        return max(float(group["lr"]) for group in self.optimizer.param_groups)


@contextmanager
def held_still(model: nn.Module, names: tuple[str, ...]) -> Iterator[None]:
    """Take gradients of none of the parameters of these names while the block runs.

    Raises:
        ConfigError: If the model has nothing else.
    """
    held = [
        parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and any(name == known or name.startswith(f"{known}.") for known in names)
    ]
    for parameter in held:
        parameter.requires_grad_(False)
    try:
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise ConfigError(
                f"frozen_parameters={list(names)} leaves nothing to train. Name fewer parameters, or none."
            )
        yield
    finally:
        for parameter in held:
            parameter.requires_grad_(True)


def set_drop_path(model: nn.Module, rate: float) -> None:
    """Set stochastic depth: 0 in the first block, ``rate`` in the last, linear between, as DeiT and Swin do.

    Args:
        model: A timm transformer; a model without residual blocks is left as it is.
        rate: Chance of the last block to be skipped, for one image.
    """
    blocks = [
        (module, names)
        for module in model.modules()
        if (names := [name for name in ("drop_path", "drop_path1", "drop_path2") if hasattr(module, name)])
    ]
    for place, (block, names) in enumerate(blocks):
        chance = rate * place / max(len(blocks) - 1, 1)
        for name in names:
            setattr(block, name, DropPath(chance) if chance else nn.Identity())
