"""What running out of memory leaves behind is freed, so that measuring can go on with the rest."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import TypeVar

import torch

from prunefront.errors import is_out_of_memory

T = TypeVar("T")


def if_it_fits(run: Callable[[], T], device: torch.device) -> T | None:
    """What ``run`` returns, or None where it runs out of memory; what it held until then is free again."""
    try:
        return run()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    # Only here, outside the handler, does nothing hold the frames of the failed run any longer.
    free_memory(device)
    return None


def free_memory(device: torch.device) -> None:
    """Give back what nothing refers to: compiled models are cycles, and torch keeps freed blocks of a GPU."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
