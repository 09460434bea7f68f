"""Put a token-reduction method into a timm model, and take it out again.

The compressed model is a new module that shares the parameters of the original. Its class derives from the original's,
so state-dict keys, heads, gradient checkpointing and everything else of timm's stay as they are; only the walk through
the blocks is ours.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Hashable
from typing import Any, cast

import timm
from timm.models.eva import Eva
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from prunefront.backbones.compressed import Compressed, compressed_class
from prunefront.backbones.eva import CompressedEva
from prunefront.backbones.lvvit import LVViT
from prunefront.backbones.swin import CompressedSwinTransformer
from prunefront.backbones.vit import CompressedLVViT, CompressedVisionTransformer
from prunefront.checkpoints import PREDICTORS, load_weights, read_saved_config
from prunefront.config import ConfigSource, ModelSpec, PruneConfig, load_config
from prunefront.errors import CheckpointError, ModelError
from prunefront.geometry import ModelGeometry, build_timm_model, geometry_for, geometry_of, require_supported
from prunefront.methods.base import Method
from prunefront.registry import get_method
from prunefront.schedule import plan_model

# Backbone → how it walks; the first that fits.
_MIXINS: tuple[tuple[type, type[Compressed]], ...] = (
    (LVViT, CompressedLVViT),
    (VisionTransformer, CompressedVisionTransformer),
    (SwinTransformer, CompressedSwinTransformer),
    (Eva, CompressedEva),
)


def is_compressed(model: nn.Module) -> bool:
    return isinstance(model, Compressed)


def compress(model: nn.Module, config: ConfigSource) -> nn.Module:
    """A new model that runs ``model``'s weights under a token schedule; ``model`` stays as it was.

    Parameters and buffers are shared, so training one trains the other.

    Args:
        model: A timm VisionTransformer, Eva or SwinTransformer, compressed or not.
        config: Config, dict, path or open file. Its model must have the token counts of ``model``.

    Raises:
        ModelError: If prunefront or the method does not support the model, or the config is for another model.
        ConfigError: If the config cannot be right for this model.
    """
    config = load_config(config)
    base = uncompress(model) if is_compressed(model) else _share(model)
    geometry = geometry_of(base)
    _check_fits(config, geometry)
    method = get_method(config.method)
    method.check_geometry(geometry, config.sites)
    vit = cast(Any, base)
    mixin = next(mixin for backbone, mixin in _MIXINS if isinstance(base, backbone))
    vit.__class__ = compressed_class(cast(Hashable, mixin), cast(Hashable, type(base)))
    vit.prune_config = config
    vit._method = method
    vit._blocks_plan = plan_model(method, config.options, config.sites, geometry)
    predictors = _predictors(method, geometry, config, model)
    if predictors is not None:
        place = next(model.parameters())
        vit.score_predictor = predictors.to(device=place.device, dtype=place.dtype).train(model.training)
    return cast(nn.Module, vit)


def _predictors(
    method: Method, geometry: ModelGeometry, config: PruneConfig, source: nn.Module
) -> nn.ModuleList | None:
    """Learned parts, one per site: those of ``source`` where it has them for the block, else freshly initialised."""
    trained: dict[int, nn.Module] = {}
    if isinstance(source, Compressed) and source.prune_config.method == config.method:
        existing = getattr(source, PREDICTORS, ())
        trained = {site.block: part for site, part in zip(source.prune_config.sites, existing, strict=False)}
    parts = []
    for site in config.sites:
        part = trained.get(site.block)
        if part is None:
            part = method.create_predictor(geometry)
        if part is None:
            return None
        parts.append(part)
    return nn.ModuleList(parts) if parts else None


def uncompress(model: nn.Module) -> nn.Module:
    """The dense timm model inside a compressed one, sharing its parameters."""
    if not is_compressed(model):
        raise ModelError(f"{type(model).__name__} is not compressed, so there is nothing to undo.")
    dense = cast(Any, _share(model))
    del dense.prune_config, dense._blocks_plan, dense._method
    dense._modules.pop(PREDICTORS, None)
    dense.__class__ = type(model).__bases__[1]
    return cast(nn.Module, dense)


def _share(model: nn.Module) -> nn.Module:
    """Copy of the module tree whose parameters and buffers are the original's own objects."""
    require_supported(model)
    memo: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, memo)


def _check_fits(config: PruneConfig, geometry: ModelGeometry) -> None:
    """A config made for another resolution or depth would silently mean something else here."""
    if timm.is_model(config.model.name):
        expected, got = _blocks_of(geometry_for(config.model)), _blocks_of(geometry)
        if expected != got:
            raise ModelError(
                f"The config is for {config.model.name} with {expected} blocks, but this model has {got}. "
                "Use prunefront.create_model(config), or a config made for this model."
            )
    if config.model.img_size is not None:
        wanted = config.model.img_size if isinstance(config.model.img_size, tuple) else (config.model.img_size,) * 2
        if wanted != geometry.img_size:
            raise ModelError(
                f"The config is for images of {wanted[0]} x {wanted[1]} px, but this model takes "
                f"{geometry.img_size[0]} x {geometry.img_size[1]}. Use prunefront.create_model(config) "
                "or change model.img_size in the config."
            )


def _blocks_of(geometry: ModelGeometry) -> str:
    return "+".join(str(stage.depth) for stage in geometry.stages) or str(geometry.depth)


def create_dense(
    spec: ModelSpec, *, pretrained: bool = False, checkpoint: str | os.PathLike[str] | None = None
) -> nn.Module:
    """The dense model of a spec, with timm's weights, a checkpoint file's, or freshly initialised.

    Raises:
        UnknownNameError, ModelError: If timm cannot build it, or it is not supported.
        CheckpointError: If the checkpoint is missing or does not fit.
    """
    if pretrained and checkpoint is None:
        try:
            model = build_timm_model(spec, pretrained=True)
        except (OSError, RuntimeError) as error:
            raise CheckpointError(
                f"Could not load timm's pretrained weights of {spec.name!r}: {' '.join(str(error).split())[:300]}. "
                "Check the network, or name a local checkpoint."
            ) from error
    else:
        model = build_timm_model(spec)
    require_supported(model)
    if checkpoint is not None:
        load_weights(model, checkpoint)
    return model


def create_model(
    config: ConfigSource,
    pretrained: bool = False,
    *,
    checkpoint: str | os.PathLike[str] | None = None,
) -> nn.Module:
    """Build the config's timm model and compress it.

    Args:
        config: Config, dict, path or open file.
        pretrained: Load timm's pretrained weights.
        checkpoint: Weights to load instead: a safetensors or PyTorch file. A dense one leaves the learned parts of
            methods that have any as they are initialised, and a warning says so.
    """
    config = load_config(config)
    model = compress(create_dense(config.model, pretrained=pretrained and checkpoint is None), config)
    if checkpoint is not None:
        load_weights(model, checkpoint)
    return model


def load_model(path: str | os.PathLike[str]) -> nn.Module:
    """A compressed model from a file of `save_model`: config and weights.

    Raises:
        CheckpointError: If the file is missing, damaged or carries no config.
    """
    return create_model(read_saved_config(path), checkpoint=path)
