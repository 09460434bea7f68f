"""Results of benchmarks are kept per machine, and running a part again replaces that part alone."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import records
from benchmarks.records import RESULTS, Record, add_output_options, command_line, record_for, results_file
from latency_tables.device import DeviceInfo
from prunefront.errors import ConfigError
from tests.unit.latency_tables.fakes import DEVICE

KEY = ("model", "batch_size")


def record(path: Path | None, device: DeviceInfo = DEVICE, benchmark: str = "inference") -> Record:
    return Record(benchmark, device, key=KEY, path=path)


def kept(path: Path) -> list[tuple[str, int, float]]:
    return [(run["model"], run["batch_size"], run["ms"]) for run in json.loads(path.read_text())["runs"]]


def run(model: str, batch_size: int, ms: float) -> dict[str, Any]:
    return {"model": model, "batch_size": batch_size, "ms": ms}


def test_a_part_that_is_run_again_replaces_itself_and_no_other_run(tmp_path: Path) -> None:
    path = tmp_path / "new" / "inference.json"
    first = record(path)
    for batch_size in (1, 8, 16):
        first.add(run("small", batch_size, 10.0 * batch_size))
    again = record(path)
    again.add(run("small", 8, 70.0))
    again.add(run("base", 8, 300.0))
    assert kept(path) == [("small", 1, 10.0), ("small", 8, 70.0), ("small", 16, 160.0), ("base", 8, 300.0)]
    assert [r["ms"] for r in json.loads(again.as_json())["runs"]] == [70.0, 300.0]


def test_what_another_process_kept_meanwhile_stays(tmp_path: Path) -> None:
    path = tmp_path / "inference.json"
    one, other = record(path), record(path)
    one.add(run("small", 1, 10.0))
    other.add(run("small", 8, 80.0))
    one.add(run("small", 16, 160.0))
    assert [batch_size for _, batch_size, _ in kept(path)] == [1, 8, 16]


def test_each_run_keeps_its_own_command_time_and_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "inference.json"
    monkeypatch.setattr("sys.argv", ["inference.py", "--batch-sizes", "1", "--out", str(path)])
    record(path).add(run("small", 1, 10.0))
    monkeypatch.setattr("sys.argv", ["inference.py", "--batch-sizes", "8"])
    newer = DEVICE.model_copy(update={"versions": {"torch": "3.0"}, "os": "Linux 7"})
    record(path, newer).add(run("small", 8, 80.0))
    document = json.loads(path.read_text())
    assert document["device"]["name"] == DEVICE.name and "versions" not in document["device"]
    assert [(r["command"], r["versions"]) for r in document["runs"]] == [
        ("python -m benchmarks.inference --batch-sizes 1", DEVICE.versions),
        ("python -m benchmarks.inference --batch-sizes 8", {"torch": "3.0"}),
    ]
    assert all(r["measured_at"].endswith("Z") for r in document["runs"])


def test_a_record_without_a_file_only_collects() -> None:
    collecting = record(None)
    collecting.add(run("small", 1, 10.0))
    collecting.add(run("small", 1, 11.0))
    assert [r["ms"] for r in collecting.runs] == [11.0]


@pytest.mark.parametrize(
    ("device", "benchmark", "sentence"),
    [
        (DEVICE.model_copy(update={"cpu_features": ("amx_tile",)}), "inference", "another machine: .*avx2.*amx_tile"),
        (DEVICE.model_copy(update={"threads": 4}), "inference", "of another machine: .*2 threads.*4 threads"),
        (DEVICE, "latency_table", "has runs of the benchmark inference"),
    ],
)  # fmt: skip
def test_a_file_of_another_machine_or_benchmark_is_refused(
    tmp_path: Path, device: DeviceInfo, benchmark: str, sentence: str
) -> None:
    path = tmp_path / "inference.json"
    record(path).add(run("small", 1, 10.0))
    before = path.read_text()
    with pytest.raises(ConfigError, match=sentence):
        record(path, device, benchmark)
    assert path.read_text() == before


@pytest.mark.parametrize("text", ["{", "[]", '{"runs": []}', '{"benchmark": "inference", "device": {}, "runs": []}'])
def test_what_is_no_record_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match="other.json is not the record of a benchmark"):
        record(path)


def test_save_keeps_runs_in_the_machines_folder_and_no_option_keeps_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    parser = argparse.ArgumentParser()
    add_output_options(parser)
    for line in ([], ["--save"]):
        record_for(parser, parser.parse_args(line), "inference", DEVICE, KEY).add(run("small", 1, 10.0))
    (found,) = tmp_path.rglob("*.json")
    assert found == tmp_path / "abacus-3000-2-threads" / "inference.json" == results_file("inference", DEVICE)
    assert kept(found) == [("small", 1, 10.0)]


def test_a_file_that_cannot_take_runs_ends_the_process_with_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = argparse.ArgumentParser()
    add_output_options(parser)
    with pytest.raises(SystemExit, match="2"):
        record_for(parser, parser.parse_args(["--out", str(tmp_path)]), "inference", DEVICE, KEY)
    assert f"{tmp_path} cannot be written: Is a directory" in capsys.readouterr().err


def test_the_command_that_repeats_a_run_does_not_say_where_its_output_went() -> None:
    line = ["--json", "--models", "a b", "--out", "x.json", "--save", "--out=y.json", "--seed", "3"]
    assert command_line("inference", line) == "python -m benchmarks.inference --models 'a b' --seed 3"


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*/*.json")), ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_kept_records_lie_in_the_folder_of_their_machine(path: Path) -> None:
    document = json.loads(path.read_text())
    device = DeviceInfo.model_validate(document["device"])
    assert results_file(document["benchmark"], device) == path
    assert document["runs"] and all(r["command"].startswith("python -m benchmarks.") for r in document["runs"])
