import gc
import logging
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from latency_tables import predict as predict_module
from latency_tables.errors import LatencyTableError
from latency_tables.parts import REDUCTION_KINDS, gives_sizes, kind_name, measured_kinds
from latency_tables.predict import (
    check_table_matches,
    predict,
    predict_distribution,
    predict_latency_ms,
    predictor_of,
)
from latency_tables.schema import Correction, LatencyTable
from prunefront.config import ModelSpec, PruneConfig, Site
from prunefront.geometry import geometry_for
from prunefront.macs import carries_sizes
from prunefront.registry import get_method
from prunefront.schedule import BlockSchedule, Step, TokenSchedule, plan_schedule
from tests.unit.latency_tables.fakes import DEVICE, NO_CLASS_TOKEN, TINY, entry, simple_table, table_of

TABLE = simple_table()
DENSE = PruneConfig(model=TINY, method="hybrid")


def config_of(method: str, *sites: dict[str, Any], **options: Any) -> PruneConfig:
    return PruneConfig(model=TINY, method=method, sites=tuple(Site(**site) for site in sites), options=options)


def schedule_of(*tokens: int) -> TokenSchedule:
    """Plain blocks of the given token counts."""
    blocks = tuple(BlockSchedule(index=index, tokens_in=at, tokens_out=at) for index, at in enumerate(tokens))
    options = tuple(get_method("hybrid").parse_options({}).items())
    return TokenSchedule(method="hybrid", options=options, num_prefix_tokens=1, blocks=blocks)


def test_the_dense_model_is_the_sum_of_its_parts() -> None:
    assert predict_latency_ms(TABLE, DENSE) == pytest.approx(5.0 + 3 * 17 * (2.0 + 3.0) + 1.0)


def test_a_config_may_come_as_a_document() -> None:
    config = config_of("evit", {"block": 1, "op": "fuse", "tokens": 4})
    assert predict_latency_ms(TABLE, config.to_dict()) == predict_latency_ms(TABLE, config)


def test_a_schedule_is_looked_up_at_its_exact_tokens() -> None:
    config = config_of("evit", {"block": 1, "op": "prune", "tokens": 8})
    # 17 -> 17, 17 -> 9 with 4 ms for the reduction, 9 -> 9; the head was measured at 17 tokens alone.
    expected = 5.0 + 17 * 5.0 + (17 * 2.0 + 4.0 + 9 * 3.0) + 9 * 5.0 + 1.0
    assert predict_latency_ms(TABLE, config) == pytest.approx(expected)
    assert predict_latency_ms(TABLE, plan_schedule(config)) == pytest.approx(expected)


@given(st.lists(st.integers(2, 17), min_size=1, max_size=12))
def test_blocks_add_up(tokens: list[int]) -> None:
    table = TABLE.model_copy(update={"entries": tuple(e for e in TABLE.entries if e.entry in ("attention", "mlp"))})
    assert predict_latency_ms(table, schedule_of(*tokens)) == pytest.approx(5.0 * sum(tokens))


@given(
    st.lists(st.floats(0.0, 5.0), min_size=4, max_size=4),
    st.lists(st.tuples(st.integers(2, 17), st.integers(0, 15)), min_size=1, max_size=6),
)
def test_more_tokens_never_cost_less_when_the_table_rises(steps: list[float], blocks: list[tuple[int, int]]) -> None:
    heights = [0.5 + sum(steps[: number + 1]) for number in range(4)]
    halves = [
        entry(name, at, at, height)
        for name in ("attention", "mlp")
        for at, height in zip((2, 5, 11, 17), heights, strict=True)
    ]
    table = table_of(halves)
    fewer = schedule_of(*(tokens for tokens, _ in blocks))
    more = schedule_of(*(min(17, tokens + extra) for tokens, extra in blocks))
    assert predict_latency_ms(table, fewer) <= predict_latency_ms(table, more) + 1e-9


