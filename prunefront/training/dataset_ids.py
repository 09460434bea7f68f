"""Dataset ids: what a name in a job stands for on this machine, and what it must never reach.

Ids are ``digit-scenes``, ``imagefolder:NAME``, ``lmdb:NAME``, ``timm:SCHEME/NAME`` and whatever the settings file
names. The environment variable ``PRUNEFRONT_DATA_ROOTS`` lists the folders that hold NAME; ``PRUNEFRONT_DATASETS``
names the settings file. A job can only reach what these two allow: NAME never leaves its root, and schemes that may
download or run commands (``hfds``, ``hfids``, ``tfds``, ``wds``) work only when the settings file lists the dataset.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import Field, TypeAdapter, ValidationError
from timm.data.readers.img_extensions import get_img_extensions

from prunefront.config import StrictModel, describe_validation_error
from prunefront.errors import DatasetError, UnknownNameError
from prunefront.training.lmdb_images import LMDB_SUFFIX, lmdb_files

SplitName = Literal["train", "search", "test"]
Scheme = Literal["digit-scenes", "folder", "lmdb", "torch", "hfds", "hfids", "tfds", "wds"]
SPLITS: tuple[SplitName, ...] = get_args(SplitName)

ROOTS_VARIABLE = "PRUNEFRONT_DATA_ROOTS"
SETTINGS_VARIABLE = "PRUNEFRONT_DATASETS"
DIGIT_SCENES = "digit-scenes"

_TIMM_SCHEMES: tuple[Scheme, ...] = ("folder", "torch", "hfds", "hfids", "tfds", "wds")
_STREAMED: frozenset[Scheme] = frozenset({"hfids", "tfds", "wds"})
_NAME = re.compile(r"[\w+-][\w.+ -]*(/[\w+-][\w.+ -]*)*")


class DatasetEntry(StrictModel):
    """One dataset of the settings file (``PRUNEFRONT_DATASETS``: YAML or JSON, id -> entry)."""

    path: str | None = Field(default=None, description="Root folder; relative paths start at the settings file.")
    scheme: Literal["imagefolder", "folder", "lmdb", "torch", "hfds", "hfids", "tfds", "wds"] | None = Field(
        default=None, description="Null takes it from an id of the form timm:SCHEME/NAME; else imagefolder."
    )
    name: str | None = Field(default=None, description="The scheme's own dataset name, as timm takes it.")
    splits: dict[SplitName, str] | None = Field(
        default=None,
        description="The dataset's own split name (folder: subfolder, .tar or .lmdb) for train, search, test.",
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

    @property
    def is_named_by_paths(self) -> bool:
        """Whether its splits are folders or files below ``path``."""
        return self.scheme in ("folder", "lmdb")


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
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        if isinstance(error, ValidationError):
            reason = describe_validation_error(error)
        else:
            reason = getattr(error, "strerror", None) or " ".join(str(error).split())
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
        if folder.is_dir() and _NAME.fullmatch(folder.name) and _contained(root, folder.name) and has_image(folder)
    }
    return (DIGIT_SCENES, *sorted(folders | _lmdb_ids() | dataset_entries().keys()))


def _lmdb_ids() -> set[str]:
    """``lmdb:NAME`` for each folder under the roots that has LMDB files, and each such file right there."""
    places = [(root, place) for root in data_roots() if root.is_dir() for place in root.iterdir()]
    return {
        f"lmdb:{place.name}"
        for root, place in places
        if _NAME.fullmatch(place.name)
        and _contained(root, place.name)
        and (any(lmdb_files(place)) if place.is_dir() else place.suffix == LMDB_SUFFIX)
    }


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
        if given not in ("imagefolder", "lmdb", *_TIMM_SCHEMES):
            raise _unknown_scheme(dataset_id, given)
        default_name = rest if kind == "timm" else ""
        location = None if entry.path is None else Path(entry.path)
        # The other schemes make their own folders when they download.
        if location is not None and given in ("imagefolder", "folder", "lmdb", "wds"):
            existing(dataset_id, location)
        return Dataset(
            id=dataset_id,
            scheme="folder" if given == "imagefolder" else given,  # type: ignore[arg-type]
            path=location,
            name=entry.name if entry.name is not None else default_name,
            splits=entry.splits,
            num_classes=entry.num_classes,
            num_images=entry.num_images,
            options=entry.options,
        )
    if kind == "imagefolder" and name:
        return Dataset(id=dataset_id, scheme="folder", path=_folder_under_roots(dataset_id, name))
    if kind == "lmdb" and name:
        return Dataset(id=dataset_id, scheme="lmdb", path=_folder_under_roots(dataset_id, name))
    if kind == "timm" and slash and rest:
        if scheme == "folder":
            return Dataset(id=dataset_id, scheme="folder", path=_folder_under_roots(dataset_id, rest))
        if scheme == "torch":
            return Dataset(id=dataset_id, scheme="torch", path=_torch_root(dataset_id, rest), name=rest)
        if scheme in _TIMM_SCHEMES:
            raise DatasetError(
                f"Datasets of the scheme {scheme!r} may download data, so a job can name {dataset_id!r} only after "
                f"the settings file that {SETTINGS_VARIABLE} names lists it. Add an entry {dataset_id!r} there."
            )
        raise _unknown_scheme(dataset_id, scheme)
    raise UnknownNameError.of(
        "dataset",
        dataset_id,
        list_datasets(),
        "Other ids are imagefolder:NAME, lmdb:NAME, timm:SCHEME/NAME, and those of the file that "
        f"{SETTINGS_VARIABLE} names.",
    )


def _unknown_scheme(dataset_id: str, scheme: str) -> UnknownNameError:
    return UnknownNameError.of("dataset scheme", scheme, _TIMM_SCHEMES, f"It was read from the id {dataset_id!r}.")


def _contained(root: Path, name: str) -> Path | None:
    """Return ``root/name`` when it really lies inside ``root``, links followed."""
    base, target = os.path.realpath(root), os.path.realpath(root / name)
    return Path(target) if target.startswith(base + os.sep) else None


def existing(dataset_id: str, path: Path) -> Path:
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


def has_image(folder: Path) -> bool:
    extensions = (*get_img_extensions(), ".tar")
    return any(file.lower().endswith(extensions) for _, _, files in os.walk(folder, followlinks=True) for file in files)
