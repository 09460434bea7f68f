"""What commands print."""

from __future__ import annotations

import json
from typing import Any

import pytest

from prunefront.cli.front import print_front
from prunefront.cli.jobs import print_job, share_done
from prunefront.cli.output import print_error, print_fields, print_json, print_table, progress_bar


def point(label: str, trial: int, measured_ms: float, sites: int) -> dict[str, Any]:
    return {
        "label": label, "config": {"method": "evit", "sites": [{}] * sites}, "measured_ms": measured_ms, "iqr_ms": 0.1,
        "speedup": 9.0 / measured_ms, "predicted_ms": None, "top1": 0.97, "top1_ci": [0.96, 0.98], "top1_delta": -0.005,
        "macs": 1e8, "trial": trial,
    }  # fmt: skip


def front(**changes: Any) -> dict[str, Any]:
    dense = point("dense", 0, 9.0, 0)
    return {
        "device": "cpu", "runtime": "eager", "dtype": "fp32", "batch_size": 8, "fidelity": "evaluated", "split": "test",
        "dense": dense, "marks": [], "points": [point("evit", 4, 4.5, 2), dense], "notes": [], **changes,
    }  # fmt: skip


def job(**changes: Any) -> dict[str, Any]:
    return {
        "id": "j1", "kind": "search", "name": "n", "state": "running", "stage": "propose", "waiting_reason": None,
        "progress": {"done": 3, "total": 4, "message": "trial 3"}, "failure": None, "attempts": 1,
        "created_at": "2026-01-01T00:00:00Z", "finished_at": None, **changes,
    }  # fmt: skip


def test_rows_stay_whole_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(["name", "text"], [("a", "x" * 300), ("b", None)])

    lines = capsys.readouterr().out.splitlines()
    assert "x" * 300 in lines[1]
    assert lines[2].split() == ["b", "–"]


def test_text_in_square_brackets_is_text(capsys: pytest.CaptureFixture[str]) -> None:
    print_error("expected [224, 224] or [red]")

    print_table(["what"], [("[red]",)], title="[bold]")
    print_fields([("size", "[224, 224] [red]")])

    shown = capsys.readouterr()
    assert shown.err == "Error: expected [224, 224] or [red]\n"
    assert [line.strip() for line in shown.out.splitlines()] == ["[bold]", "what", "[red]", "size  [224, 224] [red]"]


def test_json_is_the_only_thing_on_stdout_and_refuses_nan(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("work") as progress:
        progress(1, 2, "half")
        progress(1, 0, "no end in sight")
    print_json({"µ": 1})

    shown = capsys.readouterr()
    assert json.loads(shown.out) == {"µ": 1}
    assert shown.err == "", "nobody watches a bar in a log"
    with pytest.raises(ValueError, match="not JSON compliant"):
        print_json(float("nan"))


def test_a_front_is_printed_fastest_first_with_dense_once(capsys: pytest.CaptureFixture[str]) -> None:
    print_front(front(notes=["noisy numbers were left out"]))

    shown = capsys.readouterr()
    rows = shown.out.splitlines()[2:]
    assert [row.split()[1] for row in rows] == ["evit", "dense"]
    assert "2.00 ×" in rows[0] and "-0.50%" in rows[0] and "96.00% to 98.00%" in rows[0]
    assert "noisy numbers were left out" in shown.err


def test_a_dense_model_that_is_not_on_the_front_is_shown_all_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    print_front(front(points=[point("evit", 4, 4.5, 2)]))

    assert "dense" in capsys.readouterr().out.splitlines()[-1].split()


def test_an_empty_front_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    print_front(front(points=[], dense=None))

    assert "Nothing is measured yet." in capsys.readouterr().err


def test_progress_is_a_share_of_the_present_stage_while_a_job_runs() -> None:
    assert share_done(job()) == "75%"
    assert share_done(job(state="succeeded")) is None
    assert share_done(job(progress={"done": 0, "total": 0, "message": ""})) is None


def test_a_failed_job_shows_its_reason_and_the_end_of_its_log(capsys: pytest.CaptureFixture[str]) -> None:
    print_job(job(state="failed", failure={"message": "no images", "log_tail": "last line of the log"}))

    shown = capsys.readouterr()
    assert "no images" in shown.out
    assert "last line of the log" in shown.err
