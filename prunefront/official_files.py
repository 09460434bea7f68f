"""Checkpoint files of the papers' own repositories: what their names, shapes and stored arguments tell.

`load_official` (reached as `prunefront.official.load_official`) works out architecture and hyper-parameters as far as
the file tells them, takes the rest from the caller, and asks in one sentence for what nobody said.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from typing import Any, cast

import timm
from torch import Tensor, nn

from prunefront.checkpoints import read_checkpoint, state_dict_in
from prunefront.config import ModelSpec
from prunefront.errors import CheckpointError, ConfigError
from prunefront.geometry import geometry_for
from prunefront.methods.diffrate import mean_kept
from prunefront.registry import get_method

# What the papers report accuracy with: resized to 256/224 of the input, bicubic, centre crop.
PAPERS_CROP_PCT = 0.875

# What repositories call models that timm knows under another name.
REPOSITORY_NAMES: dict[str, str] = {
    **{f"deit_{size}_patch16_shrink_base": f"deit_{size}_patch16_224" for size in ("tiny", "small", "base")},
    **{f"deit-{size[0]}": f"deit_{size}_patch16_224" for size in ("tiny", "small", "base")},
    **{f"lvvit-{size}": f"lvvit_{size}" for size in "tsml"},
    "swin_tiny_patch4_window7_224_token": "swin_tiny_patch4_window7_224",
    "swin_small_patch4_window7_224_token": "swin_small_patch4_window7_224",
}

# (width, depth) → heads, where they are not width / 64.
_ODD_HEADS = {(1280, 32): 16, (240, 12): 4}
# (width, depth) → divisor of LV-ViT's residual branches.
_LVVIT_SKIP = {(240, 12): 1.0, (384, 16): 2.0, (512, 20): 2.0, (768, 24): 3.0}
# Depths whose selection blocks the repositories fix at quarters.
_SELECTION_DEPTHS = (12, 16, 20)

# Method → name of a stored argument → our hyper-parameter.
_ARGUMENTS: dict[str, dict[str, str]] = {
    "evit": {"base_keep_rate": "base_keep_rate", "drop_loc": "drop_loc", "fuse_token": "fuse_token"},
    "ppt": {"r_tokens": "r", "pp_loc_list": "pp_loc_list", "threshold": "threshold", "prop_attn": "prop_attn"},
    "tome": {"r": "r", "prop_attn": "prop_attn"},
    "diffrate": {"prune_kept_num": "prune_kept_num", "merge_kept_num": "merge_kept_num"},
    "dynamicvit": {"base_rate": "base_rate"},
    "spvit": {"base_rate": "base_rate"},
    "trilevel": {"keep_ratio": "keep_ratio", "attn_ratio": "attn_ratio"},
}
# Method → what has to be known, each by one of several names; the repositories' defaults stand for the rest.
_NEEDED: dict[str, tuple[tuple[str, ...], ...]] = {
    "evit": (("base_keep_rate", "keep_rate"), ("fuse_token",)),
    "ppt": (("r",),),
    "tome": (("r",),),
    "diffrate": (("prune_kept_num",), ("merge_kept_num",)),
    "dynamicvit": (("base_rate", "token_ratio"),),
    "trilevel": (("keep_ratio",), ("attn_ratio",)),
}
# Giving one of these makes a stored one of the others meaningless.
_REPLACES = {"keep_rate": ("base_keep_rate", "drop_loc"), "token_ratio": ("base_rate",)}
_LISTS = ("drop_loc", "pp_loc_list", "pruning_loc", "pruning_blocks", "prune_kept_num", "merge_kept_num", "token_ratio")


def load_official(
    method: str,
    path: str | os.PathLike[str],
    *,
    model: str | None = None,
    architecture: Mapping[str, Any] | None = None,
    hparams: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Our model for a checkpoint file of a method's own repository, in eval mode.

    The file may be a bare state dict, or hold one under ``model``, ``state_dict`` or, where neither is there,
    ``model_ema``; names may begin with ``module.``. It is read weights-only, with argparse namespaces (``args``) and
    yacs settings (``config``) beside the weights and nothing more. Layer norms get the repositories' epsilon: 1e-6 for
    DeiT, 1e-5 for LV-ViT, Swin and predictors.

    Args:
        method: As in `from_official`: "evit", "ppt", "tome", "diffrate", "dynamicvit", "spvit", "trilevel" or "lvvit".
        path: The file.
        model: timm's or the repository's name of the model, for what weights do not show (heads of a width that is no
            multiple of 64) and for the mean and standard deviation of its images. Its width and depth are checked.
        architecture: Parts of the architecture that go before anything inferred, under the names of `from_official`:
            ``num_heads``, ``img_size`` of a grid that is not square, ``skip_lam``, ``layernorm_eps``, ...
        hparams: Hyper-parameters, under the names of `from_official` or of the repository's arguments. They go before
            those stored in the file. DiffRate's counts are recomputed from a searched checkpoint.

    Returns:
        A compressed model whose ``pretrained_cfg`` has the papers' evaluation transform (bicubic, centre crop of
        0.875), which `prunefront.training.data.data_config_of` reads.

    Raises:
        CheckpointError: If the file is missing, is not a checkpoint, would run code, or does not fit the method.
        ConfigError: If something needed is neither in the file nor given, or a hyper-parameter cannot be right.
    """
    from prunefront.official import from_official

    if method != "lvvit":
        get_method(method)
    name = os.fspath(path)
    loaded = read_checkpoint(path)
    state = state_dict_in(loaded, name)
    stored = stored_arguments(loaded)
    _check_kind(method, state, name)
    described = infer_architecture(state, model=model, given=architecture or {}, source=name)
    found = infer_hparams(method, state, stored, hparams or {}, depth=described.get("depth"), source=name)
    built = from_official(method, described, found, state)
    _set_transform(built, model)
    return built


