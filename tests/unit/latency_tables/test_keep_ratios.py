"""Keep ratios for a latency limit, against latencies worked out by hand."""

from functools import partial
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latency_tables.errors import LatencyTableError, UnmeasuredTokensError
from latency_tables.keep_ratios import dense_ms, keep_ratios_within
from latency_tables.predict import predict_latency_ms
from prunefront.config import ModelSpec, PruneConfig, Site
from prunefront.errors import ConfigError
from prunefront.schedule import plan_schedule
from tests.unit.latency_tables.fakes import TINY, entry, simple_table

# The selection itself costs 4 ms wherever it stands; everything else is 5 ms a token and block, and 6 ms at the ends.
PLAIN = simple_table()
TABLE = simple_table(
    entries=[*PLAIN.entries, *(entry(f"block.{name}.select", 17, 17, 89.0) for name in ("dynamicvit", "spvit"))]
)
COST = partial(predict_latency_ms, TABLE)
DENSE_MS = 261.0  # 6 + 3 blocks of 17 tokens


def config_of(method: str, *blocks: int, **changes: Any) -> PruneConfig:
    sites = tuple(Site(block=block, op="select", cumulative_keep_ratio=0.9) for block in blocks)
    return PruneConfig(model=changes.pop("model", TINY), method=method, sites=sites, **changes)


def ratios(config: PruneConfig) -> list[float | None]:
    return [site.cumulative_keep_ratio for site in config.sites]


@pytest.mark.parametrize(
    ("method", "blocks", "limit", "expected"),
    [
        # Before block 1 of 3: 6 + 85 + 4 + 2 blocks of 5 (k + 1) = 105 + 10 k for k = int(16 r) patches.
        ("dynamicvit", [1], 185.0, [0.562]),  # k = 8: the largest thousandth below 9 / 16
        ("dynamicvit", [1], 184.9, [0.499]),  # k = 7
        ("dynamicvit", [1], 260.9, [0.999]),  # k = 15
        # Two sites: 109 + 5 (k1 + k2); 8 + 4 patches of r = 0.5 are too many, 7 + 3 of 0.499 are not.
        ("dynamicvit", [1, 2], 160.0, [0.499, 0.499**2]),
        # A package more in both blocks, 115 + 10 k; k = 16 would be 18 tokens, which were never measured.
        ("spvit", [1], 200.0, [0.562]),
        ("spvit", [1], 260.9, [0.937]),  # k = 14
    ],
)
def test_the_highest_ratios_within_the_limit_are_chosen(
    method: str, blocks: list[int], limit: float, expected: list[float]
) -> None:
    chosen = keep_ratios_within(config_of(method, *blocks), COST, limit)
    assert ratios(chosen) == pytest.approx(expected)
    assert [site.block for site in chosen.sites] == blocks
    assert COST(chosen) <= limit


def test_what_was_known_of_the_old_ratios_is_left_out() -> None:
    config = config_of("spvit", 1, options={"mode": "fixed"}, results={"macs": 1.0})
    chosen = keep_ratios_within(config, COST, 200.0)
    assert chosen.results is None
    assert chosen.options == config.options


def test_the_dense_model_has_no_selection() -> None:
    assert dense_ms(config_of("dynamicvit", 1, 2), COST) == DENSE_MS


@given(st.lists(st.floats(0.0, 300.0), min_size=17, max_size=17), st.floats(0.0, 300.0), st.floats(0.0, 300.0))
def test_a_lower_limit_never_keeps_more_even_by_a_noisy_table(of_kept: list[float], one: float, other: float) -> None:
    def cost(config: PruneConfig) -> float:
        return of_kept[plan_schedule(config).blocks[1].steps[0].kept] if config.sites else 301.0

    def chosen(limit: float) -> float:
        try:
            return ratios(keep_ratios_within(config_of("dynamicvit", 1), cost, limit))[0] or 0.0
        except ConfigError:
            return 0.0

    low, high = sorted((one, other))
    assert chosen(low) <= chosen(high)


def test_a_limit_out_of_reach_is_refused_with_one_that_can_be_met() -> None:
    config = config_of("dynamicvit", 1)
    # One patch stays: 105 + 10.
    with pytest.raises(ConfigError, match=r"blocks 1 bring .* 100 ms: .* down to 115.0 ms, 0.441 of .* 261 ms"):
        keep_ratios_within(config, COST, 100.0)
    assert ratios(keep_ratios_within(config, COST, 0.441 * DENSE_MS)) == [0.124]


def test_a_limit_that_the_dense_model_meets_is_refused() -> None:
    with pytest.raises(ConfigError, match="dense model takes 261 ms by the table, within the limit of 261 ms"):
        keep_ratios_within(config_of("dynamicvit", 1), COST, DENSE_MS)


def test_a_config_without_sites_is_refused() -> None:
    with pytest.raises(ConfigError, match="the config's sites, but it has none"):
        keep_ratios_within(config_of("spvit"), COST, 100.0)


def test_a_table_that_does_not_know_the_selection_is_to_be_rebuilt() -> None:
    with pytest.raises(LatencyTableError, match=r"no entry 'block.spvit.select'.*Rebuild the table"):
        keep_ratios_within(config_of("spvit", 1), partial(predict_latency_ms, PLAIN), 200.0)


def test_a_table_of_other_blocks_or_fewer_tokens_is_refused() -> None:
    wide = ModelSpec(name=TINY.name, img_size=32, kwargs={**TINY.kwargs, "embed_dim": 96})
    with pytest.raises(LatencyTableError, match="Build a table for this model"):
        keep_ratios_within(config_of("spvit", 1, model=wide), COST, 100.0)
    large = ModelSpec(name=TINY.name, img_size=64, kwargs=TINY.kwargs)
    with pytest.raises(LatencyTableError, match="works on 65 tokens, but table 'synthetic' was measured for 2 to 17"):
        keep_ratios_within(config_of("spvit", 1, model=large), COST, 100.0)


def test_a_table_that_reaches_none_of_the_schedules_says_so() -> None:
    def cost(config: PruneConfig) -> float:
        if config.sites:
            raise UnmeasuredTokensError("nothing but 17 tokens was measured")
        return DENSE_MS

    with pytest.raises(UnmeasuredTokensError, match="nothing but 17 tokens"):
        keep_ratios_within(config_of("spvit", 1), cost, 200.0)
