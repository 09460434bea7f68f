"""What a training minimises. An objective is one class and one line of ``OBJECTIVES``; a recipe names it.

An objective owns the forward pass, since methods differ in what they need of it: decisions, tokens, a teacher's tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from prunefront.backbones.heads import Heads
from prunefront.backbones.lvvit import ConvStem, LVViT
from prunefront.config import PruneConfig
from prunefront.errors import ConfigError, UnknownNameError
from prunefront.registry import get_method
from prunefront.training.losses import finetuning_loss, selection_loss, token_label_loss
from prunefront.training.mix_token import NO_BOX, Box, draw_box, mixed_tokens, on_grid, swap_box
from prunefront.training.rates import rates_loss
from prunefront.training.recipes import PruningLoss, RateTarget, Recipe, TokenLabels
from prunefront.training.schedules import cumulative_keep_ratios


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
            options: To be passed on to ``model``: ``schedule`` while keep ratios come down or selectors are left out.

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
    decisions: dict[int, Tensor]  # by the number of the site in the config
    keep_ratios: tuple[float, ...]  # their targets
    teacher_logits: Tensor
    teacher_tokens: Tensor
    has_token_logits: bool


class PruningDistillation:
    """The loss of DynamicViT and SPViT: see `losses.selection_loss`."""

    needs_teacher = True

    def __init__(self, recipe: Recipe, config: PruneConfig | None = None) -> None:
        """Read weights from the recipe, and from the config the sites whose keep ratios are aimed at.

        Raises:
            ConfigError: If the config has no site that selects.
        """
        if config is None or not config.sites or any(site.op != "select" for site in config.sites):
            raise ConfigError(
                "The objective 'pruning-distillation' trains learned selection, but the config has no 'select' site. "
                "Use a dynamicvit or spvit config, or the objective 'classification'."
            )
        self._weights, self._label_smoothing = recipe.pruning or PruningLoss(), recipe.label_smoothing
        self._config = config
        self._stages = {site.block: stage for stage, site in enumerate(config.sites)}

    def forward(self, model: nn.Module, teacher: nn.Module | None, images: Tensor, **options: Any) -> _Selected:
        """Run the model with masks instead of removal, and the dense teacher for its logits and tokens.

        Raises:
            ConfigError: If there is no teacher, or the model runs in eval mode, where decisions have no gradient.
        """
        if teacher is None:
            raise ConfigError("The objective 'pruning-distillation' needs the dense model as its teacher. Name one.")
        if not model.training:
            raise ConfigError("The objective 'pruning-distillation' needs eval_mode=false: selection learns by masks.")
        active = self._config
        if "schedule" in options:
            active = active.evolve(sites=options["schedule"])
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
            decisions={self._stages[site.block]: kept for site, kept in zip(active.sites, aux.decisions, strict=True)},
            keep_ratios=cumulative_keep_ratios(active),
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
            list(outputs.decisions.values()),
            outputs.keep_ratios,
            outputs.teacher_logits,
            outputs.teacher_tokens,
            classification_weight=self._weights.classification_weight,
            ratio_weight=self._weights.ratio_weight,
            distillation_weight=self._weights.distillation_weight,
            token_loss="kl" if outputs.has_token_logits else "mse",
            ratio_over=self._weights.ratio_over,
            label_smoothing=self._label_smoothing,
        )
        kept = {f"kept_{stage}": decision.detach().mean() for stage, decision in outputs.decisions.items()}
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


@dataclass(frozen=True, kw_only=True)
class _Labelled:
    """What `TokenLabelling` keeps of a forward pass; N are all initial patches."""

    logits: Tensor  # the model's, for the training accuracy
    class_logits: Tensor
    token_logits: Tensor  # (B, N, classes), swapped back
    kept: Tensor  # patches that are left, (B, N), swapped back
    box: Box
    teacher: Heads | None


class TokenLabelling:
    """LV-ViT's: every token has a label of its own, and images swap tokens; see `losses.token_label_loss`."""

    def __init__(self, recipe: Recipe, config: PruneConfig | None = None) -> None:
        """Read weights, labels and mixing from the recipe.

        Raises:
            ConfigError: If the model has no config or a method that learns by masks, or images are mixed already.
        """
        self._settings, self._label_smoothing = recipe.token_labels or TokenLabels(), recipe.label_smoothing
        self.needs_teacher = self._settings.source == "teacher"
        if config is None:
            raise ConfigError(
                "The objective 'token-labels' trains the model of a config. Use prunefront.compress with a config, "
                "which needs no sites."
            )
        if get_method(config.method).masks_in_training:
            raise ConfigError(
                f"The objective 'token-labels' trains no predictors, but {config.method} learns its selection. Use the "
                f"recipe {config.method}, or a config of a method without learned parts."
            )
        if self._settings.mix_alpha and (recipe.mixup or recipe.cutmix):
            raise ConfigError(
                f"MixToken replaces mixup and cutmix, but the recipe has mixup={recipe.mixup:g} and "
                f"cutmix={recipe.cutmix:g}. Set both to 0, or token_labels.mix_alpha=0."
            )

    def forward(self, model: nn.Module, teacher: nn.Module | None, images: Tensor, **options: Any) -> _Labelled:
        """Run the model on mixed tokens, and the teacher on the images as they are.

        Raises:
            ConfigError: If the model has no token classifier, or the teacher has none for the same patches.
        """
        stem = next((module for module in model.modules() if isinstance(module, ConvStem)), None)
        if stem is None:
            raise ConfigError(
                "The objective 'token-labels' trains a classifier on every token, which only LV-ViT has. Use a config "
                "of lvvit_t, lvvit_s, lvvit_m or lvvit_l, or the objective 'classification'."
            )
        grid = stem.dynamic_feat_size((images.shape[-2], images.shape[-1]))
        box = NO_BOX
        if model.training and self._settings.mix_alpha:
            # The loop seeds torch for each batch and process, so a resumed run draws the boxes of a whole one.
            seed = int(torch.randint(2**63 - 1, ()))
            box = draw_box(grid, self._settings.mix_alpha, np.random.default_rng(seed))
        with mixed_tokens(stem, box):
            logits, aux = model(images, return_aux=True, **options)
        token_logits, kept = on_grid(aux.token_logits, aux.token_places, grid)
        return _Labelled(
            logits=logits,
            class_logits=aux.class_logits,
            token_logits=swap_box(token_logits, box).flatten(1, 2),
            kept=swap_box(kept, box).flatten(1, 2),
            box=box,
            teacher=self._ask(teacher, images, grid) if self.needs_teacher else None,
        )

    def _ask(self, teacher: nn.Module | None, images: Tensor, grid: tuple[int, int]) -> Heads:
        if not isinstance(teacher, LVViT):
            got = "none was named" if teacher is None else f"got {type(teacher).__name__}"
            raise ConfigError(
                f"Token labels come from a teacher that classifies every token, an LV-ViT, but {got}. Name one, or set "
                "token_labels.source=image."
            )
        with torch.no_grad():
            heads = teacher.classify(teacher.forward_features(images))
        assert heads.token_logits is not None
        if heads.token_logits.shape[1] != grid[0] * grid[1]:
            raise ConfigError(
                f"The teacher has {heads.token_logits.shape[1]} tokens for the model's {grid[0]} x {grid[1]} patches. "
                "Use a dense teacher with the model's patch size."
            )
        return heads

    def loss(self, outputs: _Labelled, targets: Tensor) -> Loss:
        """Cross-entropy of the class token and, on average, of the tokens that are left; the log has both parts."""
        if targets.ndim == 1:
            num_classes, smoothing = outputs.class_logits.shape[1], self._label_smoothing
            targets = functional.one_hot(targets, num_classes) * (1.0 - smoothing) + smoothing / num_classes
        if outputs.teacher is not None:
            assert outputs.teacher.token_logits is not None
            of_image = outputs.teacher.logits.float().softmax(dim=1)
            of_tokens = outputs.teacher.token_logits.float().softmax(dim=2)
            targets = torch.cat((torch.stack((targets, of_image), dim=2), of_tokens.transpose(1, 2)), dim=2)
        parts = token_label_loss(
            outputs.class_logits,
            outputs.token_logits,
            targets,
            kept=outputs.kept,
            mixed_box=outputs.box,
            class_weight=self._settings.class_weight,
            token_weight=self._settings.token_weight,
            uses_ground_truth=self._settings.uses_ground_truth,
        )
        return Loss(
            total=parts.total,
            logits=outputs.logits,
            parts={"classification": parts.classification, "tokens": parts.tokens},
        )


# Name in a recipe -> how to build it from (recipe, config of the model or None for a dense one).
OBJECTIVES: dict[str, Callable[[Recipe, Any], Objective]] = {
    "classification": Classification,
    "pruning-distillation": PruningDistillation,
    "kept-counts": LearnedCounts,
    "token-labels": TokenLabelling,
}


def build_objective(recipe: Recipe, model: nn.Module) -> Objective:
    """Build the objective that a recipe names.

    Raises:
        UnknownNameError: If nobody registered it.
    """
    if recipe.objective not in OBJECTIVES:
        raise UnknownNameError.of("objective", recipe.objective, OBJECTIVES)
    return OBJECTIVES[recipe.objective](recipe, getattr(model, "prune_config", None))