def stored_arguments(loaded: Any) -> dict[str, Any]:
    """What a training script stored of its arguments (``args``), or nothing."""
    stored = loaded.get("args") if isinstance(loaded, Mapping) else None
    if stored is None:
        return {}
    if isinstance(stored, Mapping):
        return dict(stored)
    return dict(vars(stored)) if hasattr(stored, "__dict__") else {}


def infer_architecture(
    state: Mapping[str, Tensor], *, model: str | None = None, given: Mapping[str, Any] | None = None, source: str = ""
) -> dict[str, Any]:
    """The architecture of a state dict under a repository's names, as `from_official` takes it.

    Args:
        state: Names → tensors of a DeiT or ViT, LV-ViT, or Swin.
        model: See `load_official`.
        given: Entries that go before anything inferred.
        source: What errors call the weights.

    Raises:
        CheckpointError: If these are the weights of something else, or not of the ``model`` named.
        ConfigError: If a part cannot be seen; the text says how to give it.
    """
    given = dict(given or {})
    source = source or "The state dict"
    if any(name.startswith("layers.0.blocks.0.attn.") for name in state):
        described = _swin(state, model, given, source)
    elif "patch_embed.proj.weight" in state and "blocks.0.attn.qkv.weight" in state and "pos_embed" in state:
        described = _vit(state, model, given, source)
    else:
        shown = ", ".join(list(state)[:3]) or "nothing"
        raise CheckpointError(
            f"{source} should hold a DeiT, ViT, LV-ViT or Swin under its repository's names, but has {shown}. "
            "Convert the names first."
        )
    return described | given


def infer_hparams(
    method: str,
    state: Mapping[str, Tensor],
    stored: Mapping[str, Any],
    given: Mapping[str, Any],
    *,
    depth: int | None = None,
    source: str = "The file",
) -> dict[str, Any]:
    """Hyper-parameters of a checkpoint, as `from_official` takes them.

    Args:
        method: See `load_official`.
        state: Weights under the repository's names.
        stored: Arguments that the training script stored.
        given: What goes before them, under our names or the repository's.
        depth: Blocks; None for a Swin.
        source: What errors call the file.

    Raises:
        ConfigError: If one that is needed is in neither, or has a value out of place.
    """
    if method == "lvvit":
        return {}
    arguments = _ARGUMENTS.get(method, {})
    given = {arguments.get(name, name): _value(name, value) for name, value in given.items()}
    if depth is None:  # Swin: the repository's constants
        return given
    found = {
        hparam: _value(hparam, stored[argument])
        for argument, hparam in arguments.items()
        if stored.get(argument) is not None
    }
    if method == "diffrate":
        found = _searched_counts(state, depth) | found
    for name in given:
        for replaced in _REPLACES.get(name, ()):
            found.pop(replaced, None)
    found |= given
    if method == "spvit":
        found.pop("base_rate", None)  # the repository reads it and does not use it
    if method in ("dynamicvit", "spvit"):
        _complete_selection(found, state, depth, source)
    missing = [" or ".join(names) for names in _NEEDED.get(method, ()) if not any(name in found for name in names)]
    if missing:
        raise ConfigError(
            f"{source} does not tell {' and '.join(missing)} of {method}, without which its accuracy would be another "
            f"model's. Give {' '.join(f'--hparam {name.split()[0]}=VALUE' for name in missing)}."
        )
    return found


