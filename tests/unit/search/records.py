"""Records as the store would return them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from prunefront.config import PruneConfig
from store.records import CandidateRecord, EvaluationRecord, JobRecord, JobState, MeasurementRecord, Progress
from tests.unit.search.spaces import SMALL

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def job_record() -> JobRecord:
    return JobRecord(
        id="job", kind="search", name="job", tags=(), priority=0, spec={"device": "cpu", "batch_size": 4},
        state=JobState.SUCCEEDED, stage="done", progress=Progress(), waiting_reason=None, failure=None, result=None,
        cancel_requested=False, pause_requested=False, attempts=1, times_lost=0, fence=1, lease_owner=None,
        lease_expires_at=None, created_at=NOW, started_at=NOW, finished_at=NOW, updated_at=NOW,
    )  # fmt: skip


def evaluation(top1: float, fidelity: str = "evaluated", split: str = "test") -> EvaluationRecord:
    return EvaluationRecord(
        id=1, job_id="job", number=0, fidelity=fidelity, split=split, dataset="digit-scenes", num_images=100, top1=top1,
        top5=1.0, loss=0.1, ci_low=top1 - 0.01, ci_high=top1 + 0.01, details={}, created_at=NOW,
    )  # fmt: skip


def measured(ms: float, state: str = "ok", *, later: int = 0, dense_ms: float = 100.0) -> MeasurementRecord:
    return MeasurementRecord(
        id=1, job_id="job", number=0, stage=f"stage {later}", device="cpu", runtime="eager", dtype="fp32", batch_size=4,
        median_ms=ms, iqr_ms=1.0, speedup=dense_ms / ms, dense_ms=dense_ms, state=state, details={},
        created_at=NOW + timedelta(seconds=later),
    )  # fmt: skip


def candidate(
    number: int,
    evaluations: Any = (),
    measurements: Any = (),
    *,
    origin: str = "sampler",
    block: int = 1,
    predicted_ms: float = 50.0,
) -> CandidateRecord:
    sites = [] if origin == "dense" else [{"block": block, "op": "fuse", "tokens": 20 + number}]
    config = PruneConfig.model_validate({"model": SMALL, "method": "evit", "sites": sites})
    return CandidateRecord(
        job_id="job", number=number, config=config.to_dict(), config_hash=config.content_hash(), label=f"c{number}",
        origin=origin, params={}, predicted_ms=predicted_ms, macs=1000, state="proposed", note=None, created_at=NOW,
        updated_at=NOW, evaluations=tuple(evaluations), measurements=tuple(measurements),
    )  # fmt: skip
