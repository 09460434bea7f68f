from pathlib import Path

import pytest

from latency_tables.errors import LatencyTableError
from latency_tables.partial import FinishedGroup, PartialFile, canary_drift, rescaled
from prunefront.config import PruneConfig
from prunefront.errors import FileWriteError
from tests.unit.latency_tables.fakes import TINY, entry

HEADER = {"device": "Abacus 3000", "dtype": "fp32", "batch_size": 8}
FIRST = FinishedGroup(canary_ms=100.0, entries=(entry("mlp", 17, 17, 3.0),), seconds=2.0)
SECOND = FinishedGroup(canary_ms=110.0, whole_models=((PruneConfig(model=TINY, method="hybrid"), 55.0, 1.0),))


def test_finished_groups_are_found_again(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "partial.jsonl"
    partial = PartialFile(path, HEADER)
    partial.append(FIRST)
    partial.append(SECOND)
    assert PartialFile(path, HEADER).groups == [FIRST, SECOND]


def test_a_line_cut_off_by_a_kill_is_left_out_and_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "partial.jsonl"
    partial = PartialFile(path, HEADER)
    partial.append(FIRST)
    partial.append(SECOND)
    path.write_bytes(path.read_bytes()[:-20])
    resumed = PartialFile(path, HEADER)
    assert resumed.groups == [FIRST]
    resumed.append(SECOND)
    assert PartialFile(path, HEADER).groups == [FIRST, SECOND]


def test_a_header_cut_off_starts_anew(tmp_path: Path) -> None:
    path = tmp_path / "partial.jsonl"
    path.write_text('{"format": "prunefront/late')
    PartialFile(path, HEADER).append(FIRST)
    assert PartialFile(path, HEADER).groups == [FIRST]


def test_a_build_of_another_table_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "partial.jsonl"
    PartialFile(path, HEADER)
    with pytest.raises(LatencyTableError, match="another table .*batch_size 8 instead of 16.*Delete it, or choose"):
        PartialFile(path, {**HEADER, "batch_size": 16})


@pytest.mark.parametrize("text", ["hello\n", '{"format": "prunefront/config/1"}\n'])
def test_a_file_of_another_kind_is_refused_and_kept(tmp_path: Path, text: str) -> None:
    path = tmp_path / "notes.txt"
    path.write_text(text)
    with pytest.raises(LatencyTableError, match="is not an interrupted table build"):
        PartialFile(path, HEADER)
    assert path.read_text() == text


def test_a_damaged_line_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "partial.jsonl"
    PartialFile(path, HEADER).append(FIRST)
    with open(path, "a") as file:
        file.write('{"entries": 3}\n')
    with pytest.raises(LatencyTableError, match="is damaged"):
        PartialFile(path, HEADER)


def test_a_folder_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises((LatencyTableError, FileWriteError), match="file"):
        PartialFile(tmp_path / "file" / "partial.jsonl", HEADER)


def test_without_a_path_groups_stay_in_memory() -> None:
    partial = PartialFile(None, HEADER)
    partial.append(FIRST)
    assert partial.groups == [FIRST]


def test_groups_are_brought_to_the_speed_of_the_median_canary() -> None:
    slow = FinishedGroup(canary_ms=200.0, entries=(entry("mlp", 9, 9, 4.0),))
    canary_ms, entries, whole_models = rescaled([FIRST, SECOND, slow])
    assert canary_ms == 110.0
    assert {found.tokens_in: found.median_ms for found in entries} == pytest.approx({17: 3.3, 9: 2.2})
    assert whole_models[0][1:] == (55.0, 1.0)


def test_the_canary_tells_how_much_the_machine_changed_between_groups() -> None:
    assert canary_drift([FinishedGroup(canary_ms=ms) for ms in (100.0, 125.0, 80.0)]) == pytest.approx(0.45)
    assert canary_drift([FIRST]) is None
