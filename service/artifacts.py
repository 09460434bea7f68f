"""Files of jobs: where a recorded path may lead."""

from __future__ import annotations

from pathlib import Path

from service.settings import Settings


def contained_path(settings: Settings, name: str) -> Path | None:
    """The file behind a recorded path, absolute or relative to the data folder; None if it lies outside of it."""
    root = settings.data_dir.resolve()
    path = (root / name).resolve()
    return path if path.is_relative_to(root) else None
