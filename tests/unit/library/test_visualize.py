"""Pictures of sites, pixel by pixel."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from prunefront.errors import InputError
from prunefront.token_maps import PatchState, SiteMap
from prunefront.visualize import (
    CAPTION_PX,
    DARK,
    GAP_PX,
    TILES_PER_ROW,
    draw_image,
    draw_site,
    png_bytes,
    stack_pictures,
    to_picture,
)

SIDE = 20  # px of a patch


def site(states: list[list[int]], groups: list[list[int]]) -> SiteMap:
    return SiteMap(
        block=3,
        op="merge",
        action="merge",
        tokens=4,
        states=np.array(states, np.int8),
        groups=np.array(groups, np.int32),
    )


def middle(picture: Image.Image, row: int, column: int) -> list[int]:
    pixel: list[int] = np.asarray(picture)[row * SIDE + SIDE // 2, column * SIDE + SIDE // 2].tolist()
    return pixel


def four_patches() -> Image.Image:
    colours = np.array([[[200, 0, 0], [0, 100, 0]], [[100, 0, 200], [60, 60, 60]]], dtype=np.uint8)
    return Image.fromarray(colours.repeat(SIDE, axis=0).repeat(SIDE, axis=1))


def test_each_state_has_its_look() -> None:
    merged = site([[2, 1], [2, 0]], [[1, 0], [1, -1]])

    picture = draw_site(four_patches(), merged)

    assert picture.size == (2 * SIDE, 2 * SIDE)
    assert middle(picture, 0, 1) == [0, 100, 0]  # kept
    assert middle(picture, 0, 0) == middle(picture, 1, 0) == [150, 0, 100]  # the mean of both
    assert middle(picture, 1, 1) == [round(60 * DARK)] * 3
    assert np.asarray(picture)[0, 0].tolist() != [150, 0, 100]  # its outline
    assert np.asarray(picture)[SIDE, SIDE // 2].tolist() == [150, 0, 100]  # none between patches of a group


def test_tokens_of_what_was_dropped_are_tinted_apart() -> None:
    fused = site([[3, 3], [1, 1]], [[2, 3], [0, 1]])

    picture = draw_site(four_patches(), fused)

    assert middle(picture, 0, 0) == [228, 70, 0]
    assert middle(picture, 0, 1) == [107, 70, 100]
    assert middle(picture, 1, 0) == [100, 0, 200]


def test_nothing_dropped_changes_nothing() -> None:
    picture = four_patches()

    kept = draw_site(picture, site([[PatchState.KEPT] * 2] * 2, [[0, 1], [2, 3]]))

    assert np.array_equal(np.asarray(kept), np.asarray(picture))


@pytest.mark.parametrize("channels", [1, 3])
def test_normalisation_is_undone(channels: int) -> None:
    image = torch.rand(channels, 8, 8, generator=torch.Generator().manual_seed(0))
    mean, std = [0.4, 0.5, 0.3][:channels], [0.2, 0.25, 0.3][:channels]
    shift, scale = (torch.tensor(values)[:, None, None] for values in (mean, std))

    picture = to_picture((image - shift) / scale, mean, std)

    assert picture.mode == "RGB"
    assert (
        np.abs(np.asarray(picture) / 255 - image.expand(3, -1, -1).permute(1, 2, 0).numpy()).max() <= 0.5 / 255 + 1e-6
    )


def test_two_channels_have_no_colours() -> None:
    with pytest.raises(InputError, match="1 or 3 channels"):
        to_picture(torch.zeros(2, 4, 4), [0.5] * 2, [0.5] * 2)


def test_many_sites_wrap_and_bytes_repeat() -> None:
    sites = [site([[1, 0], [1, 1]], [[0, -1], [1, 2]])] * TILES_PER_ROW
    picture = Image.new("RGB", (240, 240), (90, 90, 90))

    sheet = draw_image(picture, sites, "image 3", "label 1")

    width, height = 240 + GAP_PX, 240 + GAP_PX + CAPTION_PX
    assert sheet.size == (TILES_PER_ROW * width + GAP_PX, 2 * height + GAP_PX)
    data = png_bytes(sheet)
    assert data == png_bytes(draw_image(picture, sites, "image 3", "label 1"))
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), np.asarray(sheet))
    assert stack_pictures([sheet, picture]).size == (sheet.width, sheet.height + 240)


def test_no_picture_is_no_grid() -> None:
    with pytest.raises(InputError, match="at least one"):
        stack_pictures([])
