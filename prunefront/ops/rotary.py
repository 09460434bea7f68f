"""Rotary position embeddings that follow the tokens.

Su et al., "RoFormer" (arXiv:2104.09864); for images as in timm's ``Eva`` family (EVA-02, DINOv3, RoPE-ViT). Every patch
keeps the rotation of its own place, a merged token that of its destination. Prefix tokens are not rotated, and neither
are tokens without a place: one token fused of many has no position, and an unrotated key meets every query alike.

Shapes: B images, N tokens with their prefix, N0 places, H heads, D channels per head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from prunefront.ops.tokens import NO_PLACE


@dataclass(frozen=True, kw_only=True)
class Rotary:
    """The rotations of one forward pass, looked up by place.

    Attributes:
        tables: Sines, then cosines, by place, behind a first row that rotates nothing: (B or 1, H or 1, 1 + N0, 2D).
            One table for all blocks, or one per block.
        initial: Places (B, N) of the sequence that enters block 0: with this very tensor nothing is looked up.
        block: Number of the block that runs next.
    """

    tables: tuple[Tensor, ...]
    initial: Tensor
    block: int = 0

    def at(self, places: Tensor, num_prefix: int) -> Tensor:
        """Rotations of the non-prefix tokens at ``places`` (B, N): (B or 1, H or 1, N - prefix, 2D)."""
        table = self.tables[self.block if len(self.tables) > 1 else 0]
        if places is self.initial:
            return table[:, :, 1:]
        rows = places[:, num_prefix:] - NO_PLACE
        if table.shape[0] == 1:
            return table[0][:, rows].transpose(0, 1)
        return table.gather(2, rows[:, None, :, None].expand(-1, table.shape[1], -1, table.shape[3]))


def rotation_tables(embed: Tensor, *, per_block: bool) -> tuple[Tensor, ...]:
    """Tables of `Rotary` from what timm's models add to their positions.

    Args:
        embed: Sines, then cosines: (N0, 2D) or, with places per image (patch dropout), (B, 1, N0, 2D). ``per_block``
            (learned frequencies, ``rope_type="mixed"``): (depth, H, N0, 2D) or (depth, B, H, N0, 2D).
        per_block: Whether the first dimension counts blocks.
    """
    still = torch.cat((embed.new_zeros(embed.shape[-1] // 2), embed.new_ones(embed.shape[-1] // 2)))
    embed = torch.cat((still.expand(*embed.shape[:-2], 1, -1), embed), dim=-2)
    blocks = embed.unbind(0) if per_block else (embed,)
    return tuple(block.reshape(*(1,) * (4 - block.ndim), *block.shape) for block in blocks)
