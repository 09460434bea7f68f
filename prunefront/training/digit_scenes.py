"""The demo dataset ``digit-scenes``: real handwritten digits on larger cluttered canvases, most patches background.

The sources are the 1,797 scanned 8 x 8 digits that scikit-learn ships (E. Alpaydin, C. Kaynak, UCI 1998). Each scene
shows one of them about 30 px wide on a noisy 48-px canvas, with one fragment of another digit of the same split as
clutter. ``prunefront.training.data`` serves the scenes under the id ``digit-scenes``.

A scene is a pure function of (split, index, epoch, repeat): its random numbers are the raw output of a counter-based
generator keyed by these, turned into values with additions and multiplications alone. So scenes are equal in
any order, process, thread count and NumPy version, and a resumed training run sees what an uninterrupted one would.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from prunefront.errors import DatasetError

DigitSplitName = Literal["train", "search", "test"]

CANVAS_PX = 48
DIGIT_PX = 30
FRAGMENT_PX = 12  # a 4 x 4 window of another digit
NUM_CLASSES = 10

# Images of one split: its source digits, each rendered this many times (train: this many per epoch).
SOURCE_DIGITS: dict[DigitSplitName, int] = {"train": 900, "search": 297, "test": 600}
RENDERINGS_PER_DIGIT: dict[DigitSplitName, int] = {"train": 4, "search": 7, "test": 7}

_SPLIT_KEYS: dict[DigitSplitName, int] = {"train": 1, "search": 2, "test": 3}
_SOURCE_PX = 8
_FRAGMENT_SOURCE_PX = 4
_MAX_INK = 16.0  # the scans hold counts of dark pixels, 0..16
_WARP = 0.12  # largest deviation of each entry of the 2 x 2 matrix that scales, shears and turns a digit
_NUM_UNIFORMS = 24
_NUM_NOISE_WORDS = CANVAS_PX * CANVAS_PX * 3 // 8
_CHUNK = 256  # scenes rendered at once: keeps temporaries within the cache


@dataclass(frozen=True, kw_only=True)
class Scenes:
    """Rendered scenes of one split.

    Attributes:
        images: Colour images, shape (N, 48, 48, 3), uint8.
        labels: Digit shown, shape (N,), int64, 0..9.
        clusters: Index of the source digit among the 1,797, shape (N,), int64. Scenes of one digit are not independent.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    clusters: NDArray[np.int64]


@cache
def _source_digits() -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return the scans as ink in 0..1, shape (1797, 8, 8), and their labels."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DatasetError(
            "The dataset 'digit-scenes' needs the digits that scikit-learn ships, but scikit-learn is not installed. "
            "Install it with: pip install scikit-learn"
        ) from error
    digits = load_digits()
    ink = (digits.images / _MAX_INK).astype(np.float32)
    return ink, digits.target.astype(np.int64)


@cache
def source_indices(split: DigitSplitName) -> NDArray[np.int64]:
    """Return which of the 1,797 digits a split owns; fixed, disjoint between splits, stratified by class.

    Args:
        split: ``train``, ``search`` or ``test``.

    Returns:
        Indices into scikit-learn's ``load_digits``, in an order of which every prefix is stratified by class too: the
        first images of a split are a fair sample of it.
    """
    _, labels = _source_digits()
    keys = np.random.Philox(key=0).random_raw(len(labels))
    rank = np.empty(len(labels))
    for label in range(NUM_CLASSES):
        members = np.flatnonzero(labels == label)
        # Relative ranks spread each class evenly over 0..1, so every stretch of the merged order is stratified.
        rank[members[np.argsort(keys[members])]] = (np.arange(len(members)) + 0.5) / len(members)
    order = np.lexsort((keys, rank))
    num_train, num_search = SOURCE_DIGITS["train"], SOURCE_DIGITS["search"]
    starts = {"train": 0, "search": num_train, "test": num_train + num_search}
    chosen = order[starts[split] : starts[split] + SOURCE_DIGITS[split]].astype(np.int64)
    chosen.setflags(write=False)
    return chosen


