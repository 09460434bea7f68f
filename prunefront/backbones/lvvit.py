"""LV-ViT: a ViT with a convolutional stem, scaled branches and a classifier on every patch token. timm has none.

Jiang et al., "All Tokens Matter: Token Labeling for Training Better Vision Transformers", NeurIPS 2021
(arXiv:2104.10858). Parameter names are the official repository's, so its checkpoints load as they are.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any, cast

import torch
from timm.layers import to_2tuple, trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from prunefront.backbones.heads import Heads
from prunefront.errors import ModelError

STEM_STRIDE = 2
AUX_WEIGHT = 0.5  # of the best patch's vote beside the class token's


class ConvStem(nn.Module):
    """Three convolutions with batch norm at half resolution, then patches: images (B, C, H, W) → tokens (B, N, D)."""

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        *,
        stem_width: int = 64,
        bias: bool = True,
        dynamic_img_pad: bool = False,
        strict_img_size: bool = True,
        output_fmt: str | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if dynamic_img_pad:
            raise ModelError("LV-ViT's convolutional stem does not pad images. Resize them to multiples of the patch.")
        place = {"device": device, "dtype": dtype}
        self.img_size: tuple[int, int] = to_2tuple(img_size)
        self.patch_size: tuple[int, int] = to_2tuple(patch_size)
        self.in_chans, self.strict_img_size, self.output_fmt = in_chans, strict_img_size, output_fmt
        self.grid_size = (self.img_size[0] // self.patch_size[0], self.img_size[1] // self.patch_size[1])
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        width = stem_width
        self.conv1 = nn.Conv2d(in_chans, width, 7, stride=STEM_STRIDE, padding=3, bias=False, **place)
        self.bn1: nn.Module = nn.BatchNorm2d(width, **place)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False, **place)
        self.bn2: nn.Module = nn.BatchNorm2d(width, **place)
        self.conv3 = nn.Conv2d(width, width, 3, padding=1, bias=False, **place)
        self.bn3: nn.Module = nn.BatchNorm2d(width, **place)
        kernel = (self.patch_size[0] // STEM_STRIDE, self.patch_size[1] // STEM_STRIDE)
        self.proj = nn.Conv2d(width, embed_dim, kernel, stride=kernel, bias=bias, **place)

    def feat_ratio(self) -> tuple[int, int]:
        """Pixels per token along height and width."""
        return self.patch_size

    def dynamic_feat_size(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """Grid of an image of another size."""
        return img_size[0] // self.patch_size[0], img_size[1] // self.patch_size[1]

    def convolve(self, images: Tensor) -> Tensor:
        """Feature map of the patches, (B, D, H / 16, W / 16)."""
        x = F.relu(self.bn1(self.conv1(images)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = F.relu(self.bn3(self.conv3(x)))
        return cast(Tensor, self.proj(x))

    def forward(self, images: Tensor) -> Tensor:
        size = tuple(images.shape[-2:])
        if self.strict_img_size and size != self.img_size:
            raise ModelError(f"LV-ViT was built for images of {self.img_size} px, but got {size}. Resize the images.")
        x = self.convolve(images)
        return x.permute(0, 2, 3, 1) if self.output_fmt == "NHWC" else x.flatten(2).transpose(1, 2)


class BranchScale(nn.Module):
    """Divides a residual branch by a constant (``skip_lam``); stands where other ViTs have a layer scale."""

    def __init__(self, divisor: float) -> None:
        super().__init__()
        self.divisor = divisor

    def forward(self, x: Tensor) -> Tensor:
        return x / self.divisor


class LVViT(VisionTransformer):  # type: ignore[misc]
    """LV-ViT as timm has its ViTs, with ``aux_head`` on the patch tokens.

    Logits are ``head(class token) + 0.5 * max over patches of aux_head(patch)``, the maximum per class (section 3.3).
    """

    def __init__(self, *, stem_width: int = 64, skip_lam: float = 1.0, **kwargs: Any) -> None:
        kwargs = {
            "embed_layer": partial(ConvStem, stem_width=stem_width),
            "norm_layer": partial(nn.LayerNorm, eps=1e-5),
            "qkv_bias": False,
            "mlp_ratio": 3.0,
            **kwargs,
        }
        super().__init__(**kwargs)
        if not self.has_class_token or self.global_pool not in ("token", ""):
            raise ModelError("LV-ViT classifies by its class token; leave class_token and global_pool as they are.")
        self.aux_head = self._aux_head()
        if skip_lam != 1.0:
            for block in self.blocks:
                block.ls1, block.ls2 = BranchScale(skip_lam), BranchScale(skip_lam)

    def _aux_head(self) -> nn.Module:
        if self.num_classes <= 0:
            return nn.Identity()
        place = next(self.parameters())
        head = nn.Linear(self.embed_dim, self.num_classes, device=place.device, dtype=place.dtype)
        trunc_normal_(head.weight, std=0.02)
        nn.init.zeros_(head.bias)
        return head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace both classifiers."""
        super().reset_classifier(num_classes, global_pool)
        self.aux_head = self._aux_head()

    def get_classifier(self) -> nn.Module:
        """The class token's classifier; ``aux_head`` is the patches'."""
        return cast(nn.Module, self.head)

    def classify(self, x: Tensor, is_patch: Tensor | None = None, num_added: int = 0) -> Heads:
        """Both heads on normalised tokens (B, N, C).

        Args:
            x: Class token first.
            is_patch: Which of the tokens vote beside the class token, (B, N - 1 - num_added); None for all.
            num_added: Tokens at the end that are no patches and have no logits.
        """
        class_logits = self.head(self.head_drop(x[:, 0]))
        token_logits = self.aux_head(x[:, 1 : x.shape[1] - num_added])
        votes = token_logits if is_patch is None else token_logits.masked_fill(~is_patch.unsqueeze(-1), -torch.inf)
        if votes.shape[1]:
            best = votes.amax(dim=1)
            # An image that kept no patch has no vote.
            best = best if is_patch is None else best.masked_fill(~is_patch.any(dim=1, keepdim=True), 0.0)
        else:
            best = torch.zeros_like(class_logits)
        return Heads(logits=class_logits + AUX_WEIGHT * best, class_logits=class_logits, token_logits=token_logits)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits (B, classes) of normalised tokens (B, N, C), or the class token's features."""
        return x[:, 0] if pre_logits else self.classify(x).logits


