"""Confidence intervals for accuracy and for the difference of two models on the same images.

Images made from one source (renderings of one digit, frames of one video) are not independent: counting them as such
makes intervals too narrow. Both functions estimate the variance from sums over clusters, turn it into an effective
number of independent images, and use a small-sample interval with that number: Wilson's for a share (as recommended
for clustered samples by Franco, Little, Louis and Slud, JSSAM 7(3), 2019), Bonett and Price's adjusted Wald interval
for a paired difference (Statistics in Medicine 31, 2012). Both stay sensible when every image is right or none differs.
"""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from prunefront.errors import ConfigError


def top1_interval(
    correct: NDArray[np.bool_], clusters: NDArray[np.int64] | None, level: float = 0.95
) -> tuple[float, float]:
    """Interval of the accuracy.

    Args:
        correct: Per image, shape (N,).
        clusters: Source of each image, shape (N,); None when every image is independent.
        level: Confidence, such as 0.95.

    Returns:
        (low, high), within 0-1 and around the observed share.

    Raises:
        ConfigError: If the shapes differ, there are no images, or ``level`` is not between 0 and 1.
    """
    values, groups, num_groups = _checked(correct, clusters, level)
    share = float(values.mean())
    size = _effective_size(values, groups, num_groups, share * (1 - share))
    z = _quantile(level, num_groups)
    center = (share + z**2 / (2 * size)) / (1 + z**2 / size)
    half = z / (1 + z**2 / size) * math.sqrt(share * (1 - share) / size + z**2 / (4 * size**2))
    return min(max(center - half, 0.0), share), max(min(center + half, 1.0), share)


def paired_interval(
    correct: NDArray[np.bool_],
    reference: NDArray[np.bool_],
    clusters: NDArray[np.int64] | None,
    level: float = 0.95,
) -> tuple[float, float, float]:
    """Interval of the difference in accuracy of two models on the same images.

    Args:
        correct: Per image, shape (N,).
        reference: The other model's (the dense model's), same images, shape (N,).
        clusters: Source of each image, shape (N,); None when every image is independent.
        level: Confidence.

    Returns:
        (difference, low, high): accuracy minus the reference's, within -1..1.

    Raises:
        ConfigError: As ``top1_interval``.
    """
    if np.shape(correct) != np.shape(reference):
        raise ConfigError(
            f"Both models must be evaluated on the same images, but got {np.shape(correct)} and {np.shape(reference)} "
            "results. Evaluate both on one split."
        )
    differences = np.asarray(correct, dtype=np.float64) - np.asarray(reference, dtype=np.float64)
    values, groups, num_groups = _checked(differences, clusters, level)
    difference = float(values.mean())
    size = _effective_size(values, groups, num_groups, float(values.var()))
    z = _quantile(level, num_groups)
    # One pseudo-image gained and one lost keep the variance above zero when no image differs.
    gained = (size * float(np.mean(values > 0)) + 1) / (size + 2)
    lost = (size * float(np.mean(values < 0)) + 1) / (size + 2)
    half = z * math.sqrt((gained + lost - (gained - lost) ** 2) / (size + 2))
    center = gained - lost
    return difference, max(min(center - half, difference), -1.0), min(max(center + half, difference), 1.0)


def _checked(
    values: NDArray[np.bool_] | NDArray[np.float64], clusters: NDArray[np.int64] | None, level: float
) -> tuple[NDArray[np.float64], NDArray[np.int64], int]:
    numbers = np.asarray(values, dtype=np.float64)
    if numbers.ndim != 1 or not len(numbers):
        raise ConfigError(f"An interval needs one result per image, but got an array of shape {numbers.shape}.")
    if not 0 < level < 1:
        raise ConfigError(f"The confidence level lies between 0 and 1, but got {level}. Use 0.95 for 95 %.")
    if clusters is None:
        return numbers, np.arange(len(numbers)), len(numbers)
    if np.shape(clusters) != numbers.shape:
        raise ConfigError(
            f"Clusters name the source of each image, but got {np.shape(clusters)} for {numbers.shape} results. "
            "Pass the clusters of the same split."
        )
    names, groups = np.unique(np.asarray(clusters), return_inverse=True)
    return numbers, groups.astype(np.int64), len(names)


def _effective_size(values: NDArray[np.float64], groups: NDArray[np.int64], num_groups: int, variance: float) -> float:
    """Return how many independent images would give the cluster-robust variance of the mean.

    Between the number of clusters' worth of one image each (renderings of a source all agree) and the number of images.
    Without any variance nothing tells how strongly images of a source agree; then they are taken to agree fully.
    """
    count = len(values)
    if num_groups < 2 or variance == 0.0:
        return float(num_groups)
    sums = np.bincount(groups, weights=values - values.mean(), minlength=num_groups)
    robust = num_groups / (num_groups - 1) * float((sums**2).sum()) / count**2
    return float(count) if robust == 0.0 else min(float(count), variance / robust)


def _quantile(level: float, num_groups: int) -> float:
    """Student's t quantile of a two-sided level with ``num_groups`` - 1 degrees of freedom.

    Closed forms for 1 and 2, beyond that Abramowitz and Stegun's expansion 26.7.5: within 1 % at 95 %.
    """
    tail = (1 + level) / 2
    freedom = max(num_groups - 1, 1)
    if freedom == 1:
        return math.tan(math.pi * (tail - 0.5))
    if freedom == 2:
        return (2 * tail - 1) / math.sqrt(2 * tail * (1 - tail))
    z = NormalDist().inv_cdf(tail)
    return (
        z
        + (z**3 + z) / (4 * freedom)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
    )
