"""Folders of images in one LMDB file: what ``prunefront data lmdb`` writes (``lmdb_builder``) and datasets read.

A record is the image's label, four bytes little-endian, followed by the image file as it was; its key is its running
number, eight bytes big-endian, in the order in which timm reads the folder (``9.png`` before ``10.png``). After the
records come ``meta`` (format, count, class names, a digest) and ``names`` (each image's path below the folder), both
JSON: an LMDB gives the splits its folder gives, since these are held out by a hash of the names. Nothing is pickled.
"""

from __future__ import annotations

import io
import json
import os
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from prunefront.errors import DatasetError, MissingExtraError

LMDB_SUFFIX = ".lmdb"
LMDB_FORMAT = "prunefront/images"
LMDB_FORMAT_VERSION = 1
LABEL = struct.Struct("<I")
META_KEY, NAMES_KEY = b"meta", b"names"  # sorted behind every running number


def image_key(index: int) -> bytes:
    """Key of an image: its running number, so that keys sort in the order of the folder."""
    return index.to_bytes(8, "big")


def import_lmdb() -> Any:
    """Return the package lmdb.

    Raises:
        MissingExtraError: If it is not installed.
    """
    try:
        import lmdb
    except ImportError as error:
        raise MissingExtraError(
            "LMDB files need the package lmdb, which is not installed. Install it with: pip install lmdb"
        ) from error
    return lmdb


class LmdbReader:
    """The images of one LMDB file, with the methods of timm's readers: (open file, label) by index.

    The environment is opened at the first read in each process, read-only and without a lock, and left out of
    pickles. It stays open while any reader of the file is alive: LMDB allows one per file and process.

    Attributes:
        class_to_idx: Label of each class name.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Open a file that ``write_lmdb`` wrote.

        Raises:
            DatasetError: If the file is missing, truncated, or something else.
            MissingExtraError: If the package lmdb is not installed.
        """
        self._path = os.path.realpath(path)
        self._opened: _Opened | None = None
        self._names: list[str] | None = None
        self._meta = self._environment().meta
        self.class_to_idx: dict[str, int] = {name: label for label, name in enumerate(self._meta["classes"])}

    def __len__(self) -> int:
        return int(self._meta["num_images"])

    def __getitem__(self, index: int) -> tuple[io.BytesIO, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"{self._path} has images 0..{len(self) - 1}, but got {index}.")
        record = self._environment().get(image_key(index))
        if record is None or len(record) < LABEL.size:
            raise _not_ours(self._path, f"record {index} is missing")
        (label,) = LABEL.unpack_from(record)
        return io.BytesIO(record[LABEL.size :]), label

    def filenames(self, basename: bool = False, absolute: bool = False) -> list[str]:
        """Paths of the images below the folder the file was made of, ``/`` between their parts."""
        if self._names is None:
            raw = self._environment().get(NAMES_KEY)
            try:
                names = json.loads(raw or b"null")
            except ValueError:
                names = None
            if not isinstance(names, list) or len(names) != len(self):
                raise _not_ours(self._path, "its list of image names is damaged")
            self._names = names
        if basename:
            return [name.rpartition("/")[2] for name in self._names]
        return [f"{self._path}/{name}" for name in self._names] if absolute else self._names

    def filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        """Path of one image; see ``filenames``."""
        name = self.filenames()[index]
        if basename:
            return name.rpartition("/")[2]
        return f"{self._path}/{name}" if absolute else name

    def __getstate__(self) -> dict[str, Any]:
        # A worker process opens the file itself, and needs the names only when it has something to say.
        return {**self.__dict__, "_opened": None, "_names": None}

    def _environment(self) -> _Opened:
        if self._opened is None:
            self._opened = _open(self._path)
            meta = self.__dict__.get("_meta", self._opened.meta)
            if meta != self._opened.meta:
                raise DatasetError(
                    f"{self._path} holds other images than when the dataset was opened: it was replaced meanwhile. "
                    "Start again with the new file."
                )
        return self._opened


class _Opened:
    """An open environment and its checked ``meta``; closed when its last reader is gone."""

    def __init__(self, path: str) -> None:
        lmdb = import_lmdb()
        self._path, self._error = path, lmdb.Error
        if not os.path.isfile(path):
            raise _not_ours(path, "it is a folder" if os.path.isdir(path) else "there is no such file")
        try:
            # No read-ahead: training reads in random order.
            self._environment = lmdb.open(path, subdir=False, readonly=True, lock=False, readahead=False, max_dbs=0)
        except (OSError, lmdb.Error) as error:
            raise _not_ours(path, _reason(error, path)) from error
        try:
            self.meta = self._checked_meta()
        except BaseException:
            self._environment.close()
            raise

    def _checked_meta(self) -> dict[str, Any]:
        # Reading a page behind the end of a mapped file would kill the process.
        statistics = self._environment.stat()
        expected_bytes = (self._environment.info()["last_pgno"] + 1) * statistics["psize"]
        size_bytes = os.path.getsize(self._path)
        if size_bytes < expected_bytes:
            raise _not_ours(self._path, f"it is cut off: {size_bytes} of {expected_bytes} bytes are there")
        raw = self.get(META_KEY)
        try:
            meta = json.loads(raw or b"null")
        except ValueError:
            meta = None
        if not isinstance(meta, dict) or meta.get("format") != LMDB_FORMAT:
            raise _not_ours(self._path, "it holds no description of images")
        if meta.get("version") != LMDB_FORMAT_VERSION:
            raise _not_ours(
                self._path,
                f"its format version is {meta.get('version')}, and this prunefront reads {LMDB_FORMAT_VERSION}",
            )
        if statistics["entries"] != meta["num_images"] + 2:
            raise _not_ours(
                self._path, f"it has {statistics['entries'] - 2} of the {meta['num_images']} images it promises"
            )
        return meta

    def get(self, key: bytes) -> bytes | None:
        try:
            with self._environment.begin() as transaction:
                value: bytes | None = transaction.get(key)
        except self._error as error:
            raise _not_ours(self._path, _reason(error, self._path)) from error
        return value

    def __del__(self) -> None:
        environment = self.__dict__.get("_environment")
        if environment is not None:
            environment.close()


_OPENED: WeakValueDictionary[tuple[int, int], _Opened] = WeakValueDictionary()
_OPENING = threading.Lock()


def _open(path: str) -> _Opened:
    """Share the environment of a file: the same one must not be opened twice in a process."""
    with _OPENING:
        try:
            status = os.stat(path)
        except OSError as error:
            raise _not_ours(path, error.strerror or str(error)) from error
        identity = status.st_dev, status.st_ino
        opened = _OPENED.get(identity)
        if opened is None:
            opened = _OPENED[identity] = _Opened(path)
        return opened


def _not_ours(path: str, reason: str) -> DatasetError:
    return DatasetError(
        f"Expected an LMDB of images that prunefront data lmdb wrote, but {path} is not one: {reason}. "
        f"Build it again with: prunefront data lmdb IMAGE_FOLDER {path} --force"
    )


def _reason(error: Exception, path: str) -> str:
    return str(error).removeprefix(f"{path}: ")


def lmdb_files(folder: Path) -> Iterator[Path]:
    """LMDB files right in a folder, sorted by name."""
    yield from sorted(path for path in folder.glob(f"*{LMDB_SUFFIX}") if path.is_file())
