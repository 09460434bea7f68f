"""Whole builds on a tiny model, timed by a stopwatch that counts work instead of time, so that every number repeats."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from latency_tables.build import BuildSettings, build_table, settings_for
from latency_tables.csv_import import export_csv, import_csv
from latency_tables.device import describe_device
from latency_tables.errors import LatencyTableError, MeasurementStoppedError
from latency_tables.measure import MeasureSettings, Subject
from latency_tables.parts import REDUCTION_KINDS, AttentionHalf, Frame, ReducingBlock
from latency_tables.plot import plot_table
from latency_tables.predict import predict_distribution, predict_latency_ms
from latency_tables.schema import Correction, LatencyTable, ValidationReport
from latency_tables.validate import validate_table
from prunefront.compress import compress, create_dense
from prunefront.config import ModelSpec, PruneConfig, Site
from prunefront.errors import ModelError, UnknownNameError
from prunefront.geometry import block_key, geometry_for
from prunefront.runtimes import CompiledForward
from prunefront.token_use import TokenCounter
from tests.unit.latency_tables.fakes import NO_CLASS_TOKEN, TINY

# What else runs on this machine does not matter to a stopwatch that counts work.
ONCE = MeasureSettings(warmup_rounds=1, min_rounds=1, max_rounds=1, max_foreign_cores=math.inf)
SETTINGS = BuildSettings(
    token_shares=(0.0, 0.5, 1.0), attention_step=None, max_token_counts=5, least_gap=2, reduction_blocks=1,
    num_whole_models=4, blocks=ONCE, reductions=ONCE, models=ONCE, patience=None,
)  # fmt: skip
FEW_REDUCTIONS = dataclasses.replace(SETTINGS, reduction_tokens=(1.0,))


def _attention_flops(query: Any, key: Any, value: Any, *args: Any, out_val: Any, **kwargs: Any) -> int:
    return int(sdpa_flop_count(query.shape, key.shape, value.shape))


# torch before 2.15 leaves out attention as CPUs do it.
COUNTERS = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops, **flop_registry}


class CountWork(TorchDispatchMode):
    """Floating point operations of matrix products, convolutions and attention."""

    flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        counted = COUNTERS.get(func._overloadpacket)
        if counted is None:
            # In inference mode composite operations (linear, matmul) arrive whole; inside are those that count.
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = func(*args, **kwargs)
        if counted is not None:
            self.flops += counted(*args, **kwargs, out_val=out)
        return out


class WorkStopwatch:
    """A device whose latency is its floating point operations, a millisecond per 10⁵, and 1 µs per lap.

    What it says is exact, so predictions may only be wrong by interpolation.
    """

    def __init__(self) -> None:
        self.num_samples = 0

    def sample(self, subject: Subject) -> list[tuple[str, float]]:
        self.num_samples += 1
        laps: list[tuple[str, float]] = []
        with CountWork() as counter:
            done = 0

            def lap(name: str) -> None:
                nonlocal done
                laps.append((name, (counter.flops - done) / 1e5 + 1e-3))
                done = counter.flops

            subject(lap)
        return laps


def build(
    spec: ModelSpec = TINY,
    *,
    stopwatch: WorkStopwatch | None = None,
    partial_path: Path | None = None,
    progress: Callable[[float, float, str], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    batch_size: int = 2,
    settings: BuildSettings = FEW_REDUCTIONS,
) -> LatencyTable:
    return build_table(
        spec, batch_size=batch_size, partial_path=partial_path, progress=progress, should_stop=should_stop,
        settings=settings, stopwatch=stopwatch or WorkStopwatch(),
    )  # fmt: skip


def validate(
    table: LatencyTable, *, num_schedules: int, seed: int = 0, methods: Sequence[str] | None = None
) -> ValidationReport:
    return validate_table(
        table, num_schedules=num_schedules, seed=seed, methods=methods, settings=ONCE, patience=None,
        stopwatch=WorkStopwatch(),
    )  # fmt: skip


@pytest.fixture(scope="module")
def table() -> LatencyTable:
    return build(settings=SETTINGS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Uninterrupted:
    """A build with few kinds of reductions, and what it reported on the way."""

    table: LatencyTable
    num_samples: int
    reports: list[tuple[float, float, str]]


@pytest.fixture(scope="module")
def uninterrupted() -> Uninterrupted:
    stopwatch = WorkStopwatch()
    reports: list[tuple[float, float, str]] = []
    table = build(stopwatch=stopwatch, progress=lambda *report: reports.append(report))
    return Uninterrupted(table=table, num_samples=stopwatch.num_samples, reports=reports)


def test_a_table_has_halves_ends_and_every_reduction_that_no_other_stands_in_for(table: LatencyTable) -> None:
    names = set(table.entries_by_name)
    assert {"stem", "head", "attention", "attention.sized", "attention.masked", "mlp"} <= names
    assert {name for name in names if name.startswith("block.")} == {
        "block.evit.prune", "block.evit.fuse", "block.tome.merge", "block.ppt.prune", "block.ppt.pool_or_prune",
        "block.diffrate.merge_mean", "block.hybrid.prune+merge", "block.hybrid.fuse+merge",
        "block.dynamicvit.select", "block.spvit.select", "block.trilevel.prune:connections",
    }  # fmt: skip
    assert table.block_key == block_key(geometry_for(TINY))
    assert table.device == describe_device("cpu")
    assert not table.noisy_entries
    assert {entry.tokens_in for entry in table.entries_by_name["mlp"]} >= {2, 8, 17}


def test_entries_are_what_the_device_takes(table: LatencyTable) -> None:
    by_key = {entry.key: entry.median_ms for entry in table.entries}
    width, batch = 48, 2
    # Two operations per multiply-accumulate; an MLP of ratio 4.
    assert by_key["mlp", 17, 17] == pytest.approx(batch * 17 * 2 * 2 * width * 4 * width / 1e5 + 1e-3)
    attention = batch * (17 * 2 * 4 * width * width + 2 * 2 * 17 * 17 * width)
    assert by_key["attention", 17, 17] == pytest.approx(attention / 1e5 + 1e-3)


def test_the_dense_model_is_predicted_as_measured(table: LatencyTable) -> None:
    assert table.dense_ms is not None
    assert predict_latency_ms(table, PruneConfig(model=TINY, method="hybrid")) == pytest.approx(table.dense_ms)
    # On a device without noise the parts say so too.
    assert table.correction.dense_factor == pytest.approx(1.0, abs=0.01)


def test_held_out_schedules_are_predicted_on_a_device_without_noise(table: LatencyTable, tmp_path: Path) -> None:
    report = validate(table, num_schedules=15, seed=1)
    assert report.num_schedules == 15
    assert report.mape < 0.02
    assert report.speedup_mape < 0.02
    assert report.within_10_percent == 1.0
    assert (report.num_remeasured, report.remeasured_mape) == (3, 0.0)
    assert report.kendall_tau is not None and report.kendall_tau > 0.9
    shares = sorted(point.measured_ms / report.dense_ms for point in report.points)
    assert shares[0] < 0.45 and shares[-1] > 0.9
    assert len({point.config.method for point in report.points}) >= 4
    validated = table.evolve(validation=report)
    assert LatencyTable.model_validate(validated.model_dump(mode="json")) == validated
    assert plot_table(validated, tmp_path / "table.png").read_bytes().startswith(b"\x89PNG")


def test_memory_is_told_without_weights_and_compared_with_whole_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("latency_tables.build.peak_memory_mib", lambda run, device, runtime: 3.0)
    monkeypatch.setattr("latency_tables.measure.peak_memory_mib", lambda run, device, model, runtime: 8.0)
    table = build()
    mib, width, mlp_width = 2**20, 48, 4 * 48
    norms = 2 * 2 * width
    block = norms + (width + 1) * 3 * width + (width + 1) * width + (width + 1) * mlp_width + (mlp_width + 1) * width
    # Patch embedding, class token, 17 positions, final norm, classifier.
    rest = (3 * 8 * 8 + 1) * width + width + 17 * width + 2 * width + (width + 1) * 1000
    assert table.weights is not None
    assert table.weights.block_mib == pytest.approx(4 * block / mib)
    assert table.weights.rest_mib == pytest.approx(4 * rest / mib)
    tokens_mib = 2 * 17 * width * 4 / mib
    # Chains make their input themselves, and so do stem and head; a block that reduces is given it.
    by_key = {entry.key: entry.peak_memory_mib for entry in table.entries}
    assert (
        by_key["attention", 17, 17] == by_key["mlp", 17, 17] == by_key["stem", 16, 17] == by_key["head", 17, 1] == 3.0
    )
    assert by_key["block.evit.prune", 17, 15] == pytest.approx(3.0 + tokens_mib)

    report = validate(table, num_schedules=2, methods=["tome"])

    weights_mib = 4 * (3 * block + rest) / mib
    for point in report.points:
        assert point.measured_memory_mib == 8.0
        assert point.predicted_memory_mib is not None
        assert weights_mib + 3.0 <= point.predicted_memory_mib <= weights_mib + 3.0 + tokens_mib
    errors = [1.0 - (point.predicted_memory_mib or 0.0) / 8.0 for point in report.points]
    assert report.memory_mape == pytest.approx(sum(errors) / 2)


def test_a_table_of_a_system_that_does_not_tell_memory_is_built_without(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("build", "measure"):
        monkeypatch.setattr(f"latency_tables.{module}.peak_memory_mib", lambda *_, **__: None)
    table = build()
    assert {entry.peak_memory_mib for entry in table.entries} == {None}
    report = validate(table, num_schedules=1, methods=["tome"])
    assert report.memory_mape is None


@pytest.mark.parametrize("method", ["dynamicvit", "spvit", "trilevel"])
def test_learned_methods_are_predicted_on_a_device_without_noise(table: LatencyTable, method: str) -> None:
    report = validate(table, num_schedules=6, seed=2, methods=[method])
    assert {point.config.method for point in report.points} == {method}
    assert report.mape < 0.02


def test_a_table_without_some_reductions_is_validated_with_the_methods_that_it_knows(table: LatencyTable) -> None:
    older = table.evolve(entries=[entry for entry in table.entries if "select" not in entry.entry])
    report = validate(older, num_schedules=6, seed=2)
    assert not {point.config.method for point in report.points} & {"dynamicvit", "spvit"}


@pytest.mark.parametrize("mode", ["adaptive", "bucketed"])
def test_batches_of_adaptive_images_cost_what_their_counts_predict(table: LatencyTable, mode: str) -> None:
    torch.manual_seed(0)
    sites = tuple(Site(block=block, op="select", keep_ratio=0.6) for block in (0, 2))
    config = PruneConfig(model=TINY, method="spvit", sites=sites, options={"mode": mode, "bucket": 4})
    counter = TokenCounter(compress(create_dense(TINY), config).eval())
    costs_ms = []
    for images in torch.randn(8, 2, 3, 32, 32):  # batches of two, as in the table
        with CountWork() as work, torch.inference_mode():
            counter(images)
        costs_ms.append(work.flops / 1e5)
    counts = counter.counts().numpy()
    assert len(np.unique(counts, axis=0)) > 1  # the selectors do decide per image
    plain = table.evolve(correction=Correction())
    distribution = predict_distribution(plain, config, counts)
    assert distribution.mean_ms == pytest.approx(np.mean(costs_ms), rel=0.02)
    assert distribution.p50_ms == pytest.approx(np.percentile(costs_ms, 50), rel=0.03)
    assert distribution.p95_ms == pytest.approx(np.percentile(costs_ms, 95), rel=0.03)


def test_a_table_that_was_not_validated_is_drawn_without_errors(table: LatencyTable, tmp_path: Path) -> None:
    text = plot_table(table, tmp_path / "table.svg").read_text()
    assert "Whole blocks that reduce" in text
    with pytest.raises(LatencyTableError, match="ends in .png, .svg, .pdf, but got .*table.bmp"):
        plot_table(table, tmp_path / "table.bmp")


def test_an_exported_csv_is_imported_again(table: LatencyTable, tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text(export_csv(table))
    imported = import_csv(path, spec=TINY, device=table.device, runtime="eager", dtype="fp32")
    assert [entry.key for entry in imported.entries] == [entry.key for entry in table.entries]
    config = PruneConfig(model=TINY, method="evit", sites=(Site(block=1, op="fuse", keep_ratio=0.5),))
    plain = table.evolve(correction=imported.correction)
    assert predict_latency_ms(imported, config) == pytest.approx(predict_latency_ms(plain, config))


def test_a_stopped_build_goes_on_where_it_ended(uninterrupted: Uninterrupted, tmp_path: Path) -> None:
    path = tmp_path / "partial.jsonl"
    first, last = WorkStopwatch(), WorkStopwatch()
    with pytest.raises(MeasurementStoppedError):
        build(
            stopwatch=first, partial_path=path,
            should_stop=lambda: first.num_samples > 0.7 * uninterrupted.num_samples,
        )  # fmt: skip
    resumed = build(stopwatch=last, partial_path=path)
    assert last.num_samples < 0.7 * uninterrupted.num_samples
    # It stays until the table is saved: whoever is stopped before that loses nothing.
    again = WorkStopwatch()
    assert build(stopwatch=again, partial_path=path).entries == resumed.entries
    assert again.num_samples < 0.1 * uninterrupted.num_samples
    assert [(entry.key, entry.median_ms) for entry in resumed.entries] == [
        (entry.key, pytest.approx(entry.median_ms)) for entry in uninterrupted.table.entries
    ]


def test_a_partial_file_of_another_build_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "partial.jsonl"
    with pytest.raises(MeasurementStoppedError):
        build(partial_path=path, should_stop=lambda: True)
    with pytest.raises(LatencyTableError, match="batch_size 2 instead of 4"):
        build(partial_path=path, batch_size=4)


def test_progress_rises_to_the_end_and_tells_the_time_left(uninterrupted: Uninterrupted) -> None:
    shares = [done / total for done, total, _ in uninterrupted.reports]
    assert shares == sorted(shares)
    assert shares[0] == 0.0 and shares[-1] == 1.0
    assert any(message.endswith(" left") for _, _, message in uninterrupted.reports)
    assert "measuring block.evit.prune" in " ".join(message for _, _, message in uninterrupted.reports)


def test_models_without_a_class_token_get_a_table_of_what_does_not_rank_by_it() -> None:
    table = build(NO_CLASS_TOKEN, settings=FEW_REDUCTIONS)
    assert {name for name in table.entries_by_name if name.startswith("block.")} == {
        "block.tome.merge", "block.dynamicvit.select", "block.spvit.select",
    }  # fmt: skip
    assert "attention.masked" not in table.entries_by_name
    merging = PruneConfig(model=NO_CLASS_TOKEN, method="hybrid", sites=(Site(block=0, op="merge", remove=3),))
    assert predict_latency_ms(table, merging) > 0


@pytest.mark.parametrize("name", ["vit_small_patch16_dinov3", "vit_small_patch16_rope_mixed_224"])
def test_models_with_rotary_embeddings_get_a_table_that_predicts_them(name: str) -> None:
    spec = TINY.model_copy(update={"name": name})
    table = build(spec)
    assert table.block_key == block_key(geometry_for(spec))
    report = validate(table, num_schedules=5, seed=1)
    assert report.mape < 0.03


def test_what_cannot_be_built_is_refused() -> None:
    with pytest.raises(UnknownNameError, match="Unknown model"):
        build(ModelSpec(name="deit_smal"))
    with pytest.raises(ModelError, match="not supported"):
        build(ModelSpec(name="resnet18"))
    with pytest.raises(LatencyTableError, match="Unknown device"):
        build_table(TINY, device="abacus", batch_size=1)
    with pytest.raises(UnknownNameError, match="Unknown runtime .tensorrt.*imported"):
        build_table(TINY, runtime="tensorrt", batch_size=1, settings=SETTINGS)


def test_a_table_of_another_machine_is_not_validated_here(table: LatencyTable) -> None:
    elsewhere = table.evolve(device=table.device.model_copy(update={"name": "Abacus 3000"}))
    with pytest.raises(LatencyTableError, match="does not fit: it was measured with device 'Abacus 3000'"):
        validate_table(elsewhere, num_schedules=1)


def test_a_real_clock_builds_a_table() -> None:
    table = build_table(TINY, batch_size=1, settings=FEW_REDUCTIONS)
    assert all(entry.median_ms > 0 for entry in table.entries)
    assert table.correction.num_models == 5


def test_samples_take_turns_through_the_blocks_whatever_they_are_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights of a block that another sample has just used would come from the cache."""
    used: list[nn.Module] = []
    for kind in (AttentionHalf, ReducingBlock):

        def noted(part: Any, x: Tensor, forward: Callable[[Any, Tensor], Tensor] = kind.forward) -> Tensor:
            used.append(part.block)
            return forward(part, x)

        monkeypatch.setattr(kind, "forward", noted)
    build(settings=dataclasses.replace(FEW_REDUCTIONS, chain_blocks=2, reduction_blocks=2))
    first = used[:3]
    assert len(set(first)) == 3
    assert len(used) > 100
    assert all(block is first[at % 3] for at, block in enumerate(used))


