"""The benchmark of latency tables: what it prints."""

from datetime import UTC, datetime

from benchmarks.latency_table import run_of, summary
from latency_tables.schema import ValidationPoint
from latency_tables.validate import report_of
from prunefront.config import PruneConfig
from tests.unit.latency_tables.fakes import DEVICE, TINY, simple_table


def test_a_single_schedule_has_no_rank_and_is_summed_up_all_the_same() -> None:
    point = ValidationPoint(
        config=PruneConfig(model=TINY, method="hybrid"), predicted_ms=9.0, measured_ms=10.0, iqr_ms=0.1, dense_ms=12.0
    )
    report = report_of(
        [point], dense_predicted_ms=12.0, seed=0, device=DEVICE, created_at=datetime(2026, 1, 1, tzinfo=UTC)
    )
    text = summary(run_of(simple_table(), report, build_s=1.0, validate_s=1.0, load=0.0), DEVICE)
    assert "mean absolute error 10.00%" in text
    assert "Kendall's tau None" in text
    assert "of speed-ups: mean absolute error 10.00%" in text and "moved by 0%" in text
