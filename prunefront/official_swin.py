"""Tri-Level's Swin: checkpoints and recorded cases of the official repository.

Kong et al., "Peeling the Onion", AAAI 2023 (arXiv:2211.10801); ``Swin/models/swin_transformer_prune.py`` of its code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from prunefront.compress import compress
from prunefront.config import ModelSpec, PruneConfig
from prunefront.errors import ConfigError
from prunefront.official_architecture import build_described, load_described, require_parts, spec_for

SWIN_KEEP_RATIO = 0.9
SWIN_STAGE = 2
SWIN_AFTER_BLOCKS = (1, 2, 3)  # of the stage

_BUFFERS = ("relative_position_index", "attn_mask")  # timm computes them itself
_OPTIONAL = ("after_blocks_in_stage", "attn_ratio", "keep_ratio", "stage", "token_prune_ratio")
_NOTES = {"score", "rounding", "comparison", "mask_eps"}  # what cases document beside the parameters


def swin_from_official(
    model: Mapping[str, Any], hparams: Mapping[str, Any], weights: Mapping[str, Tensor]
) -> nn.Module:
    """Our Swin, in official form and eval mode, for a checkpoint of the official repository.

    Args:
        model: Architecture: ``img_size``, ``patch_size``, ``embed_dim``, ``depths``, ``num_heads``, ``window_size``,
            ``num_classes``; optionally ``mlp_ratio``, ``qkv_bias``, ``in_chans``, ``norm_eps``, ``drop_path_rate``,
            ``token_prune_ratio``.
        hparams: ``token_prune_ratio`` (0.9; or ``keep_ratio``, as the repository's DeiT has it), ``stage`` (2),
            ``after_blocks_in_stage`` (1, 2, 3), ``attn_ratio`` (1, as Swin has no attention level); may be empty.
        weights: State dict under the repository's names; its buffers are left out.

    Raises:
        ConfigError: If a part of the architecture is missing or timm has no such variant, or a hyper-parameter is
            unknown or cannot be right.
        CheckpointError: If the weights do not fit the architecture.
    """
    spec = _spec_of(model, weights)
    if "token_prune_ratio" in model and "keep_ratio" not in hparams:
        hparams = {"token_prune_ratio": model["token_prune_ratio"], **hparams}
    sites, options = swin_sites(model["depths"], hparams)
    dense = build_described(spec, model)
    load_described(dense, timm_names(weights))
    config = PruneConfig.model_validate({"model": spec, "method": "trilevel", "sites": sites, "options": options})
    return compress(dense, config).eval()


def swin_sites(
    depths: Sequence[int], hparams: Mapping[str, Any] | None = None
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The official sites, after blocks 1 to 3 of the third stage, where 0.9 of the tokens present stay, and options.

    Args:
        depths: Blocks per stage.
        hparams: See `swin_from_official`.

    Raises:
        ConfigError: If a hyper-parameter is unknown or cannot be right.
    """
    hparams = hparams or {}
    unknown = sorted(set(hparams) - set(_OPTIONAL) - _NOTES)
    if unknown:
        raise ConfigError(
            f"Unknown hyper-parameter(s) of trilevel on Swin: {', '.join(unknown)}. Known: {', '.join(_OPTIONAL)}."
        )
    ratio_names = [name for name in ("token_prune_ratio", "keep_ratio") if name in hparams]
    if len(ratio_names) > 1:
        raise ConfigError("token_prune_ratio and keep_ratio are one share of the tokens. Give one of them.")
    ratio_name = ratio_names[0] if ratio_names else "token_prune_ratio"
    ratio = hparams.get(ratio_name, SWIN_KEEP_RATIO)
    stage = hparams.get("stage", SWIN_STAGE)
    after = hparams.get("after_blocks_in_stage", SWIN_AFTER_BLOCKS)
    if not isinstance(ratio, int | float) or not 0 < ratio <= 1:
        raise ConfigError(f"{ratio_name} is a share of the tokens, above 0 and at most 1, but got {ratio!r}.")
    if not isinstance(stage, int) or not 0 <= stage < len(depths):
        raise ConfigError(f"stage is one of 0 to {len(depths) - 1}, but got {stage!r}; name a stage the model has.")
    if not isinstance(after, list | tuple) or not all(isinstance(block, int) and block >= 0 for block in after):
        raise ConfigError(f"after_blocks_in_stage is a list of blocks such as [1, 2, 3], but got {after!r}.")
    first = sum(depths[:stage])
    # As in the official code, blocks the stage does not have are never reached.
    sites = [
        {"block": first + block, "op": "prune", "keep_ratio": ratio}
        for block in sorted(set(after))
        if block < depths[stage]
    ]
    return sites, {"attn_ratio": hparams.get("attn_ratio", 1.0), "tie": "official"}


def timm_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Official names → timm's, in float32, without buffers.

    Patch merging stands at the end of a stage there and at the start of the next in timm; the classifier is ``head``
    there and ``head.fc`` in timm.
    """
    renamed = {}
    for name, tensor in weights.items():
        parts = name.split(".")
        if parts[-1] in _BUFFERS:
            continue
        if parts[0] == "layers" and len(parts) > 2 and parts[2] == "downsample":
            parts[1] = str(int(parts[1]) + 1)
        elif parts[0] == "head" and len(parts) == 2:
            parts.insert(1, "fc")
        renamed[".".join(parts)] = tensor.float()
    return renamed


def replay_swin(case: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our results for a recorded Swin case, under the case's own tensor names.

    Args:
        case: The case's JSON.
        tensors: Its tensors; ``weights/*`` and ``input`` are read, the rest is not.

    Returns:
        ``logits``; for every block d of stage s ``token_mask/<s>.<d>``, the mask entering it, (B, L) in uint8, and
        ``attn_score/<s>.<d>``, its scores, (B, L).
    """
    from prunefront.official import recorded_input

    weights = {name.removeprefix("weights/"): value for name, value in tensors.items() if name.startswith("weights/")}
    model = cast(Any, swin_from_official(case["model"], case["hparams"], weights))
    images = recorded_input(case, tensors)
    with torch.no_grad():
        results: dict[str, Tensor] = {"logits": model(images)}
        blocks = iter(model.trace_official(images))
    for stage, depth in enumerate(case["model"]["depths"]):
        for number in range(depth):
            block = next(blocks)
            results[f"token_mask/{stage}.{number}"] = block.mask.to(torch.uint8)
            results[f"attn_score/{stage}.{number}"] = block.scores
    return results


def _spec_of(model: Mapping[str, Any], weights: Mapping[str, Tensor]) -> ModelSpec:
    require_parts(model, ("img_size", "patch_size", "embed_dim", "depths", "num_heads", "window_size", "num_classes"))
    if model.get("ape"):
        raise ConfigError("timm's Swin has no absolute position embedding, but got ape=True; train without it.")
    if not model.get("patch_norm", True):
        raise ConfigError("timm's Swin normalises its patches, but got patch_norm=False; train with it.")
    kwargs = {
        "patch_size": model["patch_size"],
        "embed_dim": model["embed_dim"],
        "depths": list(model["depths"]),
        "num_heads": list(model["num_heads"]),
        "window_size": model["window_size"],
        "mlp_ratio": model.get("mlp_ratio", 4.0),
        "qkv_bias": model.get("qkv_bias", "layers.0.blocks.0.attn.qkv.bias" in weights),
        "drop_path_rate": model.get("drop_path_rate", 0.1),
    }
    return spec_for("swin_tiny_patch4_window7_224", kwargs, model)
