"""Checkpoints, hyper-parameters and recorded cases of the papers' own repositories.

Whoever used one of them brings weights and flags unchanged: `from_official` builds our model from them,
`load_official` reads them out of a file of its training script, and `replay` recomputes a recorded case under the names
it was recorded with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from prunefront.compress import compress
from prunefront.config import ModelSpec, PruneConfig
from prunefront.errors import ConfigError, PrunefrontError
from prunefront.methods.base import Aux
from prunefront.methods.spvit import TokenSelector, shared_heads
from prunefront.official_architecture import build_described, load_described, require_parts, spec_for
from prunefront.official_files import load_official
from prunefront.official_swin import swin_from_official, swin_sites
from prunefront.published_schedules import (
    DYNAMICVIT_RATE,
    EVIT_LOCATIONS,
    PPT_LOCATIONS,
    PPT_THRESHOLD,
    SPVIT_KEEP_RATIOS,
    TRILEVEL_LOCATIONS,
    diffrate_sites,
    dynamicvit_keep_ratios,
    selection_locations,
)
from prunefront.registry import get_method
from prunefront.replay import recorded_input, replay

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
        method: "evit", "ppt", "tome", "diffrate", "dynamicvit", "spvit" or "trilevel"; "lvvit" for the dense backbone.
        model: Architecture: ``img_size`` (int or [H, W]), ``patch_size``, ``embed_dim``, ``depth``, ``num_heads``,
            ``mlp_ratio``, ``qkv_bias``, ``num_classes``, ``in_chans``, ``distilled``, ``layernorm_eps``; with ``arch``
            "lvvit" also ``skip_lam`` and ``stem_width``; with ``depths`` a Swin, which has ``window_size`` too.
        hparams: The method's hyper-parameters under its repository's names; may be empty.
        weights: State dict under the repository's names.

    Raises:
        ConfigError: If a hyper-parameter is unknown or cannot be right.
        CheckpointError: If the weights do not fit the architecture.
    """
    if method != "lvvit":
        get_method(method)
    if "depths" in model:
        _require_trilevel(method)
        return swin_from_official(model, hparams, weights)
    state = {
        name: tensor.float() if tensor.is_floating_point() else tensor
        for name, tensor in weights.items()
        if not any(proxy in name for proxy in _DIFFRATE_PROXIES)
    }
    is_lvvit = model.get("arch") == "lvvit" or method == "lvvit"
    spec = _lvvit_spec(model) if is_lvvit else _model_spec(model, state)
    dense = build_described(spec, model)
    if method == "lvvit":
        load_described(dense, state)
        return dense.eval()
    sites, options = official_sites(method, hparams, int(model["depth"]))
    config = PruneConfig.model_validate({"model": spec, "method": method, "sites": sites, "options": options})
    compressed = compress(dense, config)
    if method == "spvit":
        selectors = [module for module in compressed.modules() if isinstance(module, TokenSelector)]
        state = shared_heads(state, selectors)
    load_described(compressed, state)
    return compressed.eval()


def official_sites(
    method: str, hparams: Mapping[str, Any], depth: int | Sequence[int]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Sites and options for a repository's hyper-parameters (see `from_official`).

    Args:
        method: As in `from_official`.
        hparams: Hyper-parameters.
        depth: Blocks; of a Swin, per stage.

    Raises:
        ConfigError: If one is unknown, missing or cannot be right, or the method has no Swin.
    """
    if not isinstance(depth, int):
        _require_trilevel(method)
        return swin_sites(depth, hparams)
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


def _require_trilevel(method: str) -> None:
    if method != "trilevel":
        raise ConfigError(f"Swin was pruned by trilevel alone, but got {method!r}. Use another architecture.")


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
    require_parts(model, ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "num_classes"))
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
    name = "deit_tiny_distilled_patch16_224" if distilled else "deit_tiny_patch16_224"
    return spec_for(name, kwargs, model)


def _lvvit_spec(model: Mapping[str, Any]) -> ModelSpec:
    require_parts(model, ("img_size", "embed_dim", "depth", "num_heads", "num_classes"))
    kwargs = {name: model[name] for name in ("embed_dim", "depth", "num_heads")}
    kwargs |= {
        "patch_size": model.get("patch_size", 16),
        "mlp_ratio": model.get("mlp_ratio", 3.0),
        "qkv_bias": model.get("qkv_bias", False),
        "skip_lam": model.get("skip_lam", 1.0),
        "stem_width": model.get("stem_width", 64),
    }
    return spec_for("lvvit_s", kwargs, model)


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


def _selection_sites(hparams: Mapping[str, Any], depth: int, default: Sequence[float]) -> list[dict[str, Any]]:
    """Cumulative ratios at the locations of the repository: quarters of the depth where none are given."""
    locations = hparams.get("pruning_loc", selection_locations(depth))
    ratios = hparams.get("token_ratio")
    if ratios is None:
        base = hparams.get("base_rate")
        ratios = default if base is None else dynamicvit_keep_ratios(base, len(locations))
    if len(ratios) != len(locations):
        raise ConfigError(
            f"token_ratio needs one entry per entry of pruning_loc ({len(locations)}), but got {len(ratios)}."
        )
    return [
        {"block": block, "op": "select", "cumulative_keep_ratio": ratio}
        for block, ratio in zip(locations, ratios, strict=True)
    ]


def _dynamicvit_sites(hparams: Mapping[str, Any], depth: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    _known(hparams, "dynamicvit", {"pruning_loc", "token_ratio", "base_rate"})
    return _selection_sites(hparams, depth, dynamicvit_keep_ratios(DYNAMICVIT_RATE)), {}


def _spvit_sites(hparams: Mapping[str, Any], depth: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    _known(hparams, "spvit", {"pruning_loc", "token_ratio", "base_rate"})
    # The repository reads base_rate and does not use it; the ratios only aim the training.
    given = {name: value for name, value in hparams.items() if name != "base_rate"}
    return _selection_sites(given, depth, SPVIT_KEEP_RATIOS), {}


def _trilevel_sites(hparams: Mapping[str, Any], depth: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    _known(hparams, "trilevel", {"keep_ratio", "attn_ratio", "pruning_blocks"})
    ratio = hparams.get("keep_ratio", 0.7)
    sites = [
        {"block": block, "op": "prune", "keep_ratio": ratio}
        for block in hparams.get("pruning_blocks", TRILEVEL_LOCATIONS)
        if block < depth
    ]
    return sites, {"attn_ratio": hparams.get("attn_ratio", 0.3), "tie": "official"}


_SITES = {
    "evit": _evit_sites,
    "ppt": _ppt_sites,
    "tome": _tome_sites,
    "diffrate": _diffrate_sites,
    "dynamicvit": _dynamicvit_sites,
    "spvit": _spvit_sites,
    "trilevel": _trilevel_sites,
}


def _known(hparams: Mapping[str, Any], method: str, names: set[str]) -> None:
    """Refuse misspelt hyper-parameters; results and notes that cases carry beside them are documentation."""
    documentation = {
        "r_list_parsed", "r_effective", "r_effective_per_block", "token_ratio_meaning",
        "score", "rounding", "fused_token", "mask_eps",
    }  # fmt: skip
    unknown = sorted(set(hparams) - names - documentation)
    if unknown:
        raise ConfigError(
            f"Unknown hyper-parameter(s) of {method}: {', '.join(unknown)}. Known: {', '.join(sorted(names))}."
        )


__all__ = ["Aux", "from_official", "load_official", "official_sites", "parse_r", "recorded_input", "replay"]
