"""Folders of small images: of one brightness per class, or of noise that no two images share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image


def write_images(folder: Path, counts: Sequence[int], *, mode: str = "RGB") -> None:
    """Write ``counts[c]`` images of class c as ``folder/class_c/i.png``, brightness ``c / len(counts)``."""
    for label, count in enumerate(counts):
        class_folder = folder / f"class_{label}"
        class_folder.mkdir(parents=True)
        level = round(255 * label / len(counts))
        for number in range(count):
            Image.new(mode, (40, 32), level if mode == "L" else (level,) * 3).save(class_folder / f"{number}.png")


def write_noise(folder: Path, count: int, *, seed: int = 0) -> None:
    """Write ``count`` images of random pixels for each of two classes as ``folder/class_c/i.png``."""
    pixels = np.random.default_rng(seed)
    for label in range(2):
        (folder / f"class_{label}").mkdir(parents=True)
        for number in range(count):
            image = Image.fromarray(pixels.integers(0, 256, (40, 40, 3), dtype=np.uint8))
            image.save(folder / f"class_{label}" / f"{number}.png")
