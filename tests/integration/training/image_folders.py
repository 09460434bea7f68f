"""Folders of small images whose brightness tells the class."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image


def write_images(folder: Path, counts: Sequence[int], *, mode: str = "RGB") -> None:
    """Write ``counts[c]`` images of class c as ``folder/class_c/i.png``, brightness ``c / len(counts)``."""
    for label, count in enumerate(counts):
        class_folder = folder / f"class_{label}"
        class_folder.mkdir(parents=True)
        level = round(255 * label / len(counts))
        for number in range(count):
            Image.new(mode, (40, 32), level if mode == "L" else (level,) * 3).save(class_folder / f"{number}.png")
