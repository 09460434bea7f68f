"""Training of learned selection through the loop: DynamicViT and SPViT, on a ViT and on LV-ViT."""

from __future__ import annotations

import itertools
import json
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
from prunefront.training.finetune import finetune
from prunefront.training.loop import BEST_NAME, EMA_NAME, train
from prunefront.training.recipes import PruningLoss, Recipe, SelectorPhases
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


PHASES = SelectorPhases(epochs=1, max_drop=None)
PHASED = RECIPE.model_copy(update={"phases": PHASES, "ema_decay": 0.9, "drop_path": 0.2})
SITES = [(0, 0.9), (1, 0.5), (2, 0.48)]  # the last two end as one


def phased(
    folder: Path, method: str = "spvit", recipe: Recipe = PHASED, look: Any = None, **options: Any
) -> tuple[Any, Any]:
    """A training of three selectors; ``look`` is called with the model after each epoch."""
    torch.manual_seed(0)
    dense = prunefront.create_dense(SPECS["vit"])
    sites = [{"block": block, "op": "select", "cumulative_keep_ratio": ratio} for block, ratio in SITES]
    config = PruneConfig.model_validate({"model": SPECS["vit"], "method": method, "sites": sites})
    student: Any = prunefront.compress(dense, config)
    options = {"epochs": 5, "on_epoch": None if look is None else lambda *_: look(student), **options}
    history = train(student, DATASET, folder=folder, recipe=recipe, teacher=dense, **options)
    save_weights(student, folder / "model.safetensors")
    return student, history


@pytest.mark.parametrize("method", ["dynamicvit", "spvit"])
def test_selectors_join_one_by_one_and_the_others_stay_bit_for_bit(tmp_path: Path, method: str) -> None:
    snapshots: list[list[dict[str, torch.Tensor]]] = []
    has_best: list[bool] = []

    def look(model: Any) -> None:
        snapshots.append(
            [{name: tensor.clone() for name, tensor in part.state_dict().items()} for part in model.score_predictor]
        )
        has_best.append((tmp_path / BEST_NAME).exists())

    student, history = phased(tmp_path, method, look=look)
    moved = [
        [
            any(not torch.equal(before[name], after[name]) for name in before)
            for before, after in zip(*pair, strict=True)
        ]
        for pair in itertools.pairwise(snapshots)
    ]

    assert [record["phase"] for record in history] == [0, 1, 2, 3, 3]
    # Epochs 1 to 4 against the ones before; the last selector has no work once its site is merged.
    assert moved == [[False, True, True], [True, True, True], [True, True, False], [True, True, False]]
    kept = [sorted(name for name in record if name.startswith("loss_kept_")) for record in history]
    assert [[int(name[-1]) for name in names] for names in kept] == [[2], [1, 2], [0, 1, 2], [0, 1], [0, 1]]
    # Fewer selectors are no rival of the final ones.
    assert has_best == [False, False, False, True, True]
    for name in (BEST_NAME, EMA_NAME):
        final = prunefront.load_model(tmp_path / name)
        assert [(site.block, site.cumulative_keep_ratio) for site in final.prune_config.sites] == [(0, 0.9), (1, 0.48)]
    assert len(student.score_predictor) == 3


@pytest.mark.parametrize("steps", [3, 4, 9, 15])
def test_a_phased_training_resumes_bit_for_bit(tmp_path: Path, steps: int) -> None:
    # 34 images make four steps an epoch; asking goes on while it validates.
    recipe = PHASED.model_copy(update={"phases": SelectorPhases(epochs=2, max_drop=0.05, ratio_tolerance=0.3)})
    options: dict[str, Any] = {"recipe": recipe, "epochs": 8}
    _, whole = phased(tmp_path / "whole", **options)
    done = [0.0]
    with pytest.raises(StoppedError):
        phased(
            tmp_path / "parts", **options,
            progress=lambda number, *_: done.__setitem__(0, number), should_stop=lambda: done[0] >= steps,
        )  # fmt: skip
    _, resumed = phased(tmp_path / "parts", **options)

    assert resumed == whole
    for name in ("model.safetensors", BEST_NAME, EMA_NAME):
        one, other = load_file(tmp_path / "whole" / name), load_file(tmp_path / "parts" / name)
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one), name


def test_a_selector_joins_early_where_the_search_split_says_so(tmp_path: Path) -> None:
    easy = SelectorPhases(epochs=3, max_drop=1.0, ratio_tolerance=1.0)
    options: dict[str, Any] = {"recipe": PHASED.model_copy(update={"phases": easy}), "epochs": 10}
    _, looked_at = phased(tmp_path / "looked", **options)
    _, unseen = phased(tmp_path / "unseen", **options, validates=False)

    assert [record["phase"] for record in looked_at] == [0, 1, 2, *[3] * 7]
    assert len({record["teacher_search_top1"] for record in looked_at}) == 1
    assert [record["phase"] for record in unseen] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3]


def test_fine_tuning_of_one_config_takes_no_phases(tmp_path: Path) -> None:
    student, dense = pair("spvit")
    with pytest.raises(ConfigError, match="fine-tuning keeps its config; set phases=null"):
        finetune(student, DATASET, epochs=2, checkpoint_dir=tmp_path, recipe=PHASED, teacher=dense)


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


def test_the_command_ends_with_the_merged_sites(line: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    config = prunefront.load_config("spvit.json")
    sites = [{"block": block, "op": "select", "cumulative_keep_ratio": ratio} for block, ratio in SITES]
    merged = [(0, 0.9), (1, 0.48)]
    PruneConfig.model_validate({**config.to_dict(), "sites": sites}).save("three.json")
    phases = "--epochs 4 --set phases.epochs=1 --set phases.max_drop=null --json".split()

    assert run_command([*line, "--config", "three.json", *phases]) == 0
    result = json.loads(capfd.readouterr().out)
    final = prunefront.load_model("run/model.safetensors").prune_config
    assert [(site.block, site.cumulative_keep_ratio) for site in final.sites] == merged
    assert prunefront.load_config("run/config.json").content_hash() == final.content_hash()
    assert result["macs"] == prunefront.macs(final)
    log = [row.split(",") for row in Path("run/log.csv").read_text().splitlines()]
    assert [float(row[log[0].index("phase")]) for row in log[1:]] == [0, 1, 2, 3]
    assert result["best_search_top1"] == result["search_top1"]  # of the only epoch that all of them trained

    assert run_command([*line, "--config", "three.json", "--epochs", "3", "--set", "phases.epochs=1"]) == 2
    assert "leave none of the 3 epochs" in capfd.readouterr().err
