"""The schedules of the papers and their repositories, as configs.

They apply to the models they were published for and to any timm model of the same token geometry (DeiT-S and
AugReg's ViT-S, say). The search transfers them to other models by relative depth and kept share.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from importlib import resources
from typing import Any

from prunefront.config import ModelSpec, PruneConfig
from prunefront.geometry import ModelGeometry, geometry_for
from prunefront.registry import get_method, list_methods

EVIT_LOCATIONS = (3, 6, 9)
EVIT_KEEP_RATES = (0.9, 0.8, 0.7, 0.6, 0.5)
PPT_LOCATIONS = (3, 6, 9)
PPT_REMOVED = 50
PPT_THRESHOLD = 7e-5
DYNAMICVIT_RATE = 0.7
# (width, depth, is LV-ViT) → base rates of the released models.
_DYNAMICVIT_RATES = {
    (256, 12, False): (0.7,),
    (384, 12, False): (0.7,),
    (768, 12, False): (0.7,),
    (384, 16, True): (0.5, 0.7),
    (512, 20, True): (0.7,),
}
SPVIT_KEEP_RATIOS = (0.617, 0.369, 0.137)  # written into the training script; logs of LV-ViT-S have powers of 0.7
TRILEVEL_LOCATIONS = (3, 6, 9)
# Depth → r of the models in ToMe's tables, at 224 px and patch 16.
TOME_R = {12: (8, 12, 13, 16), 24: (4, 7, 8)}
# (width, depth, pools by the class token) → key in the data file.
_DIFFRATE_MODELS = {
    (192, 12, True): "ViT-T-DeiT",
    (384, 12, True): "ViT-S-DeiT",
    (768, 12, True): "ViT-B-DeiT",
    (768, 12, False): "ViT-B-MAE",
    (1024, 24, False): "ViT-L-MAE",
    (1280, 32, False): "ViT-H-MAE",
}


def published(method: str, model_name: str | ModelSpec) -> dict[str, PruneConfig]:
    """Named schedules that ``method``'s authors published for a model like this one.

    Args:
        method: A name of `list_methods` ("hybrid" has none of its own). Those of learned methods ("dynamicvit",
            "spvit") and of "trilevel" need a checkpoint trained for them.
        model_name: timm name or a full spec.

    Returns:
        Name → config; empty when nothing was published for such a model.

    Raises:
        UnknownNameError: If the method or the model is unknown.
        ModelError: If the model is not a plain ViT.
    """
    get_method(method)
    spec = model_name if isinstance(model_name, ModelSpec) else ModelSpec(name=model_name)
    geometry = geometry_for(spec)
    rows: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {}
    if method == "evit" and _is_deit_like(geometry):
        for rate in EVIT_KEEP_RATES:
            for op in ("fuse", "prune"):
                name = f"evit-{rate}-{op}"
                rows[name] = ([{"block": b, "op": op, "keep_ratio": rate} for b in EVIT_LOCATIONS], {})
    elif method == "ppt" and _is_deit_like(geometry):
        sites = [{"block": b, "op": "pool_or_prune", "remove": PPT_REMOVED} for b in PPT_LOCATIONS]
        rows["ppt-r50"] = (sites, {"threshold": PPT_THRESHOLD, "prop_attn": True})
    elif method == "tome" and geometry.num_patch_tokens == 196:
        for r in TOME_R.get(geometry.depth, ()):
            merges = [{"block": b, "op": "merge", "remove": r} for b in range(geometry.depth)]
            rows[f"tome-r{r}"] = (merges, {"prop_attn": True})
    elif method == "diffrate":
        key = _DIFFRATE_MODELS.get((geometry.embed_dim, geometry.depth, geometry.global_pool == "token"))
        for target, counts in _diffrate_schedules().get(key or "", {}).items():
            if counts["prune"][0] == geometry.num_patch_tokens + 1:
                sites = diffrate_sites(counts["prune"], counts["merge"], only_removing=True)
                rows[f"diffrate-{target}G"] = (sites, {})
    elif method == "dynamicvit":
        for rate in _dynamicvit_rates(geometry):
            rows[f"dynamicvit-{rate}"] = (_selections(geometry, dynamicvit_keep_ratios(rate)), {})
    elif method == "spvit" and _DYNAMICVIT_RATES.get(
        (geometry.embed_dim, geometry.depth, geometry.token_head_macs > 0)
    ):
        rows["spvit-0.617"] = (_selections(geometry, SPVIT_KEEP_RATIOS), {})
        if geometry.token_head_macs:
            rows["spvit-0.7"] = (_selections(geometry, dynamicvit_keep_ratios(DYNAMICVIT_RATE)), {})
    elif method == "trilevel" and _is_deit_like(geometry):
        prunes = [{"block": b, "op": "prune", "keep_ratio": 0.9} for b in TRILEVEL_LOCATIONS]
        rows["trilevel-0.9"] = (prunes, {"attn_ratio": 0.1, "tie": "official"})
    return {
        name: PruneConfig.model_validate({"model": spec, "method": method, "sites": sites, "options": options})
        for name, (sites, options) in rows.items()
    }


def all_published(model_name: str | ModelSpec) -> dict[str, PruneConfig]:
    """`published` over all methods."""
    merged: dict[str, PruneConfig] = {}
    for method in list_methods():
        merged |= published(method, model_name)
    return merged


def diffrate_sites(
    prune_kept: Sequence[int], merge_kept: Sequence[int], *, only_removing: bool = False
) -> list[dict[str, Any]]:
    """Sites of DiffRate's two lists of kept counts, which include the class token.

    Args:
        prune_kept: Kept after pruning, per block.
        merge_kept: Kept after merging, per block.
        only_removing: Leave out entries that remove nothing. The official code sorts the tokens there all the same,
            which costs time and changes no logit.
    """
    sites: list[dict[str, Any]] = []
    present = prune_kept[0] if only_removing else None
    for block, (prune, merge) in enumerate(zip(prune_kept, merge_kept, strict=True)):
        for op, count in (("prune", prune), ("merge_mean", merge)):
            if present is not None:
                if count >= present:
                    continue
                present = count
            sites.append({"block": block, "op": op, "tokens": count - 1})
    return sites


def dynamicvit_keep_ratios(rate: float, stages: int = 3) -> list[float]:
    """Cumulative ratios of a base rate: its powers, unrounded floats as in the official code."""
    return [rate ** (stage + 1) for stage in range(stages)]


def selection_locations(depth: int) -> list[int]:
    """Blocks before which DynamicViT and SPViT select: 3, 6, 9 of 12 blocks, 4, 8, 12 of 16, 5, 10, 15 of 20."""
    return [depth // 4 * part for part in (1, 2, 3)]


def _dynamicvit_rates(geometry: ModelGeometry) -> tuple[float, ...]:
    return _DYNAMICVIT_RATES.get((geometry.embed_dim, geometry.depth, geometry.token_head_macs > 0), ())


def _selections(geometry: ModelGeometry, ratios: Sequence[float]) -> list[dict[str, Any]]:
    return [
        {"block": block, "op": "select", "cumulative_keep_ratio": ratio}
        for block, ratio in zip(selection_locations(geometry.depth), ratios, strict=True)
    ]


def _is_deit_like(geometry: ModelGeometry) -> bool:
    return geometry.depth == 12 and geometry.num_patch_tokens == 196 and geometry.has_class_token


@cache
def _diffrate_schedules() -> dict[str, dict[str, dict[str, list[int]]]]:
    text = resources.files("prunefront").joinpath("data/diffrate_schedules.json").read_text()
    schedules: dict[str, dict[str, dict[str, list[int]]]] = json.loads(text)["schedules"]
    return schedules
