"""Builds and validations in which some parts, or whole models, do not fit into memory."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from latency_tables import build as build_module
from latency_tables import validate as validate_module
from latency_tables.errors import ExceedsMemoryError, LatencyTableError
from latency_tables.measure import Subject
from latency_tables.parts import MASKED_ATTENTION, AttentionHalf, ReducingBlock
from latency_tables.predict import predict_latency_ms
from latency_tables.validate import validate_table
from prunefront.compress import compress
from prunefront.config import PruneConfig, Site
from tests.integration.latency_tables.test_build import FEW_REDUCTIONS, ONCE, WorkStopwatch, build
from tests.integration.latency_tables.test_probe import compiled_table
from tests.unit.latency_tables.fakes import TINY

CUDA = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
CPU = RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you")
DENSE = PruneConfig(model=TINY, method="hybrid")


def config_of(method: str, *sites: dict[str, Any]) -> PruneConfig:
    return PruneConfig(model=TINY, method=method, sites=tuple(Site(**site) for site in sites))


@dataclasses.dataclass
class Exhausted:
    """Lets parts of a class run out of memory where a condition holds, and counts how often."""

    times: int = 0

    def inject(
        self, patch: pytest.MonkeyPatch, kind: type[nn.Module], where: Callable[[Any, Tensor], bool], error: Exception
    ) -> None:
        forward = kind.forward

        def guarded(part: nn.Module, x: Tensor) -> Any:
            if where(part, x):
                self.times += 1
                raise error
            return forward(part, x)

        patch.setattr(kind, "forward", guarded)


@pytest.fixture
def exhausted() -> Exhausted:
    return Exhausted()


@pytest.mark.parametrize("error", [CUDA, CPU])
def test_parts_that_do_not_fit_are_marked_and_the_build_goes_on(
    monkeypatch: pytest.MonkeyPatch,
    exhausted: Exhausted,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
) -> None:
    exhausted.inject(monkeypatch, ReducingBlock, lambda part, x: part.kind.name == "tome.merge", error)
    exhausted.inject(
        monkeypatch, AttentionHalf, lambda part, x: part.entry == MASKED_ATTENTION and x.shape[1] > 9, error
    )
    path = tmp_path / "partial.jsonl"

    with caplog.at_level(logging.WARNING):
        table = build(partial_path=path)

    assert {one.key for one in table.unfit_entries} == {
        ("block.tome.merge", 17, 15), ("block.tome.merge", 17, 10), ("attention.masked", 17, 17),
    }  # fmt: skip
    assert all("ran out of memory at batch size 2 in fp32 on" in (one.reason or "") for one in table.unfit_entries)
    assert f"3 of {len(table.entries)} entries ran out of memory" in caplog.text
    # What fits is as in any other table, and has its correction; nothing that was measured for it merges as ToMe does.
    assert table.correction.num_models == 5
    prune = config_of("evit", {"block": 1, "op": "prune", "tokens": 8})
    assert 0 < predict_latency_ms(table, prune) < predict_latency_ms(table, DENSE)
    with pytest.raises(ExceedsMemoryError, match="Block 1 needs 'block.tome.merge'.* at batch size 2 on .*smaller"):
        predict_latency_ms(table, config_of("tome", {"block": 1, "op": "merge", "tokens": 9}))
    # Whoever resumes does not try again.
    tried = exhausted.times
    assert build(partial_path=path).entries == table.entries
    assert exhausted.times == tried
    report = validate_table(table, num_schedules=6, settings=ONCE, patience=None, stopwatch=WorkStopwatch())
    assert report.num_schedules == 6
    assert report.mape < 0.02
    assert "tome" not in {point.config.method for point in report.points}


def test_token_counts_are_refined_towards_where_memory_ends(
    monkeypatch: pytest.MonkeyPatch, exhausted: Exhausted, caplog: pytest.LogCaptureFixture
) -> None:
    exhausted.inject(monkeypatch, AttentionHalf, lambda part, x: x.shape[1] > 11, CUDA)
    settings = dataclasses.replace(FEW_REDUCTIONS, max_token_counts=7)

    with caplog.at_level(logging.WARNING):
        table = build(settings=settings)

    states = {one.tokens_in: one.state for one in table.entries_by_name["attention"]}
    # 2, 8 and 17 tokens first, then the middles 5 and 12, then 10 of the gap in which memory ends.
    assert states == {2: "ok", 5: "ok", 8: "ok", 10: "ok", 12: "out_of_memory", 17: "out_of_memory"}
    assert {one.tokens_in for one in table.entries_by_name["mlp"] if one.median_ms is None} == {12, 17}
    with pytest.raises(ExceedsMemoryError, match="'attention' on 17 tokens.*it fits up to 10 tokens"):
        predict_latency_ms(table, DENSE)
    # The dense model of smaller images fits; none of this size does, so none is measured.
    assert predict_latency_ms(table, DENSE.evolve(model=TINY.model_copy(update={"img_size": 16}))) > 0
    assert table.correction.num_models == 0
    assert "The table goes without a correction: Block 0 needs 'attention' on 17 tokens" in caplog.text
    with pytest.raises(ExceedsMemoryError, match="The model needs 'attention' on 17 tokens"):
        validate_table(table, num_schedules=2, settings=ONCE, patience=None, stopwatch=WorkStopwatch())


def test_a_compiled_table_is_made_of_the_parts_that_fit(monkeypatch: pytest.MonkeyPatch, exhausted: Exhausted) -> None:
    unfit = {"block.tome.merge", "block.hybrid.prune+merge"}
    exhausted.inject(monkeypatch, ReducingBlock, lambda part, x: part.kind.entry in unfit, CPU)
    table = compiled_table()
    assert {one.entry for one in table.unfit_entries} == unfit
    assert table.correction.num_models == 2  # The dense model and one that prunes; the third merges.
    assert predict_latency_ms(table, config_of("evit", {"block": 1, "op": "prune", "tokens": 8})) > 0
    merge = {"block": 1, "op": "merge", "tokens": 9}
    both = config_of("hybrid", {"block": 1, "op": "prune", "tokens": 12}, merge)
    for config, entry in ((config_of("tome", merge), "block.tome.merge"), (both, "block.hybrid.prune.merge")):
        with pytest.raises(ExceedsMemoryError, match=f"Block 1 needs '{entry}'"):
            predict_latency_ms(table, config)


def test_a_compiled_table_of_which_no_block_fits_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, exhausted: Exhausted
) -> None:
    exhausted.inject(monkeypatch, AttentionHalf, lambda part, x: True, CUDA)
    with pytest.raises(LatencyTableError, match="Every part of the model ran out of memory. Choose a smaller"):
        compiled_table()


class CrowdedStopwatch(WorkStopwatch):
    """A device that runs out of memory in some samples."""

    def __init__(self, fails: Callable[[int], bool], error: Exception = CUDA) -> None:
        super().__init__()
        self._fails, self._error = fails, error

    def sample(self, subject: Subject) -> list[tuple[str, float]]:
        if self._fails(self.num_samples + 1):
            self.num_samples += 1
            raise self._error
        return super().sample(subject)


def test_parts_that_fit_one_by_one_are_measured_so() -> None:
    whole = WorkStopwatch()
    expected = build(stopwatch=whole)
    for at in (5, 30, 40, round(0.6 * whole.num_samples), whole.num_samples - 2):  # warming up, sampling, whole models
        table = build(stopwatch=CrowdedStopwatch(lambda number, at=at: number == at))  # type: ignore[misc]
        assert not table.unfit_entries
        assert [(one.key, one.median_ms) for one in table.entries] == [
            (one.key, pytest.approx(one.median_ms)) for one in expected.entries
        ]
        assert table.correction.num_models == 5


def test_a_device_on_which_no_part_fits_gets_no_table(tmp_path: Path) -> None:
    # Three samples warm the dense model up.
    for _ in range(2):  # and again from what the first attempt left
        with pytest.raises(LatencyTableError, match="Every part of the model ran out of memory. Choose a smaller"):
            build(stopwatch=CrowdedStopwatch(lambda number: number > 3), partial_path=tmp_path / "partial.jsonl")


def drop_from_memory(patch: pytest.MonkeyPatch, module: Any, fits: Callable[[PruneConfig], bool]) -> list[PruneConfig]:
    """Let whole models run out of memory; returns the configs that were tried all the same, as they come."""
    tried: list[PruneConfig] = []

    def compressed(model: nn.Module, config: PruneConfig) -> nn.Module:
        if fits(config):
            return compress(model, config)
        tried.append(config)
        raise CPU

    patch.setattr(module, "compress", compressed)
    return tried


def test_whole_models_that_do_not_fit_are_left_out_of_the_correction(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fitting: list[str] = []

    def only_the_first_two(config: PruneConfig) -> bool:
        if len(fitting) < 2 and config.content_hash() not in fitting:
            fitting.append(config.content_hash())
        return config.content_hash() in fitting

    tried = drop_from_memory(monkeypatch, build_module, only_the_first_two)
    path = tmp_path / "partial.jsonl"
    with caplog.at_level(logging.WARNING):
        table = build(partial_path=path)
    assert table.correction.num_models == 3  # of five, the dense model among them
    assert caplog.text.count("ran out of memory and is left out of the correction") == 2
    assert len({config.content_hash() for config in tried}) == 2
    tried.clear()
    assert build(partial_path=path).correction == table.correction
    assert not tried


def test_whole_models_that_do_not_fit_are_left_out_of_a_validation(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    table = build()
    drop_from_memory(monkeypatch, validate_module, lambda config: config.method != "evit")
    with caplog.at_level(logging.WARNING):
        report = validate_table(
            table, num_schedules=4, methods=["evit", "tome"], settings=ONCE, patience=None, stopwatch=WorkStopwatch()
        )
    assert report.num_schedules == 2
    assert {point.config.method for point in report.points} == {"tome"}
    assert caplog.text.count("is left out") == 2
    with pytest.raises(ExceedsMemoryError, match="None of 2 held-out schedules of .* fits into memory at batch size 2"):
        validate_table(
            table, num_schedules=2, methods=["evit"], settings=ONCE, patience=None, stopwatch=WorkStopwatch()
        )


@pytest.mark.parametrize("error", [CUDA, CPU])
def test_a_dense_model_that_does_not_fit_is_one_sentence(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    sentence = "'vit_tiny_patch16_224' does not fit into the memory of cpu at batch size 2 in fp32. Choose a smaller"
    with pytest.raises(LatencyTableError, match=sentence):
        build(stopwatch=CrowdedStopwatch(lambda number: True, error))

    def fails(spec: Any) -> nn.Module:
        raise error

    monkeypatch.setattr(build_module, "create_dense", fails)
    with pytest.raises(LatencyTableError, match=sentence):
        build()
