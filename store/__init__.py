"""REMEMBER: jobs, candidates, measurements, tables, devices and events, in SQLite or Postgres."""

from store.backups import backup
from store.candidates import CandidateChanges, CandidateOrigin, Fidelity
from store.errors import (
    ConflictError,
    DocumentError,
    InvalidCursorError,
    LeaseLostError,
    NotFoundError,
    StoreError,
    StoreLockedError,
    StoreSchemaError,
    StoreUnavailableError,
)
from store.migrations import upgrade
from store.records import (
    ArtifactRecord,
    CandidateRecord,
    DeviceRecord,
    EvaluationRecord,
    EventRecord,
    JobRecord,
    JobState,
    JsonObject,
    MeasurementRecord,
    Progress,
    TableRecord,
)
from store.store import Store, open_store

__all__ = [
    "ArtifactRecord",
    "CandidateChanges",
    "CandidateOrigin",
    "CandidateRecord",
    "ConflictError",
    "DeviceRecord",
    "DocumentError",
    "EvaluationRecord",
    "EventRecord",
    "Fidelity",
    "InvalidCursorError",
    "JobRecord",
    "JobState",
    "JsonObject",
    "LeaseLostError",
    "MeasurementRecord",
    "NotFoundError",
    "Progress",
    "Store",
    "StoreError",
    "StoreLockedError",
    "StoreSchemaError",
    "StoreUnavailableError",
    "TableRecord",
    "backup",
    "open_store",
    "upgrade",
]