def test_a_measured_reducing_block_is_predicted_exactly() -> None:
    halves = [entry(name, at, at, ms * at) for name, ms in (("attention", 1.7), ("mlp", 0.9)) for at in (2, 8, 17)]
    table = table_of([*halves, entry("block.tome.merge", 17, 12, 123.0)])
    config = config_of("tome", {"block": 2, "op": "merge", "remove": 5}, prop_attn=False)
    assert predict_latency_ms(table, config) == pytest.approx(2 * 17 * 2.6 + 123.0)


def test_parts_are_reported_per_block() -> None:
    prediction = predict(TABLE, config_of("evit", {"block": 1, "op": "prune", "tokens": 8}))
    assert [block.reduction_ms for block in prediction.blocks] == pytest.approx([0.0, 4.0, 0.0])
    assert [block.attention_ms for block in prediction.blocks] == pytest.approx([34.0, 34.0, 18.0])
    assert sum(prediction.part_sums.values()) == pytest.approx(prediction.latency_ms)


def test_the_correction_scales_each_part() -> None:
    factors = {"attention": 1.1, "mlp": 0.9, "reduction": 2.0, "rest": 1.0}
    table = simple_table(correction=Correction(intercept_ms=7.0, factors=factors, num_models=5))
    config = config_of("evit", {"block": 1, "op": "prune", "tokens": 8})
    sums = predict(TABLE, config).part_sums
    expected = 7.0 + sum(factors[part] * ms for part, ms in sums.items())
    assert predict_latency_ms(table, config) == pytest.approx(expected)


def test_the_dense_model_is_predicted_as_it_was_measured_and_no_other() -> None:
    table = simple_table(correction=Correction(intercept_ms=7.0, dense_factor=0.9))
    dense, pruned = config_of("hybrid"), config_of("evit", {"block": 1, "op": "prune", "tokens": 8})
    assert predict_latency_ms(table, dense) == pytest.approx(0.9 * (7.0 + predict_latency_ms(TABLE, dense)))
    assert predict_latency_ms(table, pruned) == pytest.approx(7.0 + predict_latency_ms(TABLE, pruned))


def test_proportional_attention_costs_its_bias_only_once_tokens_were_merged() -> None:
    table = simple_table(
        entries=(*TABLE.entries, entry("attention.sized", 9, 9, 18.5), entry("attention.sized", 17, 17, 36.0))
    )
    merge = {"block": 0, "op": "merge", "tokens": 8}
    plain = predict(table, config_of("tome", merge, prop_attn=False))
    proportional = predict(table, config_of("tome", merge, prop_attn=True))
    assert plain.blocks[0] == proportional.blocks[0]
    assert [block.attention_ms for block in proportional.blocks[1:]] == pytest.approx([18.5, 18.5])
    assert [block.attention_ms for block in plain.blocks[1:]] == pytest.approx([18.0, 18.0])


def test_a_kind_that_was_not_measured_is_predicted_by_its_like() -> None:
    site = {"block": 1, "op": "prune", "tokens": 8}
    assert predict_latency_ms(TABLE, config_of("hybrid", site)) == pytest.approx(
        predict_latency_ms(TABLE, config_of("evit", site))
    )


def test_an_operation_that_was_not_measured_is_refused_by_name() -> None:
    config = config_of("diffrate", {"block": 0, "op": "merge_mean", "tokens": 8})
    with pytest.raises(LatencyTableError, match="no entry 'block.diffrate.merge_mean'.*it knows block.evit.fuse"):
        predict_latency_ms(TABLE, config)


# --- learned methods -------------------------------------------------------------------------------------------------


