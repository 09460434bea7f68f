"""An engine without processes: what a task returns is worked out from its payload alone, so runs can be compared."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from latency_tables.device import describe_device
from latency_tables.parts import measured_kinds
from latency_tables.schema import LatencyEntry, LatencyTable
from prunefront.config import ModelSpec, PruneConfig
from prunefront.geometry import block_key, geometry_for
from prunefront.schedule import plan_schedule
from prunefront.training.evaluate import pack_correct
from workers.engines.base import DeviceSlot, Engine, EngineError, EngineEvent, Finished, Item, Progress, Started
from workers.tasks import TaskFailure, TaskResult, TaskSpec, TaskState

NUM_IMAGES = {"search": 40, "test": 40}
TINY = {
    "name": "vit_tiny_patch16_224",
    "img_size": 32,
    "num_classes": 10,
    "kwargs": {"patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3},
}
STUBBORN = TaskFailure(type="RuntimeError", message="The images are upside down.", cause="error", log_tail="upside")
VANISHED = TaskFailure(type="ProcessEnded", message="The task's process was killed by SIGKILL.", cause="signal")


def synthetic_table(spec: ModelSpec, *, runtime: str, dtype: str, batch_size: int) -> LatencyTable:
    """Attention 2 ms a token, MLP 3 ms a token, on this machine's CPU."""
    halves = [
        LatencyEntry(entry=name, tokens_in=at, tokens_out=at, median_ms=ms * at)
        for name, ms in (("attention", 2.0), ("mlp", 3.0))
        for at in (1, 9, 17, 65)
    ]
    geometry = geometry_for(spec)
    reductions = [
        LatencyEntry(
            entry=f"block.{kind.name}", tokens_in=t_in, tokens_out=t_out, median_ms=2.0 * t_in + 3.0 * t_out + 4
        )
        for kind in measured_kinds(geometry)
        for t_in, t_out in ((17, 15), (17, 9), (9, 8), (9, 5))
    ]
    return LatencyTable(
        name="synthetic",
        device=describe_device("cpu"),
        runtime=runtime,
        dtype=dtype,
        batch_size=batch_size,
        block_key=block_key(geometry),
        model=spec,
        created_at=datetime(2026, 1, 1, tzinfo=UTC),
        entries=(*halves, *reductions),
    )


def kept_share(config: PruneConfig) -> float:
    """Mean share of the dense model's tokens that the blocks of a config see."""
    schedule = plan_schedule(config)
    most = schedule.blocks[0].tokens_in
    return sum(block.tokens_in + block.tokens_out for block in schedule.blocks) / (2 * most * len(schedule.blocks))


