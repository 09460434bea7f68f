"""Dataset ids -> decoded images: the registry that turns a name in a job into files on this machine.

Ids are ``digit-scenes``, ``imagefolder:NAME``, ``timm:SCHEME/NAME`` and whatever the settings file names. The
environment variable ``PRUNEFRONT_DATA_ROOTS`` lists the folders that hold NAME; ``PRUNEFRONT_DATASETS`` names the
settings file. A job can only reach what these two allow: NAME never leaves its root, and schemes that may download or
run commands (``hfds``, ``hfids``, ``tfds``, ``wds``) work only when the settings file lists the dataset.

Every dataset has the same three splits: *train*, *search* (all that proposals see) and *test* (what is reported). A
missing one is held out of another by a hash of each image's name, so it is the same on every machine.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import numpy as np
import yaml
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field, TypeAdapter, ValidationError
from timm.data import create_dataset
from timm.data.readers.img_extensions import get_img_extensions

from prunefront.config import StrictModel
from prunefront.errors import DatasetError, UnknownNameError
from prunefront.training import digit_scenes

SplitName = Literal["train", "search", "test"]
Scheme = Literal["digit-scenes", "folder", "torch", "hfds", "hfids", "tfds", "wds"]
SPLITS: tuple[SplitName, ...] = get_args(SplitName)

ROOTS_VARIABLE = "PRUNEFRONT_DATA_ROOTS"
SETTINGS_VARIABLE = "PRUNEFRONT_DATASETS"
DIGIT_SCENES = "digit-scenes"

# A held-out split takes a tenth of its donor, within these bounds, and never more than a quarter of it.
HELD_OUT_MIN_IMAGES = 2_000
HELD_OUT_MAX_IMAGES = 10_000

_SCENES_PER_BLOCK = 256
_MAX_BLOCKS = 48  # one epoch of every split; 80 MiB
_STREAMED: frozenset[Scheme] = frozenset({"hfids", "tfds", "wds"})
_SHUFFLE_BUFFER_IMAGES = 2_048
_NAME = re.compile(r"[\w+-][\w.+ -]*(/[\w+-][\w.+ -]*)*")
_FOLDER_NAMES: dict[str, tuple[str, ...]] = {
    "train": ("train", "training"),
    "search": ("search",),
    "validation": ("val", "valid", "validation", "eval"),
    "test": ("test",),
}


class DatasetEntry(StrictModel):
    """One dataset of the settings file (``PRUNEFRONT_DATASETS``: YAML or JSON, id -> entry)."""

    path: str | None = Field(default=None, description="Root folder; relative paths start at the settings file.")
    scheme: Literal["imagefolder", "folder", "torch", "hfds", "hfids", "tfds", "wds"] | None = Field(
        default=None, description="Null takes it from an id of the form timm:SCHEME/NAME; else imagefolder."
    )
    name: str | None = Field(default=None, description="The scheme's own dataset name, as timm takes it.")
    splits: dict[SplitName, str] | None = Field(
        default=None, description="The dataset's own split name (folder: subfolder or .tar) for train, search, test."
    )
    num_classes: int | None = Field(default=None, ge=1, description="Needed where the scheme does not tell.")
    num_images: dict[SplitName, int] = Field(default_factory=dict, description="For streams that do not tell.")
    options: dict[str, Any] = Field(default_factory=dict, description="Passed to timm.data.create_dataset.")


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """A resolved dataset id: where it lies and what timm calls it; nothing is opened yet."""

    id: str
    scheme: Scheme
    path: Path | None = None
    name: str = ""
    splits: Mapping[SplitName, str] | None = None
    num_classes: int | None = None
    num_images: Mapping[SplitName, int] | None = None
    options: Mapping[str, Any] | None = None

    @property
    def is_streamed(self) -> bool:
        """Whether images come in the dataset's own order only."""
        return self.scheme in _STREAMED


@dataclass(frozen=True, kw_only=True)
class SplitOrigin:
    """Which of the dataset's own splits a split is made of, and in one sentence how."""

    donor: SplitName
    part: Literal["all", "search", "test", "rest"]
    sentence: str


class ImageSource(Protocol):
    """Decoded images of one split, in a fixed order."""

    num_classes: int
    clusters: NDArray[np.int64] | None

    def __len__(self) -> int: ...

    def load(self, index: int, epoch: int) -> tuple[Image.Image, int]:
        """Return image ``index`` and its label; ``epoch`` matters only where images are rendered anew each epoch."""
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

    def load(self, index: int, epoch: int) -> tuple[Image.Image, int]:
        block, place = divmod(index, _SCENES_PER_BLOCK)
        scenes = _rendered_block(self._split, block, epoch if self._split == "train" else 0)
        return Image.fromarray(scenes.images[place]), int(scenes.labels[place])