def learned_table(**changes: Any) -> LatencyTable:
    """`simple_table` and 7 ms for a selection, 9 for masking connections, 0.03 a pair of tokens for their mask."""
    points = ((17, 15), (17, 9), (9, 8), (9, 5))
    selections = [
        entry(f"block.{kind}", t_in, t_out, 2.0 * t_out + 3.0 * t_out + 7.0)  # The attention sees t_out tokens.
        for kind in ("dynamicvit.select", "spvit.select")
        for t_in, t_out in points
    ]
    masks = [
        entry("block.trilevel.prune:connections", t_in, t_out, 2.0 * t_in + 0.03 * t_in**2 + 3.0 * t_out + 9.0)
        for t_in, t_out in points
    ]
    masked = [entry("attention.masked", at, at, 2.0 * at + 0.03 * at**2) for at in (2, 17)]
    sized = [entry("attention.sized", at, at, 2.25 * at) for at in (2, 17)]
    return simple_table(entries=[*TABLE.entries, *selections, *masks, *masked, *sized], **changes)


def test_a_selection_comes_before_both_halves() -> None:
    config = config_of("dynamicvit", {"block": 1, "op": "select", "tokens": 8})
    prediction = predict(learned_table(), config)
    assert [block.attention_ms for block in prediction.blocks] == pytest.approx([34.0, 18.0, 18.0])
    assert [block.reduction_ms for block in prediction.blocks] == pytest.approx([0.0, 7.0, 0.0])
    assert [block.mlp_ms for block in prediction.blocks] == pytest.approx([51.0, 27.0, 27.0])


def test_packages_are_tokens_of_the_blocks_that_follow() -> None:
    sites = [{"block": 0, "op": "select", "tokens": 11}, {"block": 2, "op": "select", "tokens": 4}]
    prediction = predict(learned_table(), config_of("spvit", *sites, mode="fixed"))
    # Class token and 11 patches with one package, then 4 with two.
    assert [block.mlp_ms for block in prediction.blocks] == pytest.approx([3.0 * 13, 3.0 * 13, 3.0 * 7])
    assert [block.reduction_ms for block in prediction.blocks] == pytest.approx([7.0, 0.0, 7.0])
    assert not prediction.is_nominal


def test_a_package_may_exceed_the_tokens_that_were_measured() -> None:
    site = {"block": 1, "op": "select", "tokens": 16}
    prediction = predict(learned_table(), config_of("spvit", site, mode="fixed"))
    assert [block.attention_ms for block in prediction.blocks] == pytest.approx([34.0, 36.0, 36.0])  # 18 tokens
    assert [block.mlp_ms for block in prediction.blocks] == pytest.approx([51.0, 54.0, 54.0])


def test_a_selection_from_more_tokens_than_were_measured_is_refused() -> None:
    larger = TINY.model_copy(update={"img_size": 48})
    config = PruneConfig(model=larger, method="dynamicvit", sites=(Site(block=0, op="select", tokens=8),))
    with pytest.raises(LatencyTableError, match="reduction of block 0 works on 37 tokens.* measured for 2 to 17"):
        predict_latency_ms(learned_table(), config)


def merges_and_prunes(**changes: Any) -> LatencyTable:
    """Pruning costs 1 ms per token that enters, merging 0.5 ms."""
    reductions = [
        entry(f"block.{kind}", t_in, t_out, 2.0 * t_in + 3.0 * t_out + ms * t_in)
        for kind, ms in (("evit.prune", 1.0), ("tome.merge", 0.5))
        for t_in, t_out in ((17, 9), (9, 5))
    ]
    plain = [one for one in TABLE.entries if not one.entry.startswith("block.")]
    return simple_table(entries=[*plain, *reductions], **changes)


def test_what_was_not_measured_is_charged_as_what_it_is_made_of() -> None:
    both = [{"block": 1, "op": "prune", "tokens": 12}, {"block": 1, "op": "merge", "tokens": 8}]
    (_, hybrid, _) = predict(merges_and_prunes(), config_of("hybrid", *both)).blocks
    # Pruning of 17 tokens, then merging of the 13 that are left.
    assert hybrid.reduction_ms == pytest.approx(17.0 + 6.5)
    # PPT computes both branches for the same tokens.
    site = {"block": 1, "op": "pool_or_prune", "tokens": 8}
    (_, ppt, _) = predict(merges_and_prunes(), config_of("ppt", site, threshold=7e-5)).blocks
    assert ppt.reduction_ms == pytest.approx(17.0 + 8.5)


