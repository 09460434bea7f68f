"""Pictures of what a schedule does to the patches of an image: the original, then one picture per site.

Kept patches are shown as they are and dropped ones darkened; merged patches have the mean colour of their group inside
an outline in the group's own colour; patches fused into a token of what was dropped are tinted, one colour per token.
The data behind them is `prunefront.token_maps`. Equal input gives equal bytes.
"""

from __future__ import annotations

import colorsys
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from prunefront.errors import InputError
from prunefront.token_maps import PatchState, SiteMap, TokenTrace, site_maps, trace_tokens

__all__ = [
    "PatchState",
    "SiteMap",
    "TokenTrace",
    "draw_image",
    "draw_site",
    "png_bytes",
    "site_maps",
    "stack_pictures",
    "to_picture",
    "trace_tokens",
]

DARK = 0.15  # brightness left to dropped patches
TINT = 0.5  # share of the tint in fused patches
TILE_PX = 224  # least side of one picture; smaller images are enlarged by a whole factor
TILES_PER_ROW = 7
GAP_PX = 10
FONT_PX = 14
LINE_PX = 18
CAPTION_LINES = 3
CAPTION_PX = CAPTION_LINES * LINE_PX + 4
_GOLDEN = 0.6180339887498949  # turns of the colour wheel between neighbouring groups: close numbers, distant colours
_TINTS = ((255, 140, 0), (214, 39, 200), (0, 170, 220), (120, 200, 40))
_PAPER, _INK, _FAINT = (255, 255, 255), (20, 20, 20), (100, 100, 100)

Pixels = NDArray[np.float64]


def to_picture(image: Tensor, mean: Sequence[float], std: Sequence[float]) -> Image.Image:
    """Undo the normalisation of a model's input.

    Args:
        image: (channels, height, width), 1 or 3 channels.
        mean: Per channel, as in the data config.
        std: Per channel.

    Returns:
        An RGB picture.

    Raises:
        InputError: If there are neither 1 nor 3 channels.
    """
    if image.ndim != 3 or image.shape[0] not in (1, 3):
        raise InputError(
            f"Expected an image of shape (1 or 3 channels, height, width), but got {tuple(image.shape)}. "
            "Give one image, with channels first."
        )
    scale, shift = (image.new_tensor(list(values))[:, None, None] for values in (std, mean))
    pixels = ((image * scale + shift).clamp(0, 1) * 255).round().byte().cpu()
    return Image.fromarray(pixels.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy())


