"""The benchmark of shipped tables: what it prints and keeps."""

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest

from benchmarks import shipped_tables
from latency_tables import shipped
from latency_tables.schema import ValidationPoint, load_table, save_table
from latency_tables.validate import report_of
from prunefront.config import PruneConfig
from tests.unit.latency_tables.fakes import DEVICE, TINY, simple_table


@pytest.fixture
def shipped_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of the only shipped table, which predicts 261 ms for the dense model, whatever its validation says it did."""
    monkeypatch.setattr(shipped, "DATA", tmp_path)
    point = ValidationPoint(
        config=PruneConfig(model=TINY, method="hybrid"),
        predicted_ms=12.0,
        measured_ms=290.0,
        iqr_ms=0.1,
        dense_ms=290.0,
    )
    report = report_of(
        [point], dense_predicted_ms=12.0, seed=0, device=DEVICE, created_at=datetime(2026, 1, 1, tzinfo=UTC)
    )
    file = tmp_path / "machine" / "model-eager-fp32-b1.json"
    file.parent.mkdir()
    save_table(simple_table(validation=report, build_s=40.0), file)
    return file


def test_tables_are_shown_as_this_version_predicts_and_stay_as_they_are(
    shipped_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = shipped_file.read_bytes()
    monkeypatch.setattr("sys.argv", ["shipped_tables"])
    assert shipped_tables.main() == 0
    assert capsys.readouterr().out == (
        "shipped:machine/model-eager-fp32-b1: 1 schedules; speed-ups 0.0% off, 100% within 5 %, 100% within 10 %, "
        "tau -; latencies 10.0% off, built in 40 s\n"
    )
    assert shipped_file.read_bytes() == before


def test_what_they_predict_now_is_kept_on_request(
    shipped_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["shipped_tables", "--save", "--json"])
    assert shipped_tables.main() == 0
    (figures,) = json.loads(capsys.readouterr().out)
    assert figures["mape"] == pytest.approx(0.1) and figures["dense_predicted_ms"] == pytest.approx(261.0)
    kept = load_table(shipped_file).validation
    assert kept is not None and kept.points[0].predicted_ms == pytest.approx(261.0)