def fold_batch_norm(model: nn.Module) -> nn.Module:
    """A copy of an LV-ViT (compressed or not) for inference, its batch norms folded into the convolutions.

    The copy computes the same in eval mode and has other parameter names; it is not for training.

    Raises:
        ModelError: If the model is no LV-ViT.
    """
    if not isinstance(model, LVViT):
        raise ModelError(f"Only LV-ViT has batch norms to fold, but got {type(model).__name__}.")
    folded = copy.deepcopy(model).eval()
    stem = cast(ConvStem, folded.patch_embed)
    for number in (1, 2, 3):
        conv, norm = getattr(stem, f"conv{number}"), getattr(stem, f"bn{number}")
        if isinstance(norm, nn.BatchNorm2d):
            setattr(stem, f"conv{number}", fuse_conv_bn_eval(conv, norm))
            setattr(stem, f"bn{number}", nn.Identity())
    return cast(nn.Module, folded)


def _cfg(crop_pct: float, size: int = 224) -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "input_size": (3, size, size),
        "fixed_input_size": True,
        "crop_pct": crop_pct,
        "interpolation": "bicubic",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": "patch_embed.conv1",
        "classifier": ("head", "aux_head"),
        "license": "apache-2.0",
    }


default_cfgs = generate_default_cfgs(
    {
        "lvvit_t.untrained": _cfg(0.9),
        "lvvit_s.untrained": _cfg(0.9),
        "lvvit_m.untrained": _cfg(1.0),
        "lvvit_l.untrained": _cfg(1.0, size=448),
    }
)


def _create(name: str, pretrained: bool, **kwargs: Any) -> LVViT:
    return cast(
        LVViT,
        build_model_with_cfg(LVViT, name, pretrained, pretrained_filter_fn=checkpoint_filter_fn, **kwargs),
    )


@register_model  # type: ignore[untyped-decorator]
def lvvit_t(pretrained: bool = False, **kwargs: Any) -> LVViT:
    """Build LV-ViT-T: width 240, 12 blocks, 4 heads."""
    return _create("lvvit_t", pretrained, **{"embed_dim": 240, "depth": 12, "num_heads": 4, **kwargs})


@register_model  # type: ignore[untyped-decorator]
def lvvit_s(pretrained: bool = False, **kwargs: Any) -> LVViT:
    """Build LV-ViT-S: width 384, 16 blocks, 6 heads, branches halved."""
    return _create("lvvit_s", pretrained, **{"embed_dim": 384, "depth": 16, "num_heads": 6, "skip_lam": 2.0, **kwargs})


@register_model  # type: ignore[untyped-decorator]
def lvvit_m(pretrained: bool = False, **kwargs: Any) -> LVViT:
    """Build LV-ViT-M: width 512, 20 blocks, 8 heads, branches halved."""
    return _create("lvvit_m", pretrained, **{"embed_dim": 512, "depth": 20, "num_heads": 8, "skip_lam": 2.0, **kwargs})


@register_model  # type: ignore[untyped-decorator]
def lvvit_l(pretrained: bool = False, **kwargs: Any) -> LVViT:
    """Build LV-ViT-L: width 768, 24 blocks, 12 heads, a stem of 128 channels, branches divided by 3."""
    sizes = {"embed_dim": 768, "depth": 24, "num_heads": 12, "skip_lam": 3.0, "stem_width": 128, "img_size": 448}
    return _create("lvvit_l", pretrained, **{**sizes, **kwargs})
