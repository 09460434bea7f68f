"""Splits of a dataset as a model sees them: decoded, transformed by timm, normalised.

``open_split`` is what evaluation and fine-tuning read; ``dataset_info`` is what ``GET /datasets`` and
``prunefront data inspect`` show. Where the images come from is the business of ``data_sources``.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn
from torch.utils.data import Dataset as TorchDataset

from prunefront.config import StrictModel
from prunefront.errors import ConfigError, CorruptImageError, DatasetError
from prunefront.training.batches import batches_per_epoch, evaluation_batches, training_batches
from prunefront.training.data_sources import ImageSource, StreamedSource, open_source
from prunefront.training.dataset_ids import SPLITS, SplitName, list_datasets, resolve_dataset
from prunefront.training.recipes import Augmentation
from prunefront.training.split_plan import has_any_image, plan_splits

__all__ = [
    "SPLITS",
    "DataConfig",
    "DatasetInfo",
    "OnCorrupt",
    "SplitDataset",
    "SplitInfo",
    "SplitName",
    "batches_per_epoch",
    "check_classes",
    "check_dataset",
    "data_config_of",
    "dataset_info",
    "evaluation_batches",
    "list_datasets",
    "open_split",
    "training_batches",
]

OnCorrupt = Literal["refuse", "skip"]

_IMAGE_MODES = {1: "L", 3: "RGB"}
_MAX_SEED = 2**63


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """How images become a model's input; recorded with every accuracy.

    Attributes:
        input_size: Channels, height, width.
        crop_pct: Share of the resized shorter side that the centre crop keeps.
        crop_mode: timm's: ``center``, ``squash`` or ``border``.
    """

    input_size: tuple[int, int, int]
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_pct: float
    crop_mode: str

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)


class SplitInfo(StrictModel):
    """One split of a dataset."""

    num_images: int | None = Field(description="Null where a stream does not tell.")
    origin: str = Field(description="What the split is made of.")


class DatasetInfo(StrictModel):
    """What a dataset id stands for."""

    id: str
    num_classes: int
    splits: dict[SplitName, SplitInfo | None] = Field(description="Null for a split that the dataset cannot offer.")


def data_config_of(model: nn.Module) -> DataConfig:
    """Read the input a model expects from its timm config and the size it was built for.

    Args:
        model: A timm model, compressed or not.
    """
    resolved = resolve_model_data_config(model)
    channels, height, width = resolved["input_size"]
    patch_embed = getattr(model, "patch_embed", None)
    # A model built with another img_size or in_chans keeps the original numbers in its pretrained_cfg.
    if (img_size := getattr(patch_embed, "img_size", None)) is not None:
        height, width = img_size
    if (projection := getattr(patch_embed, "proj", None)) is not None:
        # LV-ViT's projection is not the first convolution; its stem says what comes in.
        channels = getattr(patch_embed, "in_chans", getattr(projection, "in_channels", channels))
    mean, std = tuple(resolved["mean"]), tuple(resolved["std"])
    if len(mean) != channels:
        mean, std = (float(np.mean(mean)),) * channels, (float(np.mean(std)),) * channels
    return DataConfig(
        input_size=(channels, height, width),
        interpolation=resolved["interpolation"],
        mean=mean,
        std=std,
        crop_pct=resolved["crop_pct"],
        crop_mode=resolved["crop_mode"],
    )


class SplitDataset(TorchDataset[tuple[Tensor, int]]):
    """One split, transformed for one model: item i is (image of shape (C, H, W), label).

    Items of a training split are random, yet a pure function of (seed, epoch, index, repeat): the same whichever
    process loads them and in whatever order.

    Reading an item that cannot be decoded always raises ``CorruptImageError``; no other image takes its place. The
    batch functions leave such items out where ``on_corrupt`` is ``skip``.

    Attributes:
        dataset_id: The id it was opened by.
        split: ``train``, ``search`` or ``test``.
        num_classes: Classes of the dataset.
        clusters: Per image, what it was made from (images made from one thing are not independent), shape (N,); None
            where every image stands for itself.
        data_config: The transforms' parameters.
        on_corrupt: What the batch functions do about images that cannot be decoded: ``refuse`` or ``skip``.
        skipped: The images that the batch functions have left out so far, by index within the split, with the reason.
        is_streamed: Whether images come in their own order only; such a split is read by the batch functions alone.
    """

    def __init__(
        self,
        source: ImageSource | StreamedSource,
        *,
        dataset_id: str,
        split: SplitName,
        data_config: DataConfig,
        indices: NDArray[np.int64] | None,
        num_images: int | None,
        transform: Any,
        seed: int | None,
        on_corrupt: OnCorrupt = "refuse",
    ) -> None:
        """Use ``open_split``."""
        self.on_corrupt = on_corrupt
        self.skipped: dict[int, CorruptImageError] = {}
        self.dataset_id, self.split, self.data_config = dataset_id, split, data_config
        self.num_classes = source.num_classes
        self.clusters: NDArray[np.int64] | None = source.clusters
        if self.clusters is not None and indices is not None:
            self.clusters = self.clusters[indices]
        self._source, self._indices, self._num_images = source, indices, num_images
        self._transform, self._seed, self._epoch = transform, seed, 0
        self._mode = _IMAGE_MODES[data_config.input_size[0]]

    @property
    def is_streamed(self) -> bool:
        return isinstance(self._source, StreamedSource)

    def __len__(self) -> int:
        if self._num_images is None:
            raise DatasetError(
                f"The stream {self.dataset_id!r} does not tell how many images its split {self.split!r} has. "
                f"Set num_images: {{{self.split}: N}} in its settings entry."
            )
        return self._num_images

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.item(index)

    def item(self, index: int, repeat: int = 0) -> tuple[Tensor, int]:
        """Return image ``index`` as it is shown for the ``repeat``-th time, from 0, in the epoch.

        Returns:
            The image, shape (C, H, W), and its label.

        Raises:
            CorruptImageError: If the image cannot be decoded.
            DatasetError: If its file cannot be read, or the split is a stream.
            IndexError: If there is no such image.
        """
        if isinstance(self._source, StreamedSource):
            raise DatasetError(f"The stream {self.dataset_id!r} can only be read from its beginning.")
        if not 0 <= index < len(self):
            raise IndexError(f"The split has images 0..{len(self) - 1}, but got {index}.")
        place = index if self._indices is None else int(self._indices[index])
        image, label = self._source.load(place, self._epoch, repeat)
        return self._to_tensor(image, place, repeat), label

    def describe_skipped(self) -> str | None:
        """Say in a sentence how many images were left out so far and which is the first; None where none was."""
        if not self.skipped:
            return None
        first = self.skipped[min(self.skipped)]
        return (
            f"{len(self.skipped)} of the {len(self)} images of {self.dataset_id!r} ({self.split}) could not be decoded "
            f"and were left out; the first is {first.image!r}: {first.reason}."
        )

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose variants a training split shows."""
        self._epoch = epoch

    def stream(self, shuffle_seed: tuple[int, int] | None = None) -> Iterator[tuple[Tensor, int]]:
        """Yield the images of a stream, each once; ``shuffle_seed`` = (seed, epoch) shuffles within a buffer."""
        if not isinstance(self._source, StreamedSource):
            yield from (self[index] for index in range(len(self)))
            return
        for place, (image, label) in enumerate(islice(self._source.images(shuffle_seed), self._num_images)):
            yield self._to_tensor(image, place), int(label)

    def _to_tensor(self, image: Any, place: int, repeat: int = 0) -> Tensor:
        # The first showing has the key it has without repeats.
        key = (self._epoch, place, repeat) if repeat else (self._epoch, place)
        with contextlib.nullcontext() if self._seed is None else _seeded(self._seed, *key):
            tensor: Tensor = self._transform(image.convert(self._mode))
        return tensor


