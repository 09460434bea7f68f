"""Accuracy of a model on a split: every image once, with the per-image result that paired intervals need."""

from __future__ import annotations

import base64
import binascii
import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from prunefront.errors import ConfigError, DatasetError
from prunefront.training.data import SplitDataset, check_classes, evaluation_batches
from prunefront.training.distributed import World
from prunefront.training.errors import StoppedError

DType = Literal["fp32", "bf16", "fp16"]
Progress = Callable[[float, float, str], None]
ShouldStop = Callable[[], bool]

_AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
_TOP_K = 5
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Accuracy of one model on one split.

    Attributes:
        num_images: Images counted, each once; skipped ones do not count.
        num_skipped: Images of the split that could not be decoded; 0 unless the split was opened to skip such.
        top1: Share of images whose highest logit is the label's, 0-1.
        top5: Share of images whose label is among the five highest logits, 0-1.
        loss: Mean cross-entropy.
        correct: Whether top-1 was right, per counted image in the order of the split, shape (num_images,).
        indices: Which image of the split each of ``correct`` is about, shape (num_images,). Two models are compared on
            the same images when theirs are equal; ``clusters[indices]`` are the clusters of ``correct``.
    """

    num_images: int
    num_skipped: int
    top1: float
    top5: float
    loss: float
    correct: NDArray[np.bool_]
    indices: NDArray[np.int64]


def evaluate(
    model: nn.Module,
    dataset: SplitDataset,
    *,
    batch_size: int = 64,
    device: str | torch.device = "cpu",
    dtype: DType = "fp32",
    num_workers: int = 0,
    world: World | None = None,
    progress: Progress | None = None,
    should_stop: ShouldStop | None = None,
) -> Evaluation:
    """Evaluate a model in eval mode; its mode is put back afterwards.

    Args:
        model: Maps images (B, C, H, W) to logits (B, classes); moved to ``device``.
        dataset: A split opened for this model's input.
        batch_size: Images per forward pass; the last batch is smaller rather than padded. Does not change the result.
        device: Torch device.
        dtype: ``fp32``, or autocast to ``bf16`` or ``fp16``.
        num_workers: Processes that load images.
        world: The processes that share the work, each with its own copy of the model; every image is counted once, and
            each process gets the whole result.
        progress: Called with (images done, all images, text) after each batch, of this process.
        should_stop: Asked before each batch; not with several processes, since some have one batch more than others.

    Raises:
        CorruptImageError: If an image cannot be decoded and the split was opened to refuse such.
        DatasetError: If the dataset's classes are not the model's, or it has no images.
        StoppedError: If ``should_stop`` said so.
    """
    device = torch.device(device)
    world = World() if world is None else world
    was_training = model.training
    model.to(device).eval()
    total = None if dataset.is_streamed else len(dataset)
    correct: list[NDArray[np.bool_]] = []
    indices: list[NDArray[np.int64]] = []
    top5_hits, loss_sum, done = 0, 0.0, 0
    try:
        with torch.inference_mode(), autocast(device, dtype):
            for images, labels, places in evaluation_batches(
                dataset, batch_size, num_workers, rank=world.rank, world_size=world.size, with_index=True
            ):
                if should_stop is not None and world.size == 1 and should_stop():
                    raise StoppedError(f"Evaluation was stopped after {done} images.")
                logits = model(images.to(device, non_blocking=True)).float()
                labels = labels.to(device)
                if done == 0:
                    check_classes(dataset, logits.shape[1])
                check_labels(labels, dataset)
                ranked = logits.topk(min(_TOP_K, logits.shape[1]), dim=1).indices == labels[:, None]
                correct.append(ranked[:, 0].cpu().numpy())
                indices.append(places.numpy())
                top5_hits += int(ranked.any(dim=1).sum())
                # Summed in float64, image by image, so that the batch size does not show.
                loss_sum += float(functional.cross_entropy(logits, labels, reduction="none").double().sum())
                done += len(labels)
                if progress is not None:
                    progress(done * world.size, total or done * world.size, f"{done * world.size} images evaluated")
    finally:
        model.train(was_training)
    done, top5_hits, loss_sum = _of_all(world, done, top5_hits, loss_sum)
    if done == 0:
        skipped = dataset.describe_skipped()
        raise DatasetError(
            f"The split {dataset.split!r} of {dataset.dataset_id!r} gave no images{f': {skipped}' if skipped else '.'} "
            "Check its files."
        )
    flags, places_seen = _in_order(world, correct, indices)
    num_skipped = 0 if total is None else total - done
    if num_skipped:
        _log.warning("images skipped", extra={"action": "evaluate", "detail": dataset.describe_skipped()})
    return Evaluation(
        num_images=done,
        num_skipped=num_skipped,
        top1=float(flags.mean()),
        top5=top5_hits / done,
        loss=loss_sum / done,
        correct=flags,
        indices=places_seen,
    )


def _of_all(world: World, done: int, top5_hits: int, loss_sum: float) -> tuple[int, int, float]:
    images, hits, loss = world.total([done, top5_hits, loss_sum])
    return int(images), int(hits), loss


def _in_order(
    world: World, correct: list[NDArray[np.bool_]], indices: list[NDArray[np.int64]]
) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """Results and images of all processes, in the order of the split."""
    if world.size == 1:
        return np.concatenate(correct), np.concatenate(indices)
    own = np.zeros((0, 2), dtype=np.int64)
    if indices:
        own = np.stack((np.concatenate(indices), np.concatenate(correct).astype(np.int64)), axis=1)
    rows = world.gathered(torch.from_numpy(own)).numpy()
    rows = rows[np.argsort(rows[:, 0])]
    return rows[:, 1].astype(np.bool_), rows[:, 0]


def autocast(device: torch.device, dtype: DType) -> contextlib.AbstractContextManager[object]:
    """Return the autocast context of a dtype; nothing for ``fp32``.

    Raises:
        ConfigError: If the dtype is unknown.
    """
    if dtype not in _AUTOCAST:
        raise ConfigError(f"dtype must be one of {', '.join(_AUTOCAST)}, but got {dtype!r}.")
    target = _AUTOCAST[dtype]
    return contextlib.nullcontext() if target is None else torch.autocast(device.type, dtype=target)


def check_labels(labels: torch.Tensor, dataset: SplitDataset) -> None:
    """Refuse labels outside the dataset's classes, such as the -1 of unlabelled test splits.

    Raises:
        DatasetError: If a label lies outside.
    """
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= dataset.num_classes:
        raise DatasetError(
            f"Labels of {dataset.dataset_id!r} must lie in 0..{dataset.num_classes - 1}, but its split "
            f"{dataset.split!r} has {low if low < 0 else high}. Name a labelled split in the settings entry."
        )


def pack_correct(correct: NDArray[np.bool_]) -> str:
    """Encode per-image results as base64 of packed bits; ``unpack_correct`` needs their number."""
    return base64.b64encode(np.packbits(correct).tobytes()).decode("ascii")


def unpack_correct(packed: str, num_images: int) -> NDArray[np.bool_]:
    """Decode ``pack_correct``.

    Raises:
        ConfigError: If the text does not hold ``num_images`` results.
    """
    try:
        raw = np.frombuffer(base64.b64decode(packed, validate=True), dtype=np.uint8)
    except binascii.Error as error:
        raise ConfigError(
            f"Per-image results are base64 of packed bits, but they cannot be decoded: {error}."
        ) from error
    if len(raw) != (num_images + 7) // 8:
        raise ConfigError(
            f"Results of {num_images} images take {(num_images + 7) // 8} bytes, but got {len(raw)}. "
            "Give the number of images they were packed from."
        )
    return np.unpackbits(raw, count=num_images).astype(np.bool_)
