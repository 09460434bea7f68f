"""Claim: the controller costs at most 50 ms per trial at 1,000 trials, the sampler included.

Runs a whole search job on a SQLite store with the real sampler and an engine that answers at once; the engine's own
time is left out. What is left is the controller: proposing, looking latency up, storing, telling.

    python -m benchmarks.controller_overhead --save

Run it on a machine that does nothing else; the record says how busy it was before.
"""

from __future__ import annotations

import argparse
import cProfile
import os
import pstats
import statistics
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.records import add_output_options, record_for
from latency_tables.device import describe_device
from latency_tables.parts import measured_kinds
from latency_tables.schema import LatencyEntry, LatencyTable
from prunefront.config import ModelSpec, PruneConfig
from prunefront.geometry import block_key, geometry_for
from prunefront.schedule import plan_schedule
from prunefront.training.digit_scenes import num_scenes
from prunefront.training.evaluate import pack_correct
from search.controller import Controller
from search.settings import ControllerSettings
from store import open_store
from workers.engines.base import DeviceSlot, Engine, EngineEvent, Finished, Item, Started
from workers.tasks import TaskResult, TaskSpec, TaskState

CLAIMED_MS = 50.0
SEARCH_IMAGES = 2000  # as many as the demo's split: their results are stored with every candidate
MODEL = ModelSpec(name="digit_vit_patch6_48")
DATASET = "digit-scenes"


class InstantEngine(Engine):
    """Answers every task at once, from its payload; counts the time it takes for that."""

    def __init__(self, table: LatencyTable) -> None:
        self.own_s = 0.0
        self.screened: list[tuple[float, float]] = []  # (seconds of the clock, own seconds until then) of each result
        self._table_document = table.model_dump(mode="json")
        self._waiting: list[TaskSpec] = []

    def submit(self, spec: TaskSpec) -> None:
        self._waiting.append(spec)

    def poll(self, timeout_s: float) -> list[EngineEvent]:
        start_s = time.perf_counter()
        events: list[EngineEvent] = []
        for spec in self._waiting:
            events.append(Started(task_id=spec.id, device=spec.device, pid=0, num_threads=1, log_path=""))
            items, value = self._answer(spec.kind, spec.payload)
            events += [Item(task_id=spec.id, key=key, value=item) for key, item in items]
            result = TaskResult(task_id=spec.id, state=TaskState.SUCCEEDED, value=value)
            events.append(Finished(task_id=spec.id, result=result))
        evaluated = any(spec.kind == "evaluate" and spec.payload["split"] == "search" for spec in self._waiting)
        self._waiting = []
        now_s = time.perf_counter()
        self.own_s += now_s - start_s
        if evaluated:
            self.screened.append((now_s, self.own_s))
        return events

    def cancel(self, task_id: str) -> None:
        self._waiting = [spec for spec in self._waiting if spec.id != task_id]

    def devices(self) -> list[DeviceSlot]:
        return [DeviceSlot(name="cpu", kind="cpu", description="instant", num_threads=1)]

    def close(self) -> list[EngineEvent]:
        return []

    def _answer(self, kind: str, payload: dict[str, Any]) -> tuple[list[tuple[str, dict[str, Any]]], dict[str, Any]]:
        if kind == "table":
            return [], {"table": self._table_document}
        if kind == "calibrate":
            return [], {"ppt_variance": {str(block): [1e-5 * rank for rank in range(1, 257)] for block in range(6)}}
        if kind == "evaluate":
            return [(entry["key"], _evaluation(entry, payload)) for entry in payload["entries"]], {"clusters": None}
        if kind == "measure":
            dense = _measurement(_tokens(PruneConfig(model=MODEL, method="hybrid")))
            return [
                (entry["key"], _measurement(_tokens(PruneConfig.model_validate(entry["config"]))))
                for entry in payload["entries"]
            ], {"dense": dense}
        raise ValueError(f"This benchmark has no task of kind {kind!r}.")


def synthetic_table() -> LatencyTable:
    """A table with as many entries as a measured one; what its numbers are does not matter to the controller."""
    geometry = geometry_for(MODEL)
    counts = range(2, geometry.num_tokens + 1, 3)
    entries = [
        LatencyEntry(entry=name, tokens_in=at, tokens_out=at, median_ms=ms * at)
        for name, ms in (("attention", 0.02), ("mlp", 0.03))
        for at in counts
    ]
    for kind in measured_kinds(geometry):
        for share_in, share_out in ((1.0, 0.9), (1.0, 0.6), (1.0, 0.3), (0.6, 0.5), (0.6, 0.2)):
            t_in, t_out = (1 + round(share * (geometry.num_tokens - 1)) for share in (share_in, share_out))
            ms = 0.02 * t_in + 0.03 * t_out + 0.2
            entries.append(LatencyEntry(entry=f"block.{kind.name}", tokens_in=t_in, tokens_out=t_out, median_ms=ms))
    return LatencyTable(
        name="synthetic",
        device=describe_device("cpu"),
        runtime="eager",
        dtype="fp32",
        batch_size=8,
        block_key=block_key(geometry),
        model=MODEL,
        created_at=datetime(2026, 1, 1, tzinfo=UTC),
        entries=tuple(entries),
    )


