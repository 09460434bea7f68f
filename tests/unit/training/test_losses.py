"""Distillation against the definition."""

import math

import pytest
import torch

from prunefront.training.losses import finetuning_loss, soft_distillation


def test_soft_distillation_is_the_divergence_times_the_squared_temperature():
    # Two classes, logit difference d: probability 1 / (1 + exp(-d / tau)).
    student, teacher, tau = torch.tensor([[1.0, 0.0]]), torch.tensor([[3.0, 0.0]]), 2.0
    p, q = 1 / (1 + math.exp(-1.5)), 1 / (1 + math.exp(-0.5))
    expected = tau**2 * (p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q)))

    assert soft_distillation(student, teacher, tau).item() == pytest.approx(expected, rel=1e-5)


def test_a_student_equal_to_its_teacher_has_no_distillation_loss():
    logits = torch.randn(4, 10)

    assert soft_distillation(logits, logits, 3.0).item() == pytest.approx(0, abs=1e-6)


def test_alpha_mixes_cross_entropy_and_distillation():
    logits, teacher, labels = torch.randn(4, 10), torch.randn(4, 10), torch.tensor([1, 2, 3, 4])
    hard = torch.nn.functional.cross_entropy(logits, labels)
    soft = soft_distillation(logits, teacher, 1.0)

    mixed = finetuning_loss(logits, labels, teacher, alpha=0.25, tau=1.0)

    assert mixed.item() == pytest.approx(0.75 * hard.item() + 0.25 * soft.item(), rel=1e-5)
    assert finetuning_loss(logits, labels, None, alpha=0.25, tau=1.0).item() == pytest.approx(hard.item())


def test_mixed_targets_are_not_smoothed_again():
    logits = torch.randn(4, 10)
    targets = torch.softmax(torch.randn(4, 10), dim=1)

    with_smoothing = finetuning_loss(logits, targets, None, alpha=0.0, tau=1.0, label_smoothing=0.1)

    assert with_smoothing.item() == pytest.approx(-(targets * logits.log_softmax(1)).sum(1).mean().item(), rel=1e-5)
