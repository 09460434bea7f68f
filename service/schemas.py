"""Request and response models of the HTTP API; what is not named here does not leave the store."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field

from latency_tables.schema import LatencyTable
from latency_tables.schema import Runtime as TableRuntime
from prunefront import PruneConfig
from prunefront.config import Dtype, StrictModel
from prunefront.schedule import TokenSchedule, plan_schedule
from search.documents import Identifier, Name
from store import CandidateRecord, DeviceRecord, JobRecord, TableRecord

JobKind = Literal["search", "table", "measure"]
JobStateName = Literal["queued", "running", "paused", "succeeded", "failed", "cancelled"]


class PublicModel(BaseModel):
    """Base of what is answered: read from store records, attribute by attribute."""

    model_config = ConfigDict(from_attributes=True)


class Progress(PublicModel):
    """How far the present stage is; ``done`` and ``total`` share a unit that the message names."""

    done: float = 0
    total: float = 0
    message: str = ""


class Failure(PublicModel):
    """Why a job failed."""

    model_config = ConfigDict(from_attributes=True, extra="ignore")

    type: str = "Error"
    message: str = ""
    cause: str | None = None
    log_tail: str | None = None


class JobPublic(PublicModel):
    """A job: what was asked for and how far it is."""

    id: str
    kind: str
    name: str
    tags: tuple[str, ...]
    priority: int
    state: JobStateName
    stage: str | None = Field(description="What a running job is at: build-table, search, measure, ...")
    progress: Progress
    waiting_reason: str | None = Field(description="Why a job that could go on does not.")
    failure: Failure | None
    result: dict[str, Any] | None = Field(description="What the job ended with: for a table job the id of its table.")
    cancel_requested: bool
    pause_requested: bool
    attempts: int
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    updated_at: datetime
    spec: dict[str, Any] = Field(description="The body as submitted, defaults filled in.")

    @classmethod
    def of(cls, record: JobRecord) -> JobPublic:
        return cls.model_validate(record)


class JobPage(BaseModel):
    """One page of jobs, newest first."""

    items: list[JobPublic]
    next_cursor: str | None = Field(description="Pass as `cursor` for the next page; null on the last.")


class EvaluationPublic(PublicModel):
    """One accuracy of a candidate, ratios 0-1, with its origin."""

    fidelity: str
    split: str
    dataset: str
    num_images: int
    top1: float
    top5: float | None
    loss: float | None
    ci_low: float | None
    ci_high: float | None


class MeasurementPublic(PublicModel):
    """One measured latency of a candidate, ms per forward pass of the batch, with its origin."""

    stage: str
    device: str
    runtime: str
    dtype: str
    batch_size: int
    median_ms: float | None
    iqr_ms: float | None
    speedup: float | None = Field(description="Dense over this, from the same interleaved run.")
    dense_ms: float | None
    state: str = Field(description='"ok", or "noisy": stored, but kept off the front.')


def plan_of(record: CandidateRecord) -> TokenSchedule:
    """What a candidate's config does to its tokens."""
    return plan_schedule(PruneConfig.model_validate(record.config))


class TrialPublic(PublicModel):
    """A candidate with every number that is known about it."""

    number: int
    label: str
    origin: str
    state: str
    note: str | None
    config: dict[str, Any] = Field(description="A PruneConfig.")
    config_hash: str
    predicted_ms: float | None = Field(description="From the latency table; never measured.")
    macs: float | None = Field(description="Multiply-accumulates per image.")
    is_nominal: bool = Field(
        description="True where each image keeps counts of its own: predicted_ms and macs are for those of the config."
    )
    evaluations: list[EvaluationPublic]
    measurements: list[MeasurementPublic]

    @classmethod
    def of(cls, record: CandidateRecord) -> TrialPublic:
        return cls._of(record, plan_of(record))

    @classmethod
    def _of(cls, record: CandidateRecord, plan: TokenSchedule, **more: Any) -> Self:
        known = {name: getattr(record, name) for name in cls.model_fields if hasattr(record, name)}
        return cls.model_validate({**known, "is_nominal": not plan.is_static, **more})


class TrialPage(BaseModel):
    """One page of candidates in the order of their numbers."""

    items: list[TrialPublic]
    next_cursor: str | None = Field(description="Pass as `cursor` for the next page; null on the last.")