def _check_kind(method: str, state: Mapping[str, Tensor], source: str) -> None:
    """Learned parts tell methods apart."""
    heads = any(re.match(r"score_predictor\.\d+\.senet\.", name) for name in state)
    predictors = any(name.startswith("score_predictor.") for name in state)
    found = "spvit" if heads else "dynamicvit" if predictors else None
    wanted = method if method in ("dynamicvit", "spvit") else None
    if found == wanted:
        return
    holds = f"those of {found}" if found else "none"
    raise CheckpointError(
        f"A checkpoint of {method} has {'its own' if wanted else 'no'} learned predictors, but {source} has {holds}. "
        f"Use {f'--official {found}' if found else 'a checkpoint trained for it, or the method that trained this one'}."
    )


def _vit(state: Mapping[str, Tensor], model: str | None, given: Mapping[str, Any], source: str) -> dict[str, Any]:
    is_lvvit = "patch_embed.conv1.weight" in state
    width = int(state["pos_embed"].shape[-1])
    depth = _count(state, r"blocks\.(\d+)\.")
    named = None
    if model is not None:
        named = geometry_for(ModelSpec(name=timm_name(model)))
        if (named.embed_dim, named.depth) != (width, depth):
            raise CheckpointError(
                f"{model} has {named.depth} blocks of width {named.embed_dim}, but {source} has {depth} of width "
                f"{width}. Name the model that the file was trained as, or none."
            )
    patch = int(state["patch_embed.proj.weight"].shape[-1]) * (2 if is_lvvit else 1)
    stem = state["patch_embed.conv1.weight" if is_lvvit else "patch_embed.proj.weight"]
    described: dict[str, Any] = {
        "arch": "lvvit" if is_lvvit else "deit",
        "patch_size": patch,
        "embed_dim": width,
        "depth": depth,
        "mlp_ratio": _plain(state["blocks.0.mlp.fc1.weight"].shape[0] / width),
        "qkv_bias": "blocks.0.attn.qkv.bias" in state,
        "num_classes": _num_classes(state, source),
        "in_chans": int(stem.shape[1]),
        "distilled": "dist_token" in state,
        "layernorm_eps": 1e-5 if is_lvvit else 1e-6,
    }
    if "img_size" not in given:
        prefix = int("cls_token" in state) + int("dist_token" in state)
        patches = int(state["pos_embed"].shape[1]) - prefix
        side = math.isqrt(patches)
        if side * side != patches:
            raise ConfigError(
                f"{source} was trained on {patches} patches, which are no square, so the image size cannot be seen. "
                "Give --img-size HEIGHTxWIDTH."
            )
        described["img_size"] = side * patch
    if "num_heads" not in given:
        described["num_heads"] = _num_heads(state, width, depth, None if named is None else named.num_heads, source)
    if is_lvvit:
        described["stem_width"] = int(stem.shape[0])
        if "skip_lam" not in given:
            if (width, depth) not in _LVVIT_SKIP:
                raise ConfigError(
                    f"{source} is an LV-ViT of width {width} and depth {depth}, which none of the released ones has, "
                    "so the divisor of its residual branches cannot be known. Give --model-kwarg skip_lam=VALUE."
                )
            described["skip_lam"] = _LVVIT_SKIP[width, depth]
    return described


def _num_heads(state: Mapping[str, Tensor], width: int, depth: int, named: int | None, source: str) -> int:
    squeeze = state.get("score_predictor.0.senet.0.weight")
    if squeeze is not None:  # SPViT weighs heads, so its selectors show how many there are
        return int(squeeze.shape[1])
    if named is not None:
        return named
    if (width, depth) in _ODD_HEADS:
        return _ODD_HEADS[width, depth]
    if width % 64:
        raise ConfigError(
            f"{source} has width {width}, no multiple of 64, so the number of attention heads cannot be known. "
            "Give --num-heads, or --model with the name of the model."
        )
    return width // 64


def _swin(state: Mapping[str, Tensor], model: str | None, given: Mapping[str, Any], source: str) -> dict[str, Any]:
    stages = _count(state, r"layers\.(\d+)\.")
    try:
        tables = [state[f"layers.{stage}.blocks.0.attn.relative_position_bias_table"].shape for stage in range(stages)]
        embed = state["patch_embed.proj.weight"]
        hidden = state["layers.0.blocks.0.mlp.fc1.weight"]
    except KeyError as error:
        raise CheckpointError(f"{source} looks like a Swin, but lacks {error}. Use the file of its script.") from error
    window = (math.isqrt(int(tables[0][0])) + 1) // 2
    patch = int(embed.shape[-1])
    described: dict[str, Any] = {
        "patch_size": patch,
        "embed_dim": int(embed.shape[0]),
        "depths": [_count(state, rf"layers\.{stage}\.blocks\.(\d+)\.") for stage in range(stages)],
        "num_heads": [int(table[1]) for table in tables],
        "window_size": window,
        "mlp_ratio": _plain(hidden.shape[0] / hidden.shape[1]),
        "num_classes": _num_classes(state, source),
        "in_chans": int(embed.shape[1]),
        "norm_eps": 1e-5,
    }
    if "img_size" not in given:
        masks = state.get("layers.0.blocks.1.attn_mask")
        if model is not None:
            named = geometry_for(ModelSpec(name=timm_name(model)))
            described["img_size"] = list(named.img_size)
        elif masks is not None and math.isqrt(len(masks)) ** 2 == len(masks):
            described["img_size"] = math.isqrt(len(masks)) * window * patch
        else:
            raise ConfigError(f"{source} does not show the image size it was trained for. Give --img-size or --model.")
    return described


