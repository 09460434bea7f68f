"""Tables of compiled models: all parts in one graph that reads the clock between them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import cast

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code

import prunefront.runtimes
from latency_tables.build import build_table, settings_for
from latency_tables.measure import Lap, WallStopwatch
from latency_tables.parts import (
    MASKED_ATTENTION,
    REDUCTION_KINDS,
    AttentionHalf,
    Frame,
    Head,
    MlpHalf,
    ReducingBlock,
    Stem,
)
from latency_tables.predict import predict_latency_ms
from latency_tables.probe import CALL, FEED, IDLE, IDLE_LAPS, Probe, Stage, timed_by
from latency_tables.schema import LatencyTable
from latency_tables.validate import validate_table
from prunefront.compress import create_dense
from prunefront.config import PruneConfig
from prunefront.runtimes import CompiledForward, EagerForward
from tests.integration.latency_tables.test_build import ONCE, WorkStopwatch
from tests.unit.latency_tables.fakes import TINY

CPU = torch.device("cpu")
LAPS = [CALL, FEED, *[IDLE] * IDLE_LAPS, "stem", FEED, "attention", "mlp", FEED, "few", FEED, "head"]


def probe() -> Probe:
    torch.manual_seed(0)
    model = cast(VisionTransformer, create_dense(TINY).eval())
    frame, blocks = Frame.of(model), model.blocks
    stages = [
        Stage(tokens=17, parts=(("attention", AttentionHalf(blocks[0], frame)), ("mlp", MlpHalf(blocks[0], frame)))),
        Stage(tokens=5, parts=(("few", MlpHalf(blocks[1], frame)),)),
        Stage(tokens=17, parts=(("head", Head(model)),)),
    ]
    return Probe(Stem(model), stages).eval()


def compiled_table() -> LatencyTable:
    """Of a device whose latency is its work, and a compiler that changes nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(prunefront.runtimes.RUNTIMES, "compile", EagerForward)
        settings = dataclasses.replace(settings_for(CPU, "compile"), blocks=ONCE, patience=None)
        return build_table(TINY, runtime="compile", batch_size=2, settings=settings, stopwatch=WorkStopwatch())


@pytest.fixture(scope="module")
def table() -> LatencyTable:
    return compiled_table()


def test_a_probe_times_every_part_once() -> None:
    subject, images = probe(), torch.randn(2, 3, 32, 32)

    def run(lap: Lap) -> None:
        with timed_by(lap, subject.lap_names), torch.inference_mode():
            subject(images)

    laps = WorkStopwatch().sample(run)
    assert [name for name, _ in laps] == subject.lap_names == LAPS
    ms = dict(laps)
    mlp = 2 * 17 * 2 * 2 * 48 * 4 * 48 / 1e5  # Two operations per multiply-accumulate.
    assert ms["mlp"] == pytest.approx(mlp + 1e-3)
    assert ms["few"] == pytest.approx(mlp * 5 / 17 + 1e-3)
    assert ms[IDLE] == pytest.approx(1e-3)


def reducing_probe(*kinds: str) -> Probe:
    model = cast(VisionTransformer, create_dense(TINY).eval())
    stages = []
    for name in kinds:
        kind = REDUCTION_KINDS[name]
        steps = kind.steps(17, 0.25, 1)
        assert steps is not None and steps[-1].tokens_out == 13
        part = ReducingBlock(model.blocks[0], kind, steps, Frame.of(model)).eval()
        stages.append(Stage(tokens=17, parts=((name, part),)))
    return Probe(Stem(model), stages).eval()


