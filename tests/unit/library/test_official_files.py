"""Files as the papers' training scripts write them: read safely, understood as far as they tell, asked about beyond."""

from __future__ import annotations

import argparse
import json
import os
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor

from prunefront.errors import CheckpointError, ConfigError
from prunefront.official import load_official, recorded_input
from prunefront.official_files import infer_architecture, infer_hparams

GOLDEN = Path(__file__).parents[2] / "data" / "golden"

# Case → what its file cannot tell: heads of 12 or 16 channels, locations, LV-ViT's divisor; and the stored arguments.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "evit/d6_mixed_fuse": ({"num_heads": 3}, {"keep_rate": [0.9, 1, 0.6, 1, 0.35, 1]}, {"fuse_token": True}),
    "ppt/d6_mixed": ({"num_heads": 4}, {"pp_loc_list": "1,3"}, {"r_tokens": 10, "threshold": 5.24e-05}),
    "tome/d6_r8": ({"num_heads": 4}, {"r": 8}, {}),
    "tome/d6_list_distilled": ({"num_heads": 4}, {"r": "0,10,6,0,5"}, {}),
    "diffrate/d6_prune_merge": (
        {"num_heads": 4},
        {"prune_kept_num": "65 60 50 38 25 9", "merge_kept_num": [65, 54, 43, 30, 18, 5]},
        {},
    ),
    "dynamicvit/deit_eval_r07": ({"num_heads": 3}, {"pruning_loc": [1, 3, 5]}, {"base_rate": 0.7}),
    "spvit/deit_eval": ({}, {"pruning_loc": "(1, 3, 5)"}, {"base_rate": 0.7}),
    "trilevel/deit_d12_k090_a010": ({"num_heads": 2}, {}, {"keep_ratio": 0.9, "attn_ratio": 0.1}),
    "lvvit/dense_eval": ({"num_heads": 4, "skip_lam": 2.0}, {}, {}),
}


def load_case(name: str) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    folder = GOLDEN / name
    tensors = load_file(folder / "tensors.safetensors")
    weights = {key.removeprefix("weights/"): value for key, value in tensors.items() if key.startswith("weights/")}
    return json.loads((folder / "case.json").read_text()), tensors, weights


@pytest.mark.parametrize("name", CASES)
def test_a_training_scripts_file_gives_the_recorded_logits(name: str, tmp_path: Path) -> None:
    architecture, hparams, arguments = CASES[name]
    case, tensors, weights = load_case(name)
    path = tmp_path / "checkpoint.pth"
    args = argparse.Namespace(**arguments, lr=5e-4, output_dir="out")
    torch.save({"model": weights, "optimizer": {"state": {}}, "epoch": 29, "args": args}, path)

    model = load_official(case["method"], path, architecture=architecture, hparams=hparams)

    with torch.no_grad():
        logits = model(recorded_input(case, tensors))
    torch.testing.assert_close(logits, tensors["logits"], atol=2e-4, rtol=0)
    assert not model.training


@pytest.mark.parametrize("layout", ["bare", "module", "state_dict", "model_ema"])
def test_every_layout_of_the_field_is_read(layout: str, tmp_path: Path) -> None:
    case, tensors, weights = load_case("tome/d6_r8")
    path = tmp_path / "checkpoint.pth"
    document: dict[str, Any] = {"epoch": 3, layout: weights}
    if layout == "bare":
        document = dict(weights)
    if layout == "module":
        document = {f"module.{name}": value for name, value in weights.items()}
    torch.save(document, path)

    model = load_official("tome", path, architecture={"num_heads": 4}, hparams={"r": 8})

    with torch.no_grad():
        torch.testing.assert_close(model(tensors["input"]), tensors["logits"], atol=2e-4, rtol=0)


class Gadget:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


def test_a_file_that_would_run_a_program_is_refused_and_runs_nothing(tmp_path: Path) -> None:
    trace = tmp_path / "it-ran"
    path = tmp_path / "checkpoint.pth"
    torch.save({"model": {}, "args": Gadget(f"touch {trace}")}, path)

    with pytest.raises(CheckpointError, match=r"as weights only: it wants to run posix\.system\. Save"):
        load_official("evit", path)
    assert not trace.exists()


