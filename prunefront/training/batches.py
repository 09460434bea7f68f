"""Batches of a split for training and evaluation: order, repeats, ranks, and images that cannot be decoded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from prunefront.errors import ConfigError, CorruptImageError, DatasetError

if TYPE_CHECKING:
    from prunefront.training.data import SplitDataset

Batch = tuple[Tensor, Tensor]
IndexedBatch = tuple[Tensor, Tensor, Tensor]
_Key = tuple[int, int]  # index within the split, repeat
_Failure = tuple[int, CorruptImageError]


@overload
def evaluation_batches(
    split: SplitDataset,
    batch_size: int,
    num_workers: int = 0,
    *,
    rank: int = 0,
    world_size: int = 1,
    with_index: Literal[False] = False,
) -> Iterator[Batch]: ...


@overload
def evaluation_batches(
    split: SplitDataset,
    batch_size: int,
    num_workers: int = 0,
    *,
    rank: int = 0,
    world_size: int = 1,
    with_index: Literal[True],
) -> Iterator[IndexedBatch]: ...


def evaluation_batches(
    split: SplitDataset,
    batch_size: int,
    num_workers: int = 0,
    *,
    rank: int = 0,
    world_size: int = 1,
    with_index: bool = False,
) -> Iterator[Batch] | Iterator[IndexedBatch]:
    """Yield every image once, in order; the last batch may be smaller rather than padded.

    Args:
        split: A split opened without ``train``.
        batch_size: Images per batch. One with skipped images is smaller, and one of nothing else is left out.
        num_workers: Loader processes; none for a stream.
        rank: Which of ``world_size`` processes this is; it gets the images ``rank``, ``rank + world_size``, ... so that
            every image comes exactly once over all ranks. One rank may get an image, and a batch, more than another.
        world_size: Processes that share the split.
        with_index: Whether to yield the index of each image within the split (of a stream: its running number) too.

    Yields:
        Images (B, C, H, W), labels (B,) and, with ``with_index``, indices (B,).

    Raises:
        ConfigError: If ``rank`` is not one of ``world_size``.
        CorruptImageError: If an image cannot be decoded and the split was opened to refuse such.
    """
    _check_rank(rank, world_size)
    return _with_or_without_index(_evaluation_batches(split, batch_size, num_workers, rank, world_size), with_index)


def _evaluation_batches(
    split: SplitDataset, batch_size: int, num_workers: int, rank: int, world_size: int
) -> Iterator[IndexedBatch]:
    if split.is_streamed:
        yield from _batched(islice(enumerate(split.stream()), rank, None, world_size), batch_size)
        return
    mine = range(rank, len(split), world_size)
    batches = _Batches(-(-len(mine) // batch_size), lambda number: _batch_of(mine, number, batch_size))
    for batch, _ in _loaded(split, batches, num_workers):
        if batch is not None:
            yield batch


def _batch_of(mine: range, number: int, batch_size: int) -> list[_Key]:
    return [(index, 0) for index in mine[number * batch_size : (number + 1) * batch_size]]


def batches_per_epoch(num_images: int, *, batch_size: int, world_size: int = 1) -> int:
    """Return how many batches ``training_batches`` yields per epoch and rank.

    Args:
        num_images: Images of the epoch: of the split, or of the given ``indices``.
        batch_size: Images per batch and rank.
        world_size: Processes that share the epoch.
    """
    return num_images // world_size // batch_size


@overload
def training_batches(
    split: SplitDataset,
    *,
    batch_size: int,
    seed: int,
    epoch: int,
    first_batch: int = 0,
    num_workers: int = 0,
    repeats: int = 1,
    rank: int = 0,
    world_size: int = 1,
    indices: Sequence[int] | NDArray[np.int64] | None = None,
    with_index: Literal[False] = False,
) -> Iterator[Batch]: ...


@overload
def training_batches(
    split: SplitDataset,
    *,
    batch_size: int,
    seed: int,
    epoch: int,
    first_batch: int = 0,
    num_workers: int = 0,
    repeats: int = 1,
    rank: int = 0,
    world_size: int = 1,
    indices: Sequence[int] | NDArray[np.int64] | None = None,
    with_index: Literal[True],
) -> Iterator[IndexedBatch]: ...


def training_batches(
    split: SplitDataset,
    *,
    batch_size: int,
    seed: int,
    epoch: int,
    first_batch: int = 0,
    num_workers: int = 0,
    repeats: int = 1,
    rank: int = 0,
    world_size: int = 1,
    indices: Sequence[int] | NDArray[np.int64] | None = None,
    with_index: bool = False,
) -> Iterator[Batch] | Iterator[IndexedBatch]:
    """Yield one epoch in an order that depends on (seed, epoch) alone; a last, smaller batch is left out.

    The images are permuted, each then stands ``repeats`` times in a row, and the row is cut to the length it has
    without repeats. Ranks take turns along it, so that consecutive repeats go to different ranks: the repeated
    augmentation of Hoffer et al. (arXiv:1901.09335) as DeiT samples it. DeiT cuts the row to a multiple of 256 images,
    this function to full batches, equally many on each rank.

    Args:
        split: A split opened with ``train=True``.
        batch_size: Images per batch and rank. A batch with skipped images is smaller.
        seed: Seed of the run.
        epoch: Epoch, from 0.
        first_batch: Where an interrupted epoch goes on.
        num_workers: Loader processes; none for a stream.
        repeats: How often an image is shown, differently augmented each time, in an epoch that sees 1 / ``repeats`` of
            the images. The augmentation is a function of (seed, epoch, index, repeat).
        rank: Which of ``world_size`` processes this is. Ranks get different batches.
        world_size: Processes that share the epoch.
        indices: The images, by index within the split, that the epoch consists of; None takes all. Each at most once.
        with_index: Whether to yield the index of each image within the split too.

    Yields:
        Images (B, C, H, W), labels (B,) and, with ``with_index``, indices (B,).

    Raises:
        ConfigError: If ``repeats`` is less than 1, ``rank`` is not one of ``world_size``, or ``indices`` is not a list
            of different images of the split.
        CorruptImageError: If an image cannot be decoded and the split was opened to refuse such, or no image of a batch
            can be decoded: without a batch, ranks and steps would no longer agree.
        DatasetError: If a stream is to be repeated, restricted or indexed.
    """
    _check_rank(rank, world_size)
    if repeats < 1:
        raise ConfigError(f"repeats must be at least 1, but got {repeats}. 1 shows each image once per epoch.")
    if split.is_streamed:
        if repeats > 1 or indices is not None or with_index:
            raise DatasetError(
                f"The stream {split.dataset_id!r} is read in its own order: its images have no index and cannot be "
                "repeated. Leave out repeats, indices and with_index, or use a dataset with random access."
            )
        num_batches = batches_per_epoch(len(split), batch_size=batch_size, world_size=world_size)
        streamed = _streamed_batches(split, batch_size, seed, epoch, rank, world_size)
        return _with_or_without_index(islice(streamed, first_batch, num_batches), False)
    chosen = np.arange(len(split)) if indices is None else _checked_indices(indices, len(split))
    order = chosen[np.random.default_rng((seed, epoch)).permutation(len(chosen))]

    def keys(number: int) -> list[_Key]:
        places = (np.arange(number * batch_size, (number + 1) * batch_size)) * world_size + rank
        return list(zip(order[places // repeats].tolist(), (places % repeats).tolist(), strict=True))

    num_batches = batches_per_epoch(len(order), batch_size=batch_size, world_size=world_size)
    batches = _Batches(max(num_batches - first_batch, 0), lambda number: keys(first_batch + number))
    return _with_or_without_index(_training_batches(split, batches, epoch, num_workers), with_index)


def _training_batches(split: SplitDataset, batches: _Batches, epoch: int, num_workers: int) -> Iterator[IndexedBatch]:
    split.set_epoch(epoch)
    for batch, failures in _loaded(split, batches, num_workers):
        if batch is None:
            first: CorruptImageError = failures[0][1]
            error = CorruptImageError(
                f"A training batch of {split.dataset_id!r} needs an image, but none of its {len(failures)} can be "
                f"decoded; the first is {first.image!r}: {first.reason}. Repair or remove such files, or use larger "
                "batches."
            )
            error.image, error.reason = first.image, first.reason
            raise error
        yield batch


def _streamed_batches(
    split: SplitDataset, batch_size: int, seed: int, epoch: int, rank: int, world_size: int
) -> Iterator[IndexedBatch]:
    split.set_epoch(epoch)
    yield from _batched(islice(enumerate(split.stream((seed, epoch))), rank, None, world_size), batch_size)


def _check_rank(rank: int, world_size: int) -> None:
    if not 0 <= rank < world_size:
        raise ConfigError(
            f"rank must be one of the world_size processes, 0..world_size-1, but got {rank=} and {world_size=}."
        )


def _checked_indices(indices: Sequence[int] | NDArray[np.int64], num_images: int) -> NDArray[np.int64]:
    chosen = np.asarray(indices)
    if chosen.ndim != 1 or not chosen.size or not np.issubdtype(chosen.dtype, np.integer):
        raise ConfigError(
            f"indices must be a list of image numbers, but got shape {chosen.shape} of type {chosen.dtype}."
        )
    if chosen.min() < 0 or chosen.max() >= num_images:
        raise ConfigError(
            f"indices must lie in 0..{num_images - 1}, the images of the split, but got {chosen.min()}..{chosen.max()}."
        )
    if len(np.unique(chosen)) != len(chosen):
        raise ConfigError(
            f"indices must name each image once, but {len(chosen) - len(np.unique(chosen))} of {len(chosen)} are there "
            "again. Use repeats to show images several times."
        )
    return chosen.astype(np.int64)


class _Batches:
    """The keys of each batch, made when it is asked for: a list of an epoch's would take hundreds of MiB."""

    def __init__(self, count: int, keys: Callable[[int], list[_Key]]) -> None:
        self._count, self._keys = count, keys

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[list[_Key]]:
        return map(self._keys, range(self._count))


