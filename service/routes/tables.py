"""Latency tables: measured by jobs, pushed by devices, imported from CSV."""

from __future__ import annotations

import json
from functools import partial
from typing import Annotated, Literal

from anyio.to_thread import run_sync
from fastapi import APIRouter, Path, Query, Request, Response

from latency_tables.csv_import import COLUMNS, parse_csv, table_of_csv
from latency_tables.predict import predict as predict_config
from latency_tables.schema import DeviceInfo, Dtype, LatencyTable, LatencyTableError, Runtime, parse_table
from prunefront.config import ModelSpec
from search.documents import Identifier, Name
from service.deps import Cursor, Limit, StoreDep
from service.problems import Problem
from service.schemas import Prediction, PredictRequest, TableDetail, TablePage, TablePublic
from service.submissions import check_model
from store import Store, TableRecord

router = APIRouter(prefix="/latency-tables", tags=["latency tables"])

TableId = Annotated[str, Path(min_length=1, max_length=64, description="Id of a latency table.")]


@router.post(
    "",
    status_code=201,
    summary="Import or push a table",
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {"schema": {"$ref": "#/components/schemas/LatencyTable"}},
                "text/csv": {"schema": {"type": "string", "example": ",".join(COLUMNS)}},
            },
        }
    },
)
async def import_table(
    request: Request,
    store: StoreDep,
    response: Response,
    source: Annotated[Literal["import", "push"], Query(description="How the table came here.")] = "import",
    model: Annotated[Identifier | None, Query(description="CSV: the model whose blocks were timed.")] = None,
    device: Annotated[Name | None, Query(description="CSV: the device as its owner calls it.")] = None,
    runtime: Annotated[Runtime, Query(description="CSV: the runtime it was timed with.")] = "eager",
    dtype: Annotated[Dtype, Query(description="CSV: the number format it was timed in.")] = "fp32",
) -> TablePublic:
    """Store a table (`prunefront/latency-table/1`); searches use the newest one that fits.

    CSV is for devices without Python; its lines do not say what was timed, so `model` and `device` have to.
    """
    body = await request.body()
    content_type = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if content_type == "application/json":
        table = await run_sync(_read_json, body)
    elif content_type == "text/csv":
        if model is None or device is None:
            raise Problem(422, "invalid_request", "A CSV needs ?model= and ?device=, since its lines do not name them.")
        about = partial(_read_csv, body, model, device, runtime, dtype)
        table = await run_sync(about)
    else:
        raise Problem(
            415,
            "unsupported_media_type",
            "Send a table as application/json or as text/csv, and say so in Content-Type.",
        )
    record = await run_sync(save, table, store, source)
    response.headers["Location"] = f"/api/v1/latency-tables/{record.id}"
    return TablePublic.of(record)


@router.get("", summary="List tables, newest first")
def list_tables(store: StoreDep, limit: Limit = 50, cursor: Cursor = None) -> TablePage:
    records, next_cursor = store.list_tables(limit=limit, cursor=cursor)
    return TablePage(items=[TablePublic.of(record) for record in records], next_cursor=next_cursor)


@router.get("/{table_id}", summary="One table with its entries")
def get_table(table_id: TableId, store: StoreDep) -> TableDetail:
    return TableDetail.of(store.get_table(table_id))


@router.delete("/{table_id}", status_code=204, summary="Delete a table")
def delete_table(table_id: TableId, store: StoreDep) -> None:
    store.delete_table(table_id)


@router.post("/{table_id}/predict", summary="Look up the latency and peak memory of a config")
def predict(table_id: TableId, body: PredictRequest, store: StoreDep) -> Prediction:
    """Predicted, not measured: the error a table may claim is in its `validation`."""
    record = store.get_table(table_id)
    predicted = predict_config(parse_table(record.document, record.name), body.config)
    return Prediction(
        table=record.id,
        device=record.device_name,
        runtime=record.runtime,
        dtype=record.dtype,
        batch_size=record.batch_size,
        predicted_ms=predicted.latency_ms,
        predicted_memory_mib=predicted.peak_memory_mib,
        is_nominal=predicted.is_nominal,
    )


def _read_json(body: bytes) -> LatencyTable:
    try:
        document = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Problem(400, "json_invalid", "The body is not valid JSON; send one latency table.") from error
    return parse_table(document)


def _read_csv(body: bytes, model: str, device: str, runtime: Runtime, dtype: Dtype) -> LatencyTable:
    try:
        text = body.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise LatencyTableError("The CSV is not UTF-8 text; send it in UTF-8.") from error
    spec = ModelSpec(name=model)
    check_model(spec)
    info = DeviceInfo(kind="other", name=device)
    return table_of_csv(parse_csv(text), spec=spec, device=info, runtime=runtime, dtype=dtype)


def save(table: LatencyTable, store: Store, source: str) -> TableRecord:
    """Store a table under the key by which searches find it."""
    return store.save_table(
        table.model_dump(mode="json"),
        name=table.name,
        device_name=table.device.name,
        fingerprint=table.device.fingerprint(),
        block_key=table.block_key,
        runtime=table.runtime,
        dtype=table.dtype,
        batch_size=table.batch_size,
        source=source,
    )
