"""What is pruned in which epoch: keep ratios that come down by and by, or selectors that join one by one.

The first is EViT's and Tri-Level E-ViT's, the second SPViT's layer-to-phase training.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from prunefront.config import PruneConfig, Site
from prunefront.errors import ConfigError
from prunefront.schedule import plan_schedule
from prunefront.training.recipes import KeepRateSchedule, SelectorPhases

_ROUNDING = 1e-9  # 0.8 - 0.75 is a little more than 0.05


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


def cumulative_keep_ratios(config: PruneConfig) -> tuple[float, ...]:
    """Share of the initial patches left after each site; as written where the site says it, else by its count."""
    schedule = plan_schedule(config)
    initial = schedule.blocks[0].tokens_entering - schedule.num_prefix_tokens
    steps = (step for block in schedule.blocks for step in block.steps)
    return tuple(
        site.cumulative_keep_ratio if site.cumulative_keep_ratio is not None else step.kept / initial
        for site, step in zip(config.sites, steps, strict=True)
    )


def merged_config(config: PruneConfig, merge_within: float) -> PruneConfig:
    """The config with neighbouring sites of similar keep ratios made one: the first one's block, the last one's amount.

    The last one's, so that the model is no slower than before.

    Args:
        config: Of a method with learned selection.
        merge_within: A site joins those before it where its cumulative ratio is at most this below their first one's.
    """
    sites: list[Site] = []
    first_ratio = math.inf
    for site, ratio in zip(_independent_sites(config), cumulative_keep_ratios(config), strict=True):
        if first_ratio - ratio <= merge_within + _ROUNDING:
            sites[-1] = site.model_copy(update={"block": sites[-1].block})
        else:
            sites.append(site)
            first_ratio = ratio
    return config if len(sites) == len(config.sites) else config.evolve(sites=tuple(sites), results=None)


def _independent_sites(config: PruneConfig) -> tuple[Site, ...]:
    """The sites with amounts that mean the same whichever of the others are in use."""
    steps = (step for block in plan_schedule(config).blocks for step in block.steps)
    return tuple(
        site if site.cumulative_keep_ratio is not None else Site(block=site.block, op=site.op, tokens=max(step.kept, 1))
        for site, step in zip(config.sites, steps, strict=True)
    )


class PhasedSites:
    """Which sites are in use while selectors join one by one.

    Kong et al., "SPViT", ECCV 2022 (arXiv:2112.13890), layer-to-phase progressive training: phase 0 uses the last site
    alone, each further phase one more in front of it, the last phase those of `merged_config`. Blocks and keep ratios
    are the config's, whereas the paper finds them on the way.
    """

    def __init__(self, config: PruneConfig, phases: SelectorPhases, epochs: int) -> None:
        """Work out the phases.

        Args:
            config: Of a method with learned selection.
            phases: How long they last.
            epochs: Length of the training.

        Raises:
            ConfigError: If not an epoch is left for the last phase.
        """
        self._config, self._phases = config, phases
        self.final = merged_config(config, phases.merge_within)
        sites = _independent_sites(config)
        self._sites = [sites[-count:] for count in range(1, len(sites))] + [config.sites]
        if self.final is not config:
            self._sites.append(self.final.sites)
        before = (len(self._sites) - 1) * phases.epochs
        if before >= epochs:
            raise ConfigError(
                f"{len(self._sites) - 1} phases of phases.epochs={phases.epochs} leave none of the {epochs} epochs to "
                "train the final selectors together; set phases.epochs lower, or train longer."
            )

    def phase(self, history: Sequence[Mapping[str, float]]) -> int:
        """Number of the phase that the epoch after ``history`` belongs to, from 0; a pure function, so that it resumes.

        Args:
            history: The records of the epochs so far, each with its ``phase``.
        """
        if not history:
            return 0
        phase = int(history[-1]["phase"])
        if self.is_last(phase):
            return phase
        taken = sum(record["phase"] == phase for record in history)
        is_over = taken >= self._phases.epochs or self._is_good_enough(phase, history[-1])
        return phase + 1 if is_over else phase

    def is_last(self, phase: int) -> bool:
        """Whether a phase lasts to the end."""
        return phase == len(self._sites) - 1

    def at(self, phase: int) -> dict[str, Any]:
        """What to call the model with beside images in a phase; nothing where all of the config's sites are meant."""
        return {} if self._sites[phase] is self._config.sites else {"schedule": self._sites[phase]}

    def _is_good_enough(self, phase: int, record: Mapping[str, float]) -> bool:
        """Whether the epoch kept accuracy at its targets."""
        max_drop = self._phases.max_drop
        if max_drop is None or "search_top1" not in record:
            return False
        if record["teacher_search_top1"] - record["search_top1"] > max_drop + _ROUNDING:
            return False
        stages = {site.block: stage for stage, site in enumerate(self._config.sites)}
        active = self._config.evolve(sites=self._sites[phase])
        return all(
            record[f"loss_kept_{stages[site.block]}"] - ratio <= self._phases.ratio_tolerance
            for site, ratio in zip(active.sites, cumulative_keep_ratios(active), strict=True)
        )