@lru_cache(maxsize=_MAX_BLOCKS)
def _rendered_block(split: SplitName, block: int, epoch: int) -> digit_scenes.Scenes:
    start = block * _SCENES_PER_BLOCK
    end = min(start + _SCENES_PER_BLOCK, digit_scenes.num_scenes(split))
    return digit_scenes.render_scenes(split, range(start, end), epoch)


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

    def load(self, index: int, epoch: int) -> tuple[Image.Image, int]:
        place = index if self._indices is None else int(self._indices[index])
        image, label = self._read(place)
        return image, int(label if self._labels is None else self._labels[label])

    def _read(self, place: int) -> tuple[Image.Image, int]:
        reader = getattr(self._dataset, "reader", None)
        if reader is None:
            image, label = self._dataset[place]
            return image, int(label)
        # Read through the reader: timm's dataset would silently serve the next image in place of an unreadable one,
        # which then counts twice.
        try:
            file, label = reader[place]
            with file:
                image = Image.open(file)
                image.load()
        except (OSError, SyntaxError) as error:
            raise DatasetError(
                f"Could not read the image {self._dataset.filename(place)!r}: {error}. Repair or remove that file."
            ) from error
        return image, int(label)


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


def data_roots() -> tuple[Path, ...]:
    """Return the folders that ``PRUNEFRONT_DATA_ROOTS`` lists, separated like PATH."""
    return tuple(Path(root).expanduser() for root in os.environ.get(ROOTS_VARIABLE, "").split(os.pathsep) if root)


def dataset_entries() -> dict[str, DatasetEntry]:
    """Return the settings file's datasets; none when ``PRUNEFRONT_DATASETS`` is unset.

    Raises:
        DatasetError: If the file cannot be read or has unknown fields.
    """
    location = os.environ.get(SETTINGS_VARIABLE)
    if not location:
        return {}
    settings = Path(location).expanduser()
    try:
        text = settings.read_text(encoding="utf-8")
        document = json.loads(text) if settings.suffix == ".json" else yaml.safe_load(text)
        entries = TypeAdapter(dict[str, DatasetEntry]).validate_python(document or {})
    except (OSError, ValueError, yaml.YAMLError) as error:
        if isinstance(error, ValidationError):
            first = error.errors(include_url=False)[0]
            reason = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        else:
            reason = str(error)
        raise DatasetError(
            f"{SETTINGS_VARIABLE} must name a YAML or JSON file of dataset entries, but {settings} is not one "
            f"({reason}). Correct the file or unset the variable."
        ) from error
    return {
        id: entry if entry.path is None else entry.model_copy(update={"path": str(settings.parent / entry.path)})
        for id, entry in entries.items()
    }


def list_datasets() -> tuple[str, ...]:
    """Return the ids a job may name here: the demo's, the settings file's, image folders under the roots."""
    folders = {
        f"imagefolder:{folder.name}"
        for root in data_roots()
        if root.is_dir()
        for folder in root.iterdir()
        if folder.is_dir() and _NAME.fullmatch(folder.name) and _contained(root, folder.name) and _has_image(folder)
    }
    return (DIGIT_SCENES, *sorted(folders | dataset_entries().keys()))