def test_settings_of_yacs_are_read_without_yacs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("yacs.config")
    node = type("CfgNode", (dict,), {"__module__": "yacs.config"})
    module.CfgNode = node  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
    monkeypatch.setitem(sys.modules, "yacs.config", module)
    weights = timm.create_model("deit_tiny_patch16_224", depth=1, num_classes=5).state_dict()
    path = tmp_path / "checkpoint.pth"
    torch.save({"model": weights, "config": node(MODEL=node(NAME="swin"))}, path)
    monkeypatch.undo()

    assert load_official("tome", path, hparams={"r": 0}).num_classes == 5


@pytest.mark.parametrize(
    ("name", "heads"),
    [("deit_tiny_patch16_224", 3), ("deit_small_distilled_patch16_224", 6), ("vit_base_patch32_224", 12)],
)
def test_the_architecture_of_timms_models_is_seen_in_their_weights(name: str, heads: int) -> None:
    with torch.device("meta"):
        model: Any = timm.create_model(name)

    described = infer_architecture(model.state_dict())

    assert described == {
        "arch": "deit", "patch_size": model.patch_embed.patch_size[0], "embed_dim": model.embed_dim, "depth": 12,
        "mlp_ratio": 4.0, "qkv_bias": True, "num_classes": 1000, "in_chans": 3, "distilled": "distilled" in name,
        "layernorm_eps": 1e-6, "img_size": 224, "num_heads": heads,
    }  # fmt: skip


@pytest.mark.parametrize(("name", "heads", "divisor"), [("lvvit_t", 4, 1.0), ("lvvit_s", 6, 2.0), ("lvvit_m", 8, 2.0)])
def test_lvvit_is_told_by_its_stem(name: str, heads: int, divisor: float) -> None:
    with torch.device("meta"):
        state = timm.create_model(name).state_dict()

    described = infer_architecture(state)

    shown = {key: described[key] for key in ("arch", "num_heads", "skip_lam", "mlp_ratio", "layernorm_eps", "img_size")}
    assert shown == {
        "arch": "lvvit", "num_heads": heads, "skip_lam": divisor, "mlp_ratio": 3.0, "layernorm_eps": 1e-5,
        "img_size": 224,
    }  # fmt: skip
    assert described["stem_width"] == 64


def official_swin() -> dict[str, Tensor]:
    """timm's Swin under the official names, with the buffers that the official code stores."""
    swin: Any = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=56, window_size=7, embed_dim=16, depths=(2, 4), num_heads=(2, 4),
        num_classes=5,
    )  # fmt: skip
    state = swin.state_dict()
    state["head.weight"], state["head.bias"] = state.pop("head.fc.weight"), state.pop("head.fc.bias")
    for name in [name for name in state if name.startswith("layers.1.downsample")]:
        state[name.replace("layers.1.", "layers.0.")] = state.pop(name)
    state["layers.0.blocks.1.attn_mask"] = torch.zeros(4, 49, 49)  # 14 x 14 patches are 2 x 2 windows
    return state


def test_swin_is_seen_whole_in_its_weights(tmp_path: Path) -> None:
    state = official_swin()

    described = infer_architecture(state)

    assert described == {
        "patch_size": 4, "embed_dim": 16, "depths": [2, 4], "num_heads": [2, 4], "window_size": 7, "mlp_ratio": 4.0,
        "num_classes": 5, "in_chans": 3, "norm_eps": 1e-5, "img_size": 56,
    }  # fmt: skip
    path = tmp_path / "swin.pth"
    torch.save({"model": state}, path)
    model = load_official("trilevel", path, hparams={"stage": 1})
    assert model(torch.zeros(1, 3, 56, 56)).shape == (1, 5)


def test_searched_counts_of_diffrate_come_from_its_candidates() -> None:
    # Shares 1/2, 1/4, 1/4 of 16, 12, 8 are 13, with the class token 14; equal shares of 16, 12 are 14, and 15.
    halves = torch.tensor([0.5, 0.25, 0.25]).log()
    state = {
        "blocks.0.prune_ddp.kept_token_candidate": torch.tensor([16.0, 12.0, 8.0]),
        "blocks.0.prune_ddp.selected_probability": halves,
        "blocks.0.merge_ddp.kept_token_candidate": torch.tensor([16.0, 12.0]),
        "blocks.0.merge_ddp.selected_probability": torch.zeros(2),
    }

    assert infer_hparams("diffrate", state, {}, {}, depth=1) == {"prune_kept_num": [14], "merge_kept_num": [15]}