class BlockTokens(BaseModel):
    """What one block does to the token count, prefix tokens included."""

    block: int
    tokens_in: int
    tokens_out: int
    ops: list[str]


class TrialDetail(TrialPublic):
    """A candidate and its tokens per block."""

    schedule: list[BlockTokens]

    @classmethod
    def of(cls, record: CandidateRecord) -> TrialDetail:
        plan = plan_of(record)
        blocks = [
            BlockTokens(
                block=block.index,
                tokens_in=block.tokens_in,
                tokens_out=block.tokens_out,
                ops=[step.op for step in block.steps],
            )
            for block in plan.blocks
        ]
        return cls._of(record, plan, schedule=blocks)


class TablePublic(PublicModel):
    """A latency table without its entries."""

    id: str
    name: str
    device_name: str
    fingerprint: str
    block_key: str
    runtime: str
    dtype: str
    batch_size: int
    source: str = Field(description="Where it came from: a job, an import, the command line.")
    created_at: datetime

    @classmethod
    def of(cls, record: TableRecord) -> TablePublic:
        return cls.model_validate(record)


class TableDetail(TablePublic):
    """A latency table."""

    document: LatencyTable = Field(description="The table (`prunefront/latency-table/1`).")

    @classmethod
    def of(cls, record: TableRecord) -> TableDetail:
        return cls.model_validate(record)


class TablePage(BaseModel):
    """One page of latency tables, newest first."""

    items: list[TablePublic]
    next_cursor: str | None = Field(description="Pass as `cursor` for the next page; null on the last.")


class PredictRequest(StrictModel):
    """A config whose latency is looked up."""

    config: PruneConfig


class Prediction(BaseModel):
    """A latency from a table, ms per forward pass of the table's batch, and the peak memory of one."""

    table: str
    device: str
    runtime: TableRuntime
    dtype: Dtype
    batch_size: int
    predicted_ms: float
    predicted_memory_mib: float | None = Field(description="Null where the table does not tell memory.")
    is_nominal: bool = Field(
        description="True where each image keeps counts of its own, and predicted_ms is for those of the schedule."
    )


class DeviceCreate(StrictModel):
    """A device that jobs may name before any controller has offered it."""

    id: Identifier
    name: Name
    kind: Literal["cpu", "cuda"]
    info: dict[str, Any] = Field(default_factory=dict, description="Hardware, threads, driver, versions.")


class DevicePublic(PublicModel):
    """A device that jobs may name."""

    id: str
    name: str
    kind: str
    info: dict[str, Any]

    @classmethod
    def of(cls, record: DeviceRecord) -> DevicePublic:
        return cls.model_validate(record)


class Devices(BaseModel):
    items: list[DevicePublic]


class ModelPublic(BaseModel):
    """A model that jobs may name."""

    name: str
    is_pretrained: bool = Field(description="Whether timm has weights for it; else a job has to name a checkpoint.")


class Models(BaseModel):
    items: list[ModelPublic]
    checkpoints: list[CheckpointPublic] = Field(description="Registered weights, to be named in `model.checkpoint`.")


class CheckpointPublic(PublicModel):
    """Registered weights."""

    id: str
    size_bytes: int


class MethodPublic(BaseModel):
    """A token-reduction method."""

    name: str
    title: str
    paper: str
    ops: list[str] = Field(description="Operations a site may have.")
    options: dict[str, Any] = Field(description="Options with their defaults.")
    needs_class_token: bool = Field(description="Whether every operation ranks tokens by class attention.")
    needs_training: bool = Field(description="Whether a model has to be trained for it first; no search proposes it.")


class Methods(BaseModel):
    items: list[MethodPublic]


class DatasetPublic(BaseModel):
    """A dataset that jobs may name."""

    id: str
    num_classes: int | None
    splits: dict[str, int | None] = Field(
        description="Images per split, null where they are not counted; splits it cannot offer are left out."
    )
    problem: str | None = Field(description="Why it cannot be used now.")


class Datasets(BaseModel):
    items: list[DatasetPublic]


class Health(BaseModel):
    """Answer of the probes."""

    status: Literal["ok"] = "ok"


Models.model_rebuild()
