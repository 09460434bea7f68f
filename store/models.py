"""The tables. Columns of user text, numbers and documents refuse what SQLite and Postgres would not both hand back."""

from __future__ import annotations

import json
import math
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    DateTime,
    Dialect,
    Float,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    MetaData,
    Text,
    TypeDecorator,
    UniqueConstraint,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from store.errors import DocumentError
from store.records import JsonObject

# Fits the primary key of both databases; SQLite only counts up in a column declared INTEGER.
RowId = BigInteger().with_variant(Integer(), "sqlite")


def is_storable_text(text: str) -> bool:
    """Whether both databases can store the text: no NUL, no lone surrogates."""
    return "\x00" not in text and not any("\ud800" <= character <= "\udfff" for character in text)


class PlainText(TypeDecorator[str]):
    """Text that both databases hand back unchanged."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        """Refuse NUL characters and lone surrogates, which Postgres cannot store."""
        if value is not None and not is_storable_text(value):
            raise DocumentError(
                f"Expected text without NUL characters or lone surrogates, got {value[:40]!r}. Remove them."
            )
        return value


class FiniteFloat(TypeDecorator[float]):
    """A double. SQLite would turn NaN into NULL without a word."""

    impl = Float
    cache_ok = True

    def process_bind_param(self, value: float | None, dialect: Dialect) -> float | None:
        """Refuse NaN and infinity."""
        if value is not None and not math.isfinite(value):
            raise DocumentError(f"Expected a finite number, got {value}. Leave the value out instead.")
        return value

    def process_result_value(self, value: float | None, dialect: Dialect) -> float | None:
        """Return floats only: SQLite's RETURNING gives whole numbers as int."""
        return None if value is None else float(value)


class Document(TypeDecorator[Any]):
    """A JSON document, as text (not JSONB) so that key order and float spelling come back as they were."""

    impl = JSON
    cache_ok = True

    def __init__(self) -> None:
        super().__init__(none_as_null=True)

    def process_bind_param(self, value: Any, dialect: Dialect) -> Any:
        """Refuse documents that are not JSON or not portable."""
        if value is not None:
            check_document(value)
        return value


def check_document(value: Any) -> None:
    """Raise :class:`DocumentError` unless the value is JSON without NaN, infinity, NUL or lone surrogates."""
    try:
        text = json.dumps(value, allow_nan=False, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as e:
        raise DocumentError(f"Expected a JSON document without NaN or infinity, got one where: {e}.") from e
    # json.dumps escapes control characters, so NUL is looked for in its escaped form. A backslash of the text itself
    # is doubled: after removing pairs, the escape can only be a real one.
    if "\\u0000" in text.replace("\\\\", "") or not is_storable_text(text):
        raise DocumentError("Expected a JSON document without NUL characters or lone surrogates. Remove them.")


class UtcDateTime(TypeDecorator[datetime]):
    """An aware timestamp in UTC; SQLite stores it without the zone."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Convert to UTC; a naive timestamp is a programming error."""
        if value is None:
            return None
        if value.tzinfo is None:
            raise DocumentError(f"Expected a timestamp with a time zone, got {value!r}.")
        value = value.astimezone(UTC)
        return value.replace(tzinfo=None) if dialect.name == "sqlite" else value

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Attach UTC again."""
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class Base(DeclarativeBase):
    """Base of all tables; constraints have names so that later migrations can change them."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map = {
        str: PlainText,
        float: FiniteFloat,
        datetime: UtcDateTime,
        JsonObject: Document,
    }


class Job(Base):
    """What a user submitted, its state, and the lease of the controller that works on it."""

    __tablename__ = "jobs"
    __table_args__ = (
        UniqueConstraint("id"),
        Index("ix_jobs_claim", "state", "priority", "seq"),
        {"sqlite_autoincrement": True},
    )

    # Order of submission: age without depending on clocks, and the key of list cursors.
    seq: Mapped[int] = mapped_column(RowId, primary_key=True)
    id: Mapped[str]
    kind: Mapped[str]
    name: Mapped[str]
    tags: Mapped[list[str]] = mapped_column(Document)
    priority: Mapped[int] = mapped_column(BigInteger)
    spec: Mapped[JsonObject]
    state: Mapped[str]
    stage: Mapped[str | None]
    progress_done: Mapped[float]
    progress_total: Mapped[float]
    progress_message: Mapped[str]
    progress_event_at: Mapped[datetime | None]
    waiting_reason: Mapped[str | None]
    failure: Mapped[JsonObject | None]
    result: Mapped[JsonObject | None]
    cancel_requested: Mapped[bool]
    pause_requested: Mapped[bool]
    attempts: Mapped[int] = mapped_column(Integer)
    times_lost: Mapped[int] = mapped_column(Integer)
    fence: Mapped[int] = mapped_column(BigInteger)
    lease_owner: Mapped[str | None]
    lease_expires_at: Mapped[datetime | None]
    created_at: Mapped[datetime]
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]
    updated_at: Mapped[datetime]


