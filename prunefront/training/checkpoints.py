"""Files of a training run: the checkpoint that continues it, and the weights it ends with."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

from prunefront.checkpoints import save_model
from prunefront.compress import is_compressed
from prunefront.errors import CheckpointError
from prunefront.files import write_atomic

CHECKPOINT_NAME = "checkpoint.pt"
WEIGHTS_NAME = "model.safetensors"

_FORMAT = 2


def save_checkpoint(path: Path, identity: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Write a checkpoint in one step: a crash leaves the previous one.

    Args:
        path: The file.
        identity: What must be equal for a later run to go on from it.
        state: Everything the run needs, of types that torch loads as weights only.

    Raises:
        FileWriteError: If it cannot be written; the previous one is intact.
    """
    buffer = io.BytesIO()
    torch.save({"format": _FORMAT, "identity": dict(identity), **state}, buffer)
    write_atomic(path, buffer.getvalue())


def load_checkpoint(path: Path, identity: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Read a checkpoint of this very run.

    Args:
        path: The file.
        identity: Of the present run.
        device: Where tensors go.

    Raises:
        CheckpointError: If it is damaged, or belongs to another run or to another number of processes.
    """
    try:
        state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # a damaged archive raises errors of many libraries
        raise CheckpointError(
            f"{path} is not a readable checkpoint: {str(error).splitlines()[0]} "
            "Remove it to start this fine-tuning anew."
        ) from error
    found = state.get("identity") or {}
    changed = [key for key, value in identity.items() if found.get(key) != value]
    if changed == ["world_size"]:
        raise CheckpointError(
            f"{path} was written by a training on {found.get('world_size')} process(es), but this one has "
            f"{identity['world_size']}: go on with as many as before, or remove that file to start anew."
        )
    if state.get("format") != _FORMAT or changed:
        raise CheckpointError(
            f"{path} belongs to another run: {', '.join(changed) or 'format'} differs. "
            "Choose another folder, or remove that file to start anew."
        )
    return state


def save_weights(model: nn.Module, path: Path) -> Path:
    """Write weights as safetensors, with the config inside for a compressed model; all or nothing."""
    if is_compressed(model):
        return save_model(model, path)
    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()}
    return write_atomic(path, safetensors.torch.save(state, metadata={"format": "pt"}))
