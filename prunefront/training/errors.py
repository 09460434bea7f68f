"""The exceptions of training and evaluation, below ``prunefront.errors.PrunefrontError``.

PrunefrontError
├── StoppedError     the caller's ``should_stop`` said so; finished work is kept
└── DivergedError    a loss or gradient that is not a number; the last good checkpoint is kept
"""

from __future__ import annotations

from prunefront.errors import PrunefrontError


class StoppedError(PrunefrontError, RuntimeError):
    """Evaluation or fine-tuning ended early because the caller asked for it."""


class DivergedError(PrunefrontError, ArithmeticError):
    """The loss or a gradient became infinite or not a number."""
