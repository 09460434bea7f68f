from __future__ import annotations

import pytest

from prunefront.config import ModelSpec, PruneConfig
from prunefront.geometry import geometry_for
from prunefront.schedule import plan_schedule
from search.seeds import REFERENCE_MODEL, seeds_for, transfer
from tests.unit.search.spaces import METHODS, NO_CLASS_TOKEN, SMALL, VARIANCES

DEEP = ModelSpec(
    name="vit_tiny_patch16_224",
    img_size=64,
    kwargs={"patch_size": 8, "embed_dim": 48, "depth": 12, "num_heads": 3},
)


def test_a_transferred_schedule_keeps_relative_depth_and_share() -> None:
    config = _evit(0.7)
    moved = transfer(config, DEEP, geometry_for(DEEP))
    assert [(site.block, site.op) for site in moved.sites] == [(3, "fuse"), (6, "fuse"), (9, "fuse")]
    source = plan_schedule(config)
    for site, at in zip(moved.sites, (3, 6, 9), strict=True):
        step = source.blocks[at].steps[0]
        assert site.keep_ratio == pytest.approx(step.kept / (step.kept + step.removed))


def test_blocks_that_fall_together_keep_the_product_of_their_shares() -> None:
    config = PruneConfig.model_validate(
        {
            "model": {"name": REFERENCE_MODEL},
            "method": "evit",
            "sites": [{"block": 3, "op": "prune", "tokens": 98}, {"block": 4, "op": "prune", "tokens": 49}],
        }
    )
    moved = transfer(config, SMALL, geometry_for(SMALL))
    assert [site.block for site in moved.sites] == [1]
    assert moved.sites[0].keep_ratio == pytest.approx(0.25)


@pytest.mark.parametrize("spec", [SMALL, DEEP])
def test_every_seed_is_a_valid_schedule_of_the_model(spec: ModelSpec) -> None:
    seeds = seeds_for(spec, geometry_for(spec), METHODS, VARIANCES)
    assert {seed.origin for seed in seeds} == {"published", "resolution"}
    assert {seed.config.method for seed in seeds if seed.origin == "published"} >= {"evit", "ppt"}
    assert len({seed.label for seed in seeds}) == len(seeds)
    for seed in seeds:
        plan_schedule(seed.config)
        if seed.origin == "published":
            assert seed.config.model == spec


def test_models_without_a_class_token_get_no_schedule_that_needs_one() -> None:
    seeds = seeds_for(NO_CLASS_TOKEN, geometry_for(NO_CLASS_TOKEN), METHODS, None)
    for seed in seeds:
        plan_schedule(seed.config)
    assert "evit" not in {seed.config.method for seed in seeds}
    assert "ppt" not in {seed.config.method for seed in seeds}


def _evit(keep: float) -> PruneConfig:
    sites = [{"block": block, "op": "fuse", "keep_ratio": keep} for block in (3, 6, 9)]
    return PruneConfig.model_validate({"model": {"name": REFERENCE_MODEL}, "method": "evit", "sites": sites})
