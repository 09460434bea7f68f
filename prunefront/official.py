"""Checkpoints, hyper-parameters and recorded cases of the papers' own repositories.

Whoever used one of them brings weights and flags unchanged: `from_official` builds our model from them, and `replay`
recomputes a recorded case under the names it was recorded with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from prunefront.backbones.compressed import Compressed
from prunefront.compress import compress
from prunefront.config import ModelSpec, PruneConfig
from prunefront.errors import CheckpointError, ConfigError, PrunefrontError
from prunefront.geometry import build_timm_model
from prunefront.methods.base import Aux, SiteRecord
from prunefront.ops.tokens import with_prefix
from prunefront.published_schedules import EVIT_LOCATIONS, PPT_LOCATIONS, PPT_THRESHOLD, diffrate_sites
from prunefront.registry import get_method
from prunefront.schedule import plan_schedule

# Proxies that DiffRate's rate search leaves in its checkpoints; the rates themselves come as lists.
_DIFFRATE_PROXIES = (".prune_ddp.", ".merge_ddp.")


def from_official(
    method: str,
    model: Mapping[str, Any],
    hparams: Mapping[str, Any],
    weights: Mapping[str, Tensor],
) -> nn.Module:
    """Our model for a checkpoint of a method's own repository, in eval mode.

    Args:
        method: "evit", "ppt", "tome" or "diffrate".
        model: Architecture: ``img_size`` (int or [H, W]), ``patch_size``, ``embed_dim``, ``depth``, ``num_heads``,
            ``mlp_ratio``, ``qkv_bias``, ``num_classes``, ``in_chans``, ``distilled``, ``layernorm_eps``.
        hparams: The method's hyper-parameters under its repository's names; may be empty.
        weights: State dict under the repository's names.

    Raises:
        ConfigError: If a hyper-parameter is unknown or cannot be right.
        CheckpointError: If the weights do not fit the architecture.
    """
    get_method(method)
    if method not in _SITES:
        raise ConfigError(f"Method {method!r} has no repository of its own; official ones are {', '.join(_SITES)}.")
    state = {
        name: tensor.float() if tensor.is_floating_point() else tensor
        for name, tensor in weights.items()
        if not any(proxy in name for proxy in _DIFFRATE_PROXIES)
    }
    spec = _model_spec(model, state)
    dense = build_timm_model(spec)
    eps = model.get("layernorm_eps", model.get("norm_eps"))
    if eps is not None:
        for module in dense.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = float(eps)
    try:
        dense.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise CheckpointError(
            f"The weights do not fit the architecture given: {' '.join(str(error).split())[:400]}"
        ) from error
    sites, options = official_sites(method, hparams, int(model["depth"]))
    config = PruneConfig.model_validate({"model": spec, "method": method, "sites": sites, "options": options})
    return compress(dense, config).eval()


def official_sites(method: str, hparams: Mapping[str, Any], depth: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Sites and options for a repository's hyper-parameters (see `from_official`).

    Raises:
        ConfigError: If one is unknown, missing or cannot be right.
    """
    if method not in _SITES:
        raise ConfigError(f"Method {method!r} has no repository of its own; official ones are {', '.join(_SITES)}.")
    try:
        return _SITES[method](hparams, depth)
    except KeyError as error:
        raise ConfigError(f"The hyper-parameters of {method} lack {error}. Add it.") from error
    except (TypeError, ValueError) as error:
        if isinstance(error, PrunefrontError):
            raise
        raise ConfigError(
            f"The hyper-parameters of {method} cannot be used: {error}. Correct {dict(hparams)}."
        ) from error


