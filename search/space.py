"""Search space <-> Optuna distributions <-> PruneConfig.

One fixed space per study: per block an operation and a drop weight, and the share of the dense latency to aim at. The
weights say how the reduction is spread over the blocks, and a low one that a block is left alone; how much is dropped
in all follows from the share, through the latency table, which costs nothing. So every proposal lands where it was
aimed on the latency axis, and the sampler learns where tokens may leave.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

from prunefront.config import ModelSpec, PruneConfig, Site
from prunefront.errors import ConfigError
from prunefront.geometry import ModelGeometry
from prunefront.registry import get_method
from prunefront.schedule import TokenSchedule, plan_blocks, plan_schedule
from search.documents import SearchSpace

OPERATIONS = ("drop", "fuse", "merge")
# Blocks whose drop weight is not above this are left alone: about two in five reduce when weights are drawn at random.
# Every reduction costs time of its own, so a few sites that drop much beat many that drop little.
LEFT_ALONE = 0.6
# A general operation -> the method's own; missing ones become the nearest that it has.
METHOD_OPERATIONS: dict[str, dict[str, str]] = {
    "evit": {"drop": "prune", "fuse": "fuse", "merge": "fuse"},
    "ppt": {"drop": "pool_or_prune", "fuse": "pool_or_prune", "merge": "pool_or_prune"},
    "tome": {"drop": "merge", "fuse": "merge", "merge": "merge"},
    "diffrate": {"drop": "prune", "fuse": "merge_mean", "merge": "merge_mean"},
    "hybrid": {"drop": "prune", "fuse": "fuse", "merge": "merge"},
}
BISECTIONS = 12
MAX_SHARE = 0.97  # above this a schedule is dense for all practical purposes
Params = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Variances:
    """PPT's score variances of calibration images, sorted, per block; turns a quantile into a threshold."""

    by_block: Mapping[int, Sequence[float]]

    def threshold(self, quantile: float, blocks: Sequence[int]) -> float:
        """Variance that a share of the images stays below, averaged over the blocks that reduce."""
        used = [self.by_block[block] for block in blocks if block in self.by_block] or list(self.by_block.values())
        return sum(row[min(int(quantile * len(row)), len(row) - 1)] for row in used) / len(used)


class ScheduleSpace:
    """All schedules a job may propose for one model on one device."""

    def __init__(
        self,
        spec: ModelSpec,
        geometry: ModelGeometry,
        space: SearchSpace,
        *,
        latency_ms: Callable[[TokenSchedule], float],
        max_latency_ms: float | None = None,
        variances: Variances | None = None,
    ) -> None:
        """Prepare the distributions.

        Args:
            spec: The model.
            geometry: Of the model.
            space: What the job allows.
            latency_ms: Predicted latency of a schedule, infinite where it does not fit into memory; methods that do
                not even when reduced the most are left out.
            max_latency_ms: Aim below this; None aims anywhere below dense.
            variances: For ``ppt``; without them its threshold is what the paper used.

        Raises:
            ConfigError: If no method fits into memory.
        """
        self.spec = spec
        self.geometry = geometry
        self.min_keep_ratio = space.min_keep_ratio
        self.blocks = blocks_of(space, geometry)
        self.latency_ms = latency_ms
        self._variances = variances
        self.dense_ms = latency_ms(plan_schedule(PruneConfig(model=spec, method="hybrid"), geometry))
        highest = MAX_SHARE if max_latency_ms is None else min(MAX_SHARE, max_latency_ms / self.dense_ms)
        # The least share any method reaches with everything dropped that may be; below it aims are all the same.
        least_ms = {method: latency_ms(self.most_reduced(method)) for method in space.methods}
        self.methods = tuple(method for method in space.methods if least_ms[method] < math.inf)
        if not self.methods:
            raise ConfigError(
                f"None of the methods {', '.join(space.methods)} fits into memory, even reduced the most. Choose a "
                "smaller batch size."
            )
        space = space.model_copy(update={"methods": self.methods})
        self.min_share = min(least_ms[method] for method in self.methods) / self.dense_ms
        self.max_share = max(highest, self.min_share)
        self.distributions = distributions_of(
            space, geometry, least_share=min(self.min_share, 1.0), greatest_share=max(self.max_share, self.min_share)
        )
        self._allowed = space

    def config(self, params: Mapping[str, Any]) -> PruneConfig:
        """The config of a point of the space: weights scaled until the predicted latency meets the share."""
        method = params["method"]
        options = self._options(params)
        low, high = 0.0, 1.0
        target_ms = params["share"] * self.dense_ms
        if self._scaled_ms(params, options, 1.0) < target_ms:
            for _ in range(BISECTIONS):
                middle = (low + high) / 2
                if self._scaled_ms(params, options, middle) < target_ms:
                    high = middle
                else:
                    low = middle
        sites = self._sites(params, high)
        return PruneConfig.model_validate({"model": self.spec, "method": method, "sites": sites, "options": options})

    def params_of(self, config: PruneConfig) -> Params:
        """The point of the space nearest to a config, for telling the sampler about schedules from elsewhere."""
        share = self.latency_ms(plan_schedule(config, self.geometry)) / self.dense_ms
        share = min(max(share, self.min_share), self.max_share)
        return nearest_params(config, self._allowed, self.geometry, share=share, variances=self._variances)

    def _options(self, params: Mapping[str, Any]) -> dict[str, Any]:
        method = params["method"]
        options: dict[str, Any] = {}
        if method in ("tome", "ppt", "hybrid"):
            options["prop_attn"] = params["prop_attn"]
        if method == "hybrid":
            options["score"] = params["hybrid_score"]
        if method == "ppt" and self._variances is not None:
            used = [block for block in self.blocks if params[f"drop_{block}"] > LEFT_ALONE]
            options["threshold"] = self._variances.threshold(params["ppt_quantile"], used)
        return get_method(method).parse_options(options)

    def _sites(self, params: Mapping[str, Any], scale: float) -> list[Site]:
        operations = METHOD_OPERATIONS[params["method"]]
        sites = []
        for block in self.blocks:
            drop = scale * _strength(params[f"drop_{block}"]) * (1 - self.min_keep_ratio)
            if drop > 0:
                sites.append(Site(block=block, op=operations[params[f"op_{block}"]], keep_ratio=1 - drop))
        return sites

    def _scaled_ms(self, params: Mapping[str, Any], options: dict[str, Any], scale: float) -> float:
        return self.latency_ms(self._scaled(params, options, scale))

    def _scaled(self, params: Mapping[str, Any], options: dict[str, Any], scale: float) -> TokenSchedule:
        method = get_method(params["method"])
        blocks = plan_blocks(
            method,
            options,
            self._sites(params, scale),
            depth=self.geometry.depth,
            num_patch_tokens=self.geometry.num_patch_tokens,
            num_prefix_tokens=self.geometry.num_prefix_tokens,
        )
        return TokenSchedule(
            method=method.name,
            options=tuple(sorted(options.items())),
            num_prefix_tokens=self.geometry.num_prefix_tokens,
            blocks=blocks,
        )

    def most_reduced(self, method: str) -> TokenSchedule:
        """Everything dropped that may be."""
        params = {"method": method, "prop_attn": True, "hybrid_score": "cls", "ppt_quantile": 0.5}
        for block in self.blocks:
            params |= {f"op_{block}": "drop", f"drop_{block}": 1.0}
        return self._scaled(params, self._options(params), 1.0)


