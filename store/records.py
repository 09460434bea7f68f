"""What the store hands out: frozen records, detached from any database session. Timestamps are aware UTC."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, TypeAlias

JsonObject: TypeAlias = dict[str, Any]


class JobState(enum.StrEnum):
    """Where a job stands."""

    QUEUED = "queued"
    """Waits for a controller; the only state that can be claimed."""

    RUNNING = "running"
    """A controller holds its lease."""

    PAUSED = "paused"
    """Waits for a person to resume it."""

    SUCCEEDED = "succeeded"
    """Ended with a result."""

    FAILED = "failed"
    """Ended with a failure; may be retried."""

    CANCELLED = "cancelled"
    """Ended on request; may be retried."""

    @property
    def is_finished(self) -> bool:
        """Whether nothing more happens to the job by itself."""
        return self in FINISHED_STATES


FINISHED_STATES = frozenset({JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED})


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far the current stage of a job is."""

    done: float = 0.0
    # 0 while the size of the stage is unknown.
    total: float = 0.0
    message: str = ""


@dataclass(frozen=True, kw_only=True)
class JobRecord:
    """A job as stored at one moment."""

    id: str
    kind: str
    name: str
    tags: tuple[str, ...]
    # Higher runs first; equal priorities run in order of submission.
    priority: int
    # The body as submitted.
    spec: JsonObject
    state: JobState
    stage: str | None
    progress: Progress
    # Why a queued or running job does not move, e.g. that no worker offers its device.
    waiting_reason: str | None
    # type, message, cause, traceback, ... of a failed job.
    failure: JsonObject | None
    result: JsonObject | None
    cancel_requested: bool
    pause_requested: bool
    # How often the job was claimed.
    attempts: int
    # How often in a row its lease expired without a new result in between.
    times_lost: int
    # Grows with every claim; writes that carry an older number are refused.
    fence: int
    lease_owner: str | None
    lease_expires_at: datetime | None
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    updated_at: datetime


@dataclass(frozen=True, kw_only=True)
class EventRecord:
    """Something that happened to a job; ids grow in the order of commits within a job."""

    id: int
    job_id: str
    type: str
    payload: JsonObject
    created_at: datetime


@dataclass(frozen=True, kw_only=True)
class EvaluationRecord:
    """An accuracy of a candidate on a number of images of one split."""

    id: int
    job_id: str
    number: int
    fidelity: str
    split: str
    dataset: str
    num_images: int
    # Shares, 0-1.
    top1: float
    top5: float | None
    # None where it was not finite.
    loss: float | None
    # Interval of top1, 0-1.
    ci_low: float | None
    ci_high: float | None
    details: JsonObject
    created_at: datetime


@dataclass(frozen=True, kw_only=True)
class MeasurementRecord:
    """A latency of a candidate, measured end to end on a device."""

    id: int
    job_id: str
    number: int
    stage: str
    device: str
    runtime: str
    dtype: str
    batch_size: int
    median_ms: float
    iqr_ms: float
    # Dense latency of the same session divided by this one.
    speedup: float | None
    dense_ms: float | None
    # "ok" or "noisy".
    state: str
    details: JsonObject
    created_at: datetime


@dataclass(frozen=True, kw_only=True)
class CandidateRecord:
    """One schedule of a job with every number known about it."""

    job_id: str
    number: int
    config: JsonObject
    config_hash: str
    label: str
    # dense, published, resolution, sibling or sampler.
    origin: str
    params: JsonObject
    predicted_ms: float | None
    macs: int | None
    state: str
    note: str | None
    created_at: datetime
    updated_at: datetime
    evaluations: tuple[EvaluationRecord, ...] = field(default=())
    measurements: tuple[MeasurementRecord, ...] = field(default=())


@dataclass(frozen=True, kw_only=True)
class ArtifactRecord:
    """A file that belongs to a job or to one of its candidates."""

    id: int
    job_id: str
    number: int | None
    kind: str
    path: str
    sha256: str
    # Bytes.
    size: int
    created_at: datetime


@dataclass(frozen=True, kw_only=True)
class TableRecord:
    """A latency table with the key under which searches find it."""

    id: str
    name: str
    device_name: str
    # Of the device: hardware and threads.
    fingerprint: str
    # Of the transformer blocks the table covers.
    block_key: str
    runtime: str
    dtype: str
    batch_size: int
    # Where it came from: a job id, "import", "push", ...
    source: str
    document: JsonObject
    created_at: datetime


@dataclass(frozen=True, kw_only=True)
class DeviceRecord:
    """A device that jobs may name."""

    id: str
    name: str
    kind: str
    info: JsonObject
    created_at: datetime
    updated_at: datetime
