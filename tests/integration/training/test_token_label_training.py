"""Training of LV-ViT with token labels and MixToken: through the loop and by the command."""

from __future__ import annotations

import json
import re
import shutil
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
from prunefront.training.recipes import Recipe, TokenLabels
from tests.integration.training.image_folders import write_images
from tests.integration.training.test_distributed import torchrun
from tests.integration.training.test_finetune import stop_after

DATASET = "imagefolder:grey"
SPEC = ModelSpec(
    name="lvvit_s",
    kwargs={"patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3, "stem_width": 8},
    img_size=32,
    num_classes=3,
)
DENSE: tuple[dict[str, Any], ...] = ()
PRUNED = ({"block": 1, "op": "fuse", "tokens": 9},)
RECIPE = Recipe(
    objective="token-labels",
    start="random",
    batch_size=8,
    lr=2e-3,
    lr_batch_size=None,
    drop_path=0.1,
    augmentation=None,
    distillation=None,
    token_labels=TokenLabels(),
)
FROM_TEACHER = RECIPE.model_copy(update={"token_labels": TokenLabels(source="teacher")})


@pytest.fixture(autouse=True)
def _grey(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRUNEFRONT_DATA_ROOTS", str(tmp_path / "data"))
    monkeypatch.setenv("PRUNEFRONT_DATA_DIR", str(tmp_path / "own"))
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "data" / "grey" / "train", [15, 15, 15])
    write_images(tmp_path / "data" / "grey" / "val", [3, 3, 3])


def config(sites: tuple[dict[str, Any], ...], spec: ModelSpec = SPEC) -> PruneConfig:
    return PruneConfig.model_validate({"model": spec, "method": "evit", "sites": sites})


def run(folder: Path, sites: tuple[dict[str, Any], ...] = DENSE, seed: int = 0, **options: Any) -> tuple[Any, Any]:
    torch.manual_seed(seed)
    model = prunefront.create_model(config(sites))
    options = {"epochs": 3, "recipe": RECIPE, "validates": False, **options}
    history = train(model, DATASET, folder=folder, **options)
    save_weights(model, folder / "model.safetensors")
    return model, history


@pytest.mark.parametrize("sites", [DENSE, PRUNED], ids=["dense", "pruned"])
def test_class_token_and_patches_learn_the_classes(tmp_path: Path, sites: tuple[dict[str, Any], ...]) -> None:
    model, history = run(tmp_path, sites, epochs=12, validates=True)

    # MixToken shows other brightnesses than the labels' in training; whole images are told apart.
    assert history[-1]["search_top1"] == 1.0
    assert history[-1]["loss_tokens"] < 0.7 * history[0]["loss_tokens"]
    assert history[-1]["loss_classification"] < history[0]["loss_classification"]
    assert not model.patch_embed.proj._forward_hooks


def test_a_teacher_labels_the_tokens(tmp_path: Path) -> None:
    teacher, _ = run(tmp_path / "teacher", epochs=12)
    dense = prunefront.uncompress(teacher)

    _, history = run(tmp_path / "student", seed=1, epochs=12, recipe=FROM_TEACHER, teacher=dense, validates=True)

    assert history[-1]["search_top1"] == 1.0


@pytest.mark.parametrize("recipe", [RECIPE, FROM_TEACHER], ids=["image", "teacher"])
def test_killed_and_resumed_training_equals_an_uninterrupted_one(tmp_path: Path, recipe: Recipe) -> None:
    torch.manual_seed(7)
    options: dict[str, Any] = {"sites": PRUNED, "recipe": recipe, "teacher": prunefront.create_dense(SPEC)}
    _, whole = run(tmp_path / "whole", **options)
    with pytest.raises(StoppedError):
        run(tmp_path / "broken", should_stop=stop_after(5), **options)
    shutil.copytree(tmp_path / "broken", tmp_path / "copy")
    torch.manual_seed(99)  # the resumed process has other random numbers
    _, resumed = run(tmp_path / "copy", **options)

    assert resumed == whole
    expected, got = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "copy"))
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[name], got[name]) for name in expected)


def command(
    sites: tuple[dict[str, Any], ...], *more: str, spec: ModelSpec = SPEC, recipe: str = "lvvit-scratch"
) -> int:
    """Train a config's model for one epoch into ``run``."""
    config(sites, spec).save("config.json")
    words = f"train --config config.json --dataset {DATASET} --out run --epochs 1 --batch-size 8 --device cpu --no-test"
    return run_command([*words.split(), "--recipe", recipe, *more])


@pytest.mark.parametrize("sites", [DENSE, PRUNED], ids=["dense", "pruned"])
def test_the_command_trains_from_scratch(sites: tuple[dict[str, Any], ...]) -> None:
    assert command(sites) == 0

    recipe = json.loads(Path("run/recipe.json").read_text())
    assert (recipe["name"], recipe["objective"], recipe["drop_path"]) == ("lvvit-scratch", "token-labels", 0.1)
    assert "loss_tokens" in Path("run/log.csv").read_text()


def test_weights_of_another_resolution_and_a_teacher_start_a_fine_tuning() -> None:
    save_weights(prunefront.create_model(config(DENSE)), Path("small.safetensors"))
    large = SPEC.model_copy(update={"img_size": 48})
    teacher = ["--set", "token_labels.source=teacher"]

    assert command(DENSE, "--checkpoint", "small.safetensors", *teacher, spec=large, recipe="lvvit-finetune") == 0
    assert load_file("run/model.safetensors")["pos_embed"].shape[1] == 1 + 36


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ("--set token_labels.source=teacher", "weights are random here; .*--set token_labels.source=image"),
        ("--teacher lvvit_m", "This recipe has no teacher; add --set token_labels.source=teacher"),
        ("--set cutmix=1", "MixToken replaces mixup and cutmix, but the recipe has mixup=0 and cutmix=1"),
        ("--set token_labels.source=nfnet", "token_labels.source: Input should be 'image' or 'teacher'"),
    ],
)
def test_bad_input_is_one_sentence(capfd: pytest.CaptureFixture[str], more: str, sentence: str) -> None:
    assert command(DENSE, *more.split()) == 2

    message = capfd.readouterr().err
    assert re.search(sentence, " ".join(message.split()))
    assert "Traceback" not in message


def test_a_model_without_a_classifier_on_tokens_is_refused(capfd: pytest.CaptureFixture[str]) -> None:
    kwargs = {name: value for name, value in SPEC.kwargs.items() if name != "stem_width"}
    vit = ModelSpec(name="vit_tiny_patch16_224", kwargs=kwargs, img_size=32, num_classes=3)

    assert command(DENSE, spec=vit) == 2
    assert "which only LV-ViT has. Use a config of lvvit_t" in " ".join(capfd.readouterr().err.split())


@pytest.mark.slow
def test_two_processes_train_even_where_the_token_loss_counts_nothing() -> None:
    # They wait for the gradient of every parameter, the token classifier's too.
    config(PRUNED).save("config.json")
    words = f"train --config config.json --dataset {DATASET} --out run --epochs 1 --batch-size 4 --device cpu --no-test"
    options = ["--recipe", "lvvit-scratch", "--set", "token_labels.token_weight=0", "--json"]

    done = torchrun("-m", "prunefront", *words.split(), *options)

    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["loss"] > 0
