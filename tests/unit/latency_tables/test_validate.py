"""The figures of a validation, by hand."""

from datetime import UTC, datetime

import pytest

from latency_tables.errors import LatencyTableError
from latency_tables.schema import ValidationPoint, ValidationReport
from latency_tables.validate import predicted_anew, report_of
from prunefront.config import PruneConfig
from tests.unit.latency_tables.fakes import DEVICE, TINY, simple_table

CONFIG = PruneConfig(model=TINY, method="hybrid")


def report(*points: tuple[float, float, float]) -> ValidationReport:
    """Of predicted latency, measured latency, and the dense model's in the same run; 12 ms are predicted for that."""
    return report_of(
        [
            ValidationPoint(config=CONFIG, predicted_ms=predicted, measured_ms=measured, iqr_ms=0.1, dense_ms=dense)
            for predicted, measured, dense in points
        ],
        dense_predicted_ms=12.0,
        seed=0,
        device=DEVICE,
        created_at=datetime(2026, 1, 1, tzinfo=UTC),
    )


def test_a_machine_that_slows_down_is_told_apart_from_a_table_that_is_wrong() -> None:
    # All speed-ups are right: 2, 4/3, 2, 4/3. In the last two runs the machine took a quarter longer.
    found = report((6.0, 6.0, 12.0), (9.0, 9.0, 12.0), (6.0, 7.5, 15.0), (9.0, 11.25, 15.0))
    assert found.mape == pytest.approx(0.1) and found.bias == pytest.approx(-0.1)
    assert found.within_5_percent == found.within_10_percent == 0.5
    assert found.speedup_mape == pytest.approx(0.0)
    assert found.speedup_within_5_percent == found.speedup_within_10_percent == found.speedup_kendall_tau == 1.0
    assert found.dense_ms == 13.5 and found.dense_drift == pytest.approx(3.0 / 13.5)
    assert not found.is_steady


def test_a_table_that_is_wrong_is_wrong_on_a_steady_machine_too() -> None:
    # Speed-ups of 2 and 1.2 are predicted as 12/6.48 and 12/9.2: latencies 8 % too high and 8 % too low.
    found = report((6.48, 6.0, 12.0), (9.2, 10.0, 12.0))
    assert found.speedup_mape == found.mape == pytest.approx(0.08)
    assert found.speedup_within_5_percent == 0.0 and found.speedup_within_10_percent == 1.0
    assert found.speedup_kendall_tau == 1.0
    assert found.dense_drift == 0.0 and found.is_steady


def test_schedules_measured_twice_tell_how_far_measuring_differs_from_itself() -> None:
    def point(measured: float, dense: float, again: float | None = None, again_dense: float | None = None):
        return ValidationPoint(
            config=CONFIG, predicted_ms=6.0, measured_ms=measured, iqr_ms=0.1, dense_ms=dense,
            again_ms=again, again_dense_ms=again_dense,
        )  # fmt: skip

    # A quarter slower the second time, as was the dense model; and 5 % slower beside a dense model that was not.
    points = [point(6.0, 12.0, 7.5, 15.0), point(8.0, 12.0), point(10.0, 12.0, 10.5, 12.0)]
    found = report_of(
        points, dense_predicted_ms=12.0, seed=0, device=DEVICE, created_at=datetime(2026, 1, 1, tzinfo=UTC)
    )
    assert found.num_remeasured == 2
    assert found.remeasured_mape == pytest.approx((0.25 + 0.05) / 2)
    assert found.remeasured_speedup_mape == pytest.approx(0.05 / 2)
    # The dense model met two speeds: 12 ms in three runs, as is the median of the first runs, and 15 in the fourth.
    assert found.dense_ms == 12.0 and found.dense_drift == pytest.approx(3.0 / 12.0)
    assert report((6.0, 6.0, 12.0)).remeasured_mape is None


def test_measurements_are_set_against_what_a_table_predicts_now() -> None:
    # `simple_table` predicts 5 + 3 blocks x 17 tokens x 5 + 1 = 261 ms for the dense model, whoever said 12 before.
    point = ValidationPoint(
        config=CONFIG, predicted_ms=12.0, measured_ms=290.0, iqr_ms=0.1, dense_ms=290.0, again_ms=319.0,
        again_dense_ms=290.0,
    )  # fmt: skip
    before = report_of(
        [point], dense_predicted_ms=12.0, seed=7, device=DEVICE, created_at=datetime(2026, 1, 1, tzinfo=UTC)
    )
    found = predicted_anew(simple_table(validation=before)).validation
    assert found is not None and found.points[0].predicted_ms == found.dense_predicted_ms == pytest.approx(261.0)
    assert found.mape == pytest.approx(0.1) and found.speedup_mape == pytest.approx(0.0)
    assert found.remeasured_mape == before.remeasured_mape and found.points[0].measured_ms == 290.0
    assert (found.seed, found.created_at) == (7, before.created_at)


def test_the_dense_model_that_was_validated_is_predicted_anew_not_the_tables() -> None:
    deeper = TINY.model_copy(update={"kwargs": {**TINY.kwargs, "depth": 6}})
    point = ValidationPoint(
        config=PruneConfig(model=deeper, method="hybrid"), predicted_ms=1.0, measured_ms=2.0, iqr_ms=0.1, dense_ms=2.0
    )
    before = report_of(
        [point], dense_predicted_ms=1.0, seed=0, device=DEVICE, created_at=datetime(2026, 1, 1, tzinfo=UTC)
    )
    found = predicted_anew(simple_table(validation=before)).validation
    assert found is not None and found.dense_predicted_ms == pytest.approx(5.0 + 6 * 17 * 5.0 + 1.0)
    assert found.speedup_mape == pytest.approx(0.0)


def test_a_table_without_validation_has_nothing_to_be_set_against() -> None:
    with pytest.raises(LatencyTableError, match="has no validation; run `prunefront table validate`"):
        predicted_anew(simple_table())