def test_what_was_given_goes_before_what_was_stored() -> None:
    stored = {"base_keep_rate": 0.7, "drop_loc": "(3, 6, 9)", "fuse_token": True, "lr": 1.0}

    assert infer_hparams("evit", {}, stored, {}, depth=12) == {
        "base_keep_rate": 0.7, "drop_loc": [3, 6, 9], "fuse_token": True,
    }  # fmt: skip
    assert infer_hparams("evit", {}, stored, {"base_keep_rate": 0.5}, depth=12)["base_keep_rate"] == 0.5
    assert infer_hparams("evit", {}, stored, {"fuse_token": "False"}, depth=12)["fuse_token"] is False
    rates = [0.5] * 12
    assert infer_hparams("evit", {}, stored, {"keep_rate": rates}, depth=12) == {"keep_rate": rates, "fuse_token": True}


@pytest.mark.parametrize(
    ("method", "model", "hparams", "sentence"),
    [
        ("evit", {}, {"base_keep_rate": 0.7}, "does not tell fuse_token of evit.*Give --hparam fuse_token=VALUE"),
        ("tome", {}, {}, "does not tell r of tome"),
        ("diffrate", {}, {}, "does not tell prune_kept_num and merge_kept_num"),
        ("ppt", {}, {"r": "many"}, "list of numbers such as 3,6,9, but got 'many'"),
        ("tome", {"embed_dim": 48, "num_heads": 3}, {"r": 1}, "width 48, no multiple of 64.*Give --num-heads"),
        ("tome", {"img_size": (224, 112)}, {"r": 1}, "98 patches, which are no square.*Give --img-size"),
    ],
)
def test_what_cannot_be_known_is_asked_for(
    method: str, model: dict[str, Any], hparams: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    path = tmp_path / "c.pth"
    torch.save(timm.create_model("deit_tiny_patch16_224", depth=1, **model).state_dict(), path)

    with pytest.raises(ConfigError, match=sentence):
        load_official(method, path, hparams=hparams)


@pytest.mark.parametrize(
    ("method", "state", "model", "sentence"),
    [
        ("dynamicvit", {}, None, "has its own learned predictors, but .* has none"),
        ("evit", {"score_predictor.0.senet.0.weight": torch.zeros(1, 3)}, None, "Use --official spvit"),
        ("tome", {}, "deit_small_patch16_224", "12 blocks of width 384, but .* has 1 of width 192"),
    ],
)
def test_files_of_another_method_or_model_are_refused(
    method: str, state: dict[str, Tensor], model: str | None, sentence: str, tmp_path: Path
) -> None:
    path = tmp_path / "c.pth"
    torch.save(timm.create_model("deit_tiny_patch16_224", depth=1).state_dict() | state, path)

    with pytest.raises(CheckpointError, match=sentence):
        load_official(method, path, model=model, hparams={"r": 1})


def test_a_file_without_a_vit_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.pth"
    torch.save({"fc.weight": torch.zeros(2, 2)}, path)

    with pytest.raises(CheckpointError, match="should hold a DeiT, ViT, LV-ViT or Swin .* but has fc.weight"):
        load_official("tome", path, hparams={"r": 1})


def test_images_are_prepared_as_in_the_papers(tmp_path: Path) -> None:
    from prunefront.training.data import data_config_of

    path = tmp_path / "c.pth"
    torch.save(timm.create_model("vit_tiny_patch16_224").state_dict(), path)

    plain = data_config_of(load_official("tome", path, hparams={"r": 0}))
    named = data_config_of(load_official("tome", path, model="vit_tiny_patch16_224", hparams={"r": 0}))

    assert (plain.crop_pct, plain.interpolation, plain.mean[0]) == (0.875, "bicubic", 0.485)
    assert (named.crop_pct, named.mean) == (0.875, (0.5, 0.5, 0.5))
