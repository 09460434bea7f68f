"""`prunefront measure` with accuracy beside latency, and its pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from prunefront.cli.app import run
from prunefront.cli.measure_plot import draw_rows

DEMO = "digit_vit_patch6_48"


@pytest.fixture
def pruned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PRUNEFRONT_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.delenv("PRUNEFRONT_DEBUG", raising=False)
    path = tmp_path / "pruned.json"
    new = ["config", "new", "--model", DEMO, "--method", "evit", "--at", "1", "--op", "fuse"]
    assert run([*new, "--keep-ratio", "0.5", "--out", str(path)]) == 0
    return path


def test_accuracy_stands_beside_latency_and_equals_evals(pruned: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data = ["--dataset", "digit-scenes", "--num-images", "32", "--batch-size", "8"]
    picture = pruned.parent / "trade-off.png"

    capfd.readouterr()
    assert run(["measure", str(pruned), *data, "--plot", str(picture), "--json"]) == 0
    rows = json.loads(capfd.readouterr().out)["measurements"]
    assert run(["eval", str(pruned), *data, "--against-dense", "--json"]) == 0
    evaluated = json.loads(capfd.readouterr().out)

    assert [row["top1"] for row in rows] == [evaluated["dense_top1"], evaluated["top1"]]
    assert rows[1]["top1_ci"] == evaluated["top1_ci"]
    assert picture.read_bytes().startswith(b"\x89PNG")


def row(label: str, *, sites: list[Any], **values: Any) -> dict[str, Any]:
    return {
        "label": label,
        "config": {"sites": sites},
        "median_ms": 8.0,
        "iqr_ms": 0.5,
        "images_per_s": 1000.0,
        **values,
    }


def test_the_picture_has_a_point_per_model_or_a_bar() -> None:
    accuracy = {"top1": 0.8, "top1_ci": [0.7, 0.9], "dataset": "d", "split": "test"}
    rows = [row("dense", sites=[], **accuracy), row("runs/a.json", sites=[{}], **accuracy)]

    (points,) = draw_rows(rows, "cpu").axes
    (bars,) = draw_rows([row("dense", sites=[]), row("a.json", sites=[{}])], "cpu").axes

    assert (points.get_xlabel(), points.get_ylabel()) == ("images/s", "top-1 on d test, %")
    assert [text.get_text() for text in points.texts] == ["\u20071  dense\n\u20072  a.json", "1", "2"]
    assert [line.get_xydata().tolist() for line in points.lines] == [[[1000.0, 80.0]]] * 2
    assert [patch.get_width() for patch in bars.patches] == [8.0, 8.0]
    assert bars.get_xlabel() == "measured latency, ms per batch"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--plot", "figure.txt"], "--plot writes .png, .svg, .pdf, but got 'figure.txt'"),
        (["--num-images", "5"], "needs --dataset"),
        (["--dataset", "digit-scene"], "did you mean 'digit-scenes'"),
    ],
)
def test_what_cannot_be_drawn_or_evaluated_is_refused_before_the_work(
    arguments: list[str], sentence: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("latency_tables.measure.measure_models", lambda *args, **options: pytest.fail("worked"))

    assert run(["measure", DEMO, *arguments]) == 2
    assert sentence in capfd.readouterr().err
