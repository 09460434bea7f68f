"""What a training minimises. An objective is one class and one line of ``OBJECTIVES``; a recipe names it.

An objective owns the forward pass, since methods differ in what they need of it: decisions, tokens, a teacher's tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from prunefront.errors import UnknownNameError
from prunefront.training.losses import finetuning_loss
from prunefront.training.recipes import Recipe


@dataclass(frozen=True, kw_only=True)
class Loss:
    """The loss of one batch.

    Attributes:
        total: What is minimised, a scalar with its graph.
        logits: The model's, (B, classes), for the training accuracy.
        parts: Scalars to log beside the total, such as ``ratio``; their means stand in the log of each epoch.
    """

    total: Tensor
    logits: Tensor
    parts: Mapping[str, Tensor] = field(default_factory=dict)


class Objective(Protocol):
    """What the loop asks of an objective.

    The loop calls ``forward`` under autocast and ``loss`` outside of it, in float32 arithmetic.
    """

    needs_teacher: bool

    def forward(self, model: nn.Module, teacher: nn.Module | None, images: Tensor, **options: Any) -> Any:
        """Run the model, and the teacher if there is one.

        Args:
            model: In train mode, unless the recipe says otherwise; may be wrapped for several processes, so only call
                it.
            teacher: Dense, in eval mode; gradients through it are switched off here.
            images: (B, C, H, W).
            options: To be passed on to ``model``: ``schedule`` while keep ratios come down.

        Returns:
            Whatever ``loss`` needs.
        """
        ...

    def loss(self, outputs: Any, targets: Tensor) -> Loss:
        """The loss of what ``forward`` returned; targets are labels (B,) or, after mixup, class shares (B, classes)."""
        ...


class Classification:
    """Cross-entropy on the logits and, with a teacher, soft distillation."""

    def __init__(self, recipe: Recipe, config: object = None) -> None:
        """Read label smoothing and distillation from the recipe."""
        self._distillation, self._label_smoothing = recipe.distillation, recipe.label_smoothing
        self.needs_teacher = recipe.distillation is not None

    def forward(
        self, model: nn.Module, teacher: nn.Module | None, images: Tensor, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        logits = model(images, **options)
        if teacher is None:
            return logits, None
        with torch.no_grad():
            return logits, teacher(images)

    def loss(self, outputs: tuple[Tensor, Tensor | None], targets: Tensor) -> Loss:
        logits, teacher_logits = outputs
        total = finetuning_loss(
            logits,
            targets,
            teacher_logits,
            alpha=self._distillation.alpha if self._distillation else 0.0,
            tau=self._distillation.tau if self._distillation else 1.0,
            label_smoothing=self._label_smoothing,
        )
        return Loss(total=total, logits=logits)


# Name in a recipe -> how to build it from (recipe, config of the model or None for a dense one).
OBJECTIVES: dict[str, Callable[[Recipe, Any], Objective]] = {
    "classification": Classification,
}


def build_objective(recipe: Recipe, model: nn.Module) -> Objective:
    """Build the objective that a recipe names.

    Raises:
        UnknownNameError: If nobody registered it.
    """
    if recipe.objective not in OBJECTIVES:
        raise UnknownNameError.of("objective", recipe.objective, OBJECTIVES)
    return OBJECTIVES[recipe.objective](recipe, getattr(model, "prune_config", None))
