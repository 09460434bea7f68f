"""The exceptions of training and evaluation, below ``prunefront.errors.PrunefrontError``.

PrunefrontError
├── StoppedError     the caller's ``should_stop`` said so; finished work is kept
├── ExampleError     statistics of training images that cannot be right; nothing of them was recorded
└── DivergedError    a loss or gradient that is not a number; the last good checkpoint is kept
"""

from __future__ import annotations

from prunefront.errors import PrunefrontError


class StoppedError(PrunefrontError, RuntimeError):
    """Evaluation or fine-tuning ended early because the caller asked for it."""


class ExampleError(PrunefrontError, ValueError):
    """Statistics of training images that cannot be right, such as those of an image that was not trained on."""


class DivergedError(PrunefrontError, ArithmeticError):
    """The loss or a gradient became infinite or not a number."""
