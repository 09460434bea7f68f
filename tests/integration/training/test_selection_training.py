"""Training of learned selection through the loop: DynamicViT and SPViT, on a ViT and on LV-ViT."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import prunefront
from prunefront.config import ModelSpec, PruneConfig
from prunefront.errors import ConfigError
from prunefront.training.checkpoints import CHECKPOINT_NAME, save_weights
from prunefront.training.errors import StoppedError
from prunefront.training.loop import train
from prunefront.training.recipes import PruningLoss, Recipe
from tests.integration.training.image_folders import write_images
from tests.integration.training.test_finetune import stop_after

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