def _tokens(config: PruneConfig) -> int:
    return sum(block.tokens_in + block.tokens_out for block in plan_schedule(config).blocks)


def _evaluation(entry: dict[str, Any], payload: dict[str, Any]) -> dict[str, Any]:
    count = payload["num_images"] or num_scenes(payload["split"])
    config = PruneConfig.model_validate(entry["config"])
    share = min(_tokens(config) / _tokens(PruneConfig(model=MODEL, method="hybrid")), 1.0)
    right = 0.99 - 0.3 * (1 - share) ** 2 - 0.02 * int(config.content_hash()[-4:], 16) / 0xFFFF
    correct = (np.arange(count) * 0.6180339887) % 1 < right
    top1 = float(correct.mean())
    return {"num_images": count, "top1": top1, "top5": 1.0, "loss": 1 - top1, "correct": pack_correct(correct)}


def _measurement(tokens: int) -> dict[str, Any]:
    median_ms = tokens / 50
    dense_ms = _tokens(PruneConfig(model=MODEL, method="hybrid")) / 50
    return {
        "median_ms": median_ms, "iqr_ms": 0.1, "p10_ms": median_ms, "p90_ms": median_ms, "p99_ms": median_ms,
        "num_samples": 10, "canary_ms": dense_ms, "speedup": dense_ms / median_ms, "peak_memory_mib": None,
        "state": "ok", "reason": None,
    }  # fmt: skip


def run(trials: int, sampler: str, table: LatencyTable, folder: Path) -> dict[str, Any]:
    """Search once; returns the overhead per trial in milliseconds, over all and by batch."""
    settings = ControllerSettings(data_dir=folder, database_url="")
    engine = InstantEngine(table)
    budget = {"trials": trials, "search_images": SEARCH_IMAGES, "measure_top": 12}
    body = {"kind": "search", "model": {"name": MODEL.name}, "dataset": DATASET, "budget": budget, "sampler": sampler}
    with open_store(f"sqlite:///{folder}/overhead.sqlite3") as store:
        job = store.create_job("search", "overhead", body)
        start_s = time.perf_counter()
        Controller(store, engine, settings).run_once()
        wall_s = time.perf_counter() - start_s
        ended = store.get_job(job.id)
        if ended.state != "succeeded":
            raise RuntimeError(f"The benchmark's job {ended.state}: {ended.failure}")
        candidates = len(store.list_candidates(job.id))
    size = settings.proposals_per_batch
    spans = [
        1e3 * ((later[0] - later[1]) - (earlier[0] - earlier[1])) / size
        for earlier, later in zip(engine.screened, engine.screened[1:], strict=False)
    ]
    tenth = max(len(spans) // 10, 1)
    return {
        "sampler": sampler,
        "trials": trials,
        "candidates": candidates,
        "batch_size": size,
        "wall_s": wall_s,
        "engine_s": engine.own_s,
        "overhead_ms_per_trial": 1e3 * (wall_s - engine.own_s) / trials,
        "median_ms": statistics.median(spans),
        "p10_ms": float(np.percentile(spans, 10)),
        "p90_ms": float(np.percentile(spans, 90)),
        "max_ms": max(spans),
        "first_tenth_ms": statistics.median(spans[:tenth]),
        "last_tenth_ms": statistics.median(spans[-tenth:]),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--sampler", default="auto")
    parser.add_argument("--profile", action="store_true", help="print where the time goes; slows the run down")
    add_output_options(parser)
    arguments = parser.parse_args()
    device = describe_device("cpu")
    record = record_for(parser, arguments, "controller_overhead", device, key=("trials", "sampler"))

    load = os.getloadavg()[0]
    table = synthetic_table()
    profile = cProfile.Profile()
    with tempfile.TemporaryDirectory() as folder:
        if arguments.profile:
            profile.enable()
        measured = run(arguments.trials, arguments.sampler, table, Path(folder))
        profile.disable()
    measured |= {"claimed_ms": CLAIMED_MS, "load_before": load}
    measured["holds"] = measured["overhead_ms_per_trial"] <= CLAIMED_MS
    record.add(measured)
    if arguments.profile:
        pstats.Stats(profile, stream=sys.stderr).sort_stats("cumulative").print_stats(60)
    if arguments.json:
        print(record.as_json())
    else:
        print(
            f"{measured['overhead_ms_per_trial']:.1f} ms per trial over {arguments.trials} trials "
            f"(batches: median {measured['median_ms']:.1f}, 10-90 % {measured['p10_ms']:.1f}-{measured['p90_ms']:.1f}, "
            f"last tenth {measured['last_tenth_ms']:.1f}); claimed <= {CLAIMED_MS:.0f}; load before {load:.2f}"
        )
    return 0 if measured["holds"] else 1


if __name__ == "__main__":
    sys.exit(main())
