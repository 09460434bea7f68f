"""Peak memory by hand: 10 MiB of weights a block and 4 beside them; 2 MiB a token in a block, 6 in the stem, 1 in the
head."""

from __future__ import annotations

from typing import Any

import pytest

from latency_tables.predict import predict
from latency_tables.schema import LatencyEntry, LatencyTable, WeightMemory
from prunefront import create_model
from prunefront.config import PruneConfig, Site
from tests.unit.latency_tables.fakes import TINY, simple_table

WEIGHTS = WeightMemory(block_mib=10.0, rest_mib=4.0)
WEIGHTS_MIB = 3 * 10.0 + 4.0  # of three blocks
MIB = {"stem": 6.0, "head": 1.0}


def figures(*more: tuple[str, int, int, float], **mib: float) -> LatencyTable:
    """`simple_table` with memory; ``more`` entries by name, tokens in and out, and MiB."""
    known = {**MIB, **mib}
    added = [
        LatencyEntry(entry=name, tokens_in=t_in, tokens_out=t_out, median_ms=1.0, peak_memory_mib=at)
        for name, t_in, t_out, at in more
    ]
    replaced = {entry.key for entry in added}
    entries = [
        entry.model_copy(update={"peak_memory_mib": known.get(entry.entry, 2.0 * entry.tokens_in)})
        for entry in simple_table().entries
        if entry.key not in replaced
    ]
    return simple_table(entries=[*entries, *added], weights=WEIGHTS)


def peak_mib(table: LatencyTable, method: str = "hybrid", *sites: dict[str, Any], **options: Any) -> float | None:
    config = PruneConfig(model=TINY, method=method, sites=tuple(Site(**site) for site in sites), options=options)
    return predict(table, config).peak_memory_mib


def test_the_dense_model_needs_its_weights_and_one_block_on_all_tokens() -> None:
    assert peak_mib(figures()) == pytest.approx(WEIGHTS_MIB + 2.0 * 17)


@pytest.mark.parametrize("end", ["stem", "head"])
def test_a_stem_or_head_that_needs_more_than_any_block_decides(end: str) -> None:
    assert peak_mib(figures(**{end: 90.0})) == pytest.approx(WEIGHTS_MIB + 90.0)


def test_a_stem_on_other_tokens_needs_memory_in_proportion() -> None:
    half = PruneConfig(model=TINY.model_copy(update={"img_size": 24}), method="hybrid")  # 9 patches and a class token
    assert predict(figures(stem=170.0), half).peak_memory_mib == pytest.approx(WEIGHTS_MIB + 100.0)


def test_a_reduction_in_the_first_block_replaces_what_a_whole_block_needs() -> None:
    site = {"block": 0, "op": "prune", "tokens": 8}
    assert peak_mib(figures(("block.evit.prune", 17, 9, 21.0)), "evit", site) == pytest.approx(WEIGHTS_MIB + 21.0)
    assert peak_mib(figures(("block.evit.prune", 17, 9, 55.0)), "evit", site) == pytest.approx(WEIGHTS_MIB + 55.0)
    # The hybrid's pruning is EViT's, in memory as in time.
    assert peak_mib(figures(("block.evit.prune", 17, 9, 55.0)), "hybrid", site) == pytest.approx(WEIGHTS_MIB + 55.0)


def test_a_later_reduction_leaves_the_first_block_as_it_was() -> None:
    site = {"block": 1, "op": "prune", "tokens": 8}
    assert peak_mib(figures(("block.evit.prune", 17, 9, 21.0)), "evit", site) == pytest.approx(WEIGHTS_MIB + 34.0)


def test_the_bias_of_proportional_attention_needs_memory_of_its_own() -> None:
    table = figures(("attention.sized", 9, 9, 70.0))
    merge = {"block": 0, "op": "merge", "tokens": 8}
    assert peak_mib(table, "tome", merge, prop_attn=True) == pytest.approx(WEIGHTS_MIB + 70.0)
    assert peak_mib(table, "tome", merge, prop_attn=False) == pytest.approx(WEIGHTS_MIB + 34.0)


def test_a_deeper_model_has_more_weights() -> None:
    deeper = TINY.model_copy(update={"kwargs": {**TINY.kwargs, "depth": 5}})
    predicted = predict(figures(), PruneConfig(model=deeper, method="hybrid"))
    assert predicted.peak_memory_mib == pytest.approx(5 * 10.0 + 4.0 + 34.0)


@pytest.mark.parametrize(("dtype", "num_bytes"), [("fp32", 4), ("bf16", 2)])
def test_score_predictors_of_dynamicvit_weigh_what_their_layers_do(dtype: str, num_bytes: int) -> None:
    sites = ({"block": 1, "op": "select", "tokens": 8}, {"block": 2, "op": "select", "tokens": 4})
    table = figures(("block.dynamicvit.select", 17, 9, 34.0)).evolve(dtype=dtype)
    width = 48  # A norm, then linear layers 48 -> 48 -> 24 -> 12 -> 2 with biases.
    parameters = 2 * width + (width + 1) * 48 + (width + 1) * 24 + (24 + 1) * 12 + (12 + 1) * 2
    expected = WEIGHTS_MIB + 34.0 + 2 * parameters * num_bytes / 2**20
    assert peak_mib(table, "dynamicvit", *sites) == pytest.approx(expected, abs=1e-6)


def test_score_predictors_of_spvit_weigh_what_a_compressed_model_has() -> None:
    site = {"block": 1, "op": "select", "tokens": 8}
    table = figures(("block.spvit.select", 17, 10, 34.0))
    config = PruneConfig(model=TINY, method="spvit", sites=(Site(**site),))
    parts = {name: part for name, part in create_model(config).state_dict().items() if "score_predictor" in name}
    predictor_mib = sum(part.numel() for part in parts.values()) * 4 / 2**20
    assert predictor_mib > 0
    assert predict(table, config).peak_memory_mib == pytest.approx(WEIGHTS_MIB + 34.0 + predictor_mib, abs=1e-6)


def test_a_table_that_does_not_tell_memory_predicts_latency_alone() -> None:
    assert peak_mib(simple_table()) is None
    assert peak_mib(simple_table(weights=WEIGHTS)) is None
    without_weights = figures().evolve(weights=None)
    assert peak_mib(without_weights) is None
    dense = PruneConfig(model=TINY, method="hybrid")
    assert predict(without_weights, dense).latency_ms == predict(figures(), dense).latency_ms
