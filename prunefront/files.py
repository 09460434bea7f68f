"""Writing files so that a crash or a full disk never leaves half of one."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from prunefront.errors import FileWriteError


def cache_folder(name: str) -> Path:
    """Where this user's ``name`` is kept between runs; it need not exist yet."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(home) / "prunefront" / name


def write_atomic(path: str | os.PathLike[str], data: str | bytes) -> Path:
    """Write ``data`` to ``path`` in one step: readers see the old file or the new one, never a part.

    Args:
        path: Target; its folder is created when missing.
        data: Text (written as UTF-8) or bytes.

    Returns:
        The path written.

    Raises:
        FileWriteError: If the folder or file cannot be written (disk full, no permission); the old file is intact.
    """
    with replacing(path) as file:
        file.write(data.encode() if isinstance(data, str) else data)
    return Path(path)


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """Open a file that gets the name ``path`` when the block ends; an exception in it leaves what was there.

    Args:
        path: Target; its folder is created when missing.

    Raises:
        FileWriteError: If the folder or file cannot be written (disk full, no permission); the old file is intact.
    """
    with replacing_by_name(path) as temporary, temporary.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def replacing_by_name(path: str | os.PathLike[str]) -> Iterator[Path]:
    """`replacing` for what writes files itself: gives the name of an empty file beside the target.

    Args:
        path: Target; its folder is created when missing.

    Raises:
        FileWriteError: If the folder or file cannot be written (disk full, no permission); the old file is intact.
    """
    target = Path(path)
    temporary: str | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
        os.close(descriptor)
        yield Path(temporary)
        # mkstemp gives 0600; a result is to be read by whoever may read its folder.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, target)
        temporary = None
    except FileWriteError:
        raise
    except OSError as error:
        raise FileWriteError(
            error.errno,
            f"Could not write {target}: {error.strerror or error}. Free some space or choose another folder; "
            "the file that stood there before is unchanged.",
        ) from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


def require_writable(path: str | os.PathLike[str]) -> None:
    """Find out before long work whether `write_atomic` could write its result to ``path``.

    Raises:
        FileWriteError: If it could not; nothing is changed.
    """
    target = Path(path)
    folder = next(parent for parent in target.absolute().parents if os.path.lexists(parent))
    try:
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise FileWriteError(
            error.errno, f"{target} cannot be written: {error.strerror or error}. Choose another file or folder."
        ) from error


def write_json_atomic(path: str | os.PathLike[str], document: Any) -> Path:
    """Write ``document`` as indented JSON with `write_atomic`; NaN and infinity are refused."""
    return write_atomic(path, json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
