"""Sites → tokens per block. Integers only: nothing here touches a tensor.

A schedule says, for every block, how many tokens enter its attention, which reductions act after it, and how many
tokens reach its MLP.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from prunefront.config import ConfigSource, ModelSpec, PruneConfig, Site, load_config
from prunefront.errors import ConfigError
from prunefront.registry import get_method

if TYPE_CHECKING:
    from prunefront.geometry import ModelGeometry
    from prunefront.methods.base import Method


@dataclass(frozen=True, kw_only=True)
class Step:
    """One reduction with effective integers.

    ``tokens_*`` include prefix tokens and those a method appended before; ``kept`` and ``removed`` count chosen tokens.
    """

    op: str
    kept: int
    removed: int
    tokens_in: int
    tokens_out: int  # prefix + kept, and one more for a fused token


@dataclass(frozen=True, kw_only=True)
class BlockSchedule:
    """Tokens of one block, prefix included: attention works on ``tokens_in``, the MLP on ``tokens_out``.

    ``tokens_entering`` is another number than ``tokens_in`` where a method selects tokens before the attention.
    """

    index: int
    tokens_in: int
    tokens_out: int
    steps: tuple[Step, ...] = ()

    @property
    def tokens_entering(self) -> int:
        return self.steps[0].tokens_in if self.steps else self.tokens_in


@dataclass(frozen=True, kw_only=True)
class TokenSchedule:
    """A whole model's token counts and the method that produces them."""

    method: str
    options: tuple[tuple[str, Any], ...]
    num_prefix_tokens: int
    blocks: tuple[BlockSchedule, ...]
    is_static: bool = True  # False where each image keeps counts of its own, and these are nominal

    @property
    def tokens_in(self) -> list[int]:
        """Tokens entering each block, prefix included."""
        return [block.tokens_in for block in self.blocks]

    @property
    def tokens_out(self) -> list[int]:
        """Tokens reaching each block's MLP and leaving it, prefix included."""
        return [block.tokens_out for block in self.blocks]

    @property
    def is_dense(self) -> bool:
        return not any(block.steps for block in self.blocks)


def plan_blocks(
    method: Method,
    options: dict[str, Any],
    sites: Sequence[Site],
    *,
    depth: int,
    num_patch_tokens: int,
    num_prefix_tokens: int,
) -> tuple[BlockSchedule, ...]:
    """Walk the blocks and turn every site into effective integers.

    Raises:
        ConfigError: If a site names a block the model does not have.
    """
    if sites and sites[-1].block >= depth:
        raise ConfigError(
            f"A site is at block {sites[-1].block}, but the model has blocks 0 to {depth - 1}. Move or drop the site."
        )
    by_block: dict[int, list[Site]] = {}
    for site in sites:
        by_block.setdefault(site.block, []).append(site)
    blocks = []
    present = num_patch_tokens  # what the next site chooses from
    carried = num_prefix_tokens  # what it never touches
    for index in range(depth):
        entering = present + carried
        steps = []
        for site in by_block.get(index, ()):
            wanted = _wanted(site, present, num_patch_tokens, method)
            kept = min(max(wanted, method.least_kept(site.op, present)), present)
            if kept == present and not method.acts_when_nothing_is_removed:
                continue
            before = present + carried
            removed = present - kept
            present = kept
            if method.adds_token(site.op) and method.carries_added_tokens:
                carried += 1
            elif method.adds_token(site.op) and removed:
                present += 1
            steps.append(Step(op=site.op, kept=kept, removed=removed, tokens_in=before, tokens_out=present + carried))
        leaving = present + carried
        attended = leaving if method.acts_before_attention else entering
        blocks.append(BlockSchedule(index=index, tokens_in=attended, tokens_out=leaving, steps=tuple(steps)))
    return tuple(blocks)