def draw_site(picture: Image.Image, site: SiteMap) -> Image.Image:
    """The picture after a site; its size stays.

    Args:
        picture: The original, RGB.
        site: What the site left of it.
    """
    pixels: Pixels = np.asarray(picture.convert("RGB"), dtype=np.float64)
    cells = _cells(pixels.shape[0], pixels.shape[1], site.states.shape)
    states, groups = site.states.reshape(-1)[cells], site.groups.reshape(-1)[cells]
    pixels = np.where((states == PatchState.DROPPED)[..., None], pixels * DARK, pixels)

    merged = states == PatchState.MERGED
    pixels[merged] = _group_means(pixels, groups)[groups[merged]]
    edge = _edges(groups, max(1, pixels.shape[1] // site.states.shape[1] // 10))
    outline = edge & merged
    tokens, number = np.unique(groups[merged], return_inverse=True)
    pixels[outline] = _outline_colours(len(tokens))[number[edge[merged]]]

    for rank, token in enumerate(np.unique(groups[states == PatchState.FUSED])):
        inside = groups == token
        tint = np.array(_TINTS[rank % len(_TINTS)], dtype=np.float64)
        pixels[inside] = pixels[inside] * (1 - TINT) + tint * TINT
        pixels[inside & edge] = tint
    return Image.fromarray(pixels.round().astype(np.uint8))


def draw_image(picture: Image.Image, sites: Sequence[SiteMap], title: str, subtitle: str = "") -> Image.Image:
    """The original and a picture per site side by side, each under a caption with its counts.

    Args:
        picture: The original, RGB, as the model saw it.
        sites: Of this image.
        title: Caption of the original.
        subtitle: Second line of it.
    """
    factor = max(1, -(-TILE_PX // max(picture.size)))
    large = picture.convert("RGB").resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    tiles = [(large, [title, subtitle])]
    tiles += [(draw_site(large, site), _caption(site)) for site in sites]
    columns = min(len(tiles), TILES_PER_ROW)
    rows = -(-len(tiles) // columns)
    width, height = large.width + GAP_PX, large.height + GAP_PX + CAPTION_PX
    sheet = Image.new("RGB", (columns * width + GAP_PX, rows * height + GAP_PX), _PAPER)
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=FONT_PX)
    for number, (tile, lines) in enumerate(tiles):
        left = GAP_PX + number % columns * width
        top = GAP_PX + number // columns * height
        for line, text in enumerate(lines):
            ink = _FAINT if line else _INK
            pen.text((left, top + line * LINE_PX), _fitting(text, large.width, font), fill=ink, font=font)
        sheet.paste(tile, (left, top + CAPTION_PX))
    return sheet


def stack_pictures(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures one under the other, left-aligned.

    Raises:
        InputError: If there is none.
    """
    if not pictures:
        raise InputError("Expected at least one picture, but got none. Choose some images.")
    sheet = Image.new("RGB", (max(p.width for p in pictures), sum(p.height for p in pictures)), _PAPER)
    top = 0
    for picture in pictures:
        sheet.paste(picture, (0, top))
        top += picture.height
    return sheet


def png_bytes(picture: Image.Image) -> bytes:
    """The picture as a PNG file, without time or other metadata."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()


def _cells(height: int, width: int, grid: tuple[int, ...]) -> NDArray[np.int64]:
    """Number of the patch that each pixel is in, (height, width)."""
    rows, columns = np.arange(height) * grid[0] // height, np.arange(width) * grid[1] // width
    return rows[:, None] * grid[1] + columns


def _group_means(pixels: Pixels, groups: NDArray[np.int32]) -> Pixels:
    """Mean colour of each group, (groups, 3); zero for numbers that no pixel has."""
    flat = groups.reshape(-1)
    inside = flat >= 0
    flat, colours = flat[inside], pixels.reshape(-1, 3)[inside]
    counts = np.bincount(flat)
    sums = np.stack([np.bincount(flat, weights=colours[:, channel]) for channel in range(3)], axis=1)
    means: Pixels = sums / np.maximum(counts, 1)[:, None]
    return means


def _edges(groups: NDArray[np.int32], thickness: int) -> NDArray[np.bool_]:
    """True for pixels with another group, or the border, within ``thickness`` pixels beside, above or below."""
    height, width = groups.shape
    around = np.pad(groups, thickness, constant_values=np.iinfo(np.int32).min)
    edge = np.zeros(groups.shape, dtype=bool)
    for step in range(1, thickness + 1):
        for down, right in ((step, 0), (-step, 0), (0, step), (0, -step)):
            top, left = thickness + down, thickness + right
            edge |= around[top : top + height, left : left + width] != groups
    return edge


def _outline_colours(count: int) -> Pixels:
    """One bright colour per group, (count, 3)."""
    wheel = (colorsys.hsv_to_rgb(number * _GOLDEN % 1.0, 0.9, 1.0) for number in range(count))
    return np.array(list(wheel), dtype=np.float64).reshape(-1, 3) * 255


def _caption(site: SiteMap) -> list[str]:
    what = site.op if site.action == site.op else f"{site.op}: {site.action}"
    first = f"kept {site.count(PatchState.KEPT)}"
    if dropped := site.count(PatchState.DROPPED):
        first += f", dropped {dropped}"
    second = [
        f"{state.name.lower()} {patches} into {site.num_groups(state)}"
        for state in (PatchState.MERGED, PatchState.FUSED)
        if (patches := site.count(state))
    ]
    return [f"block {site.block}: {what}, {site.tokens} tokens", first, ", ".join(second)]


def _fitting(text: str, width: int, font: Any) -> str:
    """``text``, cut where it would run into the next caption."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."
