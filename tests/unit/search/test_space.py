from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.distributions import CategoricalDistribution

from prunefront.config import PruneConfig
from prunefront.errors import ConfigError
from prunefront.registry import get_method
from prunefront.schedule import TokenSchedule, plan_schedule
from search.documents import SearchSpace
from search.proposals import quasi_random
from search.space import LEFT_ALONE, OPERATIONS, ScheduleSpace, Variances
from tests.unit.search.spaces import (
    ATTENTION_MS,
    METHODS,
    MLP_MS,
    NO_CLASS_TOKEN,
    SMALL,
    VARIANCES,
    latency_ms,
    space_of,
)

SPACE = space_of()
# What one more token leaving at each block may change in all: a step of the bisection removes one from several blocks.
TOKEN_STEP_MS = sum((ATTENTION_MS + MLP_MS) * (4 - block) for block in range(4))


def point(number: int, method: str, **changes: Any) -> dict[str, Any]:
    return {**quasi_random(SPACE.distributions, 0, number), "method": method, **changes}


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=25, deadline=None)
@given(number=st.integers(0, 500), place=st.floats(0.0, 1.0))
def test_a_config_lands_where_it_was_aimed_within_a_token_step(method: str, number: int, place: float) -> None:
    share = SPACE.min_share + place * (SPACE.max_share - SPACE.min_share)
    # Somewhere to drop from the first block on, so that every aim can be met.
    params = point(number, method, share=share)
    params |= {f"op_{block}": "drop" for block in range(4)} | {f"drop_{block}": 1.0 for block in range(4)}
    # ToMe and PPT take away at most half of the tokens of a block, so they reach less far than the space aims.
    aimed_ms = max(share * SPACE.dense_ms, latency_ms(SPACE.most_reduced(method)))
    got_ms = latency_ms(plan_schedule(SPACE.config(params), SPACE.geometry))
    assert got_ms <= aimed_ms + 1e-9
    assert got_ms >= aimed_ms - TOKEN_STEP_MS


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=25, deadline=None)
@given(number=st.integers(0, 500))
def test_no_site_keeps_less_than_allowed_or_lies_elsewhere(method: str, number: int) -> None:
    space = space_of(locations=(1, 3), min_keep_ratio=0.6)
    params = {**quasi_random(space.distributions, 0, number), "method": method}
    config = space.config(params)
    assert config.method == method
    assert {site.block for site in config.sites} <= {1, 3}
    assert all(site.keep_ratio is not None and site.keep_ratio >= 0.6 - 1e-12 for site in config.sites)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_operation_of_the_space_is_one_that_the_method_has(method: str, operation: str) -> None:
    params = point(1, method, share=SPACE.min_share)
    params |= {f"op_{block}": operation for block in range(4)} | {f"drop_{block}": 0.8 for block in range(4)}
    config = SPACE.config(params)
    assert [site.block for site in config.sites] == [0, 1, 2, 3]
    assert {site.op for site in config.sites} <= set(get_method(method).ops)
    assert PruneConfig.model_validate(config.to_dict()).content_hash() == config.content_hash()


def test_blocks_of_low_weight_are_left_alone() -> None:
    params = point(1, "hybrid", share=0.5) | {f"drop_{block}": LEFT_ALONE for block in range(4)}
    assert [site.block for site in SPACE.config(params | {"drop_2": 0.9}).sites] == [2]
    assert SPACE.config(params).content_hash() == PruneConfig(model=SMALL, method="hybrid").content_hash()


@pytest.mark.parametrize("method", METHODS)
def test_the_nearest_point_of_a_config_gives_about_that_config(method: str) -> None:
    for number in range(10):
        config = SPACE.config(point(number, method))
        params = SPACE.params_of(config)
        assert set(params) == set(SPACE.distributions)
        assert params["method"] == method
        schedule, again = (plan_schedule(c, SPACE.geometry) for c in (config, SPACE.config(params)))
        assert latency_ms(again) == pytest.approx(latency_ms(schedule), abs=2 * TOKEN_STEP_MS)


def test_points_outside_the_space_are_brought_into_it() -> None:
    space = space_of(methods=("evit",), locations=(2,))
    config = PruneConfig.model_validate(
        {"model": SMALL, "method": "hybrid", "sites": [{"block": 0, "op": "merge", "keep_ratio": 0.9}]}
    )
    params = space.params_of(config)
    assert params["method"] == "evit"
    for name, distribution in space.distributions.items():
        assert distribution._contains(distribution.to_internal_repr(params[name])), name


def test_a_latency_bound_limits_what_is_aimed_at() -> None:
    bounded = space_of(max_latency_ms=0.6 * SPACE.dense_ms)
    assert bounded.max_share == pytest.approx(0.6)
    impossible = space_of(max_latency_ms=0.01 * SPACE.dense_ms)
    assert impossible.max_share == impossible.min_share
    impossible.config({**quasi_random(SPACE.distributions, 0, 1), "share": impossible.min_share})


def test_a_quantile_of_the_variances_becomes_ppts_threshold() -> None:
    variances = Variances(by_block={0: [1.0, 2.0, 3.0, 4.0], 1: [10.0, 20.0, 30.0, 40.0]})
    assert variances.threshold(0.0, [0]) == 1.0
    assert variances.threshold(0.5, [0, 1]) == pytest.approx(16.5)
    assert variances.threshold(1.0, [1]) == 40.0
    assert variances.threshold(0.5, []) == pytest.approx(16.5)


def test_methods_that_fit_into_no_memory_are_left_out() -> None:
    def in_little_memory_ms(schedule: TokenSchedule) -> float:
        return math.inf if schedule.method == "tome" else latency_ms(schedule)

    known = ScheduleSpace(SMALL, SPACE.geometry, SearchSpace(), latency_ms=in_little_memory_ms, variances=VARIANCES)
    assert known.methods == tuple(method for method in METHODS if method != "tome")
    assert known.min_share == pytest.approx(
        min(latency_ms(SPACE.most_reduced(m)) for m in known.methods) / SPACE.dense_ms
    )
    choice = known.distributions["method"]
    assert isinstance(choice, CategoricalDistribution) and "tome" not in choice.choices
    merged = SPACE.config(point(3, "tome"))
    assert known.params_of(merged)["share"] == known.max_share
    with pytest.raises(ConfigError, match="None of the methods evit, ppt.* fits into memory"):
        ScheduleSpace(SMALL, SPACE.geometry, SearchSpace(), latency_ms=lambda schedule: math.inf, variances=VARIANCES)


def test_models_without_a_class_token_merge() -> None:
    space = space_of(NO_CLASS_TOKEN, methods=("tome",), variances=None)
    config = space.config(quasi_random(space.distributions, 0, 3))
    assert config.method == "tome"
    assert config.sites
