"""What prunefront needs to know about a ViT to count its tokens and MACs, without its weights."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import timm
import torch
from timm.layers import Attention, AttentionPoolLatent, AttentionRope, PatchEmbed
from timm.layers.attention_pool import AttentionPoolPrr
from timm.models.eva import Eva, EvaAttention, EvaBlock
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

from prunefront.config import ModelSpec
from prunefront.errors import ModelError, UnknownNameError, is_out_of_memory


@dataclass(frozen=True, kw_only=True)
class StageGeometry:
    """Blocks of one kind on one grid, attending inside windows: a stage of Swin. Counts are per image."""

    depth: int
    grid: tuple[int, int]
    window: tuple[int, int]
    num_heads: int
    head_dim: int
    qkv_macs_per_token: int
    proj_macs_per_token: int
    mlp_macs_per_token: int
    downsample_macs: int  # of the patch merging before the first block; 0 where there is none

    @property
    def num_tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def num_windows(self) -> int:
        return -(-self.grid[0] // self.window[0]) * -(-self.grid[1] // self.window[1])

    @property
    def window_area(self) -> int:
        return self.window[0] * self.window[1]


@dataclass(frozen=True, kw_only=True)
class ModelGeometry:
    """Sizes of a plain or rotary ViT.

    Token counts are per image; ``*_macs_per_token`` count one token through linear layers. Of a model with ``stages``,
    token count, widths and heads are those entering its first block.
    """

    embed_dim: int
    depth: int
    num_heads: int
    head_dim: int
    mlp_hidden_dim: int
    qkv_macs_per_token: int
    proj_macs_per_token: int
    mlp_macs_per_token: int
    img_size: tuple[int, int]
    patch_size: tuple[int, int]
    grid: tuple[int, int]
    num_patch_tokens: int
    num_prefix_tokens: int
    has_class_token: bool
    in_chans: int
    num_classes: int
    num_heads_out: int  # classifiers: 2 with a distillation head
    global_pool: str
    stem_macs: int
    head_macs: int  # classifiers only
    token_head_macs: int  # of a classifier on every remaining patch token, per token
    pool_macs_fixed: int  # attention pooling, the part that does not depend on tokens
    pool_macs_per_token: int
    pool_macs_per_token_pair: int
    has_attention_mask_pool: bool
    block: str  # what makes two blocks cost the same; see block_key
    stages: tuple[StageGeometry, ...] = ()  # empty where all blocks are alike
    pools_prefix: bool = False  # pooling reads the prefix tokens too

    @property
    def num_tokens(self) -> int:
        """Tokens entering block 0, prefix included."""
        return self.num_patch_tokens + self.num_prefix_tokens


def block_key(geometry: ModelGeometry) -> str:
    """Identity of the block type: models with equal keys are served by one latency table."""
    return geometry.block


def require_equal_blocks(geometry: ModelGeometry, name: str) -> None:
    """Refuse a model whose blocks differ, which one latency table cannot describe.

    Raises:
        ModelError: With what such a model can be used for.
    """
    if geometry.stages:
        raise ModelError(
            f"{name} has {len(geometry.stages)} kinds of blocks, but latency tables, and searches that need one, take "
            "models whose blocks are all alike. Measure its configs as a whole instead, or use a plain ViT."
        )


def require_supported(model: nn.Module) -> nn.Module:
    """Return ``model``, a plain ViT, a rotary one or a Swin.

    Raises:
        ModelError: If token reduction does not know its blocks; the text names the offending class.
    """
    name = type(model).__name__
    if isinstance(model, SwinTransformer):
        from prunefront.swin_geometry import require_plain_swin

        return cast(nn.Module, require_plain_swin(model))
    if isinstance(model, Eva):
        return cast(nn.Module, _require_supported_eva(model))
    if not isinstance(model, VisionTransformer):
        raise ModelError(
            f"{name} is not supported: token reduction needs a timm VisionTransformer "
            "(ViT, DeiT, DeiT-3, AugReg, MAE, CLIP, DINOv2, SigLIP, ...), Eva (EVA-02, DINOv3, RoPE-ViT, ...) or "
            "SwinTransformer. See `prunefront models`."
        )
    for index, block in enumerate(model.blocks):
        # Exact types: a subclass may change the order of operations that reductions rely on.
        if type(block) is not Block:
            raise ModelError(
                f"{name} has {type(block).__name__} at block {index}; parallel-branch and post-norm blocks are not "
                "supported, because a reduction acts between a block's attention and its MLP. Use a pre-norm ViT."
            )
        if type(block.attn) is not Attention:
            raise ModelError(
                f"{name} has {type(block.attn).__name__} at block {index}; only timm's plain Attention is supported, "
                "since positions or state inside attention would not follow the kept tokens."
            )
    return cast(nn.Module, model)


def _require_supported_eva(model: Eva) -> Eva:
    name = type(model).__name__
    for index, block in enumerate(model.blocks):
        if type(block) is not EvaBlock:
            raise ModelError(
                f"{name} has {type(block).__name__} at block {index}; post-norm blocks are not supported, because a "
                "reduction acts between a block's attention and its MLP. Use a model without use_post_norm."
            )
        if type(block.attn) not in (EvaAttention, AttentionRope):
            raise ModelError(
                f"{name} has {type(block.attn).__name__} at block {index}; only timm's EvaAttention and AttentionRope "
                "are supported, since positions inside another attention would not follow the kept tokens."
            )
        if _describe_block(block) != _describe_block(model.blocks[0]):
            raise ModelError(
                f"{name} has blocks of several kinds: block {index} is {_describe_block(block)}, but block 0 is "
                f"{_describe_block(model.blocks[0])}. Use a model whose blocks are alike (for example, num_kv_heads "
                "the same for all)."
            )
    return model


def geometry_of(model: nn.Module) -> ModelGeometry:
    """Read the geometry off a model.

    Raises:
        ModelError: If the model is neither a plain ViT nor a rotary one nor a plain Swin.
    """
    vit: Any = require_supported(model)
    if isinstance(model, SwinTransformer):
        from prunefront.swin_geometry import swin_geometry_of

        return swin_geometry_of(model)
    embed = vit.patch_embed
    grid = (int(embed.grid_size[0]), int(embed.grid_size[1]))
    if not len(vit.blocks):
        raise ModelError(
            f"{type(model).__name__} has no blocks, so there is nothing to reduce. Set depth to 1 or more."
        )
    block = vit.blocks[0]
    attn = block.attn
    if grid[0] < 1 or grid[1] < 1:
        raise ModelError(
            f"Images of {embed.img_size[0]} x {embed.img_size[1]} px hold no patch of {embed.patch_size[0]} x "
            f"{embed.patch_size[1]} px. Use larger images or a smaller patch_size."
        )
    if attn.num_heads < 1 or attn.head_dim < 1:
        raise ModelError(f"A model needs at least one attention head, but got num_heads={attn.num_heads}.")
    heads = [module for name, module in vit.named_children() if name in ("head", "head_dist")]
    linear_heads = [head for head in heads if isinstance(head, nn.Linear)]
    gate = getattr(attn, "gate", None)
    pool_fixed, pool_token, pool_pair = _pool_macs(vit)
    mlp_linears = [layer for layer in block.mlp.modules() if isinstance(layer, nn.Linear)]
    return ModelGeometry(
        embed_dim=vit.embed_dim,
        depth=len(vit.blocks),
        num_heads=attn.num_heads,
        head_dim=attn.head_dim,
        mlp_hidden_dim=mlp_linears[-1].in_features,
        qkv_macs_per_token=sum(_linear_macs(layer) for layer in (*_projections(attn), gate) if layer is not None),
        proj_macs_per_token=_linear_macs(attn.proj),
        mlp_macs_per_token=sum(_linear_macs(layer) for layer in mlp_linears),
        img_size=(int(embed.img_size[0]), int(embed.img_size[1])),
        patch_size=(int(embed.patch_size[0]), int(embed.patch_size[1])),
        grid=grid,
        num_patch_tokens=grid[0] * grid[1],
        num_prefix_tokens=vit.num_prefix_tokens,
        has_class_token=vit.cls_token is not None if isinstance(vit, Eva) else bool(vit.has_class_token),
        in_chans=in_chans_of(vit),
        num_classes=vit.num_classes,
        num_heads_out=len(linear_heads),
        global_pool=vit.global_pool,
        stem_macs=_stem_macs(vit),
        head_macs=sum(_linear_macs(head) for head in linear_heads),
        token_head_macs=_linear_macs(vit.aux_head) if isinstance(getattr(vit, "aux_head", None), nn.Linear) else 0,
        pool_macs_fixed=pool_fixed,
        pool_macs_per_token=pool_token,
        pool_macs_per_token_pair=pool_pair,
        has_attention_mask_pool=isinstance(vit.attn_pool, AttentionPoolLatent),
        block=_describe_block(block) + _describe_rotation(vit),
        pools_prefix=vit.attn_pool is not None if isinstance(vit, Eva) else bool(vit.pool_include_prefix),
    )


def geometry_for(spec: ModelSpec) -> ModelGeometry:
    """Geometry of a model by its spec; built without memory for weights and remembered.

    Raises:
        UnknownNameError: If timm has no such model.
        ModelError: If the model cannot be built with these arguments or is not supported.
    """
    return _geometry_for(json.dumps(spec.model_dump(mode="json"), sort_keys=True))


@lru_cache(maxsize=512)
def _geometry_for(spec_json: str) -> ModelGeometry:
    spec = ModelSpec.model_validate_json(spec_json)
    with torch.device("meta"):
        return geometry_of(build_timm_model(spec))


def build_timm_model(spec: ModelSpec, *, pretrained: bool = False) -> nn.Module:
    """``timm.create_model`` with the spec's arguments and errors in one sentence.

    Raises:
        UnknownNameError: If timm has no such model.
        ModelError: If timm cannot build it with these arguments.
    """
    if not timm.is_model(spec.name):
        raise UnknownNameError.of(
            "model", spec.name, timm.list_models(), "`prunefront models` lists those that are supported."
        )
    kwargs: dict[str, Any] = dict(spec.kwargs)
    if spec.img_size is not None:
        kwargs["img_size"] = spec.img_size
    if spec.num_classes is not None:
        kwargs["num_classes"] = spec.num_classes
    if spec.in_chans != 3:
        kwargs["in_chans"] = spec.in_chans
    try:
        model: nn.Module = timm.create_model(spec.name, pretrained=pretrained, **kwargs)
    except (OSError, RuntimeError) as error:
        # What goes wrong with weights, and a lack of memory, is not the arguments' fault; a negative size is.
        if pretrained or is_out_of_memory(error):
            raise
        raise _cannot_build(spec.name, kwargs, error) from error
    except (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise _cannot_build(spec.name, kwargs, error) from error
    return model


def spec_of(model: nn.Module, overrides: Mapping[str, Any] | None = None) -> ModelSpec:
    """The spec that builds ``model`` again, as far as timm recorded it."""
    name = (getattr(model, "pretrained_cfg", None) or {}).get("architecture") or ""
    vit = cast(Any, require_supported(model))
    size = vit.patch_embed.img_size
    return ModelSpec(
        name=name,
        kwargs=dict(overrides or {}),
        img_size=(int(size[0]), int(size[1])),
        in_chans=in_chans_of(vit),
        num_classes=vit.num_classes,
    )


def _cannot_build(name: str, kwargs: Mapping[str, Any], error: Exception) -> ModelError:
    reason = " ".join(str(error).split())[:300].rstrip(". ") or type(error).__name__
    return ModelError(
        f"timm cannot build {name!r} with {_arguments(kwargs)}: {reason}. Check the model's arguments in the config."
    )


def _arguments(kwargs: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in kwargs.items()) or "its defaults"


def _linear_macs(layer: nn.Module) -> int:
    assert isinstance(layer, nn.Linear)
    return int(layer.in_features * layer.out_features)


def _projections(attn: Any) -> list[Any]:
    """Layers that make queries, keys and values: one, or three where they are separate."""
    return [attn.qkv] if attn.qkv is not None else [attn.q_proj, attn.k_proj, attn.v_proj]


def in_chans_of(vit: VisionTransformer | Eva) -> int:
    """Channels of the images a model takes."""
    embed = vit.patch_embed
    proj = getattr(embed, "proj", None)
    if isinstance(embed, PatchEmbed) and isinstance(proj, nn.Conv2d):
        return int(proj.in_channels)
    return int(getattr(embed, "in_chans", getattr(vit, "in_chans", 3)))


def _stem_macs(vit: VisionTransformer | Eva) -> int:
    embed = vit.patch_embed
    if isinstance(embed, PatchEmbed) and isinstance(embed.proj, nn.Conv2d):
        return int(embed.num_patches * embed.proj.weight.numel())
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    parameter = next(embed.parameters())
    image = torch.zeros(1, in_chans_of(vit), *embed.img_size, device=parameter.device, dtype=parameter.dtype)
    was_training = embed.training
    embed.eval()  # a batch norm in train mode would learn from this image
    try:
        with counter, torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            embed(image)
    finally:
        embed.train(was_training)
    return int(counter.get_total_flops() // 2)


def _pool_macs(vit: VisionTransformer | Eva) -> tuple[int, int, int]:
    """MACs of attention pooling: fixed, per pooled token, per pair of pooled tokens."""
    pool = vit.attn_pool
    if isinstance(pool, AttentionPoolLatent):
        fixed = sum(
            pool.latent_len * _linear_macs(layer)
            for name, layer in pool.named_modules()
            if isinstance(layer, nn.Linear) and name != "kv"
        )
        per_token = _linear_macs(pool.kv) + 2 * pool.latent_len * pool.num_heads * pool.head_dim
        return fixed, per_token, 0
    if isinstance(pool, AttentionPoolPrr):
        return 0, 0, 2 * pool.num_heads * pool.head_dim
    return 0, 0, 0


def _describe_block(block: Block | EvaBlock) -> str:
    """Class names and sizes of everything in a block that takes time, in order."""
    attn = block.attn
    projections = _projections(attn)
    parts = [
        f"w{projections[0].in_features}",
        f"h{attn.num_heads}x{attn.head_dim}",
        "mlp" + "-".join(f"{m.in_features}x{m.out_features}" for m in block.mlp.modules() if isinstance(m, nn.Linear)),
        f"act:{type(getattr(block.mlp, 'act', None)).__name__}",
        f"norm:{type(block.norm1).__name__}",
    ]
    if projections[0].bias is None and getattr(attn, "q_bias", None) is None:
        parts.append("no-qkv-bias")
    if not isinstance(attn.q_norm, nn.Identity):
        parts.append(f"qknorm:{type(attn.q_norm).__name__}")
    if not isinstance(attn.norm, nn.Identity):
        parts.append("attn-norm")
    if not isinstance(getattr(block.mlp, "norm", nn.Identity()), nn.Identity):
        parts.append("mlp-norm")
    if getattr(attn, "gate", None) is not None:
        parts.append("gated")
    if isinstance(block, EvaBlock):
        return _describe_eva(block, parts)
    if not isinstance(block.ls1, nn.Identity):
        parts.append("layerscale")
    return "vit:" + ",".join(parts)


def _describe_eva(block: EvaBlock, parts: list[str]) -> str:
    attn = block.attn
    if attn.qkv is None:
        parts.append("separate-qkv")
    if getattr(attn, "num_kv_heads", attn.num_heads) != attn.num_heads:
        parts.append(f"kv{attn.num_kv_heads}")
    if getattr(attn, "qkv_bias_separate", False):
        parts.append("separate-bias")
    parts.append(f"mlp:{type(block.mlp).__name__}")
    if block.gamma_1 is not None:
        parts.append("layerscale" if block.gamma_2 is not None else "attn-layerscale")
    return "eva:" + ",".join(parts)


def _describe_rotation(vit: VisionTransformer | Eva) -> str:
    """Rotations shared by all heads and blocks cost less than those of each block and head."""
    if getattr(vit, "rope", None) is None:
        return ""
    return ",rope-mixed" if getattr(vit, "rope_mixed", False) else ",rope"


__all__ = [
    "ModelGeometry",
    "StageGeometry",
    "UnknownNameError",
    "block_key",
    "build_timm_model",
    "geometry_for",
    "geometry_of",
    "require_equal_blocks",
    "require_supported",
    "spec_of",
]