def test_what_was_measured_is_not_composed() -> None:
    table = merges_and_prunes()
    measured = entry("block.hybrid.prune+merge", 17, 9, 2.0 * 17 + 3.0 * 9 + 11.0)
    both = [{"block": 1, "op": "prune", "tokens": 12}, {"block": 1, "op": "merge", "tokens": 8}]
    prediction = predict(table.evolve(entries=(*table.entries, measured)), config_of("hybrid", *both))
    assert prediction.blocks[1].reduction_ms == pytest.approx(11.0)


def test_predictors_are_corrected_with_stem_and_head() -> None:
    table = learned_table(correction=Correction(factors={"reduction": 3.0, "rest": 2.0}))
    select = config_of("dynamicvit", {"block": 1, "op": "select", "tokens": 8})
    prune = config_of("evit", {"block": 1, "op": "prune", "tokens": 8})
    plain = learned_table()
    rest = 5.0 + 1.0
    assert predict_latency_ms(table, select) - predict_latency_ms(plain, select) == pytest.approx(rest + 7.0)
    assert predict_latency_ms(table, prune) - predict_latency_ms(plain, prune) == pytest.approx(rest + 2 * 4.0)


def test_masked_connections_cost_attention_in_the_blocks_that_follow() -> None:
    site = {"block": 0, "op": "prune", "tokens": 8}
    masked = predict(learned_table(), config_of("trilevel", site, attn_ratio=0.5))
    assert [block.attention_ms for block in masked.blocks] == pytest.approx([34.0, 18.0 + 2.43, 18.0 + 2.43])
    assert [block.reduction_ms for block in masked.blocks] == pytest.approx([9.0, 0.0, 0.0])
    # Without the attention level it is EViT's pruning.
    assert predict(learned_table(), config_of("trilevel", site)) == predict(TABLE, config_of("evit", site))


def test_masking_costs_the_square_of_the_tokens_left_where_one_share_was_measured() -> None:
    rows = {(17, 13): 1.69, (9, 6): 0.36}  # 0.01 ms a pair.
    masks = [
        entry("block.trilevel.prune:connections", t_in, t_out, 2.0 * t_in + 3.0 * t_out + ms)
        for (t_in, t_out), ms in rows.items()
    ]
    table = simple_table(entries=[*TABLE.entries, *masks])
    for tokens in (9, 16):
        site = {"block": 0, "op": "prune", "tokens": tokens - 1}
        masked = predict(table, config_of("trilevel", site, attn_ratio=0.5))
        assert masked.blocks[0].reduction_ms == pytest.approx(0.01 * tokens**2)


def test_a_table_from_before_learned_methods_names_what_it_lacks() -> None:
    select = {"block": 0, "op": "select", "tokens": 8}
    for method in ("dynamicvit", "spvit"):
        with pytest.raises(LatencyTableError, match=f"no entry 'block.{method}.select'.* Rebuild the table"):
            predict_latency_ms(TABLE, config_of(method, select))
    with pytest.raises(LatencyTableError, match=r"no entry 'block.trilevel.prune:connections'.* Rebuild the table"):
        predict_latency_ms(TABLE, config_of("trilevel", {"block": 0, "op": "prune", "tokens": 8}, attn_ratio=0.5))


def test_methods_are_covered_when_all_their_reductions_are() -> None:
    geometry = geometry_for(TINY)
    # Reductions of ppt and hybrid are made of EViT's and ToMe's.
    assert predictor_of(TABLE).covered_methods(geometry) == ["evit", "tome", "ppt", "hybrid"]
    assert predictor_of(learned_table()).covered_methods(geometry) == [
        "evit", "tome", "ppt", "hybrid", "dynamicvit", "spvit", "trilevel",
    ]  # fmt: skip
    # Without a class token hybrid only merges.
    assert predictor_of(TABLE).covered_methods(geometry_for(NO_CLASS_TOKEN)) == [
        "evit", "tome", "ppt", "diffrate", "hybrid", "trilevel",
    ]  # fmt: skip