class _TensorSplit(SplitDataset):
    """A split whose transformed images are kept in memory."""

    def __init__(self, split: SplitDataset) -> None:
        self.__dict__.update(split.__dict__)
        self._images = torch.zeros(len(split), *split.data_config.input_size)
        self._labels = [-1] * len(split)
        self._corrupt: dict[int, CorruptImageError] = {}
        for index in range(len(split)):
            try:
                self._images[index], self._labels[index] = split[index]
            except CorruptImageError as error:
                if split.on_corrupt == "refuse":
                    raise
                self._corrupt[index] = error

    def item(self, index: int, repeat: int = 0) -> tuple[Tensor, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"The split has images 0..{len(self) - 1}, but got {index}.")
        if index in self._corrupt:
            raise self._corrupt[index]
        return self._images[index], self._labels[index]


def open_split(
    dataset_id: str,
    split: SplitName,
    *,
    data_config: DataConfig,
    num_images: int | None = None,
    train: bool = False,
    augmentation: Augmentation | None = None,
    seed: int = 0,
    in_memory_mib: float = 0,
    on_corrupt: OnCorrupt = "refuse",
) -> SplitDataset:
    """Open a split as a torch dataset.

    Args:
        dataset_id: One of ``list_datasets()``, or ``timm:SCHEME/NAME``.
        split: ``train``, ``search`` or ``test``.
        data_config: The model's input, from ``data_config_of``.
        num_images: Keep a fixed sample of so many images; a smaller sample is the beginning of a larger one. A stream
            gives its first images. None, or more than there are, keeps all.
        train: Whether to apply ``augmentation``. The scenes of ``digit-scenes`` are rendered anew each epoch instead.
        augmentation: Random changes for training; None applies none.
        seed: Makes the augmentation repeatable.
        in_memory_mib: Keep transformed images in memory when they take no more than this: for evaluating many
            candidates on one split. Ignored with ``train``.
        on_corrupt: Whether the batch functions ``skip`` images that cannot be decoded, counting them in
            ``SplitDataset.skipped``, or ``refuse`` them with a sentence that names the file. Jobs refuse: their results
            are compared across devices and time, image by image. A file that cannot be read at all (a lost disk, no
            permission) is refused either way, and a stream's reader decides for itself.

    Raises:
        ConfigError: If ``on_corrupt`` is neither.
        CorruptImageError: If an image kept in memory cannot be decoded and is not to be skipped.
        DatasetError: If folder, images or classes are missing; see the message.
        UnknownNameError: If the id or split does not exist.
    """
    channels = data_config.input_size[0]
    if channels not in _IMAGE_MODES:
        raise DatasetError(
            f"Datasets give images of 1 or 3 channels, but the model takes {channels}. Use one with in_chans 1 or 3."
        )
    if num_images is not None and num_images < 1:
        raise DatasetError(f"num_images must be at least 1, but got {num_images}. Leave it out to use the whole split.")
    if on_corrupt not in ("refuse", "skip"):
        raise ConfigError(f"on_corrupt must be 'refuse' or 'skip', but got {on_corrupt!r}.")
    dataset = resolve_dataset(dataset_id)
    source = open_source(dataset, split)
    total = source.num_images if isinstance(source, StreamedSource) else len(source)
    indices = None
    if num_images is not None and (total is None or num_images < total):
        if not isinstance(source, StreamedSource):
            indices = _sample(dataset.scheme, len(source))[:num_images]
        total = num_images
    augments = train and augmentation is not None and dataset.scheme != "digit-scenes"
    parameters = data_config.to_dict()
    if augments and augmentation is not None:
        parameters = {**parameters, **augmentation.transform_options(), "is_training": True}
        del parameters["crop_pct"], parameters["crop_mode"]
    result = SplitDataset(
        source,
        dataset_id=dataset_id,
        split=split,
        data_config=data_config,
        indices=indices,
        num_images=total,
        transform=create_transform(**parameters),
        seed=seed if augments else None,
        on_corrupt=on_corrupt,
    )
    if not train and not result.is_streamed and _size_mib(result) <= in_memory_mib:
        return _TensorSplit(result)
    return result


