"""The parts of a table as ONNX files compute what the model's parts do, and their CSV makes a table once filled in."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from torch import nn

from latency_tables.block_export import export_blocks
from latency_tables.build import BuildSettings
from latency_tables.csv_import import COLUMNS, parse_csv
from latency_tables.parts import MlpHalf
from prunefront import export
from prunefront.compress import create_dense
from prunefront.config import ModelSpec
from prunefront.errors import ExportError, ModelError
from tests.unit.library.models import small_spec

# 36 patches without a class token: of all reductions merging alone can run, so there are few files.
SPEC = small_spec(class_token=False, global_pool="avg")
FEW = BuildSettings(
    token_shares=(0.5, 1.0),
    sized_shares=(0.5,),
    max_token_counts=2,
    reduction_tokens=(1.0,),
    reduction_removed=(0.25,),
)


def test_parts_agree_with_the_model_and_their_csv_becomes_a_table(tmp_path: Path) -> None:
    torch.manual_seed(0)
    written = export_blocks(SPEC, tmp_path, batch_size=2, settings=FEW)
    torch.manual_seed(0)
    model = create_dense(SPEC).eval()

    names = sorted(exported.path.name for exported in written.files)
    assert names == sorted(
        [
            "stem-36-36.onnx", "attention-18-18.onnx", "attention-36-36.onnx", "attention.sized-18-18.onnx",
            "mlp-18-18.onnx", "mlp-36-36.onnx", "head-9-1.onnx", "head-36-1.onnx", "block.tome.merge-36-27.onnx",
            "block.dynamicvit.select-36-27.onnx", "block.spvit.select-36-28.onnx",
        ]
    )  # fmt: skip
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*names, "entries.csv"])
    assert {exported.agreement.num_images for exported in written.files} == {8}

    x = torch.randn(2, 18, 48)
    session = onnxruntime.InferenceSession(str(tmp_path / "attention-18-18.onnx"), providers=["CPUExecutionProvider"])
    got = torch.from_numpy(session.run(["y"], {"x": x.numpy()})[0])
    block = model.blocks[0]
    with torch.inference_mode():
        torch.testing.assert_close(got, x + block.attn(block.norm1(x)), atol=1e-5, rtol=1e-4)

    rows = list(csv.DictReader(written.template.read_text().splitlines()))
    assert [f"{row['entry']}-{row['tokens_in']}-{row['tokens_out']}.onnx" for row in rows] == [
        exported.path.name for exported in written.files
    ]
    filled = [{**row, "median_ms": "1.5", "iqr_ms": "0.1", "samples": "20"} for row in rows]
    text = "\n".join([",".join(COLUMNS), *(",".join(row[name] for name in COLUMNS) for row in filled)])
    parsed = parse_csv(text)
    assert parsed.batch_size == 2
    assert len(parsed.entries) == len(written.files)


def test_a_part_that_computes_something_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert = export.write_onnx

    def without_mlp(module: nn.Module, *args: Any, **kwargs: Any) -> None:
        convert(nn.Identity().eval() if isinstance(module, MlpHalf) else module, *args, **kwargs)

    monkeypatch.setattr(export, "write_onnx", without_mlp)
    with pytest.raises(ExportError, match="on 8 of 8 images its outputs differ"):
        export_blocks(SPEC, tmp_path, batch_size=1, dtype="fp16", settings=FEW)
    assert not (tmp_path / "entries.csv").exists()


def test_models_without_equal_blocks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="(?i)swin"):
        export_blocks(ModelSpec(name="swin_tiny_patch4_window7_224"), tmp_path, batch_size=1)
