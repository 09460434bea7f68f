"""Losses of training: cross-entropy, distillation from the dense model, and what learned methods and LV-ViT add."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional


def soft_distillation(logits: Tensor, teacher_logits: Tensor, tau: float) -> Tensor:
    """KL divergence from the teacher's to the student's softened distribution, times tau^2, averaged over images.

    Hinton et al., "Distilling the Knowledge in a Neural Network" (arXiv:1503.02531): the factor keeps the gradient's
    size when tau changes.

    Args:
        logits: Student, shape (B, classes).
        teacher_logits: Teacher, shape (B, classes).
        tau: Temperature, above 0.
    """
    student = functional.log_softmax(logits.float() / tau, dim=-1)
    teacher = functional.log_softmax(teacher_logits.float() / tau, dim=-1)
    return functional.kl_div(student, teacher, reduction="batchmean", log_target=True) * tau**2


def finetuning_loss(
    logits: Tensor,
    targets: Tensor,
    teacher_logits: Tensor | None,
    *,
    alpha: float,
    tau: float,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Mix cross-entropy and distillation: ``(1 - alpha) * CE + alpha * KL``; plain CE without a teacher.

    Args:
        logits: Student, shape (B, classes).
        targets: Labels (B,), or class shares (B, classes) after mixup.
        teacher_logits: Teacher on the same images, or None.
        alpha: Weight of the distillation, 0-1.
        tau: Temperature.
        label_smoothing: Spread of hard labels; mixed targets come smoothed already.
    """
    smoothing = label_smoothing if targets.ndim == 1 else 0.0
    loss = functional.cross_entropy(logits.float(), targets, label_smoothing=smoothing)
    if teacher_logits is None:
        return loss
    return (1 - alpha) * loss + alpha * soft_distillation(logits, teacher_logits, tau)


@dataclass(frozen=True, kw_only=True)
class SelectionLoss:
    """Parts of `selection_loss`, unweighted but for ``total``; scalars."""

    total: Tensor
    classification: Tensor
    ratio: Tensor  # summed over stages
    class_distillation: Tensor
    token_distillation: Tensor


def selection_loss(
    logits: Tensor,
    tokens: Tensor,
    targets: Tensor,
    decisions: Sequence[Tensor],
    keep_ratios: Sequence[float],
    teacher_logits: Tensor,
    teacher_tokens: Tensor,
    *,
    kept: Tensor | None = None,
    classification_weight: float = 1.0,
    ratio_weight: float = 2.0,
    distillation_weight: float = 0.5,
    token_loss: Literal["mse", "kl"] = "mse",
    ratio_over: Literal["image", "batch"] = "image",
    label_smoothing: float = 0.0,
) -> SelectionLoss:
    """Loss of methods with learned selection: classification, keep ratio, distillation of class and kept tokens.

    Section 3.3 of Rao et al., "DynamicViT", NeurIPS 2021, and Section 4 of Kong et al., "SPViT", ECCV 2022, which lets
    the images of a batch share a ratio. The ratio term is averaged over the stages there are.

    Args:
        logits: Of the class token, (B, classes).
        tokens: Normalised patch tokens (B, N, C) for ``mse``, or their logits (B, N, classes) for ``kl`` (LV-ViT).
        targets: Labels (B,), or class shares (B, classes) after mixup.
        decisions: Nested decisions after each stage, (B, N) each.
        keep_ratios: Share of the initial patches to keep after each stage.
        teacher_logits: Dense model, (B, classes).
        teacher_tokens: Dense model, like ``tokens``.
        kept: Patches whose tokens are distilled, (B, N); None takes the last decision.
        classification_weight: Of the cross-entropy.
        ratio_weight: Of the squared distance from the ratios.
        distillation_weight: Of each of both distillation terms.
        token_loss: How tokens are compared.
        ratio_over: Whether each image has to meet a ratio, or their mean.
        label_smoothing: Spread of hard labels; mixed targets come smoothed already.

    Raises:
        ValueError: If there is not one ratio per stage.
    """
    if len(decisions) != len(keep_ratios):
        raise ValueError(
            f"One keep ratio per stage is needed, but got {len(keep_ratios)} for {len(decisions)} stages. "
            "Pass as many ratios as the model has sites."
        )
    smoothing = label_smoothing if targets.ndim == 1 else 0.0
    classification = functional.cross_entropy(logits.float(), targets, label_smoothing=smoothing)
    ratio = logits.new_zeros((), dtype=torch.float32)
    for decision, keep_ratio in zip(decisions, keep_ratios, strict=True):
        share = decision.float().mean(dim=1) if ratio_over == "image" else decision.float().mean()
        ratio = ratio + (share - keep_ratio).square().mean()
    last = (decisions[-1] if kept is None else kept).detach() > 0.5
    token_distillation = logits.new_zeros((), dtype=torch.float32)
    if bool(last.any()):
        student, teacher = tokens.float()[last], teacher_tokens.float()[last]
        token_distillation = (
            functional.mse_loss(student, teacher) if token_loss == "mse" else soft_distillation(student, teacher, 1.0)
        )
    class_distillation = soft_distillation(logits, teacher_logits, 1.0)
    return SelectionLoss(
        total=classification_weight * classification
        + ratio_weight * ratio / len(keep_ratios)
        + distillation_weight * (class_distillation + token_distillation),
        classification=classification,
        ratio=ratio,
        class_distillation=class_distillation,
        token_distillation=token_distillation,
    )


