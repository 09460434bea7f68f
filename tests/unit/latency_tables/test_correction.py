import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latency_tables.correction import WholeModel, fit_correction
from latency_tables.predict import corrected_ms


def models(num: int, intercept_ms: float, attention: float, mlp: float, noise: float = 0.0) -> list[WholeModel]:
    draw = random.Random(0)
    found = []
    for _ in range(num):
        sums = {
            "attention": draw.uniform(20, 100), "mlp": draw.uniform(20, 150), "reduction": draw.uniform(0, 8),
            "rest": 5.0,
        }  # fmt: skip
        truth = intercept_ms + attention * sums["attention"] + mlp * sums["mlp"] + sums["reduction"] + sums["rest"]
        found.append(WholeModel(part_sums=sums, measured_ms=truth * (1.0 + draw.gauss(0.0, noise))))
    return found


def test_no_whole_model_means_no_correction() -> None:
    correction = fit_correction([])
    assert correction.num_models == 0
    assert corrected_ms({"attention": 3.0, "mlp": 4.0}, correction.intercept_ms, correction.factors) == 7.0


def test_a_sum_that_is_right_stays_right() -> None:
    correction = fit_correction(models(10, 0.0, 1.0, 1.0))
    assert correction.factors == pytest.approx(dict.fromkeys(correction.factors, 1.0))
    assert correction.intercept_ms == pytest.approx(0.0, abs=1e-9)
    assert correction.mape_before == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize(("intercept_ms", "attention", "mlp"), [(0.0, 1.1, 1.1), (3.0, 0.95, 1.08), (0.0, 1.2, 0.9)])
def test_a_systematic_error_of_the_parts_is_learnt(intercept_ms: float, attention: float, mlp: float) -> None:
    correction = fit_correction(models(12, intercept_ms, attention, mlp, noise=0.01))
    unseen = models(60, intercept_ms, attention, mlp)[12:]
    errors = [
        abs(corrected_ms(m.part_sums, correction.intercept_ms, correction.factors) / m.measured_ms - 1.0)
        for m in unseen
    ]
    assert sum(errors) / len(errors) < 0.015
    assert correction.mape_after is not None and correction.mape_before is not None
    assert correction.mape_after < correction.mape_before


@given(st.floats(0.3, 3.0), st.integers(1, 4))
def test_few_models_move_all_parts_together_and_keep_factors_positive(factor: float, num: int) -> None:
    correction = fit_correction(models(num, 0.0, factor, factor))
    assert all(value > 0 for value in correction.factors.values())
    assert correction.mape_after is not None and correction.mape_before is not None
    assert correction.mape_after <= correction.mape_before + 1e-9


def test_whole_models_that_met_another_machine_than_their_parts_give_no_correction() -> None:
    """As when a neighbour came: the slow dense model five times slower, small ones hardly."""
    told = [
        WholeModel(part_sums=m.part_sums, measured_ms=30.0 + 0.2 * m.measured_ms if number else m.measured_ms)
        for number, m in enumerate(models(9, 0.0, 1.0, 1.0))
    ]
    correction = fit_correction(told)
    assert (correction.intercept_ms, correction.factors) == (0.0, {})
    assert correction.mape_after == correction.mape_before
    assert correction.mape_before is not None and correction.mape_before > 0.3


def test_whole_models_that_contradict_each_other_give_no_correction_and_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A fit to three of twelve that took 60 % longer would make the other nine wrong."""
    right = models(12, 0.0, 1.0, 1.0)
    told = [
        WholeModel(part_sums=m.part_sums, measured_ms=m.measured_ms * (1.6 if number % 4 == 0 else 1.0))
        for number, m in enumerate(right)
    ]
    correction = fit_correction(told)
    assert (correction.factors, correction.mape_before) == ({}, pytest.approx(3 / 12 * (1 - 1 / 1.6)))
    assert "do not fit together (9% apart; the table goes without a correction)" in caplog.text
    caplog.clear()
    assert fit_correction(right).factors
    assert not caplog.text
