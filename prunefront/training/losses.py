"""Losses of fine-tuning: cross-entropy on hard or mixed labels, and soft distillation from the dense model."""

from __future__ import annotations

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
