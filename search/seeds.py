"""Schedules every search begins with: what the papers published, for this model or transferred to it.

A front that starts from the state of the art cannot end below it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from prunefront.config import ModelSpec, PruneConfig, Site
from prunefront.errors import ModelError
from prunefront.geometry import ModelGeometry, geometry_for
from prunefront.published_schedules import published
from prunefront.registry import get_method
from prunefront.schedule import plan_schedule
from search.documents import Origin
from search.space import Variances

# Where schedules are taken from for models that nobody published any for.
REFERENCE_MODEL = "deit_small_patch16_224"
# DeiT-S's published PPT threshold is not a quantile of anything we could look up; half of the images pool.
PPT_QUANTILE = 0.5
RESOLUTION_SHARES = (0.83, 0.67, 0.5)


@dataclass(frozen=True, kw_only=True)
class Seed:
    """A config that is evaluated before anything is proposed, and shown as a mark."""

    label: str
    origin: Origin
    config: PruneConfig


def seeds_for(
    spec: ModelSpec, geometry: ModelGeometry, methods: Sequence[str], variances: Variances | None
) -> list[Seed]:
    """Published schedules of the methods, and the dense model at lower resolutions."""
    seeds = []
    for method in methods:
        own = published(method, spec)
        configs = own or {
            name: transfer(config, spec, geometry) for name, config in published(method, REFERENCE_MODEL).items()
        }
        for name, config in configs.items():
            if not own and method == "ppt" and variances is not None:
                blocks = [site.block for site in config.sites]
                threshold = variances.threshold(PPT_QUANTILE, blocks)
                config = config.evolve(options={**config.options, "threshold": threshold})
            try:
                get_method(method).check_geometry(geometry, config.sites)
            except ModelError:
                continue  # without a class token, what ranks by it does not apply
            label = f"{get_method(method).title} {name.removeprefix(f'{method}-')}"
            seeds.append(Seed(label=label if own else f"{label} (transferred)", origin="published", config=config))
    seeds += lower_resolutions(spec, geometry)
    return seeds


def transfer(config: PruneConfig, spec: ModelSpec, geometry: ModelGeometry) -> PruneConfig:
    """A schedule for another model: same relative depth, same share of the tokens kept per operation.

    Blocks that fall on one another share a site whose kept share is their product.
    """
    source = plan_schedule(config)
    kept: dict[tuple[int, str], float] = {}
    for block in source.blocks:
        target = min(int(block.index * geometry.depth / len(source.blocks)), geometry.depth - 1)
        for step in block.steps:
            share = step.kept / (step.kept + step.removed)
            kept[target, step.op] = kept.get((target, step.op), 1.0) * share
    order = {op: place for place, op in enumerate(get_method(config.method).ops)}
    sites = [
        Site(block=block, op=op, keep_ratio=share)
        for (block, op), share in sorted(kept.items(), key=lambda item: (item[0][0], order[item[0][1]]))
    ]
    return PruneConfig(model=spec, method=config.method, sites=tuple(sites), options=config.options)


def lower_resolutions(spec: ModelSpec, geometry: ModelGeometry) -> list[Seed]:
    """The dense model on smaller images: the rival that costs no method at all."""
    seeds = []
    for share in RESOLUTION_SHARES:
        size = tuple(
            max(round(share * side / patch), 1) * patch
            for side, patch in zip(geometry.img_size, geometry.patch_size, strict=True)
        )
        if size == geometry.img_size:
            continue
        smaller = spec.model_copy(update={"img_size": size if size[0] != size[1] else size[0]})
        try:
            geometry_for(smaller)
        except ModelError:
            continue  # models of a fixed input size
        config = PruneConfig(model=ModelSpec.model_validate(smaller.model_dump()), method="hybrid")
        label = f"dense at {size[0]} px" if size[0] == size[1] else f"dense at {size[0]} x {size[1]} px"
        seeds.append(Seed(label=label, origin="resolution", config=config))
    return seeds
