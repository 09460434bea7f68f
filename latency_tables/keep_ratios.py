"""Keep ratios that a measured table allows: what learned selection is trained to, for a device and a latency.

Kong et al., "SPViT: Enabling Faster Vision Transformers via Latency-aware Soft Token Pruning", ECCV 2022
(arXiv:2112.13890), latency-aware training: keep ratios whose table sum meets the limit become the targets of the ratio
loss. Of all that do, those of one family are considered, k, k², k³, … as DynamicViT and SPViT are published, so that
a single number is to be found.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from latency_tables.errors import UnmeasuredTokensError
from prunefront.config import PruneConfig, Site
from prunefront.errors import ConfigError
from prunefront.published_schedules import dynamicvit_keep_ratios

RATIO_STEPS = 1000  # finer than the patches of any image that tables are made for

Cost = Callable[[PruneConfig], float]  # milliseconds of a config


def dense_ms(config: PruneConfig, cost: Cost) -> float:
    """Latency of the config's model without its sites."""
    return cost(config.evolve(sites=()))


def keep_ratios_within(config: PruneConfig, cost: Cost, max_latency_ms: float) -> PruneConfig:
    """The config with the highest cumulative keep ratios k, k², … at its blocks that meet a latency.

    Ratios are tried from 1 down in thousandths. So a lower limit never gives higher ratios, even where noise lets a
    table's latency rise with fewer tokens.

    Args:
        config: Its sites say where tokens are selected; their amounts are replaced, and its results left out.
        cost: Such as `predict.predict_latency_ms` of one table.
        max_latency_ms: The limit, per forward pass of whatever batch ``cost`` speaks of.

    Raises:
        ConfigError: If the config selects nowhere, the dense model meets the limit, or no ratio does; then with the
            lowest limit that can be met.
        LatencyTableError: If the table is for another model, or lacks what all of these schedules need.
    """
    if not config.sites:
        raise ConfigError(
            "Keep ratios are chosen for the config's sites, but it has none; add one per block to select in."
        )
    dense = dense_ms(config, cost)
    if dense <= max_latency_ms:
        raise ConfigError(
            f"The dense model takes {dense:.4g} ms by the table, within the limit of {max_latency_ms:.4g} ms, so there "
            "is nothing to prune; give a lower limit."
        )
    fastest, unmeasured = math.inf, None
    for step in range(RATIO_STEPS, 0, -1):
        candidate = _with_base_ratio(config, step / RATIO_STEPS)
        try:
            latency_ms = cost(candidate)
        except UnmeasuredTokensError as error:  # near 1 SPViT's packages exceed the dense count; near 0 few are left
            unmeasured = error
            continue
        if latency_ms <= max_latency_ms:
            return candidate
        fastest = min(fastest, latency_ms)
    if unmeasured is not None and fastest == math.inf:
        raise unmeasured
    blocks = ", ".join(str(site.block) for site in config.sites)
    raise ConfigError(
        f"No keep ratios at blocks {blocks} bring the model to {max_latency_ms:.4g} ms: the table reaches down to "
        f"{_rounded_up(fastest)} ms, {_rounded_up(fastest / dense)} of the dense model's {dense:.4g} ms. Allow that "
        "much, or select in earlier blocks."
    )


def _with_base_ratio(config: PruneConfig, ratio: float) -> PruneConfig:
    ratios = dynamicvit_keep_ratios(ratio, len(config.sites))
    sites = [
        Site(block=site.block, op=site.op, cumulative_keep_ratio=share)
        for site, share in zip(config.sites, ratios, strict=True)
    ]
    return config.evolve(sites=tuple(sites), results=None)


def _rounded_up(value: float) -> float:
    """To thousandths, so that what a sentence offers can be had."""
    return math.ceil(value * 1000) / 1000
