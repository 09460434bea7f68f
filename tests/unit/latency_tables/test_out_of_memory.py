"""What ran out of memory is freed, kept by tables and their CSV, drawn by no schedule, and refused by predictions."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from latency_tables.correction import Correction
from latency_tables.csv_import import COLUMNS, export_csv, parse_csv
from latency_tables.device import DeviceInfo
from latency_tables.errors import ExceedsMemoryError, LatencyTableError, UnmeasuredTokensError
from latency_tables.keep_ratios import keep_ratios_within
from latency_tables.out_of_memory import if_it_fits
from latency_tables.partial import FinishedGroup, PartialFile, rescaled
from latency_tables.plot import render_table
from latency_tables.predict import check_table_matches, predict, predict_latency_ms, predictor_of
from latency_tables.reach import Reach
from latency_tables.schedules import random_configs
from latency_tables.schema import LatencyEntry, LatencyTable, WeightMemory, parse_table
from prunefront.config import PruneConfig, Site
from prunefront.geometry import geometry_for
from prunefront.schedule import plan_schedule
from tests.unit.latency_tables.fakes import DEVICE, TINY, entry, simple_table

REASON = "ran out of memory at batch size 8 on Abacus 3000"
DENSE = PruneConfig(model=TINY, method="hybrid")
CPU = torch.device("cpu")


def without(*keys: tuple[str, int, int], **changes: Any) -> LatencyTable:
    """`simple_table` where these entries ran out of memory."""
    kept = [one for one in simple_table().entries if one.key not in keys]
    return simple_table(entries=[*kept, *(LatencyEntry.unfit(key, REASON) for key in keys)], **changes)


def config_of(method: str, *sites: dict[str, Any], **options: Any) -> PruneConfig:
    return PruneConfig(model=TINY, method=method, sites=tuple(Site(**site) for site in sites), options=options)


# --- freed ---------------------------------------------------------------------------------------------------------


class Buffer:
    """Something large that, as compiled models do, refers to itself."""

    def __init__(self) -> None:
        self.itself = self


def test_what_runs_out_of_memory_holds_none_afterwards() -> None:
    held: list[weakref.ref[Buffer]] = []

    def run() -> None:
        buffer = Buffer()
        held.append(weakref.ref(buffer))
        raise torch.OutOfMemoryError("CUDA out of memory.")

    assert if_it_fits(run, CPU) is None
    assert held[0]() is None


def test_what_fits_is_returned_and_other_errors_pass() -> None:
    assert if_it_fits(lambda: 7, CPU) == 7
    with pytest.raises(ZeroDivisionError):
        if_it_fits(lambda: 1 // 0, CPU)


# --- kept ----------------------------------------------------------------------------------------------------------


def test_an_entry_has_a_latency_or_the_reason_why_not() -> None:
    with pytest.raises(ValueError, match="'mlp' at 9 -> 9 tokens is 'ok' with a median of None ms"):
        LatencyEntry(entry="mlp", tokens_in=9, tokens_out=9, median_ms=None, samples=0)
    with pytest.raises(ValueError, match="is 'out_of_memory' with a median of 1.0 ms"):
        LatencyEntry(entry="mlp", tokens_in=9, tokens_out=9, median_ms=1.0, state="out_of_memory", reason=REASON)
    with pytest.raises(ValueError, match="of 0 samples"):
        LatencyEntry(entry="mlp", tokens_in=9, tokens_out=9, median_ms=1.0, samples=0)
    with pytest.raises(ValueError, match="without a reason"):
        LatencyEntry.unfit(("mlp", 9, 9), "")


def test_unfit_entries_survive_the_file_and_are_not_noise() -> None:
    table = without(("mlp", 17, 17))
    assert parse_table(table.model_dump(mode="json")) == table
    assert [one.key for one in table.unfit_entries] == [("mlp", 17, 17)]
    assert table.noisy_entries == ()
    assert set(table.latencies_ms["mlp"]) == {(2, 2), (9, 9)}


def test_unfit_entries_survive_the_csv() -> None:
    text = export_csv(without(("block.tome.merge", 17, 15)))
    assert "block.tome.merge,17,15,8,out_of_memory,,\n" in text
    parsed = {one.key: one for one in parse_csv(text).entries}
    assert parsed["block.tome.merge", 17, 15].state == "out_of_memory"
    assert parsed["block.tome.merge", 17, 9].median_ms == 2.0 * 17 + 3.0 * 9 + 4.0


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        ("attention,17,17,8,2.5,0.1,30\nmlp,17,17,8,out_of_memory,,\n", "no mlp lines"),
        ("attention,17,17,8,out_of_memory,0.1,30\n", "line 2: .*iqr_ms and samples should be empty"),
    ],
)
def test_a_csv_that_timed_nothing_or_contradicts_itself_is_refused(lines: str, sentence: str) -> None:
    with pytest.raises(LatencyTableError, match=sentence):
        parse_csv(f"{','.join(COLUMNS)}\n{lines}")


def test_unfit_entries_are_drawn_as_such() -> None:
    picture = render_table(without(("mlp", 17, 17), ("block.tome.merge", 17, 15)), "svg").decode()
    assert picture.count("out of memory") == 2  # in the legends of both panels
    assert "out of memory" not in render_table(simple_table(), "svg").decode()


def test_a_partial_file_remembers_what_ran_out_of_memory(tmp_path: Path) -> None:
    path = tmp_path / "partial.jsonl"
    evit = config_of("evit", {"block": 1, "op": "prune", "tokens": 8})
    unfit = FinishedGroup(
        canary_ms=None, entries=(LatencyEntry.unfit(("mlp", 17, 17), REASON),), unfit_models=(evit,), seconds=2.0
    )
    timed = FinishedGroup(canary_ms=10.0, entries=(entry("mlp", 9, 9, 4.0),))
    written = PartialFile(path, {"model": "tiny"})
    written.append(unfit)
    written.append(timed)
    groups = PartialFile(path, {"model": "tiny"}).groups
    assert groups == [unfit, timed]
    # Nothing was timed in the first group, so it has no say in how fast the machine was.
    canary_ms, entries, _ = rescaled(groups)
    assert canary_ms == 10.0
    assert [one.median_ms for one in entries] == [None, 4.0]


def test_a_partial_file_from_before_is_read(tmp_path: Path) -> None:
    path = tmp_path / "partial.jsonl"
    PartialFile(path, {}).append(FinishedGroup(canary_ms=10.0, entries=(entry("mlp", 9, 9, 4.0),)))
    path.write_text(path.read_text().replace(', "unfit_models": []', ""))
    assert "unfit" not in path.read_text()
    assert PartialFile(path, {}).groups[0].unfit_models == ()


# --- predicted -----------------------------------------------------------------------------------------------------


def test_a_point_fits_where_something_fitted_that_needs_as_much() -> None:
    reach = Reach(fitted=[(9, 8), (9, 5), (17, 9)], failed=[(17, 15)])
    assert reach.covers(9, 8) and reach.covers(7, 7) and reach.covers(17, 9) and reach.covers(14, 6)
    assert not reach.covers(17, 15) and not reach.covers(17, 12) and not reach.covers(10, 9)
    assert reach.covers(20, 8) and not reach.covers(20, 19)  # beyond all that were tried: as the most of them
    assert reach.max_tokens == 9


def test_a_failure_below_what_fits_is_an_accident() -> None:
    assert Reach(fitted=[(17, 17)], failed=[(9, 9)]).covers(9, 9)
    table = without(("mlp", 9, 9))
    assert predict_latency_ms(table, DENSE) == predict_latency_ms(simple_table(), DENSE)
    between = config_of("evit", {"block": 0, "op": "prune", "tokens": 8})
    # The MLP at 9 tokens is interpolated between 2 and 17, which is exact in this table.
    assert predict_latency_ms(table, between) == pytest.approx(predict_latency_ms(simple_table(), between))


def test_nothing_ran_out_of_memory_where_nothing_says_so() -> None:
    with pytest.raises(UnmeasuredTokensError) as caught:
        predict_latency_ms(simple_table(), DENSE.evolve(model=TINY.model_copy(update={"img_size": 48})))
    assert not isinstance(caught.value, ExceedsMemoryError)


@pytest.mark.parametrize("half", ["attention", "mlp"])
def test_more_tokens_than_fitted_are_refused_and_fewer_are_predicted(half: str) -> None:
    table = without((half, 17, 17))
    with pytest.raises(
        ExceedsMemoryError,
        match=f"Block 0 needs '{half}' on 17 tokens, which ran out of memory at batch size 8 on Abacus 3000 .table "
        "'synthetic'; it fits up to 9 tokens.. Choose a smaller batch size or fewer tokens.",
    ):
        predict_latency_ms(table, DENSE)
    smaller = DENSE.evolve(model=TINY.model_copy(update={"img_size": 16}))
    assert predict_latency_ms(table, smaller) == predict_latency_ms(simple_table(), smaller)
    geometry = geometry_for(TINY)
    where: dict[str, Any] = {"device_info": DEVICE, "runtime": "eager", "dtype": "fp32", "batch_size": 8}
    with pytest.raises(ExceedsMemoryError, match="The model needs .* on 17 tokens"):
        check_table_matches(table, geometry=geometry, **where)


def test_a_reduction_that_did_not_fit_is_refused_and_others_are_predicted() -> None:
    table = without(("block.tome.merge", 17, 15), ("block.tome.merge", 17, 9))
    merge = config_of("tome", {"block": 1, "op": "merge", "tokens": 8}, prop_attn=False)
    with pytest.raises(ExceedsMemoryError, match="Block 1 needs 'block.tome.merge' on 17 -> 9 tokens.*up to 9 tokens"):
        predict_latency_ms(table, merge)
    prune = {"block": 0, "op": "prune", "tokens": 8}
    assert predict_latency_ms(table, config_of("evit", prune)) == predict_latency_ms(
        simple_table(), config_of("evit", prune)
    )
    # After pruning, few enough tokens are left to merge.
    both = config_of("hybrid", prune, {"block": 1, "op": "merge", "tokens": 5}, prop_attn=False)
    assert predict_latency_ms(table, both) == predict_latency_ms(simple_table(), both)


def test_a_reduction_that_fitted_nowhere_is_not_replaced_by_one_alike() -> None:
    points = ((17, 15), (17, 9), (9, 8), (9, 5))
    table = simple_table(
        entries=[*simple_table().entries, *(LatencyEntry.unfit(("block.hybrid.merge", *at), REASON) for at in points)]
    )
    with pytest.raises(ExceedsMemoryError, match="'block.hybrid.merge' on 17 -> 9 tokens.*at no token count"):
        predict_latency_ms(table, config_of("hybrid", {"block": 1, "op": "merge", "tokens": 8}))


def test_a_bias_that_did_not_fit_is_refused_where_it_is_needed() -> None:
    sized = [entry("attention.sized", 9, 9, 18.5), LatencyEntry.unfit(("attention.sized", 17, 17), REASON)]
    table = simple_table(entries=[*simple_table().entries, *sized])
    few, many = ({"block": 0, "op": "merge", "tokens": at} for at in (8, 12))
    assert predict(table, config_of("tome", few, prop_attn=True)).blocks[1].attention_ms == pytest.approx(18.5)
    with pytest.raises(ExceedsMemoryError, match="Block 1 needs 'attention.sized' on 13 tokens"):
        predict_latency_ms(table, config_of("tome", many, prop_attn=True))
    assert predict_latency_ms(table, config_of("tome", many, prop_attn=False)) > 0


@pytest.mark.parametrize("end", [("stem", 16, 17), ("head", 17, 1)])
def test_a_stem_or_head_that_did_not_fit_is_refused(end: tuple[str, int, int]) -> None:
    with pytest.raises(ExceedsMemoryError, match=f"The model needs '{end[0]}' on 17 tokens"):
        predict_latency_ms(without(end), DENSE)


def test_a_table_in_which_no_block_fits_predicts_nothing() -> None:
    table = without(*(("mlp", at, at) for at in (2, 9, 17)))
    with pytest.raises(LatencyTableError, match="'mlp' ran out of memory at every token count, at batch size 8"):
        predictor_of(table)


def test_corrections_and_memory_of_what_fits_are_as_before() -> None:
    changes: dict[str, Any] = {
        "correction": Correction(intercept_ms=3.0, num_models=2), "weights": WeightMemory(block_mib=1.0, rest_mib=1.0),
    }  # fmt: skip
    prune = config_of("evit", {"block": 0, "op": "prune", "tokens": 8})
    assert predict(without(("block.tome.merge", 17, 9), **changes), prune) == predict(simple_table(**changes), prune)


def test_keep_ratios_are_chosen_among_what_fits() -> None:
    selections = [
        entry("block.dynamicvit.select", 17, t_out, 5.0 * t_out + 7.0) for t_out in (9, 5)
    ]  # The attention sees t_out tokens.
    unfit = LatencyEntry.unfit(("block.dynamicvit.select", 17, 15), REASON)
    table = simple_table(entries=[*simple_table().entries, *selections, unfit])
    config = config_of("dynamicvit", {"block": 0, "op": "select", "keep_ratio": 0.5})
    # 13 of 17 tokens would meet the limit, but only from 9 on did it fit.
    chosen = keep_ratios_within(config, lambda one: predict_latency_ms(table, one), 6.0 + 7.0 + 5.0 * 3 * 13)
    assert plan_schedule(chosen).blocks[-1].tokens_out == 9


# --- drawn ---------------------------------------------------------------------------------------------------------


def cost_by(table: LatencyTable) -> Any:
    return lambda config: predict_latency_ms(table, config)


def test_schedules_that_do_not_fit_are_not_drawn() -> None:
    table = without(("block.tome.merge", 17, 15), ("block.tome.merge", 17, 9))
    configs = random_configs(TINY, geometry_for(TINY), 12, 0, methods=["evit", "tome"], cost=cost_by(table))
    assert {config.method for config in configs} == {"evit"}
    shares = sorted(predict_latency_ms(table, config) / predict_latency_ms(table, DENSE) for config in configs)
    assert shares[0] < 0.5 and shares[-1] > 0.85


def test_what_fits_only_on_few_tokens_is_drawn_where_few_are_left() -> None:
    merges = [entry("block.diffrate.merge_mean", 9, at, 2.0 * 9 + 3.0 * at + 4.0) for at in (8, 5)]
    unfit = [LatencyEntry.unfit(("block.diffrate.merge_mean", 17, at), REASON) for at in (15, 9)]
    table = simple_table(entries=[*simple_table().entries, *merges, *unfit])
    configs = random_configs(TINY, geometry_for(TINY), 12, 0, methods=["diffrate"], cost=cost_by(table))
    merging = [config for config in configs if any(site.op == "merge_mean" for site in config.sites)]
    assert merging
    for config in merging:
        merged = [block for block in plan_schedule(config).blocks if any(s.op == "merge_mean" for s in block.steps)]
        assert all(block.tokens_entering <= 9 for block in merged)


def test_nothing_is_drawn_where_nothing_fits() -> None:
    with pytest.raises(ExceedsMemoryError, match="Block 0 needs 'mlp' on 17 tokens"):
        random_configs(TINY, geometry_for(TINY), 3, 0, methods=["evit"], cost=cost_by(without(("mlp", 17, 17))))
    table = without(("block.tome.merge", 17, 15), ("block.tome.merge", 17, 9))
    with pytest.raises(ExceedsMemoryError, match="Every schedule that was drawn of tome .*smaller batch size"):
        random_configs(TINY, geometry_for(TINY), 3, 0, methods=["tome"], cost=cost_by(table))


def test_the_sentence_names_the_device_of_the_table() -> None:
    phone = without(("mlp", 17, 17), device=DeviceInfo(kind="other", name="Pixel 9"))
    with pytest.raises(ExceedsMemoryError, match="at batch size 8 on Pixel 9"):
        predict_latency_ms(phone, DENSE)