def test_a_probe_uses_what_a_reduction_leaves_for_the_next_block(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[tuple[int, ...]] = []

    def read(done: Tensor, source: Tensor, index: int, also: Sequence[Tensor] = ()) -> None:
        used.extend(tuple(tensor.shape) for tensor in also)

    monkeypatch.setattr("latency_tables.opaque.read_clock", read)
    with torch.inference_mode():
        reducing_probe("evit.prune", "tome.merge", "trilevel.prune:connections")(torch.randn(2, 3, 32, 32))
    assert used == [(2, 13), (2, 1, 13, 13)]  # Sizes of merged tokens; a mask of connections.


@pytest.mark.compile
@pytest.mark.slow
def test_a_compiler_computes_what_a_reduction_leaves_before_the_clock_is_read() -> None:
    """It had computed masks of connections later, so that tables charged Tri-Level's attention level nothing."""
    subject = reducing_probe("trilevel.prune:connections")
    with torch.inference_mode():
        _, codes = run_and_get_code(torch.compile(subject, fullgraph=True), torch.randn(2, 3, 32, 32))
    marks = re.findall(r"ops\.aten\.(topk)\.default\(|ops\.prunefront\.(lap)\.default\(", codes[0])
    order = "".join("t" if topk else "|" for topk, _ in marks)
    assert order == "|" * (len(subject.lap_names) - 1) + "tt|"  # Patches that stay, then connections.


@pytest.mark.compile
@pytest.mark.slow
def test_a_compiler_does_not_know_the_mask_that_attention_is_timed_under() -> None:
    """One that knew it to leave all open would leave it out."""
    model = cast(VisionTransformer, create_dense(TINY).eval())
    part, x = AttentionHalf(model.blocks[0], Frame.of(model), MASKED_ATTENTION), torch.randn(2, 17, 48)
    with torch.inference_mode():
        expected = part(x)
        attended, codes = run_and_get_code(torch.compile(part, fullgraph=True), x)
        torch.testing.assert_close(attended, expected, atol=1e-5, rtol=1e-5)
    assert "prunefront.use" in codes[0] or "prunefront::use" in codes[0]


@pytest.mark.compile
@pytest.mark.slow
def test_a_compiled_probe_reads_the_clock_in_order_and_computes_the_same() -> None:
    subject, images = probe(), torch.randn(2, 3, 32, 32)
    before = images.clone()
    with torch.inference_mode():
        forward = CompiledForward(subject, CPU)
        forward(images)

        def run(lap: Lap) -> None:
            with timed_by(lap, subject.lap_names):
                forward(images)

        laps = WallStopwatch().sample(run)
        torch.testing.assert_close(forward(images), subject(images), atol=1e-5, rtol=1e-5)
    assert [name for name, _ in laps] == LAPS
    assert torch.equal(images, before)


def test_a_compiled_table_holds_all_reductions_but_those_that_cost_what_another_does(table: LatencyTable) -> None:
    names = {name for name in table.entries_by_name if name.startswith("block.")}
    assert names == {
        "block.evit.prune", "block.evit.fuse", "block.tome.merge", "block.ppt.pool_or_prune",
        "block.diffrate.merge_mean", "block.hybrid.prune+merge", "block.hybrid.fuse+merge",
        "block.dynamicvit.select", "block.spvit.select", "block.trilevel.prune:connections",
    }  # fmt: skip
    assert {"stem", "head", "attention", "attention.sized", "attention.masked", "mlp"} <= set(table.entries_by_name)
    assert {entry.tokens_in for entry in table.entries_by_name["attention"]} == {2, 4, 8, 17}
    assert (table.runtime, table.correction.num_models) == ("compile", 3)


def test_halves_are_timed_behind_a_block_on_as_many_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first block on another number of tokens takes longer; reductions are charged that, not the blocks after."""
    stages: list[Stage] = []

    def probe_of(stem: nn.Module, made: Sequence[Stage]) -> Probe:
        stages.extend(made)
        return Probe(stem, made)

    monkeypatch.setattr("latency_tables.build.Probe", probe_of)
    compiled_table()
    laps = [[name.split(" ")[0] for name, _ in stage.parts] for stage in stages]
    assert laps.count([FEED, FEED, "attention", "mlp"]) == 4
    assert laps.count([FEED, FEED, "attention.masked"]) == laps.count([FEED, FEED, "attention.sized"]) == 2
    assert [FEED, "block.tome.merge"] in laps


def test_a_whole_block_is_charged_its_mlp(table: LatencyTable) -> None:
    by_key = {entry.key: entry.median_ms for entry in table.entries}
    (merge,) = (entry for entry in table.entries if (entry.entry, entry.tokens_in) == ("block.tome.merge", 17))
    mlp = 2 * merge.tokens_out * 2 * 2 * 48 * 4 * 48 / 1e5
    assert merge.median_ms - by_key["attention", 17, 17] - mlp == pytest.approx(0.0, abs=0.3 * mlp)


def test_compiled_models_of_all_methods_are_predicted_on_a_device_without_noise(table: LatencyTable) -> None:
    assert table.dense_ms is not None
    assert predict_latency_ms(table, PruneConfig(model=TINY, method="hybrid")) == pytest.approx(
        table.dense_ms, rel=0.01
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(prunefront.runtimes.RUNTIMES, "compile", EagerForward)
        report = validate_table(
            table, num_schedules=15, seed=1, settings=ONCE, patience=None, stopwatch=WorkStopwatch()
        )
    assert len({point.config.method for point in report.points}) >= 5
    assert report.mape < 0.03
    assert report.kendall_tau is not None and report.kendall_tau > 0.9
