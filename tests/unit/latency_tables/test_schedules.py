import pytest

from latency_tables.build import CORRECTION_SEED
from latency_tables.errors import LatencyTableError
from latency_tables.parts import measured_methods
from latency_tables.schedules import random_configs, telling_configs
from prunefront.config import ModelSpec, PruneConfig
from prunefront.geometry import geometry_for
from prunefront.macs import macs
from prunefront.schedule import token_counts
from tests.unit.latency_tables.fakes import NO_CLASS_TOKEN

DEIT = ModelSpec(name="deit_tiny_patch16_224")
GEOMETRY = geometry_for(DEIT)
DENSE_MACS = macs(PruneConfig(model=DEIT, method="hybrid"))


def test_costs_are_spread_over_the_range_and_methods_take_turns() -> None:
    configs = random_configs(DEIT, GEOMETRY, 50, 0)
    shares = sorted(macs(config) / DENSE_MACS for config in configs)
    assert len(configs) == 50
    assert all(share == pytest.approx(0.3 + 0.7 * (at + 0.5) / 50, abs=0.03) for at, share in enumerate(shares))
    for method in measured_methods():
        assert sum(config.method == method for config in configs) >= 5


def test_equal_seeds_draw_equal_configs_and_others_do_not() -> None:
    first = [config.content_hash() for config in random_configs(DEIT, GEOMETRY, 8, 3)]
    assert first == [config.content_hash() for config in random_configs(DEIT, GEOMETRY, 8, 3)]
    assert not set(first) & {config.content_hash() for config in random_configs(DEIT, GEOMETRY, 8, 4)}
    assert not set(first) & {config.content_hash() for config in random_configs(DEIT, GEOMETRY, 8, CORRECTION_SEED)}


def test_the_cost_may_be_a_latency() -> None:
    configs = random_configs(DEIT, GEOMETRY, 10, 0, cost=lambda config: 100.0 + macs(config) / DENSE_MACS * 300.0)
    costs = sorted((100.0 + macs(config) / DENSE_MACS * 300.0) / 400.0 for config in configs)
    assert costs == pytest.approx([0.335 + 0.07 * at for at in range(10)], abs=0.05)


def test_without_a_class_token_nothing_that_ranks_by_it_is_drawn() -> None:
    configs = random_configs(NO_CLASS_TOKEN, geometry_for(NO_CLASS_TOKEN), 10, 0)
    assert {config.method for config in configs} == {"tome", "hybrid", "dynamicvit", "spvit"}
    assert {site.op for config in configs for site in config.sites} == {"merge", "select"}


def test_all_images_keep_the_counts_of_what_is_drawn() -> None:
    configs = random_configs(DEIT, GEOMETRY, 12, 0, methods=["spvit", "dynamicvit"])
    assert all(token_counts(config).is_static for config in configs)


def test_tri_level_is_drawn_with_and_without_its_attention_level() -> None:
    configs = random_configs(DEIT, GEOMETRY, 12, 0, methods=["trilevel"])
    assert {config.options["attn_ratio"] < 1.0 for config in configs} == {True, False}


def test_methods_that_cannot_run_are_refused() -> None:
    with pytest.raises(LatencyTableError, match="None of the methods can run on this model"):
        random_configs(NO_CLASS_TOKEN, geometry_for(NO_CLASS_TOKEN), 3, 0, methods=["evit", "ppt"])


def test_two_telling_schedules_reduce_everywhere_and_early_to_the_same_cost() -> None:
    everywhere, early = telling_configs(DEIT, GEOMETRY)
    assert [(site.block, site.op) for site in everywhere.sites] == [(block, "merge") for block in range(12)]
    assert [(site.block, site.op) for site in early.sites] == [(1, "prune")]
    for config in (everywhere, early):
        assert macs(config) / DENSE_MACS == pytest.approx(0.45, abs=0.01)


def test_telling_schedules_of_a_model_without_a_class_token_only_merge() -> None:
    configs = telling_configs(NO_CLASS_TOKEN, geometry_for(NO_CLASS_TOKEN))
    assert {(config.method, site.op) for config in configs for site in config.sites} == {("tome", "merge")}
    assert len(configs[0].sites) > len(configs[1].sites)