def _sample(scheme: str, num_images: int) -> NDArray[np.int64]:
    """Return a fixed order of which every beginning is a fair sample."""
    if scheme == "digit-scenes":
        return np.arange(num_images)  # different digits first, classes mixed
    # Folders are sorted by class. The raw generator's output is the same in every NumPy version.
    return np.argsort(np.random.Philox(key=num_images).random_raw(num_images)).astype(np.int64)


def _size_mib(split: SplitDataset) -> float:
    return len(split) * float(np.prod(split.data_config.input_size)) * 4 / 2**20


@contextlib.contextmanager
def _seeded(*key: int) -> Iterator[None]:
    """Seed the three global generators that timm's transforms draw from, and put them back afterwards."""
    seed = int(np.random.SeedSequence([value % 2**32 for value in key]).generate_state(1, np.uint64)[0])
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed % _MAX_SEED)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


def check_classes(split: SplitDataset, num_classes: int) -> None:
    """Refuse a model whose logits do not belong to the dataset's classes.

    Raises:
        DatasetError: If the counts differ.
    """
    if split.num_classes != num_classes:
        raise DatasetError(
            f"The dataset {split.dataset_id!r} has {split.num_classes} classes, but the model has {num_classes}. "
            "Use a model or checkpoint trained on these classes, or another dataset."
        )


def check_dataset(dataset_id: str, *, needs_train: bool = False) -> None:
    """Check, without reading images, that a job may name a dataset.

    Raises:
        DatasetError: If its folder is missing or empty, or it offers no train split although one is needed.
        UnknownNameError: If nobody knows the id.
    """
    dataset = resolve_dataset(dataset_id)
    plan = plan_splits(dataset)
    if needs_train and plan["train"] is None:
        raise DatasetError(
            f"Fine-tuning needs training images, but {dataset_id!r} has none. Add a 'train' folder or do not fine-tune."
        )
    if not has_any_image(dataset):
        raise DatasetError(
            f"The dataset {dataset_id!r} has no images in {dataset.path}. Put one folder of images per class there."
        )
    if dataset.scheme == "digit-scenes":
        open_source(dataset, "search")


def dataset_info(dataset_id: str) -> DatasetInfo:
    """Open every split and count; the first time for a folder takes as long as listing it.

    Raises:
        DatasetError: If a split cannot be opened.
        UnknownNameError: If nobody knows the id.
    """
    dataset = resolve_dataset(dataset_id)
    splits: dict[SplitName, SplitInfo | None] = {}
    num_classes = 0
    for split in SPLITS:
        origin = plan_splits(dataset)[split]
        if origin is None:
            splits[split] = None
            continue
        source = open_source(dataset, split)
        count = source.num_images if isinstance(source, StreamedSource) else len(source)
        splits[split] = SplitInfo(num_images=count, origin=origin.sentence)
        num_classes = source.num_classes
    return DatasetInfo(id=dataset_id, num_classes=num_classes, splits=splits)
