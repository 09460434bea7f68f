"""timm's ``Eva`` under a token schedule: EVA-02, DINOv3, RoPE-ViT, Perception Encoder; positions inside attention.

What differs from the plain ViT is that rotary embeddings follow the kept tokens (`prunefront.ops.rotary`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import cast

from timm.models.eva import Eva
from torch import Tensor

from prunefront.backbones.vit import CompressedVisionTransformer
from prunefront.blocks import Blocks, EvaBlocks
from prunefront.ops.rotary import Rotary, rotation_tables
from prunefront.ops.tokens import Tokens, initial_places

EVA_BLOCKS: Blocks = EvaBlocks()


def embed(eva: Eva, images: Tensor) -> Tokens:
    """Images (B, C, H, W) to what enters block 0, with the rotations of the grid."""
    x, rotations = eva._pos_embed(eva.patch_embed(images))
    x = eva.norm_pre(x)
    places = initial_places(x, eva.num_prefix_tokens)
    rotary = None
    if rotations is not None:
        tables = rotation_tables(rotations, per_block=getattr(eva, "rope_mixed", False))
        rotary = Rotary(tables=tables, initial=places)
    return Tokens(x=x, num_prefix=eva.num_prefix_tokens, places=places, rotary=rotary)


class CompressedEva(CompressedVisionTransformer):
    """Mixin in front of timm's ``Eva``. Made by `prunefront.compress`.

    Images of another size than the model's need ``dynamic_img_size``; timm then makes the rotations for their grid.
    """

    blocks_family = EVA_BLOCKS
    needs_places = True

    @property
    def pool_include_prefix(self) -> bool:
        """timm's attention pooling of ``Eva`` reads all tokens, its averages the patch tokens."""
        return cast(Eva, self).attn_pool is not None

    def _start(self, images: Tensor) -> Tokens:
        eva = cast(Eva, self)
        self._check_images(images)
        if tuple(images.shape[-2:]) != tuple(eva.patch_embed.img_size) and not eva.dynamic_img_size:
            raise self._wrong_size(images)
        return embed(eva, images)

    def _entering(self, tokens: Tokens, block: int) -> Tokens:
        if tokens.rotary is None:
            return tokens
        return tokens.but(rotary=replace(tokens.rotary, block=block))