def num_scenes(split: DigitSplitName) -> int:
    """Return the number of scenes of a split (for ``train``: of one epoch)."""
    return SOURCE_DIGITS[split] * RENDERINGS_PER_DIGIT[split]


def render_scenes(
    split: DigitSplitName, indices: Sequence[int] | NDArray[np.int64], epoch: int = 0, repeat: int = 0
) -> Scenes:
    """Render scenes of one split.

    Args:
        split: ``train``, ``search`` or ``test``.
        indices: Scene numbers in 0..``num_scenes(split)`` - 1, in any order. Consecutive numbers show different digits.
        epoch: Variant of the renderings; ``search`` and ``test`` are always variant 0.
        repeat: Which of an epoch's variants, where training shows scenes several times per epoch.

    Returns:
        The scenes in the order of ``indices``.

    Raises:
        DatasetError: If scikit-learn is missing or an index lies outside the split.
    """
    index_array = np.asarray(indices, dtype=np.int64)
    total = num_scenes(split)
    if index_array.size and not (0 <= index_array.min() and index_array.max() < total):
        raise DatasetError(
            f"Scene numbers of digit-scenes {split!r} lie in 0..{total - 1}, but got "
            f"{index_array.min()}..{index_array.max()}. Ask for scenes of that range."
        )
    _, labels = _source_digits()
    sources = source_indices(split)
    images = np.empty((len(index_array), CANVAS_PX, CANVAS_PX, 3), dtype=np.uint8)
    for start in range(0, len(index_array), _CHUNK):
        part = slice(start, start + _CHUNK)
        variant = (epoch, repeat) if split == "train" else (0, 0)
        images[part] = _render_chunk(split, index_array[part], variant)
    clusters = sources[index_array % len(sources)]
    return Scenes(images=images, labels=labels[clusters], clusters=clusters)


def _render_chunk(split: DigitSplitName, indices: NDArray[np.int64], variant: tuple[int, int]) -> NDArray[np.uint8]:
    ink, _ = _source_digits()
    sources = source_indices(split)
    words = np.stack(
        [
            np.random.Philox(key=_SPLIT_KEYS[split], counter=(0, int(index), *variant)).random_raw(
                _NUM_UNIFORMS + _NUM_NOISE_WORDS
            )
            for index in indices
        ]
    )
    # 24 bits of each word: exact in float32.
    uniforms = (words[:, :_NUM_UNIFORMS] >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)
    draw = iter(uniforms.T)
    noise = words[:, _NUM_UNIFORMS:].astype("<u8").view(np.uint8).reshape(-1, CANVAS_PX, CANVAS_PX, 3)

    free_px = CANVAS_PX - DIGIT_PX
    offset_x, offset_y = free_px * next(draw), free_px * next(draw)
    half = np.float32(DIGIT_PX / 2 - 0.5)
    place = indices % len(sources)
    digit = _paint(ink[sources[place]], offset_x + half, offset_y + half, _SOURCE_PX / DIGIT_PX, _warp(draw))

    # The fragment comes from another digit of the split: step from this one by 1..len-1 places.
    step = 1 + (next(draw) * (len(sources) - 1)).astype(np.int64)
    window_x, window_y = (1 + (next(draw) * 3).astype(np.int64) for _ in range(2))
    fragment = _window(ink[sources[(place + step) % len(sources)]], window_x, window_y)
    center_x, center_y = _fragment_center(offset_x, offset_y, next(draw), free_px)
    clutter = _paint(fragment, center_x, center_y, _FRAGMENT_SOURCE_PX / FRAGMENT_PX, _warp(draw))

    cover = np.maximum(digit, clutter)[..., None]
    background = 20 + 70 * np.stack([next(draw) for _ in range(3)], axis=-1)
    foreground = 150 + 105 * np.stack([next(draw) for _ in range(3)], axis=-1)
    picture = background[:, None, None] + cover * (foreground - background)[:, None, None]
    picture += noise.astype(np.float32) * np.float32(40 / 255) - np.float32(20)
    pixels: NDArray[np.uint8] = np.clip(picture, 0, 255).astype(np.uint8)
    return pixels


