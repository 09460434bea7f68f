"""Intervals against hand computation, known formulas and simulation."""

import math

import numpy as np
import pytest

from prunefront.errors import ConfigError
from prunefront.training.statistics import paired_interval, top1_interval

Z = 1.959963985


def test_without_clusters_the_interval_is_wilsons():
    # 45 of 50: Wilson's textbook interval with z = t(49) = 2.00958.
    correct = np.arange(50) < 45
    t, n, p = 2.009575, 50, 0.9
    center = (p + t**2 / (2 * n)) / (1 + t**2 / n)
    # The robust variance has n - 1 below, so it counts as 49 independent images.
    n = 49
    center = (p + t**2 / (2 * n)) / (1 + t**2 / n)
    half = t / (1 + t**2 / n) * math.sqrt(p * (1 - p) / n + t**2 / (4 * n**2))

    assert top1_interval(correct, None) == pytest.approx((center - half, center + half), abs=1e-6)


def test_clusters_that_always_agree_count_once():
    one_each = np.arange(40) % 5 > 0
    repeated = np.repeat(one_each, 7)

    assert top1_interval(repeated, np.repeat(np.arange(40), 7)) == pytest.approx(
        top1_interval(one_each, None), abs=1e-9
    )


def test_the_robust_variance_is_the_sum_over_clusters():
    # Three clusters by hand: shares 3/3, 1/2, 0/1 of 6 images; residual sums 1, -1/3, -2/3 around 4/6.
    correct = np.array([1, 1, 1, 1, 0, 0], dtype=bool)
    clusters = np.array([7, 7, 7, 2, 2, 9])
    variance = 3 / 2 * (1 + 1 / 9 + 4 / 9) / 36
    size, p, t = (4 / 6) * (2 / 6) / variance, 4 / 6, 4.302653
    half = t / (1 + t**2 / size) * math.sqrt(p * (1 - p) / size + t**2 / (4 * size**2))
    center = (p + t**2 / (2 * size)) / (1 + t**2 / size)

    assert top1_interval(correct, clusters) == pytest.approx((max(center - half, 0), center + half), abs=1e-6)


@pytest.mark.parametrize("value", [True, False])
def test_without_any_variance_the_interval_is_as_wide_as_one_image_per_cluster_allows(value):
    correct = np.full(4200, value)
    low, high = top1_interval(correct, np.repeat(np.arange(600), 7))
    width = Z**2 / (600 + Z**2)

    assert (low, high) == pytest.approx((1 - width, 1) if value else (0, width), abs=1e-4)


def test_a_paired_interval_is_bonett_and_prices_when_images_are_independent():
    # 8 gained, 3 lost of 400. The robust variance divides by n - 1, as in the unclustered case above.
    correct = np.array([True] * 8 + [False] * 3 + [True] * 389)
    reference = np.array([False] * 8 + [True] * 3 + [True] * 389)
    difference, low, high = paired_interval(correct, reference, None)
    gained, lost = 9 / 402, 4 / 402
    half = Z * math.sqrt((gained + lost - (gained - lost) ** 2) / 402)

    assert difference == pytest.approx(5 / 400)
    assert (low, high) == pytest.approx((gained - lost - half, gained - lost + half), abs=2e-4)


def test_models_that_agree_everywhere_differ_by_zero_within_an_interval():
    correct = np.ones(4200, dtype=bool)
    difference, low, high = paired_interval(correct, correct, np.repeat(np.arange(600), 7))

    assert difference == 0
    assert -0.01 < low < 0 < high < 0.01


def test_a_paired_interval_is_narrower_than_two_separate_ones():
    generator = np.random.default_rng(0)
    reference = generator.random(2000) < 0.9
    correct = reference ^ (generator.random(2000) < 0.01)
    _, low, high = paired_interval(correct, reference, None)
    single = top1_interval(correct, None)

    assert high - low < single[1] - single[0]


@pytest.mark.parametrize("share, correlation", [(0.97, 0.5), (0.8, 0.2)])
def test_intervals_cover_the_truth_as_often_as_they_say(share, correlation):
    generator = np.random.default_rng(1)
    clusters = np.repeat(np.arange(300), 7)
    concentration = (1 - correlation) / correlation
    changed = 0.03
    covered = paired_covered = naive_covered = 0
    repetitions = 400
    for _ in range(repetitions):
        skill = generator.beta(share * concentration, (1 - share) * concentration, 300)
        reference = (generator.random((300, 7)) < skill[:, None]).ravel()
        flips = np.repeat(generator.beta(4 * changed, 4 * (1 - changed), 300), 7)
        correct = reference ^ (generator.random(2100) < flips)
        low, high = top1_interval(reference, clusters)
        covered += low <= share <= high
        low, high = top1_interval(reference, None)
        naive_covered += low <= share <= high
        _, low, high = paired_interval(correct, reference, clusters)
        paired_covered += low <= changed * (1 - 2 * share) <= high

    assert covered / repetitions > 0.92
    assert paired_covered / repetitions > 0.92
    assert naive_covered / repetitions < 0.88  # what clustering is for


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((np.ones(3, bool), np.ones(4, int)), "clusters of the same split"),
        ((np.ones(0, bool), None), "one result per image"),
        ((np.ones(3, bool), None, 95), "Use 0.95"),
    ],
)
def test_input_that_cannot_be_right_is_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        top1_interval(*arguments)


def test_results_of_different_splits_cannot_be_paired():
    with pytest.raises(ConfigError, match="same images"):
        paired_interval(np.ones(3, bool), np.ones(4, bool), None)
