"""The correction of a table: what whole models cost beyond the sum of their separately timed parts.

Caches, allocator and interpreter make a whole model a little faster or slower than its parts. A few whole models are
measured and one factor per part and a constant are fitted to their *relative* errors, drawn towards 1 and 0 so that
noise in ten measurements cannot twist a table.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from latency_tables.predict import PARTS, corrected_ms
from latency_tables.schema import Correction

logger = logging.getLogger(__name__)

# How far, as a standard deviation, each factor may reasonably be from 1. Stem and head run once: little to learn.
FACTOR_SPREAD = {"attention": 0.15, "mlp": 0.15, "reduction": 0.6, "rest": 0.1}
INTERCEPT_SPREAD = 0.02  # Of the slowest model.
LEAST_NOISE = 0.01  # No measurement of a whole model is trusted further, relative.
FACTOR_RANGE = (0.2, 5.0)
CONTRADICTED = 0.05  # Mean error on the models themselves beyond which something went wrong while they were measured.
IMPLAUSIBLE = 4.0  # Spreads from where it is expected: then the machine was not the same for parts and whole models.


@dataclass(frozen=True, kw_only=True)
class WholeModel:
    """A measured whole model and its uncorrected part sums, in ms."""

    part_sums: Mapping[str, float]
    measured_ms: float
    relative_iqr: float = 0.0


def fit_correction(models: Sequence[WholeModel]) -> Correction:
    """Ridge regression of relative errors; the identity without models.

    Args:
        models: Measured whole models; ten of different cost and method are plenty.
    """
    if not models:
        return Correction()
    measured = np.array([model.measured_ms for model in models])
    parts = np.array([[model.part_sums[part] for part in PARTS] for model in models])
    scale = float(measured.max())
    # Unknowns: the intercept over `scale`, and every factor minus one.
    noise = np.maximum([model.relative_iqr for model in models], LEAST_NOISE) * measured
    design = np.column_stack([np.full(len(models), scale), parts]) / noise[:, None]
    target = (measured - parts.sum(axis=1)) / noise
    spreads = np.array([INTERCEPT_SPREAD, *(FACTOR_SPREAD[part] for part in PARTS)])
    solution = np.linalg.lstsq(
        np.vstack([design, np.diag(1.0 / spreads)]), np.concatenate([target, np.zeros(len(spreads))]), rcond=None
    )[0]
    before = float(np.mean(np.abs(parts.sum(axis=1) / measured - 1.0)))
    factors = {
        part: float(np.clip(1.0 + delta, *FACTOR_RANGE)) for part, delta in zip(PARTS, solution[1:], strict=True)
    }
    intercept_ms = float(solution[0]) * scale
    fitted = np.array([corrected_ms(model.part_sums, intercept_ms, factors) for model in models])
    after = float(np.mean(np.abs(fitted / measured - 1.0)))
    # Measurements so noisy that the fit, or keeping it within its range, makes things worse teach nothing.
    helps = after <= before and not np.any(np.abs(solution) > IMPLAUSIBLE * spreads)
    if (after if helps else before) > CONTRADICTED:
        logger.warning(
            "Whole models and their parts do not fit together (%.0f%% apart%s). Build the table again on a quieter "
            "machine",
            100 * (after if helps else before), "" if helps else "; the table goes without a correction",
            extra={"action": "fit_correction", "solution": solution.tolist()},
        )  # fmt: skip
    if not helps:
        return Correction(num_models=len(models), mape_before=before, mape_after=before)
    return Correction(
        intercept_ms=intercept_ms, factors=factors, num_models=len(models), mape_before=before, mape_after=after
    )