def resolve_dataset(dataset_id: str) -> Dataset:
    """Find what an id stands for on this machine, without opening it.

    Raises:
        UnknownNameError: If the id has no known form and is not in the settings file.
        DatasetError: If its folder is missing, or the id may not be used without a settings entry.
    """
    if dataset_id == DIGIT_SCENES:
        return Dataset(id=dataset_id, scheme="digit-scenes")
    kind, _, name = dataset_id.partition(":")
    scheme, slash, rest = name.partition("/")
    entry = dataset_entries().get(dataset_id)
    if entry is not None:
        given = entry.scheme or (scheme if kind == "timm" and slash else "imagefolder")
        if given not in ("imagefolder", *get_args(Scheme)):
            raise _unknown_scheme(dataset_id, given)
        default_name = rest if kind == "timm" else ""
        return Dataset(
            id=dataset_id,
            scheme="folder" if given == "imagefolder" else given,  # type: ignore[arg-type]
            path=_existing(dataset_id, Path(entry.path)) if entry.path is not None else None,
            name=entry.name if entry.name is not None else default_name,
            splits=entry.splits,
            num_classes=entry.num_classes,
            num_images=entry.num_images,
            options=entry.options,
        )
    if kind == "imagefolder" and name:
        return Dataset(id=dataset_id, scheme="folder", path=_folder_under_roots(dataset_id, name))
    if kind == "timm" and slash and rest:
        if scheme == "folder":
            return Dataset(id=dataset_id, scheme="folder", path=_folder_under_roots(dataset_id, rest))
        if scheme == "torch":
            return Dataset(id=dataset_id, scheme="torch", path=_torch_root(dataset_id, rest), name=rest)
        if scheme in get_args(Scheme):
            raise DatasetError(
                f"Datasets of the scheme {scheme!r} may download data, so a job can name {dataset_id!r} only after "
                f"the settings file that {SETTINGS_VARIABLE} names lists it. Add an entry {dataset_id!r} there."
            )
        raise _unknown_scheme(dataset_id, scheme)
    raise UnknownNameError.of(
        "dataset",
        dataset_id,
        list_datasets(),
        f"Other ids are imagefolder:NAME, timm:SCHEME/NAME, and those of the file that {SETTINGS_VARIABLE} names.",
    )


def _unknown_scheme(dataset_id: str, scheme: str) -> UnknownNameError:
    known = [name for name in get_args(Scheme) if name != DIGIT_SCENES]
    return UnknownNameError.of("dataset scheme", scheme, known, f"It was read from the id {dataset_id!r}.")


def _contained(root: Path, name: str) -> Path | None:
    """Return ``root/name`` when it really lies inside ``root``, links followed."""
    base, target = os.path.realpath(root), os.path.realpath(root / name)
    return Path(target) if target.startswith(base + os.sep) else None


def _existing(dataset_id: str, path: Path) -> Path:
    if not path.exists():
        raise DatasetError(
            f"The dataset {dataset_id!r} should lie in {path}, but there is nothing. "
            "Put the data there or correct the path in the settings file."
        )
    return path


def _require_roots(dataset_id: str) -> tuple[Path, ...]:
    roots = data_roots()
    if not roots:
        raise DatasetError(
            f"The dataset {dataset_id!r} is looked up in the folders of {ROOTS_VARIABLE}, but that variable is unset. "
            f"Set it to the folder that holds your datasets, or list the dataset in the file of {SETTINGS_VARIABLE}."
        )
    return roots


def _check_name(dataset_id: str, name: str) -> None:
    if not _NAME.fullmatch(name):
        raise DatasetError(
            f"A dataset name is a folder below a data root, such as 'imagenet', but got {dataset_id!r}. "
            "Leave out '..', leading dots and slashes."
        )


def _folder_under_roots(dataset_id: str, name: str) -> Path:
    _check_name(dataset_id, name)
    roots = _require_roots(dataset_id)
    for root in roots:
        folder = root / name
        if not folder.exists():
            continue
        contained = _contained(root, name)
        if contained is None:
            raise DatasetError(
                f"The dataset {dataset_id!r} is a link that leaves its data root {root}. "
                f"List it with its real path in the file {SETTINGS_VARIABLE} names."
            )
        return contained
    raise DatasetError(
        f"The dataset {dataset_id!r} needs a folder {name!r} in {' or '.join(map(str, roots))}, but there is none. "
        f"Put it there or change {ROOTS_VARIABLE}."
    )


def _torch_root(dataset_id: str, name: str) -> Path:
    """torchvision keeps datasets in subfolders of its root: ``ROOT/NAME`` where that exists, else ``ROOT``."""
    _check_name(dataset_id, name)
    roots = _require_roots(dataset_id)
    own = [folder for root in roots if (folder := _contained(root, name)) is not None and folder.is_dir()]
    return own[0] if own else roots[0]


def _has_image(folder: Path) -> bool:
    extensions = (*get_img_extensions(), ".tar")
    return any(file.lower().endswith(extensions) for _, _, files in os.walk(folder, followlinks=True) for file in files)


def own_splits(dataset: Dataset) -> dict[SplitName, str]:
    """Return which splits the dataset brings along, by the names (folder: paths) it has for them."""
    if dataset.scheme != "folder":
        return dict(dataset.splits or {"train": "train", "test": "validation"})
    root = dataset.path
    if root is None:
        raise DatasetError(f"The dataset {dataset.id!r} has no path in the settings file. Add one.")
    if dataset.splits:
        return {split: str(_existing(dataset.id, root / name)) for split, name in dataset.splits.items()}
    found = {
        role: path
        for role, names in _FOLDER_NAMES.items()
        for path in (str(root / f"{name}{suffix}") for name in reversed(names) for suffix in (".tar", ""))
        if os.path.exists(path)
    }
    if not found:
        return {"train": str(root)}
    if (validation := found.pop("validation", None)) is not None:
        # ImageNet's custom: the labelled 'val' is what everybody reports, unless there is a test split as well.
        found.setdefault("test" if "test" not in found else "search", validation)
    return {split: found[split] for split in SPLITS if split in found}


