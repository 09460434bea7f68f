"""MACs against the published counts and against torchprofile on the built models."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torchprofile import profile_macs

import prunefront
from prunefront.config import ModelSpec, PruneConfig
from prunefront.macs import MODEL_OPERATORS, macs_detail, official_torchprofile_macs
from prunefront.published_schedules import diffrate_sites
from tests.unit.library import models

RECORDED = json.loads((Path(__file__).parents[2] / "data" / "macs.json").read_text())
DIFFRATE_MODELS = {
    "ViT-T-DeiT": ModelSpec(name="deit_tiny_patch16_224"),
    "ViT-S-DeiT": ModelSpec(name="deit_small_patch16_224"),
    "ViT-B-DeiT": ModelSpec(name="deit_base_patch16_224"),
    "ViT-B-MAE": ModelSpec(name="vit_base_patch16_224.mae", kwargs={"global_pool": "avg"}, num_classes=1000),
    "ViT-L-MAE": ModelSpec(name="vit_large_patch16_224", kwargs={"global_pool": "avg"}),
    "ViT-H-MAE": ModelSpec(name="vit_huge_patch14_224", kwargs={"global_pool": "avg"}, num_classes=1000),
}


def _config(method: str, model: str | ModelSpec, sites: list[dict[str, Any]]) -> PruneConfig:
    spec = model if isinstance(model, ModelSpec) else ModelSpec(name=model)
    return PruneConfig.model_validate({"model": spec, "method": method, "sites": sites})


def _row_id(row: dict[str, Any]) -> str:
    keys = ("model", "keep_rate", "fuse_token", "r", "target")
    return "-".join(str(row[key]) for key in keys if key in row)


@pytest.mark.parametrize("name", RECORDED["baselines"])
def test_dense_macs_equal_the_recorded_ones(name: str) -> None:
    assert prunefront.macs(_config("hybrid", name, [])) == RECORDED["baselines"][name]["macs_matmul"]


@pytest.mark.parametrize("row", RECORDED["evit"], ids=_row_id)
def test_evit_macs_and_counts_equal_the_recorded_ones(row: dict[str, Any]) -> None:
    op = "fuse" if row["fuse_token"] else "prune"
    sites = [{"block": b, "op": op, "keep_ratio": row["keep_rate"]} for b in row["drop_loc"]]
    config = _config("evit", row["model"], sites)
    counts = prunefront.token_counts(config)
    assert (counts.tokens_in, counts.tokens_out) == (row["tokens_in"], row["tokens_out"])
    assert prunefront.macs(config) == row["macs_matmul"]
    assert official_torchprofile_macs(config) == row["macs_torchprofile"]


@pytest.mark.parametrize("row", RECORDED["tome"], ids=_row_id)
def test_tome_macs_and_counts_equal_the_recorded_ones(row: dict[str, Any]) -> None:
    sites = [{"block": b, "op": "merge", "remove": row["r"]} for b in range(len(row["tokens_in"]))]
    config = _config("tome", row["model"], sites)
    counts = prunefront.token_counts(config)
    assert (counts.tokens_in, counts.tokens_out) == (row["tokens_in"], row["tokens_out"])
    assert prunefront.macs(config) == row["macs_matmul"]
    assert official_torchprofile_macs(config) == row["macs_torchprofile"]


@pytest.mark.parametrize("row", RECORDED["ppt"], ids=lambda row: f"{row['model']}-{'-'.join(row['policy'].values())}")
def test_ppt_macs_equal_the_recorded_ones_for_every_policy(row: dict[str, Any]) -> None:
    sites = [{"block": b, "op": "pool_or_prune", "remove": row["r"]} for b in row["pp_loc_list"]]
    config = _config("ppt", row["model"], sites)
    policy = {int(block): branch for block, branch in row["policy"].items()}
    assert prunefront.macs(config) == row["macs_matmul"]
    assert prunefront.token_counts(config).tokens_out == row["tokens_out"]
    assert official_torchprofile_macs(config, ppt_policy=policy) == row["macs_torchprofile"]


@pytest.mark.parametrize("row", RECORDED["diffrate"], ids=_row_id)
def test_diffrate_macs_and_counts_equal_the_recorded_ones(row: dict[str, Any]) -> None:
    sites = diffrate_sites(row["prune_kept_num"], row["merge_kept_num"])
    config = _config("diffrate", DIFFRATE_MODELS[row["model"]], sites)
    counts = prunefront.token_counts(config)
    assert (counts.tokens_in, counts.tokens_out) == (row["tokens_in"], row["tokens_out"])
    assert prunefront.macs(config) == row["macs_matmul"]
    published = prunefront.published("diffrate", DIFFRATE_MODELS[row["model"]])
    assert prunefront.macs(published[f"diffrate-{row['target']}G"]) == row["macs_matmul"]


PREDICTOR_MODELS = {
    "deit-t": ModelSpec(name="deit_tiny_patch16_224"),
    "deit-256": ModelSpec(name="deit_tiny_patch16_224", kwargs={"embed_dim": 256, "num_heads": 4}),
    "deit-s": ModelSpec(name="deit_small_patch16_224"),
    "deit-b": ModelSpec(name="deit_base_patch16_224"),
    "lvvit-s": ModelSpec(name="lvvit_s"),
    "lvvit-m": ModelSpec(name="lvvit_m"),
}
PREDICTOR_ROWS = json.loads((Path(__file__).parents[2] / "data" / "macs_predictor_methods.json").read_text())


@pytest.mark.parametrize(
    "row", PREDICTOR_ROWS["dynamicvit"], ids=lambda row: f"{row['model']}-{row['base_rate'] or 'dense'}"
)
def test_dynamicvit_macs_and_counts_equal_the_recorded_ones(row: dict[str, Any]) -> None:
    if row["base_rate"] is None:
        assert prunefront.macs(_config("hybrid", PREDICTOR_MODELS[row["model"]], [])) == row["conv_linear_matmul_macs"]
        return
    sites = [
        {"block": block, "op": "select", "cumulative_keep_ratio": row["base_rate"] ** (stage + 1)}
        for stage, block in enumerate(row["pruning_loc"])
    ]
    config = _config("dynamicvit", PREDICTOR_MODELS[row["model"]], sites)
    schedule = prunefront.token_counts(config)
    assert [step.kept for block in schedule.blocks for step in block.steps] == row["kept_patch_tokens"]
    assert prunefront.macs(config) == row["conv_linear_matmul_macs"]


@pytest.mark.parametrize(
    "row",
    PREDICTOR_ROWS["spvit_if_tokens_are_really_removed"]["rows"],
    ids=lambda row: f"{row['model']}-{row['keep_targets'][0]}",
)
def test_spvit_macs_equal_the_recorded_ones(row: dict[str, Any]) -> None:
    spec = PREDICTOR_MODELS[row["model"]]
    locations = prunefront.published_schedules.selection_locations(prunefront.geometry.geometry_for(spec).depth)
    sites = [
        {"block": block, "op": "select", "cumulative_keep_ratio": target}
        for block, target in zip(locations, row["keep_targets"], strict=True)
    ]
    config = _config("spvit", spec, sites)
    assert not prunefront.token_counts(config).is_static
    assert prunefront.macs(config) == row[next(name for name in row if name.endswith("macs"))]


def _profiled(model: torch.nn.Module, spec: ModelSpec) -> int:
    """torchprofile's linear, convolution, matmul and attention counts of one image."""
    size = spec.img_size if isinstance(spec.img_size, tuple) else (spec.img_size or 224,) * 2
    counted = ("linear", "addmm", "matmul", "bmm", "convolution", "scaled_dot_product_attention", "einsum")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing warns about every size it freezes
        nodes = profile_macs(model, torch.zeros(1, spec.in_chans, *size), reduction=None)
    return sum(count for node, count in nodes.items() if any(name in node.operator for name in counted))


