import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from latency_tables.schema import (
    LatencyTableError,
    ValidationPoint,
    ValidationReport,
    load_table,
    parse_table,
    save_table,
)
from prunefront.config import PruneConfig
from tests.unit.latency_tables.fakes import DEVICE, TINY, entry, simple_table, table_of


def test_a_table_survives_the_file(tmp_path: Path) -> None:
    table = simple_table()
    path = save_table(table, tmp_path / "table.json")
    assert load_table(path) == table
    with open(path) as file:
        assert load_table(file) == table
    assert load_table(json.loads(path.read_text())) == table


def test_entries_are_grouped_by_name_and_sorted_by_tokens() -> None:
    table = table_of([entry("mlp", 9, 9, 2.0), entry("attention", 2, 2, 1.0), entry("mlp", 2, 2, 1.0)])
    assert [found.tokens_in for found in table.entries_by_name["mlp"]] == [2, 9]


def test_one_point_stands_once() -> None:
    with pytest.raises(ValueError, match="'mlp' at 9 -> 9 tokens stands twice"):
        table_of([entry("mlp", 9, 9, 2.0), entry("mlp", 9, 9, 3.0)])


@pytest.mark.parametrize("half", ["attention", "mlp"])
def test_a_table_whose_halves_take_no_time_is_refused(half: str) -> None:
    document = simple_table().model_dump(mode="json")
    for found in document["entries"]:
        if found["entry"] == half:
            found["median_ms"] = 0.0
    with pytest.raises(LatencyTableError, match=f"every median of {half} is 0 ms.* rebuild the table"):
        parse_table(document)


def test_a_validation_that_measured_no_time_is_refused() -> None:
    config = PruneConfig(model=TINY, method="hybrid")
    with pytest.raises(ValueError, match=r"measured_ms\s.*greater than 0"):
        ValidationPoint(config=config, predicted_ms=1.0, measured_ms=0.0, iqr_ms=0.0)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"format": "prunefront/latency-table/9"}, "rebuild the table, or upgrade"),
        ({"colour": "blue"}, "colour: no such field is known"),
        ({"batch_size": 0}, "batch_size: .*greater than or equal to 1"),
        ({"entries": []}, "damaged.* entries: .*at least 1.* Copy it again, or rebuild the table."),
        ({"entries": [{"entry": "stem", "tokens_in": 16, "tokens_out": 0, "median_ms": 1.0}]}, "tokens_out: .*1"),
        ({"format": "prunefront/config/1"}, "format is 'prunefront/config/1'.*Check that it is the right file"),
        ({"dtype": "int8"}, "dtype: "),
    ],
)
def test_a_document_that_is_no_table_is_refused_in_one_sentence(changes: dict[str, object], sentence: str) -> None:
    document = simple_table().model_dump(mode="json") | changes
    with pytest.raises(LatencyTableError, match=sentence):
        parse_table(document, "table.json")


def test_a_mapping_without_format_is_no_table() -> None:
    with pytest.raises(LatencyTableError, match="is not a latency table"):
        load_table({"entries": []})


def test_a_cut_off_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    text = save_table(simple_table(), path).read_text()
    path.write_text(text[: len(text) // 2])
    with pytest.raises(LatencyTableError, match="table.json is not JSON .*cut off or damaged"):
        load_table(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(LatencyTableError, match="Cannot read .*nowhere.json"):
        load_table(tmp_path / "nowhere.json")


def test_a_file_of_brackets_alone_is_named(tmp_path: Path) -> None:
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(LatencyTableError, match="deep.json is not JSON .*Copy it again"):
        load_table(tmp_path / "deep.json")


@pytest.mark.parametrize("source", ["/", "a\0b", None, 5, [1]])
def test_what_no_table_can_be_read_from_is_refused(source: Any) -> None:
    with pytest.raises(LatencyTableError, match="Cannot read latency table|A latency table is read from a path"):
        load_table(source)


def test_an_infinite_latency_is_refused() -> None:
    document = simple_table().model_dump(mode="json")
    document["entries"][0]["median_ms"] = float("inf")
    with pytest.raises(LatencyTableError, match="entries.0.median_ms"):
        parse_table(document)


def test_points_are_written_without_what_they_leave_to_defaults_and_read_back_whole(tmp_path: Path) -> None:
    configs = [
        PruneConfig(model=TINY, method="evit", sites=({"block": 1, "op": "fuse", "keep_ratio": 0.5},)),
        PruneConfig(
            model=TINY,
            method="spvit",
            sites=({"block": 1, "op": "select", "cumulative_keep_ratio": 0.5},),
            options={"mode": "fixed"},
        ),
        PruneConfig(model=TINY.model_copy(update={"num_classes": 10}), method="hybrid"),
    ]
    points = [ValidationPoint(config=config, predicted_ms=1.0, measured_ms=2.0, iqr_ms=0.1) for config in configs]
    report = ValidationReport(
        num_schedules=3, seed=0, mape=0.5, bias=-0.5, within_5_percent=0, within_10_percent=0, kendall_tau=None,
        dense_ms=2.0, dense_predicted_ms=1.0, noise=0.05, num_noisy=0, device=DEVICE,
        created_at=datetime(2026, 1, 1, tzinfo=UTC), points=tuple(points),
    )  # fmt: skip
    table = simple_table(validation=report)
    path = save_table(table, tmp_path / "table.json")
    assert load_table(path) == table
    written = json.loads(path.read_text())["validation"]["points"]
    assert written[0]["config"]["sites"] == [{"block": 1, "op": "fuse", "keep_ratio": 0.5}]
