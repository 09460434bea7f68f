"""Training of learned selection through the loop: DynamicViT and SPViT, on a ViT and on LV-ViT."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import prunefront
from latency_tables.predict import predict_latency_ms
from latency_tables.schema import load_table, save_table
from prunefront.cli.app import run as run_command
from prunefront.config import ModelSpec, PruneConfig
from prunefront.errors import ConfigError
from prunefront.training.checkpoints import CHECKPOINT_NAME, save_weights
from prunefront.training.errors import StoppedError
from prunefront.training.loop import train
from prunefront.training.recipes import PruningLoss, Recipe
from tests.integration.training.image_folders import write_images
from tests.integration.training.test_finetune import stop_after
from tests.unit.latency_tables.fakes import entry, simple_table

DATASET = "imagefolder:grey"
TINY: dict[str, Any] = {"patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3}
SPECS = {
    "vit": ModelSpec(name="vit_tiny_patch16_224", kwargs=TINY, img_size=32, num_classes=3),
    "lvvit": ModelSpec(name="lvvit_s", kwargs={**TINY, "stem_width": 8}, img_size=32, num_classes=3),
}
RECIPE = Recipe(
    objective="pruning-distillation",
    batch_size=8,
    lr=2e-2,
    lr_batch_size=None,
    backbone_lr_factor=0.01,
    augmentation=None,
    distillation=None,
    pruning=PruningLoss(ratio_weight=10.0),
)


@pytest.fixture(autouse=True)
def _grey(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRUNEFRONT_DATA_ROOTS", str(tmp_path / "data"))
    write_images(tmp_path / "data" / "grey" / "train", [15, 15, 15])
    write_images(tmp_path / "data" / "grey" / "val", [3, 3, 3])


def pair(method: str, backbone: str = "vit", ratio: float = 0.5) -> tuple[Any, Any]:
    """A student and the dense model that it comes from."""
    torch.manual_seed(0)
    dense = prunefront.create_dense(SPECS[backbone])
    sites = [{"block": 1, "op": "select", "cumulative_keep_ratio": ratio}]
    config = PruneConfig.model_validate({"model": SPECS[backbone], "method": method, "sites": sites})
    return prunefront.compress(dense, config), dense


def run(folder: Path, method: str = "dynamicvit", backbone: str = "vit", **options: Any) -> tuple[Any, Any]:
    student, dense = pair(method, backbone)
    options = {"epochs": 3, "recipe": RECIPE, "teacher": dense, "validates": False, **options}
    history = train(student, DATASET, folder=folder, **options)
    save_weights(student, folder / "model.safetensors")
    return student, history


@pytest.mark.parametrize("backbone", SPECS)
@pytest.mark.parametrize("method", ["dynamicvit", "spvit"])
def test_kept_share_comes_down_to_its_target(tmp_path: Path, method: str, backbone: str) -> None:
    student, history = run(tmp_path, method, backbone, epochs=12)
    last = {name.removeprefix("loss_"): value for name, value in history[-1].items()}
    assert {"classification", "ratio", "class_distillation", "token_distillation", "kept_0"} <= set(last)
    # Fresh predictors keep and drop by the noise alone; the ratio loss pulls the share to one half.
    assert last["ratio"] < 0.02
    assert last["kept_0"] == pytest.approx(0.5, abs=0.12)
    _, dense = pair(method, backbone)
    moved = {n: (p - q).abs().max() for (n, p), q in zip(dense.named_parameters(), student.parameters(), strict=False)}
    assert max(moved.values()) > 0, "the backbone learns too"


def test_killed_and_resumed_training_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    whole, _ = run(tmp_path / "whole")
    with pytest.raises(StoppedError):
        run(tmp_path / "broken", should_stop=stop_after(5))
    assert (tmp_path / "broken" / CHECKPOINT_NAME).exists()
    shutil.copytree(tmp_path / "broken", tmp_path / "copy")
    run(tmp_path / "copy")
    expected, got = (
        load_file(tmp_path / "whole" / "model.safetensors"),
        load_file(tmp_path / "copy" / "model.safetensors"),
    )
    assert expected.keys() == got.keys() and any("score_predictor" in name for name in expected)
    assert all(torch.equal(expected[name], got[name]) for name in expected)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"teacher": None}, "needs the dense model as its teacher"),
        ({"recipe": RECIPE.model_copy(update={"eval_mode": True})}, "needs eval_mode=false"),
    ],
)
def test_what_selection_cannot_learn_from_is_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        run(tmp_path, **changes)


def test_a_config_without_selection_is_refused(tmp_path: Path) -> None:
    _, dense = pair("dynamicvit")
    config = PruneConfig.model_validate(
        {"model": SPECS["vit"], "method": "evit", "sites": [{"block": 1, "op": "prune", "keep_ratio": 0.5}]}
    )
    with pytest.raises(ConfigError, match="the config has no 'select' site"):
        train(
            prunefront.compress(dense, config), DATASET, folder=tmp_path, epochs=1, recipe=RECIPE, teacher=dense,
            validates=False,
        )  # fmt: skip


@pytest.fixture
def line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A command that trains spvit from a checkpoint for one epoch, into ``run``, beside a table of its blocks."""
    monkeypatch.setenv("PRUNEFRONT_DATA_DIR", str(tmp_path / "own"))
    monkeypatch.chdir(tmp_path)
    student, dense = pair("spvit", ratio=0.9)
    student.prune_config.save("spvit.json")
    save_weights(dense, Path("dense.safetensors"))
    table = simple_table()
    # The selection itself costs 4 ms; everything else is 5 ms a token and block, and 6 ms at the ends.
    save_table(table.evolve(entries=(*table.entries, entry("block.spvit.select", 17, 17, 89.0))), "table.json")
    save_table(table, "old.json")
    words = f"train --config spvit.json --dataset {DATASET} --out run --checkpoint dense.safetensors --device cpu"
    return [*words.split(), "--epochs", "1", "--batch-size", "8", "--set", "repeats=1", "--no-test"]


