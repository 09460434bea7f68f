"""Tasks as plain data, and what a running task may report."""

from __future__ import annotations

import json
from typing import Any

import pytest

from workers.child import describe_failure
from workers.tasks import TASK_KINDS, FailureCause, TaskContext, TaskSpec, TaskStopped

SPEC = TaskSpec(id="t", kind="evaluate", device="cpu", payload={"entries": [1, None, "x"]}, timeout_s=2.5)


def test_a_spec_survives_json() -> None:
    assert TaskSpec.from_json(json.loads(json.dumps(SPEC.to_json()))) == SPEC


def test_there_is_a_body_for_every_kind_of_design() -> None:
    assert set(TASK_KINDS) == {"table", "measure", "evaluate", "finetune", "calibrate"}


def test_progress_in_quick_succession_is_dropped_except_the_last_step() -> None:
    sent: list[dict[str, Any]] = []
    context = TaskContext(SPEC, send=sent.append)
    for done in range(1, 1001):
        context.progress(done, 1000, "working")
    assert [event["done"] for event in sent] == [1.0, 1000.0]


def test_every_item_is_sent() -> None:
    sent: list[dict[str, Any]] = []
    context = TaskContext(SPEC, send=sent.append)
    for number in range(3):
        context.item(str(number), {"n": number})
    assert [event["key"] for event in sent] == ["0", "1", "2"]


def test_a_task_ends_where_it_asks_whether_to_stop() -> None:
    asked = False
    context = TaskContext(SPEC, send=lambda event: None, should_stop=lambda: asked)
    context.stop_if_asked()
    asked = True
    with pytest.raises(TaskStopped):
        context.stop_if_asked()


def test_failures_are_told_apart_by_what_they_mean_for_another_try() -> None:
    import torch

    from latency_tables.errors import LatencyTableError
    from prunefront.errors import CheckpointError, FileWriteError

    causes = {
        MemoryError(): FailureCause.OUT_OF_MEMORY,
        torch.OutOfMemoryError("CUDA out of memory."): FailureCause.OUT_OF_MEMORY,
        RuntimeError(
            "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."
        ): FailureCause.OUT_OF_MEMORY,
        CheckpointError("It does not fit."): FailureCause.INPUT,
        LatencyTableError("Other hardware."): FailureCause.INPUT,
        FileWriteError("The disk is full."): FailureCause.ERROR,
        ValueError("a fault of ours"): FailureCause.ERROR,
    }
    assert {error: describe_failure(error).cause for error in causes} == causes


def test_a_failure_without_words_still_says_something() -> None:
    assert describe_failure(MemoryError()).message == "MemoryError"