def _warp(draw: Iterator[NDArray[np.float32]]) -> NDArray[np.float32]:
    """Draw 2 x 2 matrices near the identity, shape (N, 2, 2)."""
    entries = np.stack([next(draw) for _ in range(4)], axis=-1)
    warp: NDArray[np.float32] = np.eye(2, dtype=np.float32).reshape(4) + np.float32(_WARP) * (2 * entries - 1)
    return warp.reshape(-1, 2, 2)


def _window(digits: NDArray[np.float32], left: NDArray[np.int64], top: NDArray[np.int64]) -> NDArray[np.float32]:
    """Cut a 4 x 4 window out of each digit, shape (N, 4, 4)."""
    reach = np.arange(_FRAGMENT_SOURCE_PX)
    rows = (top[:, None] + reach)[:, :, None]
    columns = (left[:, None] + reach)[:, None, :]
    windows: NDArray[np.float32] = digits[np.arange(len(digits))[:, None, None], rows, columns]
    return windows


def _fragment_center(
    offset_x: NDArray[np.float32], offset_y: NDArray[np.float32], along: NDArray[np.float32], free_px: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Place the fragment in the widest strip that the digit leaves free, so that it clutters without hiding."""
    low, high = np.float32(FRAGMENT_PX / 2 - 0.5), np.float32(CANVAS_PX - FRAGMENT_PX / 2 - 0.5)
    along_px = low + (high - low) * along
    strips = np.stack([offset_x, free_px - offset_x, offset_y, free_px - offset_y])
    side = np.argmax(strips, axis=0)
    center_x = np.where(side == 0, low, np.where(side == 1, high, along_px))
    center_y = np.where(side == 2, low, np.where(side == 3, high, along_px))
    return center_x, center_y


def _paint(
    patches: NDArray[np.float32],
    center_x: NDArray[np.float32],
    center_y: NDArray[np.float32],
    source_px_per_px: float,
    warp: NDArray[np.float32],
) -> NDArray[np.float32]:
    """Draw each source image, warped about its centre, onto its own empty canvas by bilinear interpolation.

    Args:
        patches: Source images, shape (N, S, S).
        center_x: Canvas column of each source's centre, shape (N,).
        center_y: Canvas row of each source's centre, shape (N,).
        source_px_per_px: Source pixels per canvas pixel.
        warp: Matrices from canvas to source directions, shape (N, 2, 2).

    Returns:
        Canvases, shape (N, 48, 48); zero outside the source.
    """
    count, size = patches.shape[0], patches.shape[1]
    padded = np.pad(patches, ((0, 0), (1, 1), (1, 1)))
    width = size + 2
    pixels = np.arange(CANVAS_PX, dtype=np.float32)
    dx = (pixels - center_x[:, None])[:, None, :] * np.float32(source_px_per_px)
    dy = (pixels - center_y[:, None])[:, :, None] * np.float32(source_px_per_px)
    middle = np.float32((width - 1) / 2)
    limit = np.float32(width - 1.001)
    x = np.clip(warp[:, 0, 0, None, None] * dx + warp[:, 0, 1, None, None] * dy + middle, 0, limit)
    y = np.clip(warp[:, 1, 0, None, None] * dx + warp[:, 1, 1, None, None] * dy + middle, 0, limit)
    column, row = x.astype(np.int32), y.astype(np.int32)
    right, below = x - column, y - row
    flat = padded.reshape(-1)
    corner = row * width + column + (np.arange(count, dtype=np.int32) * (width * width))[:, None, None]
    top = flat[corner] * (1 - right) + flat[corner + 1] * right
    bottom = flat[corner + width] * (1 - right) + flat[corner + width + 1] * right
    canvas: NDArray[np.float32] = top * (1 - below) + bottom * below
    return canvas
