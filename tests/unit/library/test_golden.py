"""Recorded outputs of the papers' official code against ours.

A few small cases travel with the project; all others are tried when the folder that holds them lies beside the clone.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import prunefront
from prunefront.errors import CheckpointError, ConfigError
from prunefront.macs import official_torchprofile_macs

PROJECT = Path(__file__).parents[3]
# Given to a case rather than recorded from it.
GIVEN = {"input", "x", "policy", "upstream_grad", "targets", "teacher_logits", "teacher_tokens"}
JSON_KINDS = ("loss", "token_label_loss", "example_level")
# Ranked by scores that may lie closer than rounding: the sets have to agree.
UNORDERED = {"dynamicvit": ("kept_idx", "kept_orig_idx")}
LEARNED = ("dynamicvit", "spvit", "trilevel")


def _cases(*kinds: str) -> list[Path]:
    own = PROJECT / "tests" / "data" / "golden"
    beside = PROJECT.parent / "shared" / "golden"
    found = {
        path.parent.relative_to(root): path.parent for root in (own, beside) for path in root.glob("*/*/case.json")
    }
    return [folder for name, folder in sorted(found.items()) if _kind(folder) in kinds]


def _kind(folder: Path) -> str:
    return str(json.loads((folder / "case.json").read_text()).get("kind", "eval_forward"))


def _load(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    tensors = folder / "tensors.safetensors"
    return json.loads((folder / "case.json").read_text()), load_file(tensors) if tensors.exists() else {}


def _name(folder: Path) -> str:
    return "-".join(folder.parts[-2:])


TENSOR_CASES = _cases("eval_forward", "dense_eval", "train_forward", "masked_block", "predictor")
EVAL_CASES = _cases("eval_forward", "dense_eval")


@pytest.mark.parametrize("folder", TENSOR_CASES, ids=_name)
def test_replay_equals_every_recorded_tensor(folder: Path) -> None:
    case, tensors = _load(folder)
    results = prunefront.official.replay(case, tensors)
    recorded = {
        name: t
        for name, t in tensors.items()
        if name not in GIVEN and not name.startswith(("weights/", "gumbel_noise/"))
    }
    assert set(recorded) <= set(results)
    unordered = UNORDERED.get(case["method"], ())
    was_reordered = False
    for name, expected in recorded.items():
        got = results[name]
        if name.partition("/")[0] in unordered:
            if was_reordered and name.startswith("kept_idx/"):
                continue  # positions among tokens in another order; kept_orig_idx says whether they are the same
            was_reordered |= not torch.equal(got, expected)
            assert torch.equal(got.sort(dim=1).values, expected.sort(dim=1).values), name
        elif was_reordered and name.startswith("pred_score/"):
            torch.testing.assert_close(got.sort(dim=1).values, expected.sort(dim=1).values, atol=1e-4, rtol=1e-4)
        elif expected.is_floating_point():
            # Gradients are compared by their own scale, as the cases suggest.
            scale = float(expected.abs().max()) if name.startswith("grad/") else 1.0
            atol = 1e-4 * scale if name.startswith("grad/") else _atol(case)
            torch.testing.assert_close(got, expected, atol=atol, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
        else:
            assert torch.equal(got, expected), name


def _atol(case: dict[str, Any]) -> float:
    return 1e-4 if case["method"] in LEARNED else 1e-5


@pytest.mark.parametrize("folder", _cases(*JSON_KINDS), ids=_name)
def test_replay_equals_every_recorded_value(folder: Path) -> None:
    case, tensors = _load(folder)
    results = prunefront.official.replay(case, tensors)
    if case["kind"] == "example_level":
        assert results["initial"] == case["initial"]
        assert len(results["events"]) == len(case["events"])
        for got, expected in zip(results["events"], case["events"], strict=True):
            assert {name: got[name] for name in expected} == expected
        return
    for got, expected in zip(results["variants"], case["variants"], strict=True):
        assert got["name"] == expected["name"]
        if case["kind"] == "token_label_loss":
            assert got["value"] == pytest.approx(expected["value"], rel=1e-5)
        else:
            assert got["values"] == pytest.approx(expected["values"], rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("folder", _cases("train_forward"), ids=_name)
def test_training_loss_equals_the_recorded_one(folder: Path) -> None:
    case, tensors = _load(folder)
    results = prunefront.official.replay(case, tensors)
    assert results["loss"]["values"] == pytest.approx(case["loss"]["values"], rel=1e-4)


@pytest.mark.parametrize("folder", EVAL_CASES, ids=_name)
def test_images_do_not_depend_on_their_batch(folder: Path) -> None:
    case, tensors = _load(folder)
    model = _model(case, tensors)
    images = prunefront.official.recorded_input(case, tensors)
    target = tensors.get("logits_kept_aux", tensors["logits"])
    with torch.no_grad():
        one_by_one = torch.cat([model(image[None]) for image in images])
        reordered = model(images.flip(0)).flip(0)
    torch.testing.assert_close(one_by_one, target, atol=1e-4, rtol=0)
    torch.testing.assert_close(reordered, target, atol=1e-4, rtol=0)


def _model(case: dict[str, Any], tensors: dict[str, Tensor]) -> Any:
    weights = {name.removeprefix("weights/"): t for name, t in tensors.items() if name.startswith("weights/")}
    return prunefront.from_official(case["method"], case["model"], case.get("hparams") or {}, weights)


@pytest.mark.parametrize("folder", [f for f in EVAL_CASES if "tokens_in" in _load(f)[0]], ids=_name)
def test_counts_are_the_recorded_ones(folder: Path) -> None:
    case, tensors = _load(folder)
    schedule = prunefront.token_counts(_model(case, tensors).prune_config)
    assert schedule.tokens_in == case["tokens_in"]
    assert schedule.tokens_out == case["tokens_out"]


@pytest.mark.parametrize(
    "folder",
    [f for f in EVAL_CASES if f.parts[-2] in LEARNED and isinstance(_load(f)[0].get("tokens_after_block"), list)],
    ids=_name,
)
def test_tokens_after_each_block_are_the_recorded_ones(folder: Path) -> None:
    case, tensors = _load(folder)
    assert prunefront.token_counts(_model(case, tensors).prune_config).tokens_out == case["tokens_after_block"]


@pytest.mark.parametrize("folder", [f for f in EVAL_CASES if f.parts[-2] == "spvit"], ids=_name)
def test_spvit_removes_tokens_image_by_image(folder: Path) -> None:
    case, tensors = _load(folder)
    model = _model(case, tensors)
    images = prunefront.official.recorded_input(case, tensors)
    lengths: list[int] = []
    for block in model.blocks:
        block.register_forward_hook(lambda _, __, out: lengths.append(out.shape[1]))
    for image, expected in zip(images, case["tokens_after_block_per_image_when_really_removed"], strict=True):
        lengths.clear()
        with torch.no_grad():
            _, aux = model(image[None], return_aux=True)
        assert lengths == expected
        assert aux.present is None
    with torch.no_grad():
        _, aux = model(images, return_aux=True)
    counts = torch.stack([site.values["counts"] for site in aux.sites])
    assert counts.tolist() == case["kept_patch_tokens_per_image_per_stage"]


@pytest.mark.parametrize(
    "folder", [f for f in EVAL_CASES if f.parts[-2] in ("evit", "ppt", "tome")], ids=_name
)  # DiffRate's own count has another formula; see test_macs
def test_official_mac_counts_are_reproduced_by_formula(folder: Path) -> None:
    case, tensors = _load(folder)
    config = _model(case, tensors).prune_config
    policy = {int(block): policies[0] for block, policies in case.get("policy_per_block", {}).items()}
    expected = case.get("macs_torchprofile", case.get("macs_torchprofile_image0"))
    assert official_torchprofile_macs(config, ppt_policy=policy) == expected


def test_spvit_keeps_heads_apart_that_differ() -> None:
    case, tensors = _load(PROJECT / "tests/data/golden/spvit/deit_eval")
    shared = _model(case, tensors)
    # As the official module has it: a list of scorers, one per head.
    changed = {**tensors, "weights/score_predictor.0.out_conv.1.4.bias": torch.tensor([3.0, -3.0])}
    own = _model(case, changed)
    assert len(shared.score_predictor[0].out_conv) == 1
    assert len(own.score_predictor[0].out_conv) == case["model"]["num_heads"]
    x = torch.randn(1, 9, case["model"]["embed_dim"])
    assert not torch.allclose(shared.score_predictor[0](x)[0], own.score_predictor[0](x)[0])


@pytest.mark.parametrize(
    ("method", "hparams", "said"),
    [
        ("dynamicvit", {"pruning_loc": [1, 3], "token_ratio": [0.7]}, "token_ratio needs one entry"),
        ("dynamicvit", {"keep_rate": 0.7}, "Unknown hyper-parameter"),
        ("trilevel", {"keep_ratio": 0.0}, "keep_ratio"),
    ],
)
def test_hyper_parameters_that_cannot_be_right_are_refused(method: str, hparams: dict[str, Any], said: str) -> None:
    case, tensors = _load(PROJECT / "tests/data/golden/dynamicvit/deit_eval_r07")
    with pytest.raises((ConfigError, ValueError), match=said):
        _model({**case, "method": method, "hparams": hparams}, tensors)


def test_weights_without_predictors_are_refused_by_name() -> None:
    case, tensors = _load(PROJECT / "tests/data/golden/dynamicvit/deit_eval_r07")
    dense = {name: t for name, t in tensors.items() if "score_predictor" not in name}
    with pytest.raises(CheckpointError, match=r"lack score_predictor\.0\.in_conv\.0\.weight"):
        _model(case, dense)


def test_an_unknown_kind_of_case_is_refused() -> None:
    with pytest.raises(ConfigError, match="eval_forward"):
        prunefront.official.replay({"method": "evit", "kind": "poem"}, {})