class IdempotencyKey(Base):
    """Which job a client's idempotency key produced."""

    __tablename__ = "idempotency_keys"

    key: Mapped[str] = mapped_column(primary_key=True)
    request_hash: Mapped[str]
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), index=True)
    created_at: Mapped[datetime]


class Event(Base):
    """Something that happened to a job, for server-sent events. Ids are never used twice."""

    __tablename__ = "events"
    __table_args__ = (Index(None, "job_id", "id"), {"sqlite_autoincrement": True})

    id: Mapped[int] = mapped_column(RowId, primary_key=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"))
    type: Mapped[str]
    payload: Mapped[JsonObject]
    created_at: Mapped[datetime]


class Candidate(Base):
    """A schedule of a job."""

    __tablename__ = "candidates"
    __table_args__ = (UniqueConstraint("job_id", "config_hash"),)

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    number: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    config: Mapped[JsonObject]
    config_hash: Mapped[str]
    label: Mapped[str]
    origin: Mapped[str]
    params: Mapped[JsonObject]
    predicted_ms: Mapped[float | None]
    macs: Mapped[int | None] = mapped_column(BigInteger)
    state: Mapped[str]
    note: Mapped[str | None]
    created_at: Mapped[datetime]
    updated_at: Mapped[datetime]


class Evaluation(Base):
    """An accuracy of a candidate."""

    __tablename__ = "evaluations"
    __table_args__ = (
        ForeignKeyConstraint(["job_id", "number"], ["candidates.job_id", "candidates.number"], ondelete="CASCADE"),
        UniqueConstraint("job_id", "number", "fidelity", "split", "num_images"),
    )

    id: Mapped[int] = mapped_column(RowId, primary_key=True)
    job_id: Mapped[str]
    number: Mapped[int] = mapped_column(Integer)
    fidelity: Mapped[str]
    split: Mapped[str]
    dataset: Mapped[str]
    num_images: Mapped[int] = mapped_column(Integer)
    top1: Mapped[float]
    top5: Mapped[float | None]
    loss: Mapped[float | None]
    ci_low: Mapped[float | None]
    ci_high: Mapped[float | None]
    details: Mapped[JsonObject]
    created_at: Mapped[datetime]


class Measurement(Base):
    """A latency of a candidate."""

    __tablename__ = "measurements"
    __table_args__ = (
        ForeignKeyConstraint(["job_id", "number"], ["candidates.job_id", "candidates.number"], ondelete="CASCADE"),
        # Named by hand: all columns in the name would exceed Postgres' 63 bytes.
        UniqueConstraint(
            "job_id", "number", "stage", "device", "runtime", "dtype", "batch_size", name="uq_measurements_setting"
        ),
    )

    id: Mapped[int] = mapped_column(RowId, primary_key=True)
    job_id: Mapped[str]
    number: Mapped[int] = mapped_column(Integer)
    stage: Mapped[str]
    device: Mapped[str]
    runtime: Mapped[str]
    dtype: Mapped[str]
    batch_size: Mapped[int] = mapped_column(Integer)
    median_ms: Mapped[float]
    iqr_ms: Mapped[float]
    speedup: Mapped[float | None]
    dense_ms: Mapped[float | None]
    state: Mapped[str]
    details: Mapped[JsonObject]
    created_at: Mapped[datetime]


class Artifact(Base):
    """A file of a job; the file itself lies in the data directory."""

    __tablename__ = "artifacts"
    __table_args__ = (UniqueConstraint("job_id", "path"),)

    id: Mapped[int] = mapped_column(RowId, primary_key=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"))
    # No foreign key: an artifact outlives nothing but its job, and may come before its candidate is looked up.
    number: Mapped[int | None] = mapped_column(Integer)
    kind: Mapped[str]
    path: Mapped[str]
    sha256: Mapped[str]
    size: Mapped[int] = mapped_column(BigInteger)
    created_at: Mapped[datetime]


class Table(Base):
    """A latency table."""

    __tablename__ = "tables"
    __table_args__ = (
        UniqueConstraint("id"),
        Index("ix_tables_lookup", "fingerprint", "block_key", "runtime", "dtype", "batch_size"),
        {"sqlite_autoincrement": True},
    )

    seq: Mapped[int] = mapped_column(RowId, primary_key=True)
    id: Mapped[str]
    name: Mapped[str]
    device_name: Mapped[str]
    fingerprint: Mapped[str]
    block_key: Mapped[str]
    runtime: Mapped[str]
    dtype: Mapped[str]
    batch_size: Mapped[int] = mapped_column(Integer)
    source: Mapped[str]
    document: Mapped[JsonObject]
    created_at: Mapped[datetime]


class Device(Base):
    """A device that jobs may name."""

    __tablename__ = "devices"

    id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str]
    kind: Mapped[str]
    info: Mapped[JsonObject]
    created_at: Mapped[datetime]
    updated_at: Mapped[datetime]