@dataclass(frozen=True, kw_only=True)
class TokenLabelLoss:
    """Parts of `token_label_loss`, unweighted but for ``total``; scalars."""

    total: Tensor
    classification: Tensor
    tokens: Tensor


def token_label_loss(
    logits: Tensor,
    token_logits: Tensor,
    targets: Tensor,
    *,
    kept: Tensor | None = None,
    mixed_box: tuple[int, int, int, int] = (0, 0, 0, 0),
    class_weight: float = 1.0,
    token_weight: float = 1.0,
    uses_ground_truth: bool = False,
) -> TokenLabelLoss:
    """Cross-entropy of the class token and of every patch token against labels of its own.

    Section 3.2 of Jiang et al., "All Tokens Matter", NeurIPS 2021 (arXiv:2104.10858); code constants where the paper
    leaves them open.

    Args:
        logits: Of the class token, (B, classes).
        token_logits: Of the patches, (B, N, classes), MixToken already undone.
        targets: (B, classes, 2 + N): ground truth, soft label of the image, one per token; or (B, classes), the same
            label for the image and all its tokens.
        kept: Patches that are left and take part, (B, N); None for all.
        mixed_box: Rows and columns (top, left, bottom, right) that MixToken took from the flipped batch.
        class_weight: Of the class token.
        token_weight: Of the patches' mean.
        uses_ground_truth: Mix the ground truth into the image's soft label: half of it where both name one class, else
            a tenth. Token labels stay, as in the official code.
    """
    num_tokens = token_logits.shape[1]
    if targets.ndim == 2:
        image_target = targets
        token_targets = targets.unsqueeze(1).expand(-1, num_tokens, -1)
        ground_truth = None
    else:
        ground_truth = targets[:, :, 0]
        image_target = targets[:, :, 1]
        token_targets = targets[:, :, 2:].transpose(1, 2)
    if uses_ground_truth and ground_truth is not None:
        image_target = _corrected(image_target, ground_truth)
    top, left, bottom, right = mixed_box
    own = 1.0 - (bottom - top) * (right - left) / num_tokens
    if own < 1.0:
        image_target = own * image_target + (1.0 - own) * image_target.flip(0)
    classification = functional.cross_entropy(logits.float(), image_target)
    # A weight of 0 leaves the tokens in the graph: several processes wait for the gradient of every parameter.
    per_token = functional.cross_entropy(
        token_logits.float().flatten(0, 1), token_targets.flatten(0, 1), reduction="none"
    )
    taking_part = torch.ones_like(per_token) if kept is None else kept.flatten().to(per_token.dtype)
    tokens = (per_token * taking_part).sum() / taking_part.sum().clamp(min=1.0)
    return TokenLabelLoss(
        total=class_weight * classification + token_weight * tokens, classification=classification, tokens=tokens
    )


def _corrected(soft: Tensor, ground_truth: Tensor) -> Tensor:
    """Soft labels (B, classes) with the ground truth mixed in."""
    agrees = soft.argmax(dim=-1, keepdim=True) == ground_truth.argmax(dim=-1, keepdim=True)
    share = torch.where(agrees, 0.5, 0.9)
    return soft * share + ground_truth * (1.0 - share)