def test_attention_is_timed_on_both_sides_of_its_steps() -> None:
    settings = dataclasses.replace(FEW_REDUCTIONS, token_shares=(0.0, 1.0), max_token_counts=2, attention_step=8)
    assert settings.step_token_counts(geometry_for(TINY)) == [8, 9, 16, 17]
    # 24 x 24 patches and a class token have 72 steps of 8, of which every fifth is timed.
    large = geometry_for(TINY.model_copy(update={"img_size": 192}))
    assert settings.step_token_counts(large) == [at + side for at in range(40, 577, 40) for side in (0, 1)]
    table = build(settings=settings)
    for half in ("attention", "mlp"):
        assert [entry.tokens_in for entry in table.entries_by_name[half]] == [2, 8, 9, 16, 17]
    batch, width, tokens = 2, 48, 9
    flops = batch * (tokens * 2 * 4 * width * width + 2 * 2 * tokens * tokens * width)
    assert table.latencies_ms["attention"][9, 9] == pytest.approx(flops / 1e5 + 1e-3)


def test_gpus_get_a_dense_grid_and_compiled_tables_a_sparse_one() -> None:
    eager, gpu = settings_for(torch.device("cpu"), "eager"), settings_for(torch.device("cuda"), "eager")
    compiled = settings_for(torch.device("cpu"), "compile")
    deit = geometry_for(ModelSpec(name="deit_small_patch16_224"))

    def first_counts(settings: BuildSettings) -> int:
        return len({*settings.token_counts(deit), *settings.step_token_counts(deit)})

    assert first_counts(compiled) == 5
    assert first_counts(eager) == 24 + 4  # On both sides of twelve steps, and 2, 98, 148 and 197; 49 is a side, too.
    assert first_counts(gpu) > first_counts(eager)
    assert compiled.max_token_counts < eager.max_token_counts < gpu.max_token_counts


@pytest.mark.compile
@pytest.mark.slow
@pytest.mark.parametrize("name", ["evit.prune", "dynamicvit.select", "spvit.select", "trilevel.prune:connections"])
def test_a_reducing_block_compiles_whole(name: str) -> None:
    torch.manual_seed(0)
    model = cast(VisionTransformer, create_dense(TINY).eval())
    kind = REDUCTION_KINDS[name]
    steps = kind.steps(17, 0.3, 1)
    assert steps is not None
    part = ReducingBlock(cast(Block, model.blocks[0]), kind, steps, Frame.of(model)).eval()
    for parameter in part.parameters():  # Scores of a fresh predictor are so close that rounding ranks them.
        torch.nn.init.normal_(parameter, std=0.2)
    x = torch.randn(2, 17, 48)
    with torch.inference_mode():
        torch.testing.assert_close(CompiledForward(part, torch.device("cpu"))(x), part(x), atol=1e-5, rtol=1e-5)