@dataclass
class FakeEngine(Engine):
    """Runs one task at a time inside `poll`, one event per call."""

    tick: Callable[[], None] = lambda: None  # called before every event is handed out
    noisy_above: float = 2.0  # measurements of configs that keep more than this share are noisy
    lose_after_items: dict[str, list[int]] = field(default_factory=dict)  # kind -> items before each loss
    failures: dict[str, TaskFailure] = field(default_factory=dict)  # kind -> how its tasks fail
    device_names: tuple[str, ...] = ("cpu",)
    unfit_entries: tuple[str, ...] = ()  # names of a table's entries that ran out of memory
    on_item: Callable[[Item], None] = lambda item: None
    submitted: list[TaskSpec] = field(default_factory=list)
    evaluated: list[tuple[str, str]] = field(default_factory=list)  # (split, key) of every item handed out
    running: dict[str, Iterator[EngineEvent]] = field(default_factory=dict)
    cancelled: set[str] = field(default_factory=set)

    def submit(self, spec: TaskSpec) -> None:
        if any(spec.id == earlier.id for earlier in self.submitted):
            raise EngineError(f"Task {spec.id} was submitted twice.")
        self.submitted.append(spec)
        self.running[spec.id] = self._events(spec)

    def poll(self, timeout_s: float) -> list[EngineEvent]:
        for task_id, events in list(self.running.items()):
            self.tick()
            if task_id in self.cancelled:
                del self.running[task_id]
                return [Finished(task_id=task_id, result=TaskResult(task_id=task_id, state=TaskState.CANCELLED))]
            event = next(events)
            if isinstance(event, Finished):
                del self.running[task_id]
            if isinstance(event, Item):
                self.on_item(event)
            return [event]
        return []

    def cancel(self, task_id: str) -> None:
        if task_id in self.running:
            self.cancelled.add(task_id)

    def devices(self) -> list[DeviceSlot]:
        return [DeviceSlot(name=name, kind="cpu", description="Abacus", num_threads=1) for name in self.device_names]

    def close(self) -> list[EngineEvent]:
        self.running.clear()
        return []

    def kinds(self) -> list[str]:
        return [spec.kind for spec in self.submitted]

    def _events(self, spec: TaskSpec) -> Iterator[EngineEvent]:
        def finished(state: TaskState, **fields: Any) -> Finished:
            return Finished(task_id=spec.id, result=TaskResult(task_id=spec.id, state=state, **fields))

        yield Started(task_id=spec.id, device=spec.device, pid=1, num_threads=1, log_path="log")
        if spec.kind in self.failures:
            yield finished(TaskState.FAILED, failure=self.failures[spec.kind])
            return
        losses = self.lose_after_items.get(spec.kind, [])
        patience = losses.pop(0) if losses else None
        items, value = getattr(self, f"_{spec.kind}")(spec.payload)
        todo = deque(items)
        while todo or patience == 0:
            if patience == 0:
                yield finished(TaskState.LOST, failure=replace(VANISHED, log_path="log"))
                return
            key, item = todo.popleft()
            yield Progress(task_id=spec.id, done=1, total=2, message=f"at {key}")
            if spec.kind == "evaluate":
                self.evaluated.append((spec.payload["split"], key))
            yield Item(task_id=spec.id, key=key, value=item)
            patience = None if patience is None else patience - 1
        yield finished(TaskState.SUCCEEDED, value=value)

    def _table(self, payload: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        spec = ModelSpec.model_validate(payload["model"])
        fields = {name: payload[name] for name in ("runtime", "dtype", "batch_size")}
        table = synthetic_table(spec, **fields)
        entries = [
            LatencyEntry.unfit(entry.key, "ran out of memory") if entry.entry in self.unfit_entries else entry
            for entry in table.entries
        ]
        return [], {"table": table.evolve(entries=entries).model_dump(mode="json")}

    def _calibrate(self, payload: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        rows = {str(block): [1e-4 * (1 + block) * (1 + image) for image in range(8)] for block in range(3)}
        return [], {"ppt_variance": rows}

    def _evaluate(self, payload: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        count = payload["num_images"] or NUM_IMAGES[payload["split"]]
        difficulty = (np.arange(count) * 7 % count) / count
        items = []
        for entry in payload["entries"]:
            config = PruneConfig.model_validate(entry["config"])
            bonus = 0.1 if entry["checkpoint"] else 0.0
            if config.model.img_size != payload["model"]["img_size"]:
                bonus -= 0.4  # or no reduction would ever win
            wobble = int(config.content_hash()[-4:], 16) / 0xFFFF
            correct = difficulty < 0.6 + 0.2 * kept_share(config) + 0.04 * wobble + bonus
            items.append((entry["key"], {
                "num_images": count,
                "top1": float(correct.mean()),
                "top5": 1.0,
                "loss": 1.0 - float(correct.mean()),
                "correct": pack_correct(correct),
            }))  # fmt: skip
        return items, {"clusters": None}

    def _measure(self, payload: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        items = []
        for entry in payload["entries"]:
            config = PruneConfig.model_validate(entry["config"])
            dense_tokens = geometry_for(ModelSpec.model_validate(payload["model"])).num_tokens
            share = kept_share(config) * plan_schedule(config).blocks[0].tokens_in / dense_tokens
            items.append((entry["key"], measurement(100.0 * share, "noisy" if share > self.noisy_above else "ok")))
        return items, {"dense": measurement(100.0)}

    def _finetune(self, payload: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        path = Path(payload["checkpoint_dir"]) / "last.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"weights")
        return [], {"checkpoint": str(path), "sha256": hashlib.sha256(b"weights").hexdigest(), "history": []}


def measurement(median_ms: float, state: str = "ok") -> dict[str, Any]:
    """What the measure task reports of one model, beside a dense model of 100 ms."""
    return {
        "median_ms": median_ms,
        "iqr_ms": 0.5,
        "p10_ms": median_ms - 1,
        "p90_ms": median_ms + 1,
        "p99_ms": median_ms + 2,
        "num_samples": 10,
        "canary_ms": 100.0,
        "speedup": 100.0 / median_ms,
        "peak_memory_mib": None,
        "state": state,
        "reason": None,
    }
