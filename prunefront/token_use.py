"""What evaluated images really cost: tokens per block and MACs, measured where each image keeps counts of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from prunefront.backbones.compressed import Compressed
from prunefront.config import PruneConfig
from prunefront.geometry import ModelGeometry, geometry_of, spec_of
from prunefront.macs import macs_of_schedule
from prunefront.schedule import TokenSchedule, plan_schedule, schedule_of_counts


@dataclass(frozen=True, kw_only=True)
class TokenUse:
    """Tokens and MACs per image.

    Attributes:
        is_per_image: Whether images keep counts of their own; then mean and percentiles are over the images measured.
        mean: Tokens leaving each block (what its MLP works on), prefix and added tokens included.
        p50, p95: Percentiles of the same; equal to ``mean`` where all images keep alike.
        macs: Mean multiply-accumulates per image, as `prunefront.macs` counts them.
        num_images: Images measured; None where the schedule alone tells.
    """

    is_per_image: bool
    mean: tuple[float, ...]
    p50: tuple[float, ...]
    p95: tuple[float, ...]
    macs: float
    num_images: int | None = None


class TokenCounter(nn.Module):
    """A compressed model that notes how many tokens each image keeps; logits are the model's.

    Attributes:
        kept: Per batch seen, tokens kept at each site, prefix and added tokens not counted, shape (B, sites).
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.kept: list[Tensor] = []
        self._num_sites = sum(len(block.steps) for block in cast(Any, model)._blocks_plan)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, classes) for images (B, C, H, W)."""
        logits, aux = cast(Any, self.model)(images, return_aux=True)
        counts = [
            site.values["counts"] if "counts" in site.values else (site.assignment >= 0).sum(dim=1)
            for site in aux.sites
        ]
        self.kept.append(torch.stack(counts, dim=1).cpu())
        return cast(Tensor, logits)

    def counts(self) -> Tensor:
        """``kept`` of all images seen, (images, sites)."""
        return torch.cat(self.kept) if self.kept else torch.zeros(0, self._num_sites, dtype=torch.long)


def counts_per_image(model: nn.Module) -> bool:
    """Whether each image keeps counts of its own: SPViT's selectors decide, and a Swin in official form masks."""
    if not isinstance(model, Compressed):
        return False
    return not plan_schedule(model.prune_config, geometry_of(cast(nn.Module, model))).is_static


def token_use(model: nn.Module, kept: Sequence[Tensor] | None = None) -> TokenUse:
    """Tokens per block and MACs of a model.

    Args:
        model: A compressed model, or a dense one that prunefront supports.
        kept: What a `TokenCounter` noted of it: per batch (B, sites). Needed where `counts_per_image` holds.

    Raises:
        ModelError: If prunefront does not support the model.
    """
    geometry = geometry_of(model)
    if isinstance(model, Compressed):
        config = model.prune_config
    else:
        config = PruneConfig(model=spec_of(model), method="hybrid")
    schedule = plan_schedule(config, geometry)
    if schedule.is_static or not kept:
        tokens = tuple(float(count) for count in schedule.tokens_out)
        macs = float(macs_of_schedule(schedule, geometry).model)
        return TokenUse(is_per_image=False, mean=tokens, p50=tokens, p95=tokens, macs=macs)
    counts = torch.cat(list(kept)).numpy()
    rows, places = np.unique(counts, axis=0, return_inverse=True)
    of_rows = [_of_image(row, schedule, geometry) for row in rows]
    per_image = np.array([tokens for tokens, _ in of_rows], dtype=np.float64)[places.reshape(-1)]
    macs_per_image = np.array([macs for _, macs in of_rows], dtype=np.float64)[places.reshape(-1)]
    return TokenUse(
        is_per_image=True,
        mean=_floats(per_image.mean(axis=0)),
        p50=_floats(np.percentile(per_image, 50, axis=0)),
        p95=_floats(np.percentile(per_image, 95, axis=0)),
        macs=float(macs_per_image.mean()),
        num_images=len(per_image),
    )


def _of_image(kept: NDArray[np.int64], schedule: TokenSchedule, geometry: ModelGeometry) -> tuple[list[int], int]:
    """Tokens leaving each block and MACs of an image that keeps ``kept`` at the sites."""
    if geometry.stages:
        # Masks cost what the dense model does, and alive tokens are all there again at the next stage.
        alive = [block.tokens_out for block in schedule.blocks]
        counts = iter(kept.tolist())
        first = 0
        for stage in geometry.stages:
            current = stage.num_tokens
            for block in schedule.blocks[first : first + stage.depth]:
                for _ in block.steps:
                    current = next(counts)
                alive[block.index] = current
            first += stage.depth
        return alive, macs_of_schedule(schedule, geometry).model
    own = schedule_of_counts(schedule, kept.tolist())
    return own.tokens_out, macs_of_schedule(own, geometry).model


def _floats(values: NDArray[np.float64]) -> tuple[float, ...]:
    return tuple(float(value) for value in values)