# --- counts of each image --------------------------------------------------------------------------------------------

ADAPTIVE = config_of(
    "spvit", {"block": 0, "op": "select", "keep_ratio": 0.7}, {"block": 1, "op": "select", "keep_ratio": 0.5}
)


def test_a_schedule_of_adaptive_counts_is_nominal() -> None:
    assert predict(learned_table(), ADAPTIVE).is_nominal
    fixed = ADAPTIVE.evolve(options={"mode": "fixed"})
    assert predict_latency_ms(learned_table(), ADAPTIVE) == predict_latency_ms(learned_table(), fixed)


@pytest.mark.parametrize("mode", ["adaptive", "bucketed"])
def test_images_that_run_alone_cost_their_own_counts(mode: str) -> None:
    table = learned_table(batch_size=1)
    counts = np.array([[12, 7], [12, 3], [4, 0], [12, 7], [16, 16]])
    distribution = predict_distribution(table, ADAPTIVE.evolve(options={"mode": mode}), counts)
    # Class token and packages: 1 + kept + 1, then 1 + kept + 2 in the last two blocks. 14 ms for two selections, 6 ms
    # for stem and head, 5 ms for each token of a block.
    ms = [20.0 + 5.0 * (first + 2 + 2 * (second + 3)) for first, second in counts.tolist()]
    assert distribution.num_batches == 5
    assert distribution.mean_ms == pytest.approx(sum(ms) / 5)
    assert distribution.p50_ms == pytest.approx(sorted(ms)[2])
    assert distribution.p95_ms == pytest.approx(sorted(ms)[3] + 0.8 * (sorted(ms)[4] - sorted(ms)[3]))


def test_images_of_a_batch_cost_their_own_counts_without_padding() -> None:
    table = learned_table(batch_size=2)
    # The last image fills no batch.
    distribution = predict_distribution(table, ADAPTIVE, np.array([[12, 3], [10, 7], [0, 0]]))
    assert distribution.num_batches == 1
    assert distribution.p50_ms == pytest.approx(20.0 + 5.0 * ((14 + 12) / 2 + 2 * (6 + 10) / 2))
    alike = predict_distribution(table, ADAPTIVE, np.array([[12, 7], [12, 7]]))
    assert alike.mean_ms == alike.p50_ms == alike.p95_ms == pytest.approx(20.0 + 5.0 * (14 + 2 * 10))


def test_batches_differ_where_their_images_do() -> None:
    table = learned_table(batch_size=2)
    distribution = predict_distribution(table, ADAPTIVE, np.array([[12, 7], [0, 0], [16, 16], [12, 7]]))
    small, large = 20.0 + 5.0 * (8 + 2 * 6.5), 20.0 + 5.0 * (16 + 2 * 14.5)
    assert distribution.mean_ms == distribution.p50_ms == pytest.approx((small + large) / 2)
    assert distribution.p95_ms == pytest.approx(small + 0.95 * (large - small))


@pytest.mark.parametrize(
    ("counts", "sentence"),
    [
        ([[12, 7, 3]] * 8, r"shape \(images, 2 sites\), but got \(8, 3\)"),
        ([[12, 7]] * 7, "batches of 8 images, but counts of 7"),
        ([[7, 12]] * 8, "none above the site before"),
        ([[17, 2]] * 8, "0 to 16"),
        ([[3, -1]] * 8, "0 to 16"),
    ],
)
def test_counts_that_are_not_of_the_schedule_are_refused(counts: list[list[int]], sentence: str) -> None:
    with pytest.raises(LatencyTableError, match=sentence):
        predict_distribution(learned_table(), ADAPTIVE, np.array(counts))