def blocks_of(space: SearchSpace, geometry: ModelGeometry) -> Sequence[int]:
    """Blocks that may reduce."""
    return range(geometry.depth) if space.locations == "any" else sorted(set(space.locations))


def distributions_of(
    space: SearchSpace, geometry: ModelGeometry, *, least_share: float, greatest_share: float
) -> dict[str, BaseDistribution]:
    """Every parameter of a study with its range.

    Args:
        space: What the job allows.
        geometry: Of the model.
        least_share: Fastest share of the dense latency that is aimed at.
        greatest_share: Slowest share.
    """
    distributions: dict[str, BaseDistribution] = {
        "share": FloatDistribution(least_share, greatest_share),
        "method": CategoricalDistribution(space.methods),
    }
    if "ppt" in space.methods:
        distributions["ppt_quantile"] = FloatDistribution(0.0, 1.0)
    if "hybrid" in space.methods:
        distributions["hybrid_score"] = CategoricalDistribution(("cls", "cls_value"))
    if {"hybrid", "tome", "ppt"} & set(space.methods):
        distributions["prop_attn"] = CategoricalDistribution((True, False))
    for block in blocks_of(space, geometry):
        distributions[f"op_{block}"] = CategoricalDistribution(OPERATIONS)
        distributions[f"drop_{block}"] = FloatDistribution(0.0, 1.0)
    return distributions


def nearest_params(
    config: PruneConfig,
    space: SearchSpace,
    geometry: ModelGeometry,
    *,
    share: float,
    variances: Variances | None = None,
) -> Params:
    """The point of the space nearest to a config.

    What the space cannot say (two operations in a block, sites outside the allowed blocks) is approximated.

    Args:
        config: A schedule from elsewhere.
        space: What the job allows.
        geometry: Of the model.
        share: Of the dense latency that the config takes.
        variances: Tell which quantile a threshold of PPT is; without them it counts as the median.
    """
    schedule = plan_schedule(config, geometry)
    general = {own: name for name, own in reversed(METHOD_OPERATIONS[config.method].items())}
    params: Params = {
        "share": share,
        "method": config.method if config.method in space.methods else space.methods[0],
    }
    if "ppt" in space.methods:
        params["ppt_quantile"] = _quantile_of(config, variances)
    if "hybrid" in space.methods:
        params["hybrid_score"] = config.options.get("score", "cls")
    if {"hybrid", "tome", "ppt"} & set(space.methods):
        params["prop_attn"] = config.options.get("prop_attn", True)
    prefix = geometry.num_prefix_tokens
    most = 1 - space.min_keep_ratio
    for block in blocks_of(space, geometry):
        plan = schedule.blocks[block]
        removed = 1 - (plan.tokens_out - prefix) / max(plan.tokens_in - prefix, 1)
        params[f"op_{block}"] = general[plan.steps[0].op] if plan.steps else OPERATIONS[0]
        reduces = bool(plan.steps) and removed > 0 and most > 0
        params[f"drop_{block}"] = _weight_of(min(removed / most, 1.0)) if reduces else LEFT_ALONE / 2
    return params


def _quantile_of(config: PruneConfig, variances: Variances | None) -> float:
    threshold = config.options.get("threshold")
    if config.method != "ppt" or threshold is None or variances is None:
        return 1.0 if config.method == "ppt" and threshold is None else 0.5
    rows = [variances.by_block[s.block] for s in config.sites if s.block in variances.by_block]
    return sum(bisect_left(row, threshold) / len(row) for row in rows) / len(rows) if rows else 0.5


def _strength(weight: float) -> float:
    """How strongly a block reduces, 0 to 1, for its drop weight."""
    return max(0.0, weight - LEFT_ALONE) / (1.0 - LEFT_ALONE)


def _weight_of(strength: float) -> float:
    return LEFT_ALONE + (1.0 - LEFT_ALONE) * strength
