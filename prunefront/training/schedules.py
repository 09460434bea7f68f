"""The keep-rate schedule of EViT and Tri-Level E-ViT: training begins with all tokens and lets them go by and by."""

from __future__ import annotations

import math
from typing import Any

from prunefront.config import PruneConfig, Site
from prunefront.schedule import plan_schedule
from prunefront.training.recipes import KeepRateSchedule


def openness(schedule: KeepRateSchedule, step: int, steps_per_epoch: int) -> float:
    """How far the keep ratios are from the config's own: 1 keeps everything, 0 is the config.

    ``(1 + cos(pi * t / T)) / 2`` between the start and the end of the schedule, t counted in steps: `methods/evit.py`'s
    paper (arXiv:2202.07800), training script, and Tri-Level E-ViT (arXiv:2211.10801).

    Args:
        schedule: Start and length, in epochs.
        step: Steps done before this one.
        steps_per_epoch: Steps of one epoch.
    """
    passed = step - schedule.start_epoch * steps_per_epoch
    length = schedule.epochs * steps_per_epoch
    if passed < 0:
        return 1.0
    return 0.0 if passed >= length else (1 + math.cos(math.pi * passed / length)) / 2


class ScheduledSites:
    """The sites of a config at any stage of the schedule: keep ratio r becomes ``r + (1 - r) * openness``.

    Token counts and removals are shares of the tokens that the config leaves for that site.
    """

    def __init__(self, config: PruneConfig) -> None:
        """Work out every site's share of the tokens present."""
        self._sites, self._options = config.sites, config.options
        # A site that removes nothing has no step: it keeps all of whatever is there.
        self._present = {
            (block.index, step.op): step.kept + step.removed
            for block in plan_schedule(config).blocks
            for step in block.steps
        }

    def at(self, open_share: float) -> dict[str, Any]:
        """What to call the model with beside images; nothing where the config's own ratios are meant.

        Tri-Level's share of connections follows the same schedule as its tokens.
        """
        if open_share == 0.0:
            return {}
        sites = tuple(_opened(site, self._present.get((site.block, site.op)), open_share) for site in self._sites)
        attended = self._options.get("attn_ratio", 1.0)
        if attended == 1.0:
            return {"schedule": sites}
        return {"schedule": sites, "options": {"attn_ratio": attended + (1 - attended) * open_share}}


def _opened(site: Site, present: int | None, open_share: float) -> Site:
    if site.cumulative_keep_ratio is not None:
        ratio = site.cumulative_keep_ratio
        return Site(block=site.block, op=site.op, cumulative_keep_ratio=ratio + (1 - ratio) * open_share)
    if site.keep_ratio is not None:
        ratio = site.keep_ratio
    elif present is None:
        ratio = 1.0
    elif site.tokens is not None:
        ratio = min(site.tokens / present, 1.0)
    else:
        assert site.remove is not None
        ratio = max(1 - site.remove / present, 0.0)
    return Site(block=site.block, op=site.op, keep_ratio=ratio + (1 - ratio) * open_share)
