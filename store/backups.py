"""A copy of a SQLite store that is in use."""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
from pathlib import Path

from prunefront.errors import FileWriteError
from store.errors import StoreError
from store.session import DEFAULT_BUSY_TIMEOUT_S, translated_errors
from store.urls import describe, parse_url

logger = logging.getLogger(__name__)


def backup(url: str, path: str | os.PathLike[str]) -> Path:
    """Copy a SQLite store while others use it; the copy is one consistent moment.

    Args:
        url: Database URL.
        path: The copy; a file that stands there is replaced once the copy is complete.

    Returns:
        The path of the copy.

    Raises:
        StoreError: If the URL is not of an existing SQLite store, or it cannot be read.
        FileWriteError: If the copy cannot be written; whatever stood there is intact.
    """
    parsed = parse_url(url)
    if parsed.get_backend_name() != "sqlite":
        raise StoreError(
            f"Expected a SQLite database to copy, got Postgres at {describe(parsed)}. Use pg_dump for Postgres."
        )
    source_path, target_path = Path(str(parsed.database)).resolve(), Path(path).resolve()
    if not source_path.is_file():
        raise StoreError(f"Expected a SQLite database at {source_path}, got no such file. Check the database URL.")
    if source_path == target_path:
        raise StoreError(f"Expected another file than the database {source_path} itself. Name another file.")
    partial_path = target_path.with_name(f".{target_path.name}.{os.getpid()}.partial")
    try:
        with translated_errors(parsed):
            source = sqlite3.connect(source_path, timeout=DEFAULT_BUSY_TIMEOUT_S)
            with contextlib.closing(source):
                # Reading first tells a bad source from a bad target.
                source.execute("SELECT count(*) FROM sqlite_master").fetchone()
                _copy(source, partial_path, target_path)
        with partial_path.open("rb") as file:
            os.fsync(file.fileno())
        partial_path.replace(target_path)
    except OSError as e:
        raise FileWriteError(
            f"Expected to write the copy {target_path}, got: {e.strerror or e}. Check the folder and its free space."
        ) from e
    finally:
        with contextlib.suppress(OSError):  # where no copy could be begun, there is none to remove
            partial_path.unlink()
    logger.info("Copied the database", extra={"action": "backup", "path": str(target_path)})
    return target_path


def _copy(source: sqlite3.Connection, partial_path: Path, target_path: Path) -> None:
    try:
        with contextlib.closing(sqlite3.connect(partial_path)) as target:
            source.backup(target)
            # A copy is one file: without this it would carry the WAL mode and grow side files when opened.
            target.execute("PRAGMA journal_mode=DELETE")
    except sqlite3.Error as e:
        raise OSError(str(e)) from e