def plan_model(
    method: Method, options: dict[str, Any], sites: Sequence[Site], geometry: ModelGeometry
) -> tuple[BlockSchedule, ...]:
    """`plan_blocks`, or for a model with stages `prunefront.swin_schedule.plan_stages`.

    Raises:
        ConfigError: If a site names a block the model does not have.
    """
    if geometry.stages:
        from prunefront.swin_schedule import plan_stages

        stages = [(stage.depth, stage.num_tokens) for stage in geometry.stages]
        return plan_stages(options, sites, stages)
    return plan_blocks(
        method,
        options,
        sites,
        depth=geometry.depth,
        num_patch_tokens=geometry.num_patch_tokens,
        num_prefix_tokens=geometry.num_prefix_tokens,
    )


def plan_schedule(config: PruneConfig, geometry: ModelGeometry | None = None) -> TokenSchedule:
    """The token schedule of a config at its model's own image size.

    Args:
        config: Any config.
        geometry: Of the config's model, when the caller has it already.

    Raises:
        ConfigError: If a site lies outside the model.
        ModelError: If the method cannot work on this model, with the reason.
    """
    if geometry is None:
        geometry = _geometry(config.model)
    method = get_method(config.method)
    method.check_geometry(geometry, config.sites)
    blocks = plan_model(method, config.options, config.sites, geometry)
    steps = [step for block in blocks for step in block.steps]
    return TokenSchedule(
        method=config.method,
        options=tuple(sorted(config.options.items())),
        num_prefix_tokens=geometry.num_prefix_tokens,
        blocks=blocks,
        is_static=method.is_static(config.options, steps, geometry),
    )


def token_counts(config: ConfigSource) -> TokenSchedule:
    """What really happens to the tokens, block by block: ``.tokens_in``, ``.tokens_out`` and the steps between.

    Args:
        config: Config, dict, path or open file.
    """
    return plan_schedule(load_config(config))


def schedule_of_counts(schedule: TokenSchedule, kept: Sequence[int]) -> TokenSchedule:
    """The schedule of one image, or of a padded batch, that keeps other counts than the nominal ones.

    Args:
        schedule: Of a model without stages.
        kept: Per site the tokens kept of those that it chooses from; none above the one before.
    """
    num_patch_tokens = schedule.blocks[0].tokens_entering - schedule.num_prefix_tokens
    steps = [(block.index, step.op) for block in schedule.blocks for step in block.steps]
    sites = []
    present = num_patch_tokens
    for (block, op), count in zip(steps, kept, strict=True):
        sites.append(Site(block=block, op=op, remove=present - count))
        present = count
    blocks = plan_blocks(
        get_method(schedule.method),
        dict(schedule.options),
        sites,
        depth=len(schedule.blocks),
        num_patch_tokens=num_patch_tokens,
        num_prefix_tokens=schedule.num_prefix_tokens,
    )
    return replace(schedule, blocks=blocks, is_static=True)


def content_hash(config: PruneConfig) -> str:
    """Hash over model, method, options and effective integers. Every config that removes nothing is the dense model."""
    geometry = _geometry(config.model)
    schedule = plan_schedule(config, geometry)
    steps = [[block.index, step.op, step.kept] for block in schedule.blocks for step in block.steps]
    model = config.model.model_dump(mode="json")
    # "The model's own" and the same value written out are one model.
    model["img_size"] = list(geometry.img_size)
    model["num_classes"] = geometry.num_classes
    identity = {"model": model, "method": config.method, "options": config.options, "steps": steps}
    if not steps:
        identity = {"model": model, "steps": []}
    canonical = json.dumps(identity, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _wanted(site: Site, present: int, initial: int, method: Method) -> int:
    """Tokens the site asks to keep."""
    if site.keep_ratio is not None:
        return method.kept_of(site.keep_ratio, present)
    if site.cumulative_keep_ratio is not None:
        return method.kept_of(site.cumulative_keep_ratio, initial)
    if site.tokens is not None:
        return site.tokens
    assert site.remove is not None
    return present - site.remove


def _geometry(spec: ModelSpec) -> ModelGeometry:
    from prunefront.geometry import geometry_for

    return geometry_for(spec)
