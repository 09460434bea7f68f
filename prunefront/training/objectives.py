"""What a training minimises. An objective is one class and one line of ``OBJECTIVES``; a recipe names it.

An objective owns the forward pass, since methods differ in what they need of it: decisions, tokens, a teacher's tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from prunefront.config import PruneConfig
from prunefront.errors import ConfigError, UnknownNameError
from prunefront.schedule import plan_schedule
from prunefront.training.losses import finetuning_loss, selection_loss
from prunefront.training.rates import rates_loss
from prunefront.training.recipes import PruningLoss, RateTarget, Recipe


@dataclass(frozen=True, kw_only=True)
class Loss:
    """The loss of one batch.

    Attributes:
        total: What is minimised, a scalar with its graph.
        logits: The model's, (B, classes), for the training accuracy.
        parts: Scalars to log beside the total, such as ``ratio``; their means stand in the log of each epoch.
        class_attention: The model's (see `Aux`), (B, patches), where the recipe scores images by it.
    """

    total: Tensor
    logits: Tensor
    parts: Mapping[str, Tensor] = field(default_factory=dict)
    class_attention: Tensor | None = None


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
        """Read label smoothing, distillation and whether images are scored by class attention from the recipe."""
        self._distillation, self._label_smoothing = recipe.distillation, recipe.label_smoothing
        self._keeps_attention = recipe.examples is not None and recipe.examples.scores_attention
        self.needs_teacher = recipe.distillation is not None

    def forward(
        self, model: nn.Module, teacher: nn.Module | None, images: Tensor, **options: Any
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        class_attention = None
        if self._keeps_attention:
            logits, aux = model(images, return_aux=True, **options)
            class_attention = aux.class_attention
        else:
            logits = model(images, **options)
        if teacher is None:
            return logits, None, class_attention
        with torch.no_grad():
            return logits, teacher(images), class_attention

    def loss(self, outputs: tuple[Tensor, Tensor | None, Tensor | None], targets: Tensor) -> Loss:
        logits, teacher_logits, class_attention = outputs
        total = finetuning_loss(
            logits,
            targets,
            teacher_logits,
            alpha=self._distillation.alpha if self._distillation else 0.0,
            tau=self._distillation.tau if self._distillation else 1.0,
            label_smoothing=self._label_smoothing,
        )
        return Loss(total=total, logits=logits, class_attention=class_attention)


@dataclass(frozen=True, kw_only=True)
class _Selected:
    """What `PruningDistillation` keeps of a forward pass."""

    logits: Tensor  # the model's, for the training accuracy
    class_logits: Tensor
    tokens: Tensor  # or the tokens' logits
    decisions: list[Tensor]
    teacher_logits: Tensor
    teacher_tokens: Tensor
    has_token_logits: bool


class PruningDistillation:
    """The loss of DynamicViT and SPViT: see `losses.selection_loss`."""

    needs_teacher = True

    def __init__(self, recipe: Recipe, config: PruneConfig | None = None) -> None:
        """Read weights from the recipe and keep ratios from the config.

        Raises:
            ConfigError: If the config has no site that selects.
        """
        if config is None or not config.sites or any(site.op != "select" for site in config.sites):
            raise ConfigError(
                "The objective 'pruning-distillation' trains learned selection, but the config has no 'select' site. "
                "Use a dynamicvit or spvit config, or the objective 'classification'."
            )
        self._weights, self._label_smoothing = recipe.pruning or PruningLoss(), recipe.label_smoothing
        schedule = plan_schedule(config)
        initial = schedule.blocks[0].tokens_entering - schedule.num_prefix_tokens
        self._keep_ratios = [
            site.cumulative_keep_ratio if site.cumulative_keep_ratio is not None else step.kept / initial
            for site, step in zip(
                config.sites, (step for block in schedule.blocks for step in block.steps), strict=True
            )
        ]

    def forward(self, model: nn.Module, teacher: nn.Module | None, images: Tensor, **options: Any) -> _Selected:
        """Run the model with masks instead of removal, and the dense teacher for its logits and tokens.

        Raises:
            ConfigError: If there is no teacher, or the model runs in eval mode, where decisions have no gradient.
        """
        if teacher is None:
            raise ConfigError("The objective 'pruning-distillation' needs the dense model as its teacher. Name one.")
        if not model.training:
            raise ConfigError("The objective 'pruning-distillation' needs eval_mode=false: selection learns by masks.")
        logits, aux = model(images, return_aux=True, **options)
        with torch.no_grad():
            teacher_features = teacher.forward_features(images)  # type: ignore[operator]
        prefix = aux.tokens.shape[1] - aux.num_packages - aux.decisions[0].shape[1]
        if aux.token_logits is None:
            tokens = aux.tokens[:, prefix : aux.tokens.shape[1] - aux.num_packages]
            with torch.no_grad():
                teacher_logits = teacher.forward_head(teacher_features)  # type: ignore[operator]
            teacher_tokens = teacher_features[:, prefix:]
        else:
            with torch.no_grad():
                heads = teacher.classify(teacher_features)  # type: ignore[operator]
            tokens, teacher_logits, teacher_tokens = aux.token_logits, heads.class_logits, heads.token_logits
        return _Selected(
            logits=logits,
            class_logits=aux.class_logits,
            tokens=tokens,
            decisions=aux.decisions,
            teacher_logits=teacher_logits,
            teacher_tokens=teacher_tokens,
            has_token_logits=aux.token_logits is not None,
        )

    def loss(self, outputs: _Selected, targets: Tensor) -> Loss:
        """Classification, ratio and distillation; the parts stand in the log unweighted."""
        parts = selection_loss(
            outputs.class_logits,
            outputs.tokens,
            targets,
            outputs.decisions,
            self._keep_ratios,
            outputs.teacher_logits,
            outputs.teacher_tokens,
            classification_weight=self._weights.classification_weight,
            ratio_weight=self._weights.ratio_weight,
            distillation_weight=self._weights.distillation_weight,
            token_loss="kl" if outputs.has_token_logits else "mse",
            ratio_over=self._weights.ratio_over,
            label_smoothing=self._label_smoothing,
        )
        kept = {f"kept_{stage}": decision.detach().mean() for stage, decision in enumerate(outputs.decisions)}
        return Loss(
            total=parts.total,
            logits=outputs.logits,
            parts={
                "classification": parts.classification,
                "ratio": parts.ratio,
                "class_distillation": parts.class_distillation,
                "token_distillation": parts.token_distillation,
                **kept,
            },
        )


class LearnedCounts:
    """DiffRate's: classification, and the distance of the counts' cost from its target; see `rates.rates_loss`."""

    needs_teacher = False

    def __init__(self, recipe: Recipe, config: object = None) -> None:
        """Read the target from the recipe."""
        self._target, self._label_smoothing = recipe.rates or RateTarget(), recipe.label_smoothing

    def forward(
        self, model: nn.Module, teacher: nn.Module | None, images: Tensor, **options: Any
    ) -> tuple[Tensor, Tensor]:
        logits, cost = model(images)
        return logits, cost

    def loss(self, outputs: tuple[Tensor, Tensor], targets: Tensor) -> Loss:
        logits, cost = outputs
        total = rates_loss(logits, targets, cost, self._target.cost_share, self._target.weight, self._label_smoothing)
        return Loss(total=total, logits=logits, parts={"cost_share": cost.detach()})


# Name in a recipe -> how to build it from (recipe, config of the model or None for a dense one).
OBJECTIVES: dict[str, Callable[[Recipe, Any], Objective]] = {
    "classification": Classification,
    "pruning-distillation": PruningDistillation,
    "kept-counts": LearnedCounts,
}


def build_objective(recipe: Recipe, model: nn.Module) -> Objective:
    """Build the objective that a recipe names.

    Raises:
        UnknownNameError: If nobody registered it.
    """
    if recipe.objective not in OBJECTIVES:
        raise UnknownNameError.of("objective", recipe.objective, OBJECTIVES)
    return OBJECTIVES[recipe.objective](recipe, getattr(model, "prune_config", None))