@pytest.mark.parametrize("name", models.static_schedules())
def test_torchprofile_on_the_built_model_equals_the_detail(name: str) -> None:
    config = models.schedules()[name]
    model = prunefront.compress(models.build(config.model), config)
    assert _profiled(model, config.model) == macs_detail(config).total


@pytest.mark.parametrize(
    "spec",
    [
        models.small_spec("deit_tiny_distilled_patch16_224"),
        models.small_spec(global_pool="avg", class_token=False),
        models.small_spec(global_pool="map", class_token=False),
        models.small_spec(reg_tokens=3, init_values=0.1),
        models.small_spec(img_size=(32, 64)),
        models.small_spec("vit_base_patch14_reg4_dinov2", mlp_ratio=2, num_classes=5),
        models.small_spec("vit_giant_patch14_dinov2", mlp_ratio=2, num_classes=5),
        models.small_spec("lvvit_s", stem_width=8),
    ],
    ids=["distilled", "gap", "map", "registers", "non-square", "dinov2", "swiglu", "lvvit"],
)
def test_torchprofile_equals_the_detail_on_other_families(spec: ModelSpec) -> None:
    sites = [{"block": b, "op": "merge", "remove": 5} for b in (0, 2)]
    config = models.config("tome", sites, spec)
    model = prunefront.compress(models.build(spec), config)
    assert _profiled(model, spec) == macs_detail(config).total


def test_detail_lists_what_reductions_add_beside_the_model() -> None:
    detail = macs_detail(models.schedules()["hybrid"])
    assert {"class_row", "similarity", "merge", "fuse"} <= set(detail.blocks[0])
    assert detail.model == detail.stem + detail.head + sum(
        count for block in detail.blocks for op, count in block.items() if op in MODEL_OPERATORS
    )
    assert detail.total > detail.model
