"""Decoded images of a split, wherever they lie: rendered, in folders or LMDBs, behind timm's readers, or streamed."""

from __future__ import annotations

import io
import os
import random
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from timm.data import ImageDataset, create_dataset

from prunefront.errors import CorruptImageError, DatasetError, UnknownNameError
from prunefront.training import digit_scenes
from prunefront.training.dataset_ids import SPLITS, Dataset, SplitName, has_image
from prunefront.training.lmdb_images import LMDB_SUFFIX, LmdbReader
from prunefront.training.split_plan import held_out_indices, own_splits, plan_splits

_SCENES_PER_BLOCK = 256
_MAX_BLOCKS = 48  # one epoch of every split; 80 MiB
_SHUFFLE_BUFFER_IMAGES = 2_048


class ImageSource(Protocol):
    """Decoded images of one split, in a fixed order."""

    num_classes: int
    clusters: NDArray[np.int64] | None

    def __len__(self) -> int: ...

    def load(self, index: int, epoch: int, repeat: int = 0) -> tuple[Image.Image, int]:
        """Return image ``index`` and its label.

        ``epoch`` and ``repeat`` (which time the epoch shows the image) matter only where images are rendered anew.

        Raises:
            CorruptImageError: If the image cannot be decoded.
            DatasetError: If its file cannot be read.
        """
        ...


class DigitScenesSource:
    """The scenes of ``digit-scenes``, rendered block by block at first use and kept in memory."""

    num_classes = digit_scenes.NUM_CLASSES

    def __init__(self, split: SplitName) -> None:
        self._split = split
        sources = digit_scenes.source_indices(split)
        self.clusters: NDArray[np.int64] | None = np.resize(sources, digit_scenes.num_scenes(split))

    def __len__(self) -> int:
        return digit_scenes.num_scenes(self._split)

    def load(self, index: int, epoch: int, repeat: int = 0) -> tuple[Image.Image, int]:
        block, place = divmod(index, _SCENES_PER_BLOCK)
        variant = (epoch, repeat) if self._split == "train" else (0, 0)
        scenes = _rendered_block(self._split, block, variant)
        return Image.fromarray(scenes.images[place]), int(scenes.labels[place])


@lru_cache(maxsize=_MAX_BLOCKS)
def _rendered_block(split: SplitName, block: int, variant: tuple[int, int]) -> digit_scenes.Scenes:
    start = block * _SCENES_PER_BLOCK
    end = min(start + _SCENES_PER_BLOCK, digit_scenes.num_scenes(split))
    return digit_scenes.render_scenes(split, range(start, end), *variant)


