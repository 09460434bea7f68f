"""Sites → alive tokens per block, and → MACs, for models of several stages (Swin). Integers only.

A site masks tokens after its block, for the rest of the block's stage; the next stage has its whole grid again. So the
attention and the MLP of a block both work on ``tokens_in``, and ``tokens_out`` are the tokens alive after its site.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from prunefront.config import Site
from prunefront.errors import ConfigError
from prunefront.schedule import BlockSchedule, Step, TokenSchedule

if TYPE_CHECKING:
    from prunefront.geometry import StageGeometry


def plan_stages(
    options: Mapping[str, Any], sites: Sequence[Site], stages: Sequence[tuple[int, int]]
) -> tuple[BlockSchedule, ...]:
    """Turn every site into effective integers.

    Ratios are truncated, ``int(present * ratio)``, and ``cumulative_keep_ratio`` counts from the tokens of the site's
    stage. With ``tie="official"`` the counts are nominal: the strict comparison of the official code leaves one token
    fewer, and each image may revive some. A site after the last block of a stage does nothing, and is left out.

    Args:
        options: Of Tri-Level; any other method has no sites here.
        sites: Sorted by block.
        stages: Per stage its blocks and its tokens.

    Raises:
        ConfigError: If a site names a block the model does not have, or the options ask for the attention level.
    """
    depth = sum(blocks for blocks, _ in stages)
    if sites and sites[-1].block >= depth:
        raise ConfigError(
            f"A site is at block {sites[-1].block}, but the model has blocks 0 to {depth - 1}. Move or drop the site."
        )
    if sites and options.get("attn_ratio", 1.0) != 1.0:
        raise ConfigError(
            f"Swin has no attention level, so attn_ratio has to be 1, but got {options['attn_ratio']}. "
            "Leave it out of the options."
        )
    by_block = {site.block: site for site in sites}
    acts_always = options.get("tie") == "official"  # the n-th token itself goes, even when n are present
    plan: list[BlockSchedule] = []
    for blocks, tokens in stages:
        present = tokens
        for number in range(blocks):
            index = len(plan)
            entering = present
            steps: tuple[Step, ...] = ()
            site = by_block.get(index)
            if site is not None and number < blocks - 1:
                kept = min(max(_wanted(site, present, tokens), 1), present)
                if kept < present or acts_always:
                    step = Step(op=site.op, kept=kept, removed=present - kept, tokens_in=present, tokens_out=kept)
                    steps, present = (step,), kept
            plan.append(BlockSchedule(index=index, tokens_in=entering, tokens_out=present, steps=steps))
    return tuple(plan)


def stage_macs(schedule: TokenSchedule, stages: Sequence[StageGeometry]) -> tuple[dict[str, int], ...]:
    """MACs per block and operator.

    The official form only masks, so it costs what the dense model does. The strict form runs its linear layers on kept
    tokens alone; ``attention`` counts all windows, an upper bound, since a window left without any token is skipped on
    a CPU, and which ones are depends on the image. ``masked_query`` is the one row that stands for masked tokens when
    their votes are counted. Where windows do not divide the grid, timm's own blocks run ``qkv`` and ``proj`` on the
    padding as well, ours do not.
    """
    official = dict(schedule.options).get("tie") == "official"
    plan = iter(schedule.blocks)
    rows = []
    for stage in stages:
        slots = stage.num_windows * stage.window_area
        for number in range(stage.depth):
            block = next(plan)
            whole = official or block.tokens_in == stage.num_tokens
            tokens = stage.num_tokens if whole else block.tokens_in
            projected = slots if whole and not official and not block.steps else tokens
            operators = {
                "qkv": projected * stage.qkv_macs_per_token,
                "attention": 2 * slots * stage.window_area * stage.num_heads * stage.head_dim,
                "proj": projected * stage.proj_macs_per_token,
                "mlp": tokens * stage.mlp_macs_per_token,
            }
            if number == 0 and stage.downsample_macs:
                operators["downsample"] = stage.downsample_macs
            if block.steps and not whole:
                operators["masked_query"] = stage.qkv_macs_per_token
            rows.append(operators)
    return tuple(rows)


def _wanted(site: Site, present: int, stage_tokens: int) -> int:
    """Tokens the site asks to keep."""
    if site.keep_ratio is not None:
        return int(present * site.keep_ratio)
    if site.cumulative_keep_ratio is not None:
        return int(stage_tokens * site.cumulative_keep_ratio)
    if site.tokens is not None:
        return site.tokens
    assert site.remove is not None
    return present - site.remove
