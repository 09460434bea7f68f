"""What prunefront needs to know about a Swin to count its tokens and MACs: one `StageGeometry` per stage."""

from __future__ import annotations

from typing import Any

from timm.models.swin_transformer import (
    PatchMerging,
    SwinTransformer,
    SwinTransformerBlock,
    SwinTransformerStage,
    WindowAttention,
)
from torch import nn

from prunefront.errors import ModelError
from prunefront.geometry import ModelGeometry, StageGeometry, _linear_macs, _stem_macs


def require_plain_swin(model: SwinTransformer) -> SwinTransformer:
    """Return ``model`` if its stages, blocks and attention are timm's own.

    Raises:
        ModelError: Naming the class that token reduction does not know.
    """
    for number, stage in enumerate(model.layers):
        # Exact types: a subclass may change what the masks rely on.
        parts = [(stage, SwinTransformerStage)]
        if not isinstance(getattr(stage, "downsample", None), nn.Identity):
            parts.append((getattr(stage, "downsample", None), PatchMerging))
        for block in getattr(stage, "blocks", ()):
            parts += [(block, SwinTransformerBlock), (getattr(block, "attn", None), WindowAttention)]
        for part, expected in parts:
            if type(part) is not expected:
                raise ModelError(
                    f"{type(model).__name__} has {type(part).__name__} in stage {number}; only timm's plain "
                    f"{expected.__name__} is supported there. Use a SwinTransformer as timm builds it."
                )
    return model


def swin_geometry_of(model: SwinTransformer) -> ModelGeometry:
    """Read the geometry off a plain Swin.

    Raises:
        ModelError: If it has no blocks, no heads, or images too small for one patch.
    """
    swin: Any = model
    embed = swin.patch_embed
    grid = (int(embed.grid_size[0]), int(embed.grid_size[1]))
    if grid[0] < 1 or grid[1] < 1:
        raise ModelError(
            f"Images of {embed.img_size[0]} x {embed.img_size[1]} px hold no patch of {embed.patch_size[0]} x "
            f"{embed.patch_size[1]} px. Use larger images or a smaller patch_size."
        )
    if not swin.layers or not all(len(stage.blocks) for stage in swin.layers):
        raise ModelError("Every stage of a Swin needs at least one block. Set depths to 1 or more.")
    stages = []
    for number, stage_grid in enumerate(stage_grids(grid, [stage.downsample for stage in swin.layers])):
        stages.append(_stage_of(swin.layers[number], stage_grid))
    first = swin.layers[0].blocks[0]
    head = swin.head.fc
    return ModelGeometry(
        embed_dim=int(first.dim),
        depth=sum(stage.depth for stage in stages),
        num_heads=stages[0].num_heads,
        head_dim=stages[0].head_dim,
        mlp_hidden_dim=first.mlp.fc2.in_features,
        qkv_macs_per_token=stages[0].qkv_macs_per_token,
        proj_macs_per_token=stages[0].proj_macs_per_token,
        mlp_macs_per_token=stages[0].mlp_macs_per_token,
        img_size=(int(embed.img_size[0]), int(embed.img_size[1])),
        patch_size=(int(embed.patch_size[0]), int(embed.patch_size[1])),
        grid=grid,
        num_patch_tokens=grid[0] * grid[1],
        num_prefix_tokens=0,
        has_class_token=False,
        in_chans=int(embed.proj.in_channels),
        num_classes=swin.num_classes,
        num_heads_out=1 if isinstance(head, nn.Linear) else 0,
        global_pool=swin.global_pool,
        stem_macs=_stem_macs(swin),
        head_macs=_linear_macs(head) if isinstance(head, nn.Linear) else 0,
        token_head_macs=0,
        pool_macs_fixed=0,
        pool_macs_per_token=0,
        pool_macs_per_token_pair=0,
        has_attention_mask_pool=False,
        block="swin:" + ",".join(_describe_stage(swin.layers[n], stage) for n, stage in enumerate(stages)),
        stages=tuple(stages),
    )


def stage_grids(grid: tuple[int, int], downsamples: Any) -> list[tuple[int, int]]:
    """Grids (height, width) of the stages, given the patch grid; patch merging rounds odd sides up."""
    grids = []
    for downsample in downsamples:
        if not isinstance(downsample, nn.Identity):
            grid = (-(-grid[0] // 2), -(-grid[1] // 2))
        grids.append(grid)
    return grids


def _stage_of(stage: Any, grid: tuple[int, int]) -> StageGeometry:
    block = stage.blocks[0]
    attn = block.attn
    if attn.num_heads < 1 or attn.qkv.out_features < 3 * attn.num_heads:
        raise ModelError(f"A Swin stage needs at least one attention head, but got num_heads={attn.num_heads}.")
    merges = not isinstance(stage.downsample, nn.Identity)
    return StageGeometry(
        depth=len(stage.blocks),
        grid=grid,
        window=(int(block.window_size[0]), int(block.window_size[1])),
        num_heads=attn.num_heads,
        head_dim=attn.qkv.out_features // (3 * attn.num_heads),
        qkv_macs_per_token=_linear_macs(attn.qkv),
        proj_macs_per_token=_linear_macs(attn.proj),
        mlp_macs_per_token=_linear_macs(block.mlp.fc1) + _linear_macs(block.mlp.fc2),
        downsample_macs=grid[0] * grid[1] * _linear_macs(stage.downsample.reduction) if merges else 0,
    )


def _describe_stage(stage: Any, geometry: StageGeometry) -> str:
    block = stage.blocks[0]
    return (
        f"{geometry.depth}xw{block.dim}h{geometry.num_heads}x{geometry.head_dim}"
        f"mlp{block.mlp.fc1.out_features}win{geometry.window[0]}x{geometry.window[1]}"
        f"grid{geometry.grid[0]}x{geometry.grid[1]}"
    )
