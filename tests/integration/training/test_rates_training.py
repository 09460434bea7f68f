"""Learning DiffRate's counts: through the loop, interrupted, and as a user types it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import prunefront
from prunefront.cli.app import run as run_command
from prunefront.config import ModelSpec, PruneConfig
from prunefront.training.checkpoints import save_weights
from prunefront.training.errors import StoppedError
from prunefront.training.loop import train
from prunefront.training.rates import RateLearner
from prunefront.training.recipes import RateTarget, Recipe
from tests.integration.training.image_folders import write_images
from tests.integration.training.test_finetune import stop_after

DATASET = "imagefolder:grey"
TINY: dict[str, Any] = {"patch_size": 4, "embed_dim": 48, "depth": 4, "num_heads": 3}
SPEC = ModelSpec(name="vit_tiny_patch16_224", kwargs=TINY, img_size=32, num_classes=3)
CONFIG = PruneConfig(model=SPEC, method="diffrate")
RECIPE = Recipe(
    objective="kept-counts",
    batch_size=8,
    lr=0.2,
    lr_batch_size=None,
    weight_decay=0.0,
    augmentation=None,
    distillation=None,
    rates=RateTarget(cost_share=0.6, granularity=2),
)


@pytest.fixture(autouse=True)
def _grey(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRUNEFRONT_DATA_ROOTS", str(tmp_path / "data"))
    monkeypatch.setenv("PRUNEFRONT_DATA_DIR", str(tmp_path / "own"))
    write_images(tmp_path / "data" / "grey" / "train", [15, 15, 15])
    write_images(tmp_path / "data" / "grey" / "val", [3, 3, 3])


def learner() -> RateLearner:
    torch.manual_seed(0)
    return RateLearner(prunefront.create_dense(SPEC), CONFIG, granularity=2)


def share(config: PruneConfig) -> float:
    return prunefront.macs(config) / prunefront.macs(CONFIG)


def test_counts_meet_the_target_and_weights_stay(tmp_path: Path) -> None:
    model = learner()
    before = {name: tensor.clone() for name, tensor in model.model.state_dict().items()}
    history = train(model, DATASET, folder=tmp_path, epochs=15, recipe=RECIPE)
    assert share(model.learned_config()) == pytest.approx(0.6, abs=0.05)
    assert history[-1]["loss_cost_share"] == pytest.approx(0.6, abs=0.05)
    assert "search_top1" in history[-1]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.model.state_dict().items())


def test_interrupted_learning_ends_with_the_same_counts(tmp_path: Path) -> None:
    whole, broken, resumed = learner(), learner(), learner()
    options: dict[str, Any] = {"epochs": 3, "recipe": RECIPE, "validates": False}
    train(whole, DATASET, folder=tmp_path / "whole", **options)
    with pytest.raises(StoppedError):
        train(broken, DATASET, folder=tmp_path / "broken", should_stop=stop_after(5), **options)
    train(resumed, DATASET, folder=tmp_path / "broken", **options)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_the_command_writes_the_learned_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    CONFIG.save("diffrate.json")
    save_weights(prunefront.uncompress(learner().model), tmp_path / "dense.safetensors")
    line = (
        f"train --config diffrate.json --recipe diffrate --dataset {DATASET} --out run --checkpoint dense.safetensors"
    )
    settings = "--out run --epochs 12 --batch-size 8 --set lr=0.2 --set augmentation=null --set rates.cost_share=0.6 "
    settings += "--set rates.granularity=2 --set repeats=1 --device cpu --json"
    assert run_command([*line.split(), *settings.split()]) == 0
    assert json.loads(capfd.readouterr().out)["recipe"] == "diffrate"
    config = prunefront.load_config("run/config.json")
    assert share(config) == pytest.approx(0.6, abs=0.06)
    saved, dense = load_file("run/model.safetensors"), load_file("dense.safetensors")
    assert saved.keys() == dense.keys() and all(torch.equal(saved[name], dense[name]) for name in dense)
    assert prunefront.load_model("run/model.safetensors").prune_config.content_hash() == config.content_hash()


def test_a_table_without_counts_to_learn_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    CONFIG.save("diffrate.json")
    save_weights(prunefront.uncompress(learner().model), tmp_path / "dense.safetensors")
    line = f"train --config diffrate.json --recipe default --dataset {DATASET} --out run --checkpoint dense.safetensors"
    assert run_command([*line.split(), "--table", "table.json", "--batch-size", "8"]) == 2
    assert "--recipe diffrate" in capfd.readouterr().err