def timm_name(model: str) -> str:
    """timm's name of a model that a repository calls otherwise; other names as they are."""
    return REPOSITORY_NAMES.get(model, REPOSITORY_NAMES.get(model.lower(), model))


def _num_classes(state: Mapping[str, Tensor], source: str) -> int:
    head = state.get("head.weight")
    if head is None:
        raise CheckpointError(f"{source} has no classifier (head.weight), so there is no accuracy. Fine-tune it first.")
    return int(head.shape[0])


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    """One more than the highest number that the pattern finds at the start of a name."""
    found = (re.match(pattern, name) for name in state)
    return 1 + max((int(match.group(1)) for match in found if match), default=-1)


def _plain(ratio: float) -> float:
    """Ratios of shapes are almost always whole; timm truncates width * ratio, so others are rounded up a little."""
    return float(round(ratio)) if abs(ratio - round(ratio)) < 1e-9 else math.nextafter(ratio, math.inf)


def _value(name: str, value: Any) -> Any:
    """A value as scripts store or users write it: ``(3, 6, 9)``, ``3,6,9`` and ``3 6 9`` are lists."""
    if isinstance(value, tuple):
        return list(value)
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if name in _LISTS and isinstance(value, int | float) and not isinstance(value, bool):
        return [value]
    if isinstance(value, str) and (name in _LISTS or name in ("r", "r_tokens")):
        parts = value.strip("()[] ").replace(",", " ").split()
        try:
            numbers = [float(part) if re.search(r"[.e]", part) else int(part) for part in parts]
        except ValueError as error:
            raise ConfigError(f"{name} is a list of numbers such as 3,6,9, but got {value!r}.") from error
        is_number = name not in _LISTS and len(numbers) == 1 and not value.strip().startswith(("[", "("))
        return numbers[0] if is_number else numbers
    return value


def _complete_selection(found: dict[str, Any], state: Mapping[str, Tensor], depth: int, source: str) -> None:
    """Locations are not stored: known for the released depths, asked for otherwise."""
    stages = _count(state, r"score_predictor\.(\d+)\.")
    if "pruning_loc" not in found and (depth not in _SELECTION_DEPTHS or stages != 3):
        raise ConfigError(
            f"{source} has {stages} predictor(s) in {depth} blocks, and the file does not tell before which blocks "
            "they stand. Give --hparam pruning_loc=3,6,9 with its blocks."
        )
    locations = found.get("pruning_loc")
    if locations is not None and len(locations) != stages:
        raise ConfigError(f"{source} has {stages} predictor(s), but pruning_loc names {len(locations)}. Name one each.")


def _searched_counts(state: Mapping[str, Tensor], depth: int) -> dict[str, list[int]]:
    """DiffRate's counts by its ceil formula, from the candidates and logits of a searched checkpoint, if it is one.

    Chen et al., "DiffRate", ICCV 2023 (arXiv:2305.17997): ceil(sum of share * candidate), and the class token.
    """
    counts: dict[str, list[int]] = {}
    for kind in ("prune", "merge"):
        parts = [f"blocks.{block}.{kind}_ddp" for block in range(depth)]
        if not all(f"{part}.kept_token_candidate" in state for part in parts):
            return {}
        counts[f"{kind}_kept_num"] = [
            math.ceil(
                mean_kept(
                    state[f"{part}.kept_token_candidate"].float(), state[f"{part}.selected_probability"].float()
                ).item()
            )
            + 1
            for part in parts
        ]
    return counts


def _set_transform(built: nn.Module, model: str | None) -> None:
    """The papers' evaluation transform; mean and standard deviation are the named model's."""
    module = cast(Any, built)
    config = dict(module.pretrained_cfg)
    named = timm.get_pretrained_cfg(timm_name(model)) if model is not None else None
    if named is not None:
        config |= {"mean": named.mean, "std": named.std}
    config |= {"crop_pct": PAPERS_CROP_PCT, "interpolation": "bicubic", "crop_mode": "center", "test_crop_pct": None}
    module.pretrained_cfg = module.default_cfg = config
