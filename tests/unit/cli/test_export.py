"""`prunefront export`: what it writes, what it prints, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import onnxruntime
import pytest
import torch

import prunefront
from prunefront.cli.app import REFUSED, run
from prunefront.training.data import data_config_of, open_split

CONFIG = {
    "format": "prunefront/config/1",
    "model": {"name": "digit_vit_patch6_48"},
    "method": "evit",
    "sites": [{"block": 2, "op": "fuse", "keep_ratio": 0.5}],
}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "best.json"
    path.write_text(json.dumps(CONFIG))
    return path


def test_a_config_becomes_an_onnx_file_that_reads_digits_alike(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "best.onnx"

    assert run(["export", str(config), "--to", "onnx", "--out", str(out), "--json"]) == 0

    document = json.loads(capsys.readouterr().out)
    assert document["num_bytes"] == out.stat().st_size
    assert document["batch_size"] is None
    assert document["largest_difference"] <= document["tolerance"]
    model = prunefront.create_model(CONFIG, pretrained=True).eval()
    split = open_split("digit-scenes", "test", data_config=data_config_of(model), num_images=6)
    images = torch.stack([split[number][0] for number in range(6)])
    session = onnxruntime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
    logits = torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
    with torch.inference_mode():
        torch.testing.assert_close(logits, model(images), atol=1e-4, rtol=1e-4)


def test_a_saved_model_and_a_model_by_name_become_programs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved = tmp_path / "saved.safetensors"
    prunefront.save_model(prunefront.create_model(CONFIG), saved)  # random weights, not the shipped ones
    images = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    expected = {
        str(saved): prunefront.load_model(saved).eval(),
        "digit_vit_patch6_48": prunefront.create_dense(
            prunefront.ModelSpec(name="digit_vit_patch6_48"), pretrained=True
        ).eval(),
    }
    for what, model in expected.items():
        out = tmp_path / "model.pt2"
        assert run(["export", what, "--to", "program", "--out", str(out), "--batch-size", "2"]) == 0
        with torch.inference_mode():
            torch.testing.assert_close(torch.export.load(out).module()(images), model(images), atol=1e-4, rtol=1e-4)

        captured = capsys.readouterr()
        assert f"Wrote {out}" in captured.err
        for name in ("batch size", "largest difference", "tolerance", "MiB"):
            assert name in captured.out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--to", "onnx"], "either --out FILE for the model or --blocks FOLDER"),
        (["--to", "onnx", "--out", "a.onnx", "--blocks", "b"], "either --out FILE for the model or --blocks FOLDER"),
        (["--to", "program", "--blocks", "b"], "--blocks and --opset are about ONNX"),
        (["--to", "program", "--out", "a.pt2", "--opset", "20"], "--blocks and --opset are about ONNX"),
        (["--to", "onnx", "--blocks", "b", "--checkpoint", "w.pt"], "random weights; leave --checkpoint out"),
        (["--to", "onnx", "--out", "a.onnx", "--dtype", "bf16"], "cannot run bf16 models on a CPU"),
        (["--to", "onnx", "--out", "a.onnx", "--opset", "17"], "opset must be 18 or later, but got 17"),
    ],
)
def test_what_cannot_be_done_is_refused_and_nothing_is_written(
    arguments: list[str],
    sentence: str,
    config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)

    assert run(["export", str(config), *arguments]) == REFUSED

    assert sentence in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [config]


def test_ragged_configs_are_refused_before_weights_are_looked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "ragged.json"
    sites = [{"block": 2, "op": "select", "keep_ratio": 0.5}]
    path.write_text(json.dumps({**CONFIG, "method": "spvit", "sites": sites}))

    assert run(["export", str(path), "--to", "onnx", "--out", str(tmp_path / "a.onnx")]) == REFUSED

    assert "Set the option mode to 'fixed'" in capsys.readouterr().err
