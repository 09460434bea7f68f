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
from prunefront.macs import official_torchprofile_macs

PROJECT = Path(__file__).parents[3]
METHODS = ("evit", "ppt", "tome", "diffrate")


def _cases() -> list[Path]:
    own = PROJECT / "tests" / "data" / "golden"
    beside = PROJECT.parent / "shared" / "golden"
    found = {
        path.parent.relative_to(root): path.parent for root in (own, beside) for path in root.glob("*/*/case.json")
    }
    return [folder for name, folder in sorted(found.items()) if name.parts[0] in METHODS]


def _load(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    return json.loads((folder / "case.json").read_text()), load_file(folder / "tensors.safetensors")


@pytest.mark.parametrize("folder", _cases(), ids=lambda folder: "-".join(folder.parts[-2:]))
def test_replay_equals_every_recorded_tensor(folder: Path) -> None:
    case, tensors = _load(folder)
    results = prunefront.official.replay(case, tensors)
    recorded = {name: t for name, t in tensors.items() if not name.startswith("weights/") and name != "input"}
    assert set(recorded) <= set(results)
    for name, expected in recorded.items():
        if expected.is_floating_point():
            torch.testing.assert_close(results[name], expected, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
        else:
            assert torch.equal(results[name], expected), name


@pytest.mark.parametrize("folder", _cases(), ids=lambda folder: "-".join(folder.parts[-2:]))
def test_images_do_not_depend_on_their_batch_and_counts_are_the_recorded_ones(folder: Path) -> None:
    case, tensors = _load(folder)
    weights = {name.removeprefix("weights/"): t for name, t in tensors.items() if name.startswith("weights/")}
    model = prunefront.from_official(case["method"], case["model"], case["hparams"], weights)
    images = prunefront.official.recorded_input(case, tensors)
    with torch.no_grad():
        one_by_one = torch.cat([model(image[None]) for image in images])
        reordered = model(images.flip(0)).flip(0)
    torch.testing.assert_close(one_by_one, tensors["logits"], atol=1e-4, rtol=0)
    torch.testing.assert_close(reordered, tensors["logits"], atol=1e-4, rtol=0)
    schedule = prunefront.token_counts(model.prune_config)
    assert schedule.tokens_in == case["tokens_in"]
    assert schedule.tokens_out == case["tokens_out"]


def _profiled_cases() -> list[Path]:
    """DiffRate's own count has another formula; see test_macs."""
    return [folder for folder in _cases() if folder.parts[-2] != "diffrate"]


@pytest.mark.parametrize("folder", _profiled_cases(), ids=lambda folder: "-".join(folder.parts[-2:]))
def test_official_mac_counts_are_reproduced_by_formula(folder: Path) -> None:
    case, tensors = _load(folder)
    weights = {name.removeprefix("weights/"): t for name, t in tensors.items() if name.startswith("weights/")}
    config = prunefront.from_official(case["method"], case["model"], case["hparams"], weights).prune_config
    policy = {int(block): policies[0] for block, policies in case.get("policy_per_block", {}).items()}
    expected = case.get("macs_torchprofile", case.get("macs_torchprofile_image0"))
    assert official_torchprofile_macs(config, ppt_policy=policy) == expected
