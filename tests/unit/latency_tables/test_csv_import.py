from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latency_tables.csv_import import COLUMNS, export_csv, import_csv, parse_csv
from latency_tables.device import DeviceInfo
from latency_tables.errors import LatencyTableError
from latency_tables.predict import predict_latency_ms
from latency_tables.schema import LatencyEntry
from prunefront.config import PruneConfig
from tests.unit.latency_tables.fakes import TINY, simple_table, table_of

HEADER = ",".join(COLUMNS)
GOOD = f"{HEADER}\nattention,17,17,8,2.5,0.1,30\nmlp,17,17,8,3.5,0.1,30\n"

milliseconds = st.floats(1e-6, 1e6)
names = st.sampled_from(["attention", "mlp", "attention.sized"])


@given(st.dictionaries(st.tuples(names, st.integers(1, 2000)), st.tuples(milliseconds, milliseconds), max_size=10))
def test_entries_survive_the_csv_to_the_last_digit(drawn: dict[tuple[str, int], tuple[float, float]]) -> None:
    drawn |= {("attention", 17): (2.0, 0.1), ("mlp", 17): (3.0, 0.1)}
    entries = [
        LatencyEntry(entry=name, tokens_in=at, tokens_out=at, median_ms=ms, iqr_ms=iqr, samples=7)
        for (name, at), (ms, iqr) in drawn.items()
    ]
    table = table_of(entries)
    parsed = parse_csv(export_csv(table))
    assert parsed.entries == table.entries
    assert parsed.batch_size == table.batch_size


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("attention,17,17,8,2.5,0.1", "line 4: expected 7 cells, but got 6"),
        ("atention,9,9,8,2.5,0.1,30", "line 4: unknown entry 'atention'; expected one of stem, head, attention"),
        ("attention,nine,9,8,2.5,0.1,30", "line 4: tokens_in should be a whole number of at least 1, but is 'nine'"),
        ("attention,9,9,8,fast,0.1,30", "line 4: median_ms should be a positive number of milliseconds"),
        ("attention,9,9,8,nan,0.1,30", "line 4: median_ms should be a positive number"),
        ("attention,9,9,8,2.5,-1,30", "line 4: iqr_ms should be a number of at least 0"),
        ("attention,9,9,8,2.5,0.1,0", "line 4: samples should be a whole number of at least 1"),
        ("attention,9,9,16,2.5,0.1,30", "line 4: batch size 16 after 8 above"),
        ("attention,9,5,8,2.5,0.1,30", "line 4: attention keeps its tokens"),
        ("block.evit.prune,9,9,8,2.5,0.1,30", "line 4: block.evit.prune removes tokens"),
        ("attention,17,17,8,2.5,0.1,30", "line 4: attention at 17 -> 17 tokens stands in line 2 already"),
    ],
)
def test_a_wrong_line_is_named_with_what_is_wrong(line: str, sentence: str) -> None:
    with pytest.raises(LatencyTableError, match=sentence):
        parse_csv(GOOD + line + "\n")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "line 1: expected the header"),
        ("entry,tokens\n", "line 1: expected the header 'entry,tokens_in"),
        (f"{HEADER}\n\n", "has a header but no lines"),
        (f"{HEADER}\nattention,17,17,8,2.5,0.1,30\n", "has no mlp lines"),
    ],
)
def test_a_file_without_what_is_needed_is_refused(text: str, sentence: str) -> None:
    with pytest.raises(LatencyTableError, match=sentence):
        parse_csv(text)


def test_an_imported_table_predicts_and_says_where_it_comes_from(tmp_path: Path) -> None:
    path = tmp_path / "phone.csv"
    path.write_text("\ufeff" + export_csv(simple_table()), encoding="utf-8")
    device = DeviceInfo(kind="other", name="Pixel 9")
    table = import_csv(path, spec=TINY, device=device, runtime="onnxruntime", dtype="fp16")
    assert table.source == "imported"
    assert table.name == "vit_tiny_patch16_224 onnxruntime fp16 b8 on Pixel 9"
    dense = PruneConfig(model=TINY, method="hybrid")
    assert predict_latency_ms(table, dense) == predict_latency_ms(simple_table(), dense)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(LatencyTableError, match="Cannot read .*none.csv"):
        import_csv(
            tmp_path / "none.csv", spec=TINY, device=DeviceInfo(kind="other", name="x"), runtime="eager", dtype="fp32"
        )
