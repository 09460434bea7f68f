"""Where each patch of an image went, site by site: the records of a forward pass composed into grids of integers.

`prunefront.visualize` draws them. For Swin a grid is that of the site's own stage, whose tokens the site masks; every
stage begins with all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from prunefront.compress import is_compressed
from prunefront.errors import InputError, ModelError
from prunefront.methods.base import Aux, SiteRecord

DROPPED_GROUP = -1


class PatchState(IntEnum):
    """What became of a patch; every patch is in one of these."""

    DROPPED = 0  # its token is gone
    KEPT = 1  # a token of its own
    MERGED = 2  # shares a token with patches like it
    FUSED = 3  # part of a token made of what was dropped (EViT's fused token, SPViT's package)


@dataclass(frozen=True, kw_only=True)
class SiteMap:
    """One image after one site, H x W patches.

    Attributes:
        block: Block of the site.
        op: The config's operation.
        action: What it did to this image: ``pool`` or ``prune`` where the operation decides per image, else ``op``.
        tokens: Tokens that go on, prefix tokens included. Padding of ragged batches is not counted.
        states: `PatchState` of each patch, (H, W) int8.
        groups: Token that each patch is in, (H, W) int32, counted from the first non-prefix token; -1 where dropped.
            Patches of one token have one number. It is the token's position after the site.
    """

    block: int
    op: str
    action: str
    tokens: int
    states: NDArray[np.int8]
    groups: NDArray[np.int32]

    def count(self, state: PatchState) -> int:
        """Patches in ``state``."""
        return int((self.states == state).sum())

    def num_groups(self, state: PatchState) -> int:
        """Tokens that the patches in ``state`` are in."""
        return len(np.unique(self.groups[self.states == state]))

    def to_dict(self) -> dict[str, Any]:
        """Return plain data: counts and both grids, row by row."""
        return {
            "block": self.block,
            "op": self.op,
            "action": self.action,
            "tokens": self.tokens,
            "counts": {state.name.lower(): self.count(state) for state in PatchState},
            "merged_tokens": self.num_groups(PatchState.MERGED),
            "fused_tokens": self.num_groups(PatchState.FUSED),
            "states": self.states.tolist(),
            "groups": self.groups.tolist(),
        }


@dataclass(frozen=True, kw_only=True)
class TokenTrace:
    """One image through a compressed model.

    Attributes:
        prediction: Class with the largest logit; None for a model without classifier.
        sites: One map per reduction, in order of execution.
    """

    prediction: int | None
    sites: tuple[SiteMap, ...]


def trace_tokens(model: nn.Module, images: Tensor) -> list[TokenTrace]:
    """Run images through a compressed model and follow their patches.

    The model runs in eval mode, so that tokens are really removed; its mode is put back afterwards.

    Args:
        model: From `prunefront.compress`.
        images: As the model takes them, (B, channels, height, width).

    Returns:
        One trace per image.

    Raises:
        InputError: If the images do not fit the model.
        ModelError: If the model is not compressed.
    """
    if not is_compressed(model):
        raise ModelError(
            f"{type(model).__name__} is not compressed, so each of its patches stays a token. "
            "Compress it first: prunefront.compress(model, config)."
        )
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            logits, aux = model(images, return_aux=True)
    finally:
        model.train(was_training)
    embed = cast(Any, model).patch_embed
    grid = cast(tuple[int, int], tuple(embed.dynamic_feat_size(tuple(images.shape[-2:]))))
    maps = site_maps(aux, grid, int(getattr(model, "num_prefix_tokens", 0)))
    predictions: list[int | None] = [None] * len(maps)
    if logits.ndim == 2 and getattr(model, "num_classes", 0) > 0:
        predictions = logits.argmax(dim=-1).tolist()
    return [TokenTrace(prediction=best, sites=sites) for best, sites in zip(predictions, maps, strict=True)]


def site_maps(aux: Aux, grid: tuple[int, int], num_prefix_tokens: int) -> list[tuple[SiteMap, ...]]:
    """Compose the records of a forward pass.

    Args:
        aux: Of a forward pass in eval mode, B images.
        grid: Rows and columns of the patches entering block 0.
        num_prefix_tokens: Tokens before the first patch.

    Returns:
        For each of the B images one map per site.

    Raises:
        InputError: If a record is from training, where DynamicViT and SPViT mask tokens and remove none, or its
            tokens do not fit the grid.
    """
    batch = aux.origin.shape[0]
    maps: list[list[SiteMap]] = [[] for _ in range(batch)]
    followers = [_Follower(grid[0] * grid[1], num_prefix_tokens) for _ in range(batch)]
    packages = 0
    for number, record in enumerate(aux.sites):
        _check_removes(record)
        assignment = record.assignment.cpu().numpy()
        added, packages = _added_token(record, num_prefix_tokens, packages)
        only_sorts = _only_sorts(aux.sites, number)
        for image, follower in enumerate(followers):
            if "mask" in record.values:
                states, groups = _masked(assignment[image])
                shape = _stage_grid(grid, assignment.shape[1])
                tokens = int((groups != DROPPED_GROUP).sum())
            else:
                follower.follow(assignment[image], added)
                states, groups = follower.states(), follower.groups()
                shape = grid
                tokens = len(follower.fused)
                if "counts" in record.values:  # the batch's largest; this image may have padding
                    tokens = num_prefix_tokens + int(record.values["counts"][image]) + packages
            if only_sorts:
                continue
            if states.size != shape[0] * shape[1]:
                raise InputError(
                    f"The records are of {states.size} patches, but a grid of {shape[0]} x {shape[1]} was given."
                )
            maps[image].append(
                SiteMap(
                    block=record.block,
                    op=record.op,
                    action=_action(record, image),
                    tokens=tokens,
                    states=states.reshape(shape).astype(np.int8),
                    groups=groups.reshape(shape).astype(np.int32),
                )
            )
    return [tuple(sites) for sites in maps]


class _Follower:
    """The patches of one image on their way through the sites.

    ``positions`` (patches,) is where each one's token stands, -1 when dropped; ``fused`` (tokens,) which tokens hold
    something that was dropped.
    """

    def __init__(self, num_patches: int, num_prefix_tokens: int) -> None:
        self.prefix = num_prefix_tokens
        self.positions = np.arange(num_patches) + num_prefix_tokens
        self.fused = np.zeros(num_prefix_tokens + num_patches, dtype=bool)

    def follow(self, assignment: NDArray[np.int64], added: int | None) -> None:
        """Go through a site that sends tokens to ``assignment`` and makes a token of what was dropped at ``added``."""
        if len(assignment) != len(self.fused):
            raise InputError(
                f"A record is of {len(assignment)} tokens, but {len(self.fused)} were left by the sites before it. "
                "Give the grid and the prefix tokens of the model that made the records."
            )
        alive = self.positions >= 0
        self.positions = np.where(alive, assignment[np.where(alive, self.positions, 0)], -1)
        after = int(assignment.max(initial=-1)) + 1
        fused = np.zeros(max(after, 0 if added is None else added + 1), dtype=bool)
        fused[assignment[self.fused & (assignment >= 0)]] = True
        if added is not None:
            fused[added] = True
        self.fused = fused

    def groups(self) -> NDArray[np.int64]:
        return np.where(self.positions >= 0, self.positions - self.prefix, DROPPED_GROUP)

    def states(self) -> NDArray[np.int64]:
        alive = self.positions >= 0
        place = np.where(alive, self.positions, 0)
        members = np.bincount(self.positions[alive], minlength=len(self.fused))
        states = np.where(members[place] > 1, PatchState.MERGED, PatchState.KEPT)
        states = np.where(self.fused[place], PatchState.FUSED, states)
        return np.where(alive, states, PatchState.DROPPED)


def _only_sorts(sites: Sequence[SiteRecord], index: int) -> bool:
    """DiffRate records the sorting before its merge as a pruning; where nothing was pruned it is no site."""
    record, after = sites[index], sites[index + 1 : index + 2]
    is_before_merge = bool(after) and after[0].op == "merge_mean" and after[0].block == record.block
    return is_before_merge and record.op == "prune" and bool((record.assignment >= 0).all())


def _check_removes(record: SiteRecord) -> None:
    if record.op == "select" and not {"kept_idx", "counts"} & record.values.keys():
        raise InputError(
            f"The site of block {record.block} was recorded in training, where tokens are masked and none leaves. "
            "Call model.eval() first."
        )


def _added_token(record: SiteRecord, prefix: int, packages: int) -> tuple[int | None, int]:
    """Position of the token that the site made of what it dropped, and how many packages there are now."""
    if record.op == "fuse":
        return prefix + record.values["kept_idx"].shape[1], packages
    if "package_token" in record.values:
        return prefix + int(record.values["counts"].max()) + packages, packages + 1
    return None, packages


def _masked(alive: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """States and groups of a Swin stage: its record tells who is alive, whatever was before."""
    return np.where(alive >= 0, PatchState.KEPT, PatchState.DROPPED), alive


def _stage_grid(grid: tuple[int, int], tokens: int) -> tuple[int, int]:
    """The grid of the Swin stage that has so many tokens: each stage halves the sides, rounding up."""
    factor = 1
    while (stage := (-(-grid[0] // factor), -(-grid[1] // factor)))[0] * stage[1] > tokens:
        factor *= 2
    return stage


def _action(record: SiteRecord, image: int) -> str:
    if "policy" in record.values:
        return "pool" if bool(record.values["policy"][image]) else "prune"
    return record.op