@pytest.mark.parametrize("limit", ["--max-latency-ms 200", "--latency-share 0.767"])
def test_the_command_trains_to_the_keep_ratios_that_a_table_allows(
    line: list[str], capfd: pytest.CaptureFixture[str], limit: str
) -> None:
    assert run_command([*line, "--table", "table.json", *limit.split()]) == 0
    assert "predicts 195 ms of the dense model's 261 ms for keep ratios 0.562 from block 1" in capfd.readouterr().err
    for config in (
        prunefront.load_config("run/config.json"),
        prunefront.load_model("run/model.safetensors").prune_config,
    ):
        # 115 + 10 k ms for k patches, and a package in both blocks: 8 of them.
        assert [site.cumulative_keep_ratio for site in config.sites] == [0.562]
        assert predict_latency_ms(load_table("table.json"), config) == pytest.approx(195.0)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("--table table.json --max-latency-ms 100", "the table reaches down to 115.0 ms, 0.441 of the dense model's"),
        ("--table table.json --latency-share 1", "so there is nothing to prune"),
        ("--table old.json --max-latency-ms 200", "no entry 'block.spvit.select'.*Rebuild the table"),
        ("--table table.json", "need --table and one limit"),
        ("--max-latency-ms 200", "need --table and one limit"),
        ("--table table.json --max-latency-ms 200 --latency-share 0.7", "need --table and one limit"),
        ("--recipe default --max-latency-ms 200", "use them with --recipe dynamicvit or spvit"),
        ("--recipe default --table table.json", "--recipe diffrate, dynamicvit or spvit"),
    ],
)
def test_a_latency_that_cannot_be_aimed_at_is_refused(
    line: list[str], capfd: pytest.CaptureFixture[str], more: str, said: str
) -> None:
    assert run_command([*line, *more.split()]) == 2
    assert re.search(said, " ".join(capfd.readouterr().err.split()))
    assert not Path("run/checkpoint.pt").exists()
