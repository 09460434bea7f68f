"""What a table task asks of the building of a table."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from latency_tables.build import BuildSettings, settings_for
from latency_tables.schema import LatencyTable
from tests.acceptance.seeding import MODEL, latency_table
from workers import profiling
from workers.tasks import TaskContext, TaskSpec


def settings_of(monkeypatch: pytest.MonkeyPatch, **payload: Any) -> BuildSettings:
    """What the task would measure on a CPU, eagerly."""
    asked: list[BuildSettings | None] = []

    def build(*_: Any, settings: BuildSettings | None, **__: Any) -> LatencyTable:
        asked.append(settings)
        return latency_table()

    monkeypatch.setattr(profiling, "build_table", build)
    payload = {"model": MODEL.model_dump(mode="json"), "batch_size": 1, **payload}
    spec = TaskSpec(id="t", kind="table", device="cpu", payload=payload)
    value = profiling.run_table(payload, TaskContext(spec, send=lambda event: None))
    assert value["table"]["format"] == "prunefront/latency-table/1"
    return asked[0] or settings_for(torch.device("cpu"), "eager")


def test_a_quick_table_takes_fewer_token_counts_reductions_and_whole_models(monkeypatch: pytest.MonkeyPatch) -> None:
    quick, full = settings_of(monkeypatch, detail="quick"), settings_of(monkeypatch, detail="full")
    assert quick.max_token_counts < full.max_token_counts
    assert len(quick.reduction_tokens) * len(quick.reduction_removed) < (
        len(full.reduction_tokens) * len(full.reduction_removed)
    )
    assert quick.num_whole_models < full.num_whole_models


def test_a_quick_compiled_table_is_the_full_one_which_is_sparse(monkeypatch: pytest.MonkeyPatch) -> None:
    quick, full = (settings_of(monkeypatch, runtime="compile", detail=detail) for detail in ("quick", "full"))
    assert quick == full


def test_a_table_is_a_full_one_unless_somebody_asks_for_less(monkeypatch: pytest.MonkeyPatch) -> None:
    assert settings_of(monkeypatch) == settings_of(monkeypatch, detail="full")
