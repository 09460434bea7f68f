"""Checkpoint ids: what a job may name instead of a path.

A file ``NAME.safetensors`` in the data folder's ``checkpoints`` is the checkpoint ``NAME``. Ids are looked up in the
listing of that folder and never joined to a path, so no id leads out of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from prunefront.errors import UnknownNameError

SUFFIX = ".safetensors"


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """One registered file of weights."""

    id: str
    path: Path
    size_bytes: int


def list_checkpoints(folder: Path) -> list[Checkpoint]:
    """Every checkpoint of the folder, by id; a folder that does not exist yet has none."""
    if not folder.is_dir():
        return []
    root = folder.resolve()
    # A symbolic link to a file elsewhere is the operator's own doing only if the file stays inside.
    files = (path for path in sorted(folder.glob(f"*{SUFFIX}")) if path.resolve().parent == root and path.is_file())
    return [Checkpoint(id=path.name.removesuffix(SUFFIX), path=path, size_bytes=path.stat().st_size) for path in files]


def find_checkpoint(folder: Path, checkpoint_id: str) -> Checkpoint:
    """The checkpoint of that id.

    Raises:
        UnknownNameError: If there is none.
    """
    known = {checkpoint.id: checkpoint for checkpoint in list_checkpoints(folder)}
    if checkpoint_id not in known:
        raise UnknownNameError.of(
            "checkpoint",
            checkpoint_id,
            known,
            hint="Checkpoints are the .safetensors files in the server's checkpoints folder.",
        )
    return known[checkpoint_id]
