"""Small timm models and configs that the library's tests share."""

from __future__ import annotations

from typing import Any

import timm
import torch
from torch import nn

import prunefront
from prunefront.config import ModelSpec, PruneConfig
from prunefront.schedule import token_counts

SMALL = {"patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 3}


def small_spec(
    name: str = "vit_tiny_patch16_224", img_size: Any = 48, num_classes: int = 7, **kwargs: Any
) -> ModelSpec:
    return ModelSpec(name=name, kwargs={**SMALL, **kwargs}, img_size=img_size, num_classes=num_classes)


def build(spec: ModelSpec, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model: nn.Module = timm.create_model(
        spec.name, img_size=spec.img_size, num_classes=spec.num_classes, in_chans=spec.in_chans, **spec.kwargs
    ).eval()
    # timm starts heads and positions near zero; spread them so that differences show in the logits.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def config(method: str, sites: list[dict[str, Any]], spec: ModelSpec | None = None, **options: Any) -> PruneConfig:
    return PruneConfig.model_validate(
        {"model": spec or small_spec(), "method": method, "sites": sites, "options": options}
    )


def static_schedules() -> dict[str, PruneConfig]:
    """Those of `schedules` under which every image keeps the same counts."""
    return {name: config for name, config in schedules().items() if token_counts(config).is_static}


def _selections() -> list[dict[str, Any]]:
    return [{"block": b, "op": "select", "cumulative_keep_ratio": r} for b, r in ((1, 0.7), (3, 0.4))]


def schedules() -> dict[str, PruneConfig]:
    """One config per method and operation on the small model (36 patches, 4 blocks)."""
    return {
        "evit-prune": config("evit", [{"block": 1, "op": "prune", "keep_ratio": 0.6}]),
        "evit-fuse": config("evit", [{"block": b, "op": "fuse", "keep_ratio": 0.7} for b in (0, 2)]),
        "ppt-mixed": config("ppt", [{"block": 1, "op": "pool_or_prune", "remove": 12}], threshold=0.00022),
        "ppt-prune": config("ppt", [{"block": b, "op": "pool_or_prune", "remove": 8} for b in (0, 2)], threshold=0.0),
        "ppt-pool": config("ppt", [{"block": b, "op": "pool_or_prune", "remove": 8} for b in (0, 2)], threshold=None),
        "tome": config("tome", [{"block": b, "op": "merge", "remove": 6} for b in range(4)]),
        "tome-noprop": config("tome", [{"block": b, "op": "merge", "remove": 6} for b in range(4)], prop_attn=False),
        "diffrate": config(
            "diffrate",
            [
                {"block": 1, "op": "prune", "tokens": 30},
                {"block": 1, "op": "merge_mean", "tokens": 24},
                {"block": 2, "op": "merge_mean", "tokens": 12},
                {"block": 3, "op": "prune", "tokens": 4},
            ],
        ),
        "dynamicvit": config("dynamicvit", _selections()),
        "spvit-fixed": config("spvit", _selections(), mode="fixed"),
        "spvit-adaptive": config("spvit", _selections()),
        "spvit-bucketed": config("spvit", _selections(), mode="bucketed", bucket=4, package_norm="mean"),
        "trilevel": config("trilevel", [{"block": b, "op": "prune", "keep_ratio": 0.7} for b in (1, 2)]),
        "trilevel-attention": config(
            "trilevel", [{"block": b, "op": "prune", "keep_ratio": 0.7} for b in (1, 2)], attn_ratio=0.4
        ),
        "hybrid": config(
            "hybrid",
            [
                {"block": 0, "op": "fuse", "keep_ratio": 0.8},
                {"block": 0, "op": "merge", "remove": 4},
                {"block": 2, "op": "prune", "tokens": 12},
                {"block": 2, "op": "merge", "remove": 3},
            ],
            score="cls_value",
        ),
    }


def images(batch: int = 3, seed: int = 1) -> torch.Tensor:
    return torch.randn(batch, 3, 48, 48, generator=torch.Generator().manual_seed(seed))


def selecting(method: str, spec: Any = None, sites: list[dict[str, Any]] | None = None, **options: Any) -> Any:
    """A compressed model of "dynamicvit" or "spvit" whose untrained selectors keep about half of `images`' tokens."""
    spec = spec or small_spec()
    torch.manual_seed(0)
    model: Any = prunefront.compress(build(spec), config(method, sites or _selections(), spec, **options))
    model.eval()
    with torch.no_grad():  # spread the predictors' scores, so that images differ
        for name, parameter in model.named_parameters():
            if "score_predictor" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
        for stage in range(len(model.score_predictor)):  # and centre them
            _, aux = model(images(), return_aux=True)
            scores = aux.sites[stage].values["pred_score"]
            last = model.score_predictor[stage].out_conv[0 if method == "spvit" else 4]
            (last[4] if method == "spvit" else last).bias[0] -= (scores[..., 0] - scores[..., 1]).median()
    return model
