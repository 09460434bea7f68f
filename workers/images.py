"""Images for tasks: decoded once per process where memory allows, however many candidates look at them."""

from __future__ import annotations

from functools import lru_cache
from itertools import cycle, islice

import numpy as np
import torch
from torch import Tensor

from prunefront.training.data import DataConfig, SplitDataset, SplitName, evaluation_batches, open_split
from workers.machine import total_memory_mib

KEPT_MIB = 512.0  # a split up to this size stays in memory between the tasks of a process
MEMORY_SHARE = 0.25  # of the machine's memory: what a split may take for the length of one task


def open_images(dataset: str, split: SplitName, data_config: DataConfig, num_images: int | None = None) -> SplitDataset:
    """Open a split for evaluation, in memory if it fits.

    An image that cannot be decoded is refused: per-image results of tasks on several devices, and of earlier runs, are
    compared by position, so all of them have to be about all images of the split.

    Args:
        dataset: Dataset id.
        split: ``train``, ``search`` or ``test``.
        data_config: The model's input.
        num_images: Size of the sample; None is the whole split.

    Raises:
        CorruptImageError, DatasetError, UnknownNameError: See :func:`prunefront.training.data.open_split`.
    """
    opened = _open_kept(dataset, split, data_config, num_images)
    if opened.is_streamed:
        return opened
    size_mib = len(opened) * float(np.prod(data_config.input_size)) * 4 / 2**20
    budget_mib = MEMORY_SHARE * total_memory_mib()
    if KEPT_MIB < size_mib <= budget_mib:
        return open_split(dataset, split, data_config=data_config, num_images=num_images, in_memory_mib=budget_mib)
    return opened


def load_batches(
    dataset: str, split: SplitName, data_config: DataConfig, *, batch_size: int, num_batches: int
) -> list[Tensor]:
    """Return full batches of images, each of shape (B, C, H, W); a small split is shown again until they are full."""
    wanted = batch_size * num_batches
    opened = open_images(dataset, split, data_config, wanted)
    images = torch.cat([batch for batch, _ in evaluation_batches(opened, batch_size)])
    chosen = torch.tensor(list(islice(cycle(range(len(images))), wanted)))
    return list(images[chosen].reshape(num_batches, batch_size, *images.shape[1:]))


@lru_cache(maxsize=2)  # a search evaluates on two splits
def _open_kept(dataset: str, split: SplitName, data_config: DataConfig, num_images: int | None) -> SplitDataset:
    return open_split(dataset, split, data_config=data_config, num_images=num_images, in_memory_mib=KEPT_MIB)
