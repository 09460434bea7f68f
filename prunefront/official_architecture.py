"""Architectures as the papers' repositories and recorded cases describe them → timm models with their weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from prunefront.config import ModelSpec
from prunefront.errors import CheckpointError, ConfigError
from prunefront.geometry import build_timm_model

# Names under which repositories and cases give the backbone's layer-norm epsilon.
_NORM_EPS = ("layernorm_eps", "layernorm_eps_blocks", "norm_eps")


def spec_for(name: str, kwargs: Mapping[str, Any], model: Mapping[str, Any]) -> ModelSpec:
    """timm's model with the arguments that are worked out, and the sizes of images and classes as described."""
    size = model["img_size"]
    return ModelSpec(
        name=name,
        kwargs=dict(kwargs),
        img_size=size if isinstance(size, int) else tuple(size),
        in_chans=int(model.get("in_chans", 3)),
        num_classes=int(model["num_classes"]),
    )


def require_parts(model: Mapping[str, Any], needed: Sequence[str]) -> None:
    """Refuse a description that lacks a part.

    Raises:
        ConfigError: Naming what is missing.
    """
    missing = [name for name in needed if name not in model]
    if missing:
        raise ConfigError(f"The architecture lacks {', '.join(missing)}. Add what the checkpoint was trained with.")


def build_described(spec: ModelSpec, model: Mapping[str, Any]) -> nn.Module:
    """The dense model of a spec, with the layer-norm epsilon of the description.

    Raises:
        ModelError: If timm cannot build it.
    """
    dense = build_timm_model(spec)
    eps = next((model[name] for name in _NORM_EPS if model.get(name) is not None), None)
    if eps is not None:
        for module in dense.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = float(eps)
    return dense


def load_described(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load weights that have to fit.

    Raises:
        CheckpointError: If a name is missing or too many, or a shape differs.
    """
    try:
        missing, surplus = model.load_state_dict(dict(state), strict=False)
    except RuntimeError as error:
        raise CheckpointError(
            f"The weights do not fit the architecture given: {' '.join(str(error).split())[:400]}"
        ) from error
    # Counters of batch norms say nothing about the function; not every release stores them.
    missing = [name for name in missing if not name.endswith("num_batches_tracked")]
    problems = [f"{what} {', '.join(names[:3])}" for what, names in (("lack", missing), ("add", surplus)) if names]
    if problems:
        raise CheckpointError(
            f"The weights do not fit the architecture given: they {' and '.join(problems)}. "
            "Check method and architecture."
        )
