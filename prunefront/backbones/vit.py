"""timm's plain ViT under a token schedule: embedding, walk through the blocks, pooling and heads."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from prunefront import geometry
from prunefront.backbones.compressed import CompressedTransformer
from prunefront.backbones.heads import Heads
from prunefront.backbones.lvvit import LVViT
from prunefront.blocks import Blocks, ViTBlocks
from prunefront.errors import InputError, ModelError
from prunefront.ops.attention import log_size_bias
from prunefront.ops.tokens import NO_PLACE, Tokens, initial_places

VIT_BLOCKS: Blocks = ViTBlocks()


class CompressedVisionTransformer(CompressedTransformer):
    """Mixin in front of a timm ViT class. Made by `prunefront.compress`."""

    blocks_family = VIT_BLOCKS
    needs_places = False

    def _embed(self, images: Tensor) -> Tensor:
        """Patches, prefix tokens and positions, as timm does it; input checked first."""
        vit = cast(VisionTransformer, self)
        self._check_images(images)
        if tuple(images.shape[-2:]) == tuple(vit.patch_embed.img_size) or vit.dynamic_img_size:
            x = vit.patch_embed(images)
            x = vit._pos_embed(x)
        elif self._method.resizes_position_embedding:
            x = self._embed_resized(images)
        else:
            raise self._wrong_size(images)
        return cast(Tensor, vit.norm_pre(vit.patch_drop(x)))

    def _check_images(self, images: Tensor) -> None:
        channels = geometry.in_chans_of(cast(VisionTransformer, self))
        if images.ndim != 4 or images.shape[1] != channels:
            raise InputError(
                f"Expected images of shape (batch, {channels} channels, height, width), but got {tuple(images.shape)}. "
                "Add the batch dimension or convert the channels."
            )

    def _wrong_size(self, images: Tensor) -> InputError:
        size = cast(VisionTransformer, self).patch_embed.img_size
        return InputError(
            f"This model takes images of {size[0]} x {size[1]} px, but got {images.shape[-2]} x {images.shape[-1]}. "
            "Resize the images, or set model.img_size (or dynamic_img_size in model.kwargs) in the config."
        )

    def _embed_resized(self, images: Tensor) -> Tensor:
        """Embed images of another size, positions resized inside forward as EViT's official code does.

        Bicubic, corners not aligned, no antialiasing; the prefix positions stay.
        """
        vit = cast(VisionTransformer, self)
        patch = vit.patch_embed.patch_size
        if images.shape[-2] % patch[0] or images.shape[-1] % patch[1]:
            raise InputError(
                f"Image sides must be multiples of the patch size {patch[0]} x {patch[1]}, "
                f"but got {images.shape[-2]} x {images.shape[-1]}. Resize or pad the images."
            )
        features = getattr(vit.patch_embed, "convolve", vit.patch_embed.proj)(images)
        grid = features.shape[-2:]
        x = getattr(vit.patch_embed, "norm", nn.Identity())(features.flatten(2).transpose(1, 2))
        prefix = [
            token for token in (vit.cls_token, getattr(vit, "dist_token", None), vit.reg_token) if token is not None
        ]
        num_prefix = 0 if vit.no_embed_class else vit.num_prefix_tokens
        if vit.pos_embed is None:
            positions = None
        else:
            old = vit.patch_embed.grid_size
            table = vit.pos_embed[:, num_prefix:].reshape(1, old[0], old[1], -1).permute(0, 3, 1, 2)
            table = F.interpolate(table, size=tuple(grid), mode="bicubic", align_corners=False)
            positions = torch.cat((vit.pos_embed[:, :num_prefix], table.flatten(2).transpose(1, 2)), dim=1)
        tokens = [token.expand(x.shape[0], -1, -1) for token in prefix]
        if positions is None:
            x = torch.cat((*tokens, x), dim=1)
        elif vit.no_embed_class:
            x = torch.cat((*tokens, x + positions), dim=1)
        else:
            x = torch.cat((*tokens, x), dim=1) + positions
        return cast(Tensor, vit.pos_drop(x))

    def _start(self, images: Tensor) -> Tokens:
        x = self._embed(images)
        prefix = cast(VisionTransformer, self).num_prefix_tokens
        return Tokens(x=x, num_prefix=prefix, places=initial_places(x, prefix) if self.needs_places else None)

    def _norm(self, x: Tensor) -> Tensor:
        return cast(Tensor, cast(VisionTransformer, self).norm(x))

    def pool_tokens(self, x: Tensor, size: Tensor | None) -> Tensor:
        """timm's pooling, with tokens weighted by how many patches they stand for where tokens are averaged."""
        vit = cast(VisionTransformer, self)
        if size is None or (vit.attn_pool is None and vit.global_pool not in ("avg", "avgmax")):
            return cast(Tensor, vit.pool(x))
        if not vit.pool_include_prefix:
            x, size = x[:, vit.num_prefix_tokens :], size[:, vit.num_prefix_tokens :]
        if vit.attn_pool is not None:
            if vit.global_pool == "prr":
                raise ModelError(
                    "Pooling 'prr' cannot weight merged tokens by their size. Use a method that only prunes, "
                    "or another global_pool."
                )
            return cast(Tensor, vit.attn_pool(x, attn_mask=log_size_bias(size, x.dtype)))
        weight = (size / size.sum(dim=1, keepdim=True)).to(x.dtype)
        mean = (weight.unsqueeze(1) @ x).squeeze(1)
        return mean if vit.global_pool == "avg" else 0.5 * (x.amax(dim=1) + mean)

    def _without_packages(self, x: Tensor, num_packages: int) -> Tensor:
        """The tokens of (B, N, C) that are pooled: packages only where no patch is left."""
        last = x.shape[1] - num_packages
        return x[:, :last] if last > cast(VisionTransformer, self).num_prefix_tokens else x

    def _heads(self, tokens: Tokens) -> Heads:
        vit = cast(VisionTransformer, self)
        x, size = tokens.x, tokens.size
        if tokens.num_packages and vit.global_pool != "token":
            # Images that differ in length are pooled one by one, so that padding does not count.
            images = [x] if tokens.present is None or not vit.global_pool else tokens.images()
            pooled = torch.cat([vit.pool(self._without_packages(image, tokens.num_packages)) for image in images])
            return Heads(logits=vit.head(vit.head_drop(vit.fc_norm(pooled))))
        if size is None or hasattr(vit, "head_dist"):
            return Heads(logits=vit.forward_head(x))
        return Heads(logits=vit.head(vit.head_drop(vit.fc_norm(self.pool_tokens(x, size)))))


class CompressedLVViT(CompressedVisionTransformer):
    """LV-ViT under a token schedule: only patches that are still there vote."""

    needs_places = True

    def _heads(self, tokens: Tokens) -> Heads:
        assert tokens.places is not None
        last = tokens.x.shape[1] - tokens.num_packages
        places = tokens.places[:, tokens.num_prefix : last]
        is_patch = places >= 0
        if tokens.present is not None:
            is_patch = is_patch & tokens.present[:, tokens.num_prefix : last]
        if tokens.decision is not None:
            is_patch = is_patch & (tokens.decision > 0.5)
        heads = cast(LVViT, self).classify(tokens.x, is_patch, tokens.num_packages)
        return replace(heads, token_places=torch.where(is_patch, places, NO_PLACE))