class IndexedSource:
    """Images of a random-access dataset of timm or torchvision, or a part of them."""

    clusters: NDArray[np.int64] | None = None

    def __init__(
        self, dataset: Any, *, num_classes: int, indices: NDArray[np.int64] | None, labels: Sequence[int] | None = None
    ) -> None:
        """Wrap a dataset.

        Args:
            dataset: A timm ``ImageDataset`` or a torchvision dataset that yields (image, label).
            num_classes: Classes of the whole dataset.
            indices: The images that belong to the split, or None for all.
            labels: Replacement for each label of the dataset, or None where labels are right already.
        """
        self.num_classes = num_classes
        self._dataset, self._indices, self._labels = dataset, indices, labels

    def __len__(self) -> int:
        return len(self._dataset) if self._indices is None else len(self._indices)

    def load(self, index: int, epoch: int, repeat: int = 0) -> tuple[Image.Image, int]:
        place = index if self._indices is None else int(self._indices[index])
        image, label = self._read(place)
        return image, int(label if self._labels is None else self._labels[label])

    def _read(self, place: int) -> tuple[Image.Image, int]:
        reader = getattr(self._dataset, "reader", None)
        if reader is None:
            return self._read_decoded(place)
        # Read through the reader: timm's dataset would silently serve the next image in place of an unreadable one,
        # which then counts twice.
        try:
            file, label = reader[place]
            with file:
                content = file.read()
        except (OSError, tarfile.TarError) as error:
            raise unreadable_image(self._dataset.filename(place), error) from error
        return decode_image(content, lambda: self._dataset.filename(place)), int(label)

    def _read_decoded(self, place: int) -> tuple[Image.Image, int]:
        """Read from a dataset that decodes by itself."""
        try:
            image, label = self._dataset[place]
        except (OSError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
            # Pillow's own errors have no number; the operating system's have one.
            if isinstance(error, OSError) and error.errno is not None:
                raise unreadable_image(error.filename or f"number {place}", error) from error
            raise CorruptImageError.of(f"number {place}", _decoding_reason(error)) from error
        return image, int(label)


def decode_image(content: bytes, name: Callable[[], str]) -> Image.Image:
    """The image in the bytes of a file, all of it.

    Args:
        content: The file.
        name: Gives its name, for the error; asked for only then, as names may take long to find.

    Raises:
        CorruptImageError: If the bytes cannot be decoded.
    """
    try:
        image = Image.open(io.BytesIO(content))
        image.load()
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise errors of every kind when the bytes are wrong
        raise CorruptImageError.of(name(), _decoding_reason(error)) from error
    return image


def unreadable_image(name: str, error: Exception) -> DatasetError:
    """The error for an image whose file cannot be read."""
    return DatasetError(f"Could not read the image {name!r}: {error}. Repair or remove that file.")


def _decoding_reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "it has no known image format"
    return " ".join(str(error).split()) or type(error).__name__


class StreamedSource:
    """Images of a dataset that can only be read in its own order."""

    clusters: NDArray[np.int64] | None = None

    def __init__(self, open_stream: Callable[[], Any], *, num_classes: int, num_images: int | None) -> None:
        self.num_classes, self.num_images = num_classes, num_images
        self._open_stream = open_stream

    def images(self, shuffle_seed: tuple[int, int] | None = None) -> Iterator[tuple[Image.Image, int]]:
        """Yield every image once.

        Args:
            shuffle_seed: (seed, epoch) shuffles within a buffer, the same way each time; None keeps the order.
        """
        if shuffle_seed is None:
            yield from self._open_stream()
            return
        generator = random.Random(f"{shuffle_seed[0]}:{shuffle_seed[1]}")
        buffer: list[tuple[Image.Image, int]] = []
        for item in self._open_stream():
            if len(buffer) < _SHUFFLE_BUFFER_IMAGES:
                buffer.append(item)
                continue
            place = generator.randrange(_SHUFFLE_BUFFER_IMAGES)
            buffer[place], item = item, buffer[place]
            yield item
        generator.shuffle(buffer)
        yield from buffer


def open_source(dataset: Dataset, split: SplitName) -> ImageSource | StreamedSource:
    """Open one split.

    Raises:
        DatasetError: If the split is missing, empty, or its classes differ from the other splits'.
    """
    if split not in SPLITS:
        raise UnknownNameError.of("split", split, SPLITS)
    if dataset.scheme == "digit-scenes":
        return DigitScenesSource(split)
    plan = plan_splits(dataset)
    origin = plan[split]
    if origin is None:
        raise DatasetError(
            f"The dataset {dataset.id!r} has no images to train on: it brings only "
            f"{', '.join(map(repr, own_splits(dataset).values()))}. Add a 'train' folder or name one in the settings."
        )
    own = own_splits(dataset)
    if dataset.is_streamed:
        return _open_stream(dataset, split, own[split])
    images = _open_indexed(dataset, own[origin.donor])
    classes, labels = _class_names(dataset, images), None
    reference = next(name for role in SPLITS if (name := own.get(role)) is not None)
    if dataset.is_named_by_paths and reference != own[origin.donor]:
        expected = _class_names(dataset, _open_indexed(dataset, reference))
        if not set(classes) <= set(expected):
            extra = sorted(set(classes) - set(expected))
            raise DatasetError(
                f"The classes of {dataset.id!r} must be the same in every split, but {own[origin.donor]} has "
                f"{len(extra)} that {reference} lacks ({', '.join(repr(name) for name in extra[:3])}). "
                "Make the class folders equal."
            )
        labels = [expected.index(name) for name in classes]
        classes = expected
    if dataset.num_classes is not None and classes and len(classes) != dataset.num_classes:
        raise DatasetError(
            f"The settings say that {dataset.id!r} has {dataset.num_classes} classes, but {len(classes)} were found. "
            "Correct num_classes or the data."
        )
    indices = None
    if origin.part != "all":
        missing = tuple(part.part for part in plan.values() if part is not None and part.part in ("search", "test"))
        indices = held_out_indices(_image_keys(images), missing)[origin.part]
    source = IndexedSource(
        images, num_classes=dataset.num_classes or _counted(dataset, classes), indices=indices, labels=labels
    )
    if len(source) == 0:
        raise DatasetError(
            f"The split {split!r} of {dataset.id!r} has no images (it is {origin.sentence}). Add images to it."
        )
    return source


def _counted(dataset: Dataset, classes: Sequence[str]) -> int:
    if not classes:
        raise DatasetError(
            f"The number of classes of {dataset.id!r} is unknown. Set num_classes in its settings entry."
        )
    return len(classes)


def _class_names(dataset: Dataset, images: Any) -> list[str]:
    """Class names by label, as far as the dataset tells."""
    holder = getattr(images, "reader", images)
    mapping = getattr(holder, "class_to_idx", None) or getattr(holder, "class_name_to_idx", None)
    if mapping:
        return [str(name) for name, _ in sorted(mapping.items(), key=lambda item: item[1])]
    return [str(name) for name in getattr(images, "classes", None) or getattr(images, "categories", None) or ()]


def _image_keys(images: Any) -> list[str]:
    """A name per image: the path below its split, or the running number where images have none."""
    if type(getattr(images, "reader", None)).__name__ in ("ReaderImageFolder", "ReaderImageInTar", "LmdbReader"):
        return [name.replace(os.sep, "/") for name in images.filenames()]
    return [str(index) for index in range(len(images))]


def _open_indexed(dataset: Dataset, own_name: str) -> Any:
    if dataset.is_named_by_paths:
        status = os.stat(own_name)
        if own_name.endswith(LMDB_SUFFIX):
            return _open_lmdb(own_name, (status.st_dev, status.st_ino, status.st_mtime_ns))
        return _scan_folder(dataset.id, own_name, status.st_mtime_ns)
    return _create(dataset, own_name, {})


@lru_cache(maxsize=8)
def _scan_folder(dataset_id: str, location: str, modified_ns: int) -> Any:
    """Scan a folder or tar once per process and change: ImageNet's takes a minute."""
    if os.path.isdir(location) and not has_image(Path(location)):
        raise DatasetError(
            f"The dataset {dataset_id!r} has no images in {location}. Put one folder of images per class there."
        )
    return _create_or_explain(dataset_id, location, lambda: create_dataset("", root=location, search_split=False))


@lru_cache(maxsize=8)
def _open_lmdb(location: str, identity: tuple[int, int, int]) -> Any:
    """Open an LMDB once per process and file, so that its names are read once."""
    return ImageDataset(location, reader=LmdbReader(location))


def _create(dataset: Dataset, own_name: str, stream_options: Mapping[str, Any]) -> Any:
    return _create_or_explain(
        dataset.id,
        dataset.path,
        lambda: create_dataset(
            f"{dataset.scheme}/{dataset.name}",
            root=None if dataset.path is None else str(dataset.path),
            split=own_name,
            **{**stream_options, **(dataset.options or {})},
        ),
    )


def _create_or_explain(dataset_id: str, location: object, create: Callable[[], Any]) -> Any:
    try:
        return create()
    except ImportError as error:
        raise DatasetError(
            f"The dataset {dataset_id!r} needs the package {error.name or error!s}, which is not installed. "
            f"Install it with: pip install {error.name or ''}".rstrip()
        ) from error
    except Exception as error:  # readers of many libraries, each with errors of its own
        raise DatasetError(
            f"timm could not open the dataset {dataset_id!r} in {location}: {error or type(error).__name__}. "
            "Check its folder and the names in its settings entry."
        ) from error


def _open_stream(dataset: Dataset, split: SplitName, own_name: str) -> StreamedSource:
    num_images = (dataset.num_images or {}).get(split)
    opened = _create(dataset, own_name, {"num_samples": num_images})
    classes = _class_names(dataset, opened)
    return StreamedSource(
        lambda: _create(dataset, own_name, {"num_samples": num_images}),
        num_classes=dataset.num_classes or _counted(dataset, classes),
        num_images=num_images or _stream_length(opened),
    )


def _stream_length(opened: Any) -> int | None:
    try:
        return len(opened) or None
    except TypeError:  # a reader that does not know
        return None
