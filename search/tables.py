"""Find the latency table of a model on a device, or build it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from latency_tables.device import describe_device
from latency_tables.errors import ExceedsMemoryError, LatencyTableError
from latency_tables.predict import check_table_matches, predict_latency_ms
from latency_tables.schema import LatencyTable, parse_table
from prunefront.config import ModelSpec
from prunefront.geometry import ModelGeometry, block_key
from prunefront.schedule import TokenSchedule
from search.job_run import JobRun
from store import TableRecord


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where and how something is timed."""

    device: str
    runtime: str
    dtype: str
    batch_size: int

    @classmethod
    def of_job(cls, spec: dict[str, Any]) -> Place:
        return cls(device=spec["device"], runtime=spec["runtime"], dtype=spec["dtype"], batch_size=spec["batch_size"])


def find_table(run: JobRun, geometry: ModelGeometry, place: Place) -> tuple[TableRecord, LatencyTable] | None:
    """The newest stored table that may be used here and reaches the model's token count."""
    info = describe_device(place.device)
    record = run.store.find_table(info.fingerprint(), block_key(geometry), place.runtime, place.dtype, place.batch_size)
    if record is None:
        return None
    try:
        table = parse_table(record.document, record.name)
        check_table_matches(
            table,
            device_info=info,
            runtime=place.runtime,
            dtype=place.dtype,
            batch_size=place.batch_size,
            geometry=geometry,
        )
    except LatencyTableError as error:
        run.store.add_event(run.id, "table_refused", {"table_id": record.id, "message": str(error)})
        return None
    return record, table


def build_table(
    run: JobRun,
    spec: ModelSpec,
    geometry: ModelGeometry,
    place: Place,
    *,
    detail: str = "full",
    validate_schedules: int = 0,
    max_foreign_cores: float | None = None,
) -> tuple[TableRecord, LatencyTable]:
    """Measure a table in a task and store it; an interrupted build goes on where it was."""
    partial_path = run.folder / "table.partial.json"
    value = run.run_task(
        "table",
        {
            "model": spec.model_dump(mode="json"),
            "runtime": place.runtime,
            "dtype": place.dtype,
            "batch_size": place.batch_size,
            "detail": detail,
            "partial_path": str(partial_path),
            "validate_schedules": validate_schedules,
            "max_foreign_cores": max_foreign_cores,
        },
        stage="table",
        exclusive=True,
    )
    table = parse_table(value["table"])
    record = run.store.save_table(
        value["table"],
        name=table.name,
        device_name=table.device.name,
        fingerprint=table.device.fingerprint(),
        block_key=block_key(geometry),
        runtime=place.runtime,
        dtype=place.dtype,
        batch_size=place.batch_size,
        source=run.id,
    )
    partial_path.unlink(missing_ok=True)
    run.store.add_event(run.id, "table", {"table_id": record.id})
    return record, table


def predicted_ms(table: LatencyTable, config: Any) -> float | None:
    """Predicted latency, or None where the table does not cover the schedule."""
    try:
        return predict_latency_ms(table, config)
    except LatencyTableError:
        return None


def latency_or_inf_ms(table: LatencyTable, schedule: TokenSchedule) -> float:
    """Predicted latency, infinite where the schedule needs what ran out of memory.

    Raises:
        LatencyTableError: If the table does not cover the schedule otherwise.
    """
    try:
        return predict_latency_ms(table, schedule)
    except ExceedsMemoryError:
        return math.inf
