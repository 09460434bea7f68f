"""Write a folder of images into one LMDB file; ``lmdb_images`` says how it looks and reads it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from timm.data import create_dataset

from prunefront.errors import ConfigError, DatasetError, FileWriteError
from prunefront.files import replacing_by_name, require_writable
from prunefront.training.dataset_ids import has_image
from prunefront.training.lmdb_images import (
    LABEL,
    LMDB_FORMAT,
    LMDB_FORMAT_VERSION,
    LMDB_SUFFIX,
    META_KEY,
    NAMES_KEY,
    image_key,
    import_lmdb,
)
from prunefront.training.split_plan import split_folders

Progress = Callable[[float, float, str], None]

_IMAGES_PER_TRANSACTION = 1_000
_PROGRESS_EVERY_IMAGES = 100
# Room for growth: an LMDB reserves addresses, not space. Records begin on pages of their own.
_SPARE_MAP_BYTES = 2**26
_SPARE_MAP_BYTES_PER_IMAGE = 2**14


@dataclass(frozen=True, kw_only=True)
class LmdbInfo:
    """What an LMDB of images holds.

    Attributes:
        path: The file.
        num_images: Images in it.
        classes: Class names by label.
        size_bytes: Size of the file.
        format_version: Version of the record format.
    """

    path: str
    num_images: int
    classes: tuple[str, ...]
    size_bytes: int
    format_version: int

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self) | {"classes": list(self.classes)}


def write_lmdb(
    folder: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> LmdbInfo:
    """Write a folder of class folders into one LMDB file, all or nothing.

    Args:
        folder: One split: a folder of images per class.
        target: File to write; its name ends with ``.lmdb``.
        overwrite: Whether a file that stands there is replaced.
        progress: Called with (images done, all images, text) now and then.

    Raises:
        ConfigError: If the target's name does not end with ``.lmdb``.
        DatasetError: If the folder is missing, has no images or holds several splits, or a file cannot be read.
        FileWriteError: If the target exists without ``overwrite`` or cannot be written; what stood there is intact.
        MissingExtraError: If the package lmdb is not installed.
    """
    lmdb = import_lmdb()
    source, target = Path(folder), Path(target)
    if target.suffix != LMDB_SUFFIX:
        raise ConfigError(
            f"The name of an LMDB ends with {LMDB_SUFFIX}, but got {target}. Call it {target.name}{LMDB_SUFFIX}."
        )
    _require_absent(target, overwrite)
    require_writable(target)
    reader = _read_folder(source)
    names = [str(name).replace(os.sep, "/") for name in reader.filenames()]
    total_bytes = sum(_size_of(source / name) for name in names)
    map_size = 2 * total_bytes + len(names) * _SPARE_MAP_BYTES_PER_IMAGE + _SPARE_MAP_BYTES
    with replacing_by_name(target) as temporary:
        try:
            # A file of its own that nobody else knows: no lock is needed.
            environment = lmdb.open(str(temporary), subdir=False, lock=False, map_size=map_size, meminit=False)
            try:
                classes = _write_records(environment, source, reader, names, progress)
                environment.sync(True)
            finally:
                environment.close()
        except lmdb.Error as error:  # a full disk among them
            raise OSError(None, str(error)) from error
        _require_absent(target, overwrite)
    return LmdbInfo(
        path=str(target),
        num_images=len(names),
        classes=classes,
        size_bytes=target.stat().st_size,
        format_version=LMDB_FORMAT_VERSION,
    )


def _write_records(
    environment: Any, folder: Path, reader: Any, names: list[str], progress: Progress | None
) -> tuple[str, ...]:
    digest = hashlib.blake2b(digest_size=16)
    for start in range(0, len(names), _IMAGES_PER_TRANSACTION):
        with environment.begin(write=True) as transaction:
            for index in range(start, min(start + _IMAGES_PER_TRANSACTION, len(names))):
                try:
                    file, label = reader[index]
                    with file:
                        content = file.read()
                except OSError as error:
                    raise DatasetError(
                        f"Could not read the image {str(folder / names[index])!r}: {error.strerror or error}. "
                        "Repair or remove that file."
                    ) from error
                record = LABEL.pack(label) + content
                digest.update(hashlib.blake2b(record, digest_size=16).digest())
                transaction.put(image_key(index), record, append=True)
                if progress is not None and (index + 1) % _PROGRESS_EVERY_IMAGES == 0:
                    progress(index + 1, len(names), f"{index + 1} of {len(names)} images")
    classes = tuple(str(name) for name, _ in sorted(reader.class_to_idx.items(), key=lambda item: item[1]))
    listed = json.dumps(names).encode("ascii")
    digest.update(listed)
    meta = {
        "format": LMDB_FORMAT,
        "version": LMDB_FORMAT_VERSION,
        "num_images": len(names),
        "classes": classes,
        "digest": digest.hexdigest(),
    }
    with environment.begin(write=True) as transaction:
        transaction.put(META_KEY, json.dumps(meta).encode("ascii"), append=True)
        transaction.put(NAMES_KEY, listed, append=True)
    if progress is not None:
        progress(len(names), len(names), f"{len(names)} of {len(names)} images")
    return classes


def _require_absent(target: Path, overwrite: bool) -> None:
    if not overwrite and os.path.lexists(target):
        raise FileWriteError(
            None, f"{target} exists already. Choose another name, or replace it with --force (overwrite=True)."
        )


def _read_folder(folder: Path) -> Any:
    """timm's reader of a folder that is one split."""
    if not folder.is_dir() or not has_image(folder):
        found = "it has no images" if folder.is_dir() else "there is no such folder"
        raise DatasetError(
            f"An LMDB is made of a folder with one folder of images per class, but got {folder}: {found}. "
            "Name the folder of one split, such as flowers/train."
        )
    splits = [path for path in split_folders(folder) if any(entry.is_dir() for entry in path.iterdir())]
    if splits:
        raise DatasetError(
            f"An LMDB holds one split, but {folder} has several in it ({', '.join(path.name for path in splits)}). "
            f"Make one of each, beginning with {splits[0]}."
        )
    return create_dataset("", root=str(folder), search_split=False).reader


def _size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise DatasetError(
            f"Could not read the image {str(path)!r}: {error.strerror or error}. Repair or remove that file."
        ) from error