def plan_splits(dataset: Dataset) -> dict[SplitName, SplitOrigin | None]:
    """Say what each split is made of; None for a train split that nothing can be taken for.

    Raises:
        DatasetError: If a streamed dataset lacks a split: nothing can be held out of a stream.
    """
    if dataset.scheme == "digit-scenes":
        sentence = "source digits of its own"
        return {split: SplitOrigin(donor=split, part="all", sentence=sentence) for split in SPLITS}
    own = own_splits(dataset)
    names = {split: os.path.basename(name) or name for split, name in own.items()}
    missing = [split for split in ("search", "test") if split not in own]
    if dataset.is_streamed and missing:
        raise DatasetError(
            f"The dataset {dataset.id!r} is a stream, out of which nothing can be held out, but it has no split for "
            f"{' and '.join(missing)}. Name the splits in its settings entry, such as splits: "
            '{train: "train[:95%]", search: "train[95%:]", test: "validation"}.'
        )
    donor: SplitName = "train" if "train" in own else "test" if "test" in own else "search"
    plan: dict[SplitName, SplitOrigin | None] = {}
    for split in SPLITS:
        if split in missing:
            sentence = f"held out of {names[donor]!r} by a hash of the image names"
            plan[split] = SplitOrigin(donor=donor, part=split, sentence=sentence)  # type: ignore[arg-type]
        elif split not in own:
            plan[split] = None
        elif split == donor and missing:
            sentence = f"{names[split]!r} without what is held out for {' and '.join(missing)}"
            plan[split] = SplitOrigin(donor=split, part="rest", sentence=sentence)
        else:
            plan[split] = SplitOrigin(donor=split, part="all", sentence=f"{names[split]!r}")
    return plan


def held_out_indices(keys: Sequence[str], missing: Sequence[SplitName]) -> dict[str, NDArray[np.int64]]:
    """Part images by a stable hash of their names.

    Args:
        keys: A name per image, equal on every machine.
        missing: Splits to be held out.

    Returns:
        For each missing split and for ``rest``, sorted indices; together they are all images, each once.
    """
    hashes = [hashlib.blake2b(key.encode(), digest_size=8).digest() for key in keys]
    order = sorted(range(len(keys)), key=lambda index: (hashes[index], index))
    share = min(max(len(keys) // 10, HELD_OUT_MIN_IMAGES), HELD_OUT_MAX_IMAGES, len(keys) // 4)
    parts: dict[str, NDArray[np.int64]] = {}
    for place, split in enumerate(missing):
        parts[split] = np.sort(np.array(order[place * share : (place + 1) * share], dtype=np.int64))
    parts["rest"] = np.sort(np.array(order[len(missing) * share :], dtype=np.int64))
    return parts


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
    if dataset.scheme == "folder" and reference != own[origin.donor]:
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
    if type(getattr(images, "reader", None)).__name__ in ("ReaderImageFolder", "ReaderImageInTar"):
        return [name.replace(os.sep, "/") for name in images.filenames()]
    return [str(index) for index in range(len(images))]


def _open_indexed(dataset: Dataset, own_name: str) -> Any:
    if dataset.scheme == "folder":
        return _scan_folder(dataset.id, own_name, os.stat(own_name).st_mtime_ns)
    return _create(dataset, own_name, {})


@lru_cache(maxsize=8)
def _scan_folder(dataset_id: str, location: str, modified_ns: int) -> Any:
    """Scan a folder or tar once per process and change: ImageNet's takes a minute."""
    if os.path.isdir(location) and not _has_image(Path(location)):
        raise DatasetError(
            f"The dataset {dataset_id!r} has no images in {location}. Put one folder of images per class there."
        )
    return _create_or_explain(dataset_id, location, lambda: create_dataset("", root=location, search_split=False))


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


def has_any_image(dataset: Dataset) -> bool:
    """Whether each of the dataset's own folders has an image; cheap, and True where only opening it would tell."""
    if dataset.scheme != "folder":
        return True
    return all(name.endswith(".tar") or _has_image(Path(name)) for name in own_splits(dataset).values())
