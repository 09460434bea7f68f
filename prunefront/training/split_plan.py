"""What each split of a dataset is made of: its own folders where it has them, else a part held out of another.

Every dataset has the same three splits: *train*, *search* (all that proposals see) and *test* (what is reported). A
missing one is held out of another by a hash of each image's name, so it is the same on every machine.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from prunefront.errors import DatasetError
from prunefront.training.dataset_ids import SPLITS, Dataset, SplitName, existing, has_image
from prunefront.training.lmdb_images import LMDB_SUFFIX, LmdbReader

# A held-out split takes a tenth of its donor, within these bounds, and never more than a quarter of it.
HELD_OUT_MIN_IMAGES = 2_000
HELD_OUT_MAX_IMAGES = 10_000

_FOLDER_NAMES: dict[str, tuple[str, ...]] = {
    "train": ("train", "training"),
    "search": ("search",),
    "validation": ("val", "valid", "validation", "eval"),
    "test": ("test",),
}


@dataclass(frozen=True, kw_only=True)
class SplitOrigin:
    """Which of the dataset's own splits a split is made of, and in one sentence how."""

    donor: SplitName
    part: Literal["all", "search", "test", "rest"]
    sentence: str


def own_splits(dataset: Dataset) -> dict[SplitName, str]:
    """Return which splits the dataset brings along, by the names (folder: paths) it has for them."""
    if not dataset.is_named_by_paths:
        return dict(dataset.splits or {"train": "train", "test": "validation"})
    root = dataset.path
    if root is None:
        raise DatasetError(f"The dataset {dataset.id!r} has no path in the settings file. Add one.")
    if dataset.splits:
        named = {split: str(existing(dataset.id, root / name)) for split, name in dataset.splits.items()}
        return _require_lmdb(dataset, named)
    suffixes = (LMDB_SUFFIX,) if dataset.scheme == "lmdb" else (".tar", "")
    found = _found(root, suffixes)
    if not found:
        return _require_lmdb(dataset, {"train": str(root)})
    if (validation := found.pop("validation", None)) is not None:
        # ImageNet's custom: the labelled 'val' is what everybody reports, unless there is a test split as well.
        found.setdefault("test" if "test" not in found else "search", validation)
    return {split: found[split] for split in SPLITS if split in found}


def _found(root: Path, suffixes: Sequence[str]) -> dict[str, str]:
    """Paths of the splits below ``root`` by role; of several names or suffixes for a role the last suffix wins."""
    return {
        role: path
        for role, names in _FOLDER_NAMES.items()
        for path in (str(root / f"{name}{suffix}") for name in reversed(names) for suffix in suffixes)
        if os.path.exists(path)
    }


def split_folders(root: Path) -> list[Path]:
    """Folders below ``root`` whose names are those of splits."""
    return [Path(path) for path in _found(root, ("",)).values() if os.path.isdir(path)]


def _require_lmdb(dataset: Dataset, named: dict[SplitName, str]) -> dict[SplitName, str]:
    if dataset.scheme == "lmdb":
        for name in named.values():
            if not name.endswith(LMDB_SUFFIX):
                raise DatasetError(
                    f"The dataset {dataset.id!r} is made of files such as train{LMDB_SUFFIX} and val{LMDB_SUFFIX}, but "
                    f"got {name}. Build them with prunefront data lmdb, or use the scheme imagefolder."
                )
    return named


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


def has_any_image(dataset: Dataset) -> bool:
    """Whether each of the dataset's own folders has an image; cheap, and True where only opening it would tell.

    Raises:
        DatasetError: If one of its LMDB files is not one.
    """
    if not dataset.is_named_by_paths:
        return True
    return all(_has_any_image(name) for name in own_splits(dataset).values())


def _has_any_image(name: str) -> bool:
    if name.endswith(LMDB_SUFFIX):
        return len(LmdbReader(name)) > 0
    return name.endswith(".tar") or has_image(Path(name))
