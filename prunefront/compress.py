"""Put a token-reduction method into a timm model, and take it out again.

The compressed model is a new module that shares the parameters of the original. Its class derives from the original's,
so state-dict keys, heads, gradient checkpointing and everything else of timm's stay as they are; only the walk through
the blocks is ours.
"""

from __future__ import annotations

import copy
import json
import logging
import os
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any, cast

import safetensors
import timm
import torch
from safetensors.torch import load_file, save
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from prunefront.backbones.compressed import Compressed, compressed_class
from prunefront.backbones.lvvit import CompressedLVViT, LVViT
from prunefront.backbones.vit import CompressedVisionTransformer
from prunefront.config import ConfigSource, ModelSpec, PruneConfig, load_config
from prunefront.errors import CheckpointError, ConfigError, ModelError
from prunefront.files import write_atomic
from prunefront.geometry import ModelGeometry, build_timm_model, geometry_for, geometry_of, require_supported
from prunefront.methods.base import Method
from prunefront.registry import get_method
from prunefront.schedule import plan_blocks

_METADATA_KEY = "prunefront_config"
_PREDICTORS = "score_predictor"

# Backbone → how it walks; the first that fits.
_MIXINS: tuple[tuple[type, type[Compressed]], ...] = (
    (LVViT, CompressedLVViT),
    (VisionTransformer, CompressedVisionTransformer),
)

_log = logging.getLogger(__name__)


def is_compressed(model: nn.Module) -> bool:
    return isinstance(model, Compressed)


def compress(model: nn.Module, config: ConfigSource) -> nn.Module:
    """A new model that runs ``model``'s weights under a token schedule; ``model`` stays as it was.

    Parameters and buffers are shared, so training one trains the other.

    Args:
        model: A timm VisionTransformer, compressed or not.
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
    vit._blocks_plan = plan_blocks(
        method,
        config.options,
        config.sites,
        depth=geometry.depth,
        num_patch_tokens=geometry.num_patch_tokens,
        num_prefix_tokens=geometry.num_prefix_tokens,
    )
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
        existing = getattr(source, _PREDICTORS, ())
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
    dense._modules.pop(_PREDICTORS, None)
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
        depth = geometry_for(config.model).depth
        if depth != geometry.depth:
            raise ModelError(
                f"The config is for {config.model.name} with {depth} blocks, but this model has {geometry.depth}. "
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
        checkpoint: Weights to load instead: a safetensors or PyTorch file.
    """
    config = load_config(config)
    return compress(create_dense(config.model, pretrained=pretrained, checkpoint=checkpoint), config)


def load_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Load a state dict (safetensors, or a PyTorch file read weights-only) strictly into ``model``.

    Raises:
        CheckpointError: If the file is missing, damaged, or names and shapes do not fit; the text says which.
    """
    state = read_state_dict(path)
    own = model.state_dict()
    missing = sorted(set(own) - set(state))
    surplus = sorted(set(state) - set(own))
    reshaped = [
        f"{name} is {tuple(state[name].shape)} instead of {tuple(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    problems = []
    if missing:
        problems.append(f"lacks {_some(missing)}")
    if surplus:
        problems.append(f"has {_some(surplus)} that the model does not")
    if reshaped:
        problems.append(_some(reshaped))
    if problems:
        raise CheckpointError(
            f"Checkpoint {os.fspath(path)} does not fit {type(model).__name__}: {'; '.join(problems)}. "
            "Check model name, image size and number of classes."
        )
    model.load_state_dict(state)


def read_state_dict(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Tensors of a checkpoint file; of a training checkpoint, those under ``model``, then ``model_ema``.

    Raises:
        CheckpointError: If the file is missing or is not a checkpoint.
    """
    name = os.fspath(path)
    if not Path(path).is_file():
        raise CheckpointError(f"Checkpoint {name} does not exist. Check the path.")
    try:
        if Path(path).suffix == ".safetensors":
            return load_file(name)
        loaded = torch.load(name, map_location="cpu", weights_only=True)
    except (safetensors.SafetensorError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise CheckpointError(f"{name} is not a readable checkpoint: {_first_line(error)}") from error
    except Exception as error:  # pickle.UnpicklingError and whatever a damaged archive raises
        raise CheckpointError(
            f"{name} could not be read as weights only: {_first_line(error)} "
            "Save the state dict alone, best as safetensors."
        ) from error
    for key in ("model", "model_ema", "state_dict"):
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
            break
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise CheckpointError(f"{name} holds no state dict. Save model.state_dict(), best as safetensors.")
    return cast(dict[str, Tensor], loaded)


def save_model(model: nn.Module, path: str | os.PathLike[str]) -> Path:
    """Write weights as safetensors with the config inside, so that `load_model` needs nothing else. All or nothing.

    Raises:
        ConfigError: If the model was not compressed.
        FileWriteError: If the file cannot be written.
    """
    if not isinstance(model, Compressed):
        raise ConfigError("save_model needs a compressed model; save a dense one with safetensors or torch.save.")
    # One key: safetensors writes several in no fixed order, and equal weights should be equal files.
    metadata = {_METADATA_KEY: json.dumps(model.prune_config.to_dict())}
    module = cast(nn.Module, model)
    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in module.state_dict().items()}
    return write_atomic(path, save(state, metadata=metadata))


def load_model(path: str | os.PathLike[str]) -> nn.Module:
    """A compressed model from a file of `save_model`: config and weights.

    Raises:
        CheckpointError: If the file is missing, damaged or carries no config.
    """
    name = os.fspath(path)
    if not Path(path).is_file():
        raise CheckpointError(f"Checkpoint {name} does not exist. Check the path.")
    try:
        with safetensors.safe_open(name, framework="pt") as file:
            metadata = file.metadata() or {}
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{name} is not a readable safetensors file: {error}.") from error
    if _METADATA_KEY not in metadata:
        raise CheckpointError(
            f"{name} carries no prunefront config. Use create_model(config, checkpoint=...) for plain weights."
        )
    return create_model(json.loads(metadata[_METADATA_KEY]), checkpoint=path)


def _some(names: Sequence[str], limit: int = 3) -> str:
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