@dataclass(frozen=True)
class _Item:
    """An image as a loader process sends it: decoded, or the error that is raised or counted where it arrives."""

    index: int
    content: tuple[Tensor, int] | DatasetError


class _Items(TorchDataset[_Item]):
    def __init__(self, split: SplitDataset) -> None:
        self._split = split

    def __getitem__(self, key: _Key) -> _Item:
        try:
            return _Item(key[0], self._split.item(*key))
        except DatasetError as error:
            # Raised here, it would arrive wrapped into a loader process's traceback.
            return _Item(key[0], error)


def _collate(items: list[_Item]) -> tuple[IndexedBatch | None, list[tuple[int, DatasetError]]]:
    good = [(item.index, item.content) for item in items if not isinstance(item.content, DatasetError)]
    failures = [(item.index, item.content) for item in items if isinstance(item.content, DatasetError)]
    return _stacked(good) if good else None, failures


def _stacked(items: list[tuple[int, tuple[Tensor, int]]]) -> IndexedBatch:
    return (
        torch.stack([image for _, (image, _) in items]),
        torch.tensor([label for _, (_, label) in items]),
        torch.tensor([index for index, _ in items]),
    )


def _loaded(
    split: SplitDataset, batches: _Batches, num_workers: int
) -> Iterator[tuple[IndexedBatch | None, list[_Failure]]]:
    """Yield each batch without the images that cannot be decoded (None if that leaves nothing), and those."""
    loader: DataLoader[Any] = DataLoader(
        _Items(split),
        num_workers=num_workers,
        # spawn: a fork after torch has started its threads may hang.
        multiprocessing_context="spawn" if num_workers else None,
        batch_sampler=batches,
        collate_fn=_collate,
    )
    for batch, failures in loader:
        for index, error in failures:
            if split.on_corrupt == "refuse" or not isinstance(error, CorruptImageError):
                raise error
            split.skipped[index] = error
        yield batch, failures


def _batched(items: Iterator[tuple[int, tuple[Tensor, int]]], batch_size: int) -> Iterator[IndexedBatch]:
    while chunk := list(islice(items, batch_size)):
        yield _stacked(chunk)


def _with_or_without_index(
    batches: Iterator[IndexedBatch], with_index: bool
) -> Iterator[Batch] | Iterator[IndexedBatch]:
    return batches if with_index else ((images, labels) for images, labels, _ in batches)
