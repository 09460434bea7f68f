"""MixToken of LV-ViT: the images of a batch swap a box of tokens after the stem, and their answers swap it back.

Section 3.3 of Jiang et al., "All Tokens Matter", NeurIPS 2021 (arXiv:2104.10858); the box is drawn as CutMix draws it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from prunefront.backbones.lvvit import ConvStem

Box = tuple[int, int, int, int]  # rows and columns: top, left, bottom, right
NO_BOX: Box = (0, 0, 0, 0)


def box_around(center: tuple[int, int], grid: tuple[int, int], share: float) -> Box:
    """The box of the grid's shape and about ``share`` of its area around a center, cut off at the border.

    Args:
        center: Row and column.
        grid: Rows and columns.
        share: Of the area, 0-1. Sides are rounded down to even numbers of tokens.
    """
    (row, column), (rows, columns), side = center, grid, math.sqrt(share)
    up, left = int(rows * side) // 2, int(columns * side) // 2
    return max(row - up, 0), max(column - left, 0), min(row + up, rows), min(column + left, columns)


def draw_box(grid: tuple[int, int], alpha: float, generator: np.random.Generator) -> Box:
    """A box around a uniform center, whose share of the grid is 1 - lambda with lambda ~ Beta(alpha, alpha)."""
    share = 1.0 - float(generator.beta(alpha, alpha))
    return box_around((int(generator.integers(grid[0])), int(generator.integers(grid[1]))), grid, share)


def swap_box(maps: Tensor, box: Box) -> Tensor:
    """Maps (B, rows, columns, ...) with the box taken from the flipped batch. It is its own inverse."""
    top, left, bottom, right = box
    swapped = maps.clone()
    swapped[:, top:bottom, left:right] = maps.flip(0)[:, top:bottom, left:right]
    return swapped


@contextmanager
def mixed_tokens(stem: ConvStem, box: Box) -> Iterator[None]:
    """Let the images of a batch swap a box of tokens, before positions are added, while the block runs."""

    def swap(module: nn.Module, args: object, features: Tensor) -> Tensor:  # (B, C, rows, columns)
        return swap_box(features.permute(0, 2, 3, 1), box).permute(0, 3, 1, 2)

    hook = stem.proj.register_forward_hook(swap)
    try:
        yield
    finally:
        hook.remove()


def on_grid(token_logits: Tensor, places: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Put what is said of remaining tokens back to where the patches were.

    Args:
        token_logits: (B, N, classes).
        places: Which initial patch each of the tokens is, (B, N); negative for one that is none.
        grid: Rows and columns of the initial patches.

    Returns:
        Logits (B, rows, columns, classes), zero where no token is left, and where one is, (B, rows, columns).
    """
    num_patches = grid[0] * grid[1]
    slots = torch.where(places < 0, num_patches, places)  # what is no patch goes to a slot that is cut off
    logits = token_logits.new_zeros(len(token_logits), num_patches + 1, token_logits.shape[2])
    logits = logits.scatter(1, slots.unsqueeze(-1).expand_as(token_logits), token_logits)
    is_there = torch.zeros_like(logits[..., 0], dtype=torch.bool).scatter(1, slots, True)
    return torch.unflatten(logits[:, :-1], 1, grid), torch.unflatten(is_there[:, :-1], 1, grid)