def replay(case: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Our results for a recorded case, under the case's own tensor names.

    Args:
        case: The case's JSON.
        tensors: Its tensors; ``weights/*`` and ``input`` are read, the rest is not.

    Returns:
        ``logits``, ``logits_no_reduction`` and every quantity the method records.
    """
    method = str(case["method"])
    weights = {name.removeprefix("weights/"): value for name, value in tensors.items() if name.startswith("weights/")}
    model = from_official(method, case["model"], case["hparams"], weights)
    images = recorded_input(case, tensors)
    with torch.no_grad():
        logits, aux = model(images, return_aux=True)
        results: dict[str, Any] = {"logits": logits, "logits_no_reduction": model(images, schedule=[])}
    assert isinstance(model, Compressed)
    prefix = plan_schedule(model.prune_config).num_prefix_tokens
    for record in aux.sites:
        results |= _RECORDED[method](record, prefix)
    if method != "evit":
        first = 0 if method == "diffrate" else min((r.block for r in aux.sites), default=0)
        for plan in model._blocks_plan[first:]:
            size = aux.sizes.get(plan.index)
            results[f"size/{plan.index}"] = size if size is not None else torch.ones(len(logits), plan.tokens_out)
    if method in ("tome", "diffrate"):
        results["group"] = aux.origin.to(torch.int32)
    return {name: value.to(torch.int32) if _is_integer(value) else value for name, value in results.items()}


def recorded_input(case: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Tensor:
    """The images of a case: stored small, every pixel repeated ``input.upsample`` times each way."""
    images = tensors["input"].float()
    description = case.get("input")
    factor = int(description.get("upsample", 1)) if isinstance(description, Mapping) else 1
    return images.repeat_interleave(factor, dim=-2).repeat_interleave(factor, dim=-1) if factor > 1 else images


def parse_r(r: int | Sequence[float], depth: int, *, is_pair: bool = False) -> list[int]:
    """ToMe's r, per block: an integer for all, a list (padded with zeros), or a pair (r, inflection).

    An inflection f in [-1, 1] spreads r linearly from r * (1 - f) to r * (1 + f), truncated to integers.
    """
    if isinstance(r, int):
        return [r] * depth
    if is_pair:
        base, inflection = r
        low = int(base * (1 - inflection))
        high = 2 * base - low
        step = (high - low) / (depth - 1)
        return [int(low + step * index) for index in range(depth)]
    return [int(value) for value in r] + [0] * max(0, depth - len(r))


def _model_spec(model: Mapping[str, Any], state: Mapping[str, Tensor]) -> ModelSpec:
    """timm's arguments for an architecture; what the weights show beats a missing entry."""
    needed = ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "num_classes")
    missing = [name for name in needed if name not in model]
    if missing:
        raise ConfigError(f"The architecture lacks {', '.join(missing)}. Add what the checkpoint was trained with.")
    distilled = bool(model.get("distilled", "dist_token" in state))
    kwargs: dict[str, Any] = {
        "patch_size": model["patch_size"],
        "embed_dim": model["embed_dim"],
        "depth": model["depth"],
        "num_heads": model["num_heads"],
        "mlp_ratio": model.get("mlp_ratio", 4.0),
        "qkv_bias": model.get("qkv_bias", "blocks.0.attn.qkv.bias" in state),
    }
    if "fc_norm.weight" in state:  # MAE: normalised after averaging the patch tokens
        kwargs["global_pool"] = "avg"
    if "cls_token" not in state:
        kwargs |= {"class_token": False, "global_pool": kwargs.get("global_pool", "avg")}
    size = model["img_size"]
    return ModelSpec(
        name="deit_tiny_distilled_patch16_224" if distilled else "deit_tiny_patch16_224",
        kwargs=kwargs,
        img_size=size if isinstance(size, int) else tuple(size),
        in_chans=int(model.get("in_chans", 3)),
        num_classes=int(model["num_classes"]),
    )


def _per_block(value: Any, depth: int, name: str) -> list[Any]:
    """A scalar for all blocks, or one entry per block."""
    if isinstance(value, list | tuple):
        if len(value) != depth:
            raise ConfigError(f"{name} needs one entry per block ({depth}), but got {len(value)}.")
        return list(value)
    return [value] * depth


def _evit_sites(hparams: Mapping[str, Any], depth: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    _known(
        hparams,
        "evit",
        {"keep_rate", "drop_loc", "fuse_token", "runtime_keep_rate", "runtime_tokens", "base_keep_rate"},
    )
    stored = hparams.get("keep_rate", hparams.get("base_keep_rate", 1.0))
    for rate in stored if isinstance(stored, list | tuple) else (stored,):
        if not 0 < rate <= 1:
            raise ConfigError(f"keep_rate is a share of the tokens, above 0 and at most 1, but got {rate}.")
    if not isinstance(stored, list | tuple):
        locations = hparams.get("drop_loc", EVIT_LOCATIONS)
        stored = [stored if block in locations else 1.0 for block in range(depth)]
    stored = _per_block(stored, depth, "keep_rate")
    override = _per_block(hparams.get("runtime_keep_rate"), depth, "runtime_keep_rate")
    tokens = _per_block(hparams.get("runtime_tokens"), depth, "runtime_tokens")
    op = "fuse" if hparams.get("fuse_token") else "prune"
    sites: list[dict[str, Any]] = []
    for block in range(depth):
        rate = stored[block] if override[block] is None else override[block]
        if tokens[block] is not None:
            sites.append({"block": block, "op": op, "tokens": int(tokens[block])})
        elif stored[block] < 1 and rate < 1:
            # A run-time rate acts only where the stored one does.
            sites.append({"block": block, "op": op, "keep_ratio": rate})
    return sites, {}


def _tome_sites(hparams: Mapping[str, Any], depth: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    _known(hparams, "tome", {"r", "r_kind", "prop_attn"})
    counts = parse_r(hparams.get("r", 0), depth, is_pair=hparams.get("r_kind") == "(r, inflection)")
    sites = [{"block": b, "op": "merge", "remove": r} for b, r in enumerate(counts[:depth]) if r > 0]
    return sites, {"prop_attn": hparams.get("prop_attn", True)}


def _ppt_sites(hparams: Mapping[str, Any], depth: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    _known(hparams, "ppt", {"r", "r_kind", "pp_loc_list", "threshold", "prop_attn"})
    queue = parse_r(hparams.get("r", 0), depth, is_pair=hparams.get("r_kind") == "(r, inflection)")
    locations = sorted(set(hparams.get("pp_loc_list", PPT_LOCATIONS)))
    # Reducing blocks take from the list in order, whatever their index.
    sites = [
        {"block": block, "op": "pool_or_prune", "remove": r}
        for block, r in zip((b for b in locations if b < depth), queue, strict=False)
        if r > 0
    ]
    return sites, {"threshold": hparams.get("threshold", PPT_THRESHOLD), "prop_attn": hparams.get("prop_attn", True)}


def _diffrate_sites(hparams: Mapping[str, Any], depth: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    _known(hparams, "diffrate", {"prune_kept_num", "merge_kept_num"})
    if not hparams:
        return [], {}
    prune = _per_block(hparams["prune_kept_num"], depth, "prune_kept_num")
    merge = _per_block(hparams["merge_kept_num"], depth, "merge_kept_num")
    return diffrate_sites(prune, merge), {}


_SITES = {"evit": _evit_sites, "ppt": _ppt_sites, "tome": _tome_sites, "diffrate": _diffrate_sites}


def _known(hparams: Mapping[str, Any], method: str, names: set[str]) -> None:
    """Refuse misspelt hyper-parameters; results and notes that cases carry beside them are documentation."""
    documentation = {"r_list_parsed", "r_effective", "r_effective_per_block"}
    unknown = sorted(set(hparams) - names - documentation)
    if unknown:
        raise ConfigError(
            f"Unknown hyper-parameter(s) of {method}: {', '.join(unknown)}. Known: {', '.join(sorted(names))}."
        )


def _evit_recorded(record: SiteRecord, prefix: int) -> dict[str, Tensor]:
    b = record.block
    return {f"kept_idx/{b}": record.values["kept_idx"], f"scores/{b}": record.values["scores"]}


def _tome_recorded(record: SiteRecord, prefix: int) -> dict[str, Tensor]:
    b = record.block
    return {
        f"merge_src/{b}": record.values["merge_src"] + prefix,
        f"merge_dst/{b}": record.values["merge_dst"] + prefix,
        f"scores/{b}": _with_protected(record.values["similarity"], prefix),
    }


def _ppt_recorded(record: SiteRecord, prefix: int) -> dict[str, Tensor]:
    b, values = record.block, record.values
    pooled = values["policy"]
    protected = torch.full_like(values["scores"][:, :1], 2.0).expand(-1, prefix)
    results = {
        f"scores/{b}": torch.cat((protected, values["scores"]), dim=1),
        f"var/{b}": values["var"],
        f"policy/{b}": pooled,
    }
    if not pooled.all():
        kept = with_prefix(values["kept_idx"], prefix)
        results[f"kept_idx/{b}"] = kept.masked_fill(pooled[:, None], -1)
    if pooled.any():
        pruned = ~pooled[:, None]
        results[f"merge_src/{b}"] = (values["merge_src"] + prefix).masked_fill(pruned, -1)
        results[f"merge_dst/{b}"] = (values["merge_dst"] + prefix).masked_fill(pruned, -1)
        results[f"merge_score/{b}"] = _with_protected(values["similarity"], prefix).masked_fill(pruned, -2.0)
    return results


def _diffrate_recorded(record: SiteRecord, prefix: int) -> dict[str, Tensor]:
    b, values = record.block, record.values
    if record.op == "prune":
        return {f"scores/{b}": values["scores"], f"order/{b}": with_prefix(values["order"], prefix)}
    return {f"merge_dst/{b}": values["merge_dst"] + prefix, f"merge_sim/{b}": values["merge_sim"]}


_RECORDED = {"evit": _evit_recorded, "tome": _tome_recorded, "ppt": _ppt_recorded, "diffrate": _diffrate_recorded}


def _with_protected(similarity: Tensor, prefix: int) -> Tensor:
    """Official lists hold protected tokens of the even positions too, as -inf."""
    return torch.cat((similarity.new_full((len(similarity), -(-prefix // 2)), -torch.inf), similarity), dim=1)


def _is_integer(value: Tensor) -> bool:
    return not value.is_floating_point()


__all__ = ["Aux", "from_official", "official_sites", "parse_r", "recorded_input", "replay"]
