"""Tokens and MACs that images really cost, against counts recorded from the official code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file

import prunefront
from prunefront.official import from_official, recorded_input
from prunefront.token_use import TokenCounter, counts_per_image, token_use

GOLDEN = Path(__file__).parents[2] / "data" / "golden"


def built(name: str) -> tuple[Any, dict[str, Any], torch.Tensor, torch.Tensor]:
    case = json.loads((GOLDEN / name / "case.json").read_text())
    tensors = load_file(GOLDEN / name / "tensors.safetensors")
    weights = {key.removeprefix("weights/"): value for key, value in tensors.items() if key.startswith("weights/")}
    model = from_official(case["method"], case["model"], case["hparams"], weights)
    return model, case, recorded_input(case, tensors), tensors["logits"]


@pytest.mark.parametrize("batch_size", [1, 2])
def test_counts_per_image_are_those_of_the_official_selectors(batch_size: int) -> None:
    model, case, images, logits = built("spvit/deit_eval")
    counter = TokenCounter(model).eval()

    assert counts_per_image(model)
    with torch.no_grad():
        seen = torch.cat([counter(batch) for batch in images.split(batch_size)])
    use = token_use(model, counter.kept)

    torch.testing.assert_close(seen, logits, atol=2e-4, rtol=0)
    recorded = case["kept_patch_tokens_per_image_per_stage"]  # per stage, one count per image
    assert torch.cat(counter.kept).T.tolist() == recorded
    after = np.array(case["tokens_after_block_per_image_when_really_removed"], dtype=float)
    assert use.mean == tuple(after.mean(axis=0))
    assert use.p50 == tuple(np.percentile(after, 50, axis=0))
    assert use.p95 == tuple(np.percentile(after, 95, axis=0))
    assert (use.is_per_image, use.num_images) == (True, 2)


def test_macs_per_image_are_those_of_each_images_own_schedule() -> None:
    model, case, images, _ = built("spvit/deit_eval")
    counter = TokenCounter(model).eval()
    with torch.no_grad():
        counter(images)

    config = model.prune_config
    of_images = []
    for kept in zip(*case["kept_patch_tokens_per_image_per_stage"], strict=True):
        sites = [{"block": s.block, "op": s.op, "tokens": k} for s, k in zip(config.sites, kept, strict=True)]
        of_images.append(prunefront.macs({**config.to_dict(), "sites": sites}))

    assert token_use(model, counter.kept).macs == pytest.approx(np.mean(of_images), rel=1e-12)


def test_an_image_may_lose_all_its_patches() -> None:
    model, _, _, _ = built("spvit/deit_eval")

    use = token_use(model, [torch.tensor([[10, 0, 0]])])

    assert use.mean == (197, 12, 12, 3, 3, 4)  # class token and one package per site remain


def test_static_methods_keep_what_the_schedule_says() -> None:
    model, case, _, _ = built("evit/d6_mixed_fuse")

    use = token_use(model)

    assert not counts_per_image(model)
    assert use.mean == use.p50 == use.p95 == tuple(case["tokens_out"])
    assert use.macs == prunefront.macs(model.prune_config)


def test_a_dense_model_keeps_all() -> None:
    model = timm.create_model("deit_tiny_patch16_224", depth=2)

    use = token_use(model)

    assert use.mean == (197.0, 197.0)
    # Per token 12 C^2 and attention 2 N^2 C per block, the patch embedding and the classifier.
    assert use.macs == 2 * (197 * 12 * 192**2 + 2 * 197**2 * 192) + 196 * 192 * 768 + 192 * 1000


def test_masks_of_an_official_swin_are_counted_alive_and_cost_all() -> None:
    swin: Any = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=56, window_size=7, embed_dim=16, depths=(2, 4), num_heads=(2, 4),
    )  # fmt: skip
    spec = {
        "name": "swin_tiny_patch4_window7_224",
        "img_size": 56,
        "kwargs": {"window_size": 7, "embed_dim": 16, "depths": [2, 4], "num_heads": [2, 4]},
    }
    sites = [{"block": 3, "op": "prune", "keep_ratio": 0.9}]
    config = {"model": spec, "method": "trilevel", "sites": sites, "options": {"tie": "official"}}
    model = prunefront.compress(swin, prunefront.PruneConfig.model_validate(config)).eval()
    counter = TokenCounter(model)
    with torch.no_grad():
        counter(torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(0)))

    use = token_use(model, counter.kept)

    # 14 x 14 patches, then 7 x 7; of these int(49 * 0.9) less the one that the strict comparison drops.
    assert use.mean == (196, 196, 49, 43, 43, 43)
    assert use.macs == token_use(swin).macs