def test_a_schedule_that_all_images_keep_has_no_distribution() -> None:
    with pytest.raises(LatencyTableError, match="its latency is a point"):
        predict_distribution(learned_table(), ADAPTIVE.evolve(options={"mode": "fixed"}), np.array([[12, 7]] * 8))


@pytest.mark.parametrize("tokens", [1, 18])
def test_token_counts_outside_the_measured_range_are_refused(tokens: int) -> None:
    with pytest.raises(LatencyTableError, match=f"block 1 works on {tokens} tokens.* measured for 2 to 17. Rebuild"):
        predict_latency_ms(TABLE, schedule_of(17, tokens))


def test_a_model_of_other_blocks_is_refused() -> None:
    other = PruneConfig(model=ModelSpec(name="deit_tiny_patch16_224"), method="hybrid")
    with pytest.raises(LatencyTableError, match="'deit_tiny_patch16_224' is made of .*Build a table for this model"):
        predict_latency_ms(TABLE, other)


def test_the_table_serves_other_depths_and_smaller_images() -> None:
    deeper = TINY.model_copy(update={"kwargs": {**TINY.kwargs, "depth": 5}})
    assert predict_latency_ms(TABLE, PruneConfig(model=deeper, method="hybrid")) == pytest.approx(6.0 + 5 * 85.0)
    smaller = TINY.model_copy(update={"img_size": 16})
    # 5 of 17 tokens: the stem costs in proportion.
    assert predict_latency_ms(TABLE, PruneConfig(model=smaller, method="hybrid")) == pytest.approx(
        5.0 * 5 / 17 + 3 * 25.0 + 1.0
    )


def test_a_table_without_halves_predicts_nothing() -> None:
    with pytest.raises(LatencyTableError, match="no 'mlp' entries"):
        predict_latency_ms(table_of([entry("attention", 17, 17, 1.0)]), DENSE)


def test_a_predictor_lives_as_long_as_its_table() -> None:
    table: LatencyTable | None = simple_table()
    assert table is not None
    key = id(table)
    predict_latency_ms(table, DENSE)
    assert key in predict_module._PREDICTORS
    del table
    gc.collect()
    assert key not in predict_module._PREDICTORS


# --- which reductions a schedule has --------------------------------------------------------------------------------


def step(op: str, kept: int, removed: int) -> Step:
    return Step(op=op, kept=kept, removed=removed, tokens_in=kept + removed + 1, tokens_out=kept + 1)


@pytest.mark.parametrize(
    ("method", "options", "ops", "kind"),
    [
        ("evit", {}, ["fuse"], "evit.fuse"),
        ("ppt", {"threshold": 0}, ["pool_or_prune"], "ppt.prune"),
        ("ppt", {"threshold": None}, ["pool_or_prune"], "ppt.pool"),
        ("ppt", {"threshold": 7e-5}, ["pool_or_prune"], "ppt.pool_or_prune"),
        ("diffrate", {}, ["prune", "merge_mean"], "diffrate.prune+merge_mean"),
        ("hybrid", {"score": "cls"}, ["fuse", "merge"], "hybrid.fuse+merge"),
        ("hybrid", {"score": "cls_value"}, ["fuse", "merge"], "hybrid.fuse+merge:cls_value"),
        ("hybrid", {"score": "cls_value"}, ["merge"], "hybrid.merge"),
        ("dynamicvit", {}, ["select"], "dynamicvit.select"),
        ("spvit", {"mode": "fixed"}, ["select"], "spvit.select"),
        ("spvit", {"mode": "bucketed"}, ["select"], "spvit.select"),
        ("trilevel", {"attn_ratio": 1.0}, ["prune"], "trilevel.prune"),
        ("trilevel", {"attn_ratio": 0.9, "tie": "official"}, ["prune"], "trilevel.prune:connections"),
    ],
)
def test_reductions_are_named_by_what_they_cost(
    method: str, options: dict[str, Any], ops: list[str], kind: str
) -> None:
    assert kind_name(method, options, [step(op, 8, 8) for op in ops]) == kind
    assert kind in REDUCTION_KINDS


