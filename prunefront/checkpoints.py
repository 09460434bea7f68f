"""Weights on disk: state dicts of any origin, and our own files, which carry their config."""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import pickle
import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import safetensors
import torch
from safetensors.torch import load_file, save
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from prunefront.backbones.compressed import Compressed
from prunefront.errors import CheckpointError, ConfigError
from prunefront.files import write_atomic

PREDICTORS = "score_predictor"
CONFIG_KEY = "prunefront_config"

# Where training scripts keep the weights, the first that is there; EMA weights only where nothing else is.
_WRAPPERS = ("model", "state_dict", "model_ema", "state_dict_ema")
# What the scripts of the field pickle beside the weights. Nothing else is ever unpickled.
_ALLOWED: list[Any] = [argparse.Namespace, np.dtype, np.float64, np.dtypes.Float64DType, np.ndarray]
_ALLOWED += [(np.float64(0).__reduce__()[0], f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
# The yacs settings of Swin's scripts are read as plain dicts: nothing of yacs is needed or run.
_ALLOWED.append((OrderedDict, "yacs.config.CfgNode"))
_DDP_PREFIX = "module."

_log = logging.getLogger(__name__)


def load_weights(model: nn.Module, path: str | os.PathLike[str]) -> tuple[str, ...]:
    """Load a state dict (safetensors, or a PyTorch file read weights-only) into ``model``.

    Everything has to fit, with two exceptions. Learned parts that a dense checkpoint cannot have stay as they are, and
    a warning says so. Position embeddings of another image size are resized, as when a model is fine-tuned at a higher
    resolution (bicubic, corners not aligned, no antialiasing: EViT's way).

    Returns:
        Names of learned parts that the file lacks.

    Raises:
        CheckpointError: If the file is missing, damaged, or names and shapes do not fit; the text says which.
    """
    state = read_state_dict(path)
    if any(name.startswith(f"{PREDICTORS}.") for name in state):
        from prunefront.methods.spvit import TokenSelector, shared_heads

        state = shared_heads(state, [module for module in model.modules() if isinstance(module, TokenSelector)])
    own = model.state_dict()
    state = _with_positions_of(model, state, own)
    learned = {name for name in own if isinstance(model, Compressed) and name.startswith(f"{PREDICTORS}.")}
    has_learned = any(name in state for name in learned)
    absent = sorted(set(own) - set(state) - (set() if has_learned else learned))
    # Counters of batch norms say nothing about the function; not every release stores them.
    missing = [name for name in absent if not name.endswith("num_batches_tracked")]
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
        advice = "Check model name, image size and number of classes."
        if any(name.startswith(f"{PREDICTORS}.") for name in state) and not learned:
            advice = "It is of a compressed model with learned parts: name its config, or load it with load_model."
        raise CheckpointError(
            f"Checkpoint {os.fspath(path)} does not fit {type(model).__name__}: {'; '.join(problems)}. {advice}"
        )
    model.load_state_dict(state, strict=False)
    untrained = () if has_learned else tuple(sorted(learned))
    if untrained:
        _log.warning(
            "%s is a dense checkpoint: %s stay as they were initialised. Train the model before you use it.",
            os.fspath(path),
            _some(untrained),
        )
    return untrained


def _with_positions_of(model: nn.Module, state: dict[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state with its absolute position embeddings resized to the model's patch grid, where both are grids."""
    stored, wanted = state.get("pos_embed"), own.get("pos_embed")
    if stored is None or wanted is None or stored.shape == wanted.shape:
        return state
    vit: Any = model
    prefix = 0 if getattr(model, "no_embed_class", False) else int(getattr(model, "num_prefix_tokens", 0))
    fits = stored.ndim == wanted.ndim == 3 and stored.shape[2] == wanted.shape[2] and hasattr(model, "patch_embed")
    side = math.isqrt(max(stored.shape[1] - prefix, 0)) if fits else 0
    if side < 1 or side * side != stored.shape[1] - prefix:  # only a square grid can be told from its length
        return state
    _log.info("Positions of %d x %d patches are resized to %s.", side, side, vit.patch_embed.grid_size)
    resized = resample_abs_pos_embed(
        stored, list(vit.patch_embed.grid_size), [side, side], num_prefix_tokens=prefix, antialias=False
    )
    return {**state, "pos_embed": resized}


def read_state_dict(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Tensors of a checkpoint file.

    Of a training checkpoint those under ``model``, ``state_dict`` or, where neither is there, ``model_ema``. Pickled
    files are read weights-only, with the argument namespaces that scripts store beside them and nothing more.

    Raises:
        CheckpointError: If the file is missing or is not a checkpoint.
    """
    return state_dict_in(read_checkpoint(path), os.fspath(path))


def read_checkpoint(path: str | os.PathLike[str]) -> Any:
    """Everything a checkpoint file holds, on the CPU: of a training checkpoint the weights and what stands beside them.

    Pickled files are read weights-only, with the argument namespaces that scripts store and nothing more.

    Raises:
        CheckpointError: If the file is missing or is not a checkpoint.
    """
    name = os.fspath(path)
    if not Path(path).is_file():
        raise CheckpointError(f"Checkpoint {name} does not exist. Check the path.")
    try:
        if Path(path).suffix == ".safetensors":
            return load_file(name)
        with torch.serialization.safe_globals(_ALLOWED):
            return torch.load(name, map_location="cpu", weights_only=True)
    except (safetensors.SafetensorError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise CheckpointError(f"{name} is not a readable checkpoint: {_first_line(error)}") from error
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{name} could not be read as weights only: {_unpickling_reason(error)}. "
            "Save the state dict alone, best as safetensors."
        ) from error


def state_dict_in(loaded: Any, name: str) -> dict[str, Tensor]:
    """The state dict in what a checkpoint file held.

    Raises:
        CheckpointError: If there is none.
    """
    if isinstance(loaded, Mapping):
        loaded = next((loaded[key] for key in _WRAPPERS if isinstance(loaded.get(key), Mapping)), loaded)
    if not isinstance(loaded, Mapping) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise CheckpointError(f"{name} holds no state dict. Save model.state_dict(), best as safetensors.")
    state = cast(Mapping[str, Tensor], loaded)
    if state and all(key.startswith(_DDP_PREFIX) for key in state):
        return {key.removeprefix(_DDP_PREFIX): value for key, value in state.items()}
    return dict(state)


def save_model(model: nn.Module, path: str | os.PathLike[str]) -> Path:
    """Write weights as safetensors with the config inside, so that `load_model` needs nothing else. All or nothing.

    Raises:
        ConfigError: If the model was not compressed.
        FileWriteError: If the file cannot be written.
    """
    if not isinstance(model, Compressed):
        raise ConfigError("save_model needs a compressed model; save a dense one with safetensors or torch.save.")
    # One key: safetensors writes several in no fixed order, and equal weights should be equal files.
    metadata = {CONFIG_KEY: json.dumps(model.prune_config.to_dict())}
    module = cast(nn.Module, model)
    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in module.state_dict().items()}
    return write_atomic(path, save(state, metadata=metadata))


def read_saved_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The config inside a file of `save_model`.

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
    if CONFIG_KEY not in metadata:
        raise CheckpointError(
            f"{name} carries no prunefront config. Use create_model(config, checkpoint=...) for plain weights."
        )
    config: dict[str, Any] = json.loads(metadata[CONFIG_KEY])
    return config


def _some(names: Sequence[str], limit: int = 3) -> str:
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


def _unpickling_reason(error: Exception) -> str:
    """What was refused, without torch's advice to read the file unsafely."""
    found = re.search(r"GLOBAL (\S+?)[\s.]*(?:was|whose|\s|$)", str(error))
    return f"it wants to run {found.group(1)}" if found else _first_line(error).rstrip(".")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