@pytest.mark.parametrize("name", REDUCTION_KINDS)
def test_every_kind_knows_its_own_steps_and_name(name: str) -> None:
    kind = REDUCTION_KINDS[name]
    steps = kind.steps(197, 0.4, 1)
    assert steps is not None
    assert kind_name(kind.method, kind.options, steps) == name
    assert steps[0].tokens_in == 197
    assert steps[-1].tokens_out == pytest.approx(119, abs=2)
    method = get_method(kind.method)
    for number, one in enumerate(steps):
        present = one.tokens_in - 1
        assert one.kept >= method.least_kept(one.op, present)
        assert number == 0 or one.tokens_in == steps[number - 1].tokens_out


@pytest.mark.parametrize("name", REDUCTION_KINDS)
def test_sizes_are_told_as_macs_tell_them(name: str) -> None:
    kind = REDUCTION_KINDS[name]
    steps = kind.steps(17, 0.4, 1)
    assert steps is not None
    block = BlockSchedule(index=0, tokens_in=17, tokens_out=steps[-1].tokens_out, steps=steps)
    schedule = TokenSchedule(
        method=kind.method, options=tuple(kind.options.items()), num_prefix_tokens=1, blocks=(block,)
    )
    assert gives_sizes(name, steps) is carries_sizes(schedule)


def test_a_kind_has_no_steps_where_nothing_is_left_to_remove() -> None:
    assert REDUCTION_KINDS["evit.prune"].steps(2, 0.5, 1) is None
    assert REDUCTION_KINDS["evit.fuse"].steps(3, 0.5, 1) is None  # one kept, one fused: nothing is gained


def test_without_a_class_token_only_what_does_not_rank_by_it_is_measured() -> None:
    names = {kind.name for kind in measured_kinds(geometry_for(NO_CLASS_TOKEN))}
    assert names == {"tome.merge", "dynamicvit.select", "spvit.select"}


# --- does the table fit? ---------------------------------------------------------------------------------------------


def check(table: LatencyTable = TABLE, **changes: Any) -> list[str]:
    fields: dict[str, Any] = {
        "device_info": DEVICE, "runtime": "eager", "dtype": "fp32", "batch_size": 8, "geometry": geometry_for(TINY),
    }  # fmt: skip
    return check_table_matches(table, **{**fields, **changes})


def test_a_table_fits_what_it_was_made_for() -> None:
    assert check() == []


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"runtime": "compile"}, "runtime 'eager' instead of 'compile'"),
        ({"dtype": "bf16"}, "dtype 'fp32' instead of 'bf16'"),
        ({"batch_size": 1}, "batch size 8 instead of 1"),
        ({"device_info": DEVICE.model_copy(update={"threads": 4})}, "number of threads 2 instead of 4"),
        ({"device_info": DEVICE.model_copy(update={"name": "Other"})}, "device 'Abacus 3000' instead of 'Other'"),
    ],
)
def test_what_must_match_is_refused_by_name(changes: dict[str, Any], difference: str) -> None:
    with pytest.raises(LatencyTableError, match=f"{difference}.*Build a table here"):
        check(**changes)


def test_other_versions_warn(caplog: pytest.LogCaptureFixture) -> None:
    newer = DEVICE.model_copy(update={"versions": {"torch": "2.9.0"}})
    with caplog.at_level(logging.WARNING):
        warnings = check(device_info=newer)
    assert warnings == ["Table 'synthetic' was measured with torch 2.6.0, but here is 2.9.0."]
    assert "prunefront table validate" in caplog.text


def test_other_blocks_and_larger_images_are_refused() -> None:
    with pytest.raises(LatencyTableError, match="Build a table for this model"):
        check(geometry=geometry_for(ModelSpec(name="deit_tiny_patch16_224")))
    larger = geometry_for(TINY.model_copy(update={"img_size": 64}))
    with pytest.raises(LatencyTableError, match="up to 17 tokens, but the model has 65"):
        check(geometry=larger)
