"""Candidates of a job: every number with its origin, the config, the fine-tuned weights."""

from __future__ import annotations

import base64
import binascii
import csv
import io
from collections.abc import Iterator, Sequence
from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import FileResponse, StreamingResponse

from prunefront import PruneConfig
from search.pareto import build_front
from service.artifacts import contained_path
from service.deps import Cursor, JobDep, Limit, SettingsDep, StoreDep, TrialDep
from service.problems import Problem
from service.schemas import TrialDetail, TrialPage, TrialPublic, plan_of
from store import CandidateRecord, EvaluationRecord, MeasurementRecord, Store

router = APIRouter(prefix="/jobs/{job_id}/trials", tags=["results"])

CSV_PAGE = 500
EVALUATION_COLUMNS = ("fidelity", "split", "dataset", "num_images", "top1", "top5", "ci_low", "ci_high")
MEASUREMENT_COLUMNS = (
    "stage", "device", "runtime", "dtype", "batch_size", "median_ms", "iqr_ms", "speedup", "dense_ms", "state",
)  # fmt: skip
CSV_COLUMNS = (
    "number", "label", "origin", "method", "state", "note", "predicted_ms", "macs", "is_nominal", "config_hash",
    *EVALUATION_COLUMNS, *(f"measurement_{name}" for name in MEASUREMENT_COLUMNS),
)  # fmt: skip

Format = Annotated[
    Literal["json", "yaml"] | None, Query(description="Left out, the Accept header decides; JSON by default.")
]
Download = Annotated[bool, Query(description="Ask browsers to save the answer as a file.")]


@router.get(
    "",
    summary="Candidates in the order of their numbers",
    response_model=TrialPage,
    responses={200: {"content": {"text/csv": {"schema": {"type": "string"}}}}},
)
def list_trials(
    request: Request,
    job: JobDep,
    store: StoreDep,
    limit: Limit = 100,
    cursor: Cursor = None,
    format: Annotated[
        Literal["json", "csv"] | None, Query(description="Left out, the Accept header decides; JSON by default.")
    ] = None,
) -> TrialPage | Response:
    """JSON comes in pages. CSV holds all candidates: a row for each pair of an accuracy and a latency."""
    if format == "csv" or (format is None and _prefers(request, "text/csv")):
        return StreamingResponse(
            _csv_lines(store, job.id),
            media_type="text/csv; charset=utf-8",
            headers={"Content-Disposition": f'attachment; filename="{job.id}-trials.csv"'},
        )
    after = None if cursor is None else decode_cursor(cursor)
    # One more than asked for tells whether there is a next page.
    records = store.list_candidates(job.id, after=after, limit=limit + 1)
    page = records[:limit]
    next_cursor = encode_cursor(page[-1].number) if len(records) > limit else None
    return TrialPage(items=[TrialPublic.of(record) for record in page], next_cursor=next_cursor)


@router.get("/{number}", summary="One candidate and its tokens per block")
def get_trial(trial: TrialDep) -> TrialDetail:
    return TrialDetail.of(trial)


@router.get(
    "/{number}/config",
    summary="The config of a candidate",
    response_model=PruneConfig,
    responses={200: {"content": {"application/yaml": {"schema": {"$ref": "#/components/schemas/PruneConfig"}}}}},
)
def get_trial_config(
    request: Request, job: JobDep, trial: TrialDep, format: Format = None, download: Download = False
) -> Response:
    """With everything that is known about it in `results`."""
    front = build_front(job, [trial])
    known = [*front.points, *front.marks, *([front.dense] if front.dense else [])]
    config = known[0].config if known else PruneConfig.model_validate(trial.config)
    return config_response(request, config, f"{job.id}-trial-{trial.number}", format, download)


@router.get(
    "/{number}/checkpoint",
    summary="The fine-tuned weights of a candidate (safetensors)",
    response_class=FileResponse,
    responses={200: {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}}},
)
def get_trial_checkpoint(job: JobDep, trial: TrialDep, store: StoreDep, settings: SettingsDep) -> FileResponse:
    artifacts = [a for a in store.list_artifacts(job.id, trial.number) if a.kind == "checkpoint"]
    if not artifacts:
        raise Problem(
            404, "no_checkpoint", f"Candidate {trial.number} was not fine-tuned; its config fits the dense weights."
        )
    artifact = artifacts[-1]
    path = contained_path(settings, artifact.path)
    if path is None or not path.is_file():
        raise Problem(
            410,
            "checkpoint_gone",
            f"The weights of candidate {trial.number} are no longer on this server; run it again.",
        )
    return FileResponse(
        path,
        media_type="application/octet-stream",
        filename=f"{job.id}-trial-{trial.number}.safetensors",
        headers={"ETag": f'"{artifact.sha256}"'},
    )


def config_response(
    request: Request, config: PruneConfig, stem: str, format: Literal["json", "yaml"] | None, download: bool
) -> Response:
    """A config as JSON or YAML, whatever the client prefers."""
    if format is None:
        format = "yaml" if _prefers(request, "application/yaml") else "json"
    headers = {"Vary": "Accept"}
    if download:
        headers["Content-Disposition"] = f'attachment; filename="{stem}.{format}"'
    text = config.to_yaml() if format == "yaml" else config.to_json()
    return Response(text, media_type=f"application/{format}", headers=headers)


def _prefers(request: Request, media_type: str) -> bool:
    """Whether the Accept header names a type before JSON or anything."""
    accepted = [part.split(";")[0].strip() for part in request.headers.get("accept", "").lower().split(",")]
    for accepted_type in accepted:
        if accepted_type == media_type:
            return True
        if accepted_type in ("application/json", "application/*", "*/*"):
            return False
    return False


def encode_cursor(number: int) -> str:
    return base64.urlsafe_b64encode(f"t{number}".encode()).decode().rstrip("=")


def decode_cursor(cursor: str) -> int:
    """The candidate number behind a cursor.

    Raises:
        Problem: If it is none of ours.
    """
    try:
        text = base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)).decode("ascii")
    except (binascii.Error, ValueError):
        text = ""
    if not text.startswith("t") or not text[1:].isdecimal() or len(text) > 11:
        raise Problem(422, "invalid_cursor", "cursor is none that this server gave out; start again without one.")
    return int(text[1:])


def _csv_lines(store: Store, job_id: str) -> Iterator[str]:
    yield _csv_line(CSV_COLUMNS)
    after: int | None = None
    while True:
        records = store.list_candidates(job_id, after=after, limit=CSV_PAGE)
        for record in records:
            yield from (_csv_line(row) for row in _csv_rows(record))
        if len(records) < CSV_PAGE:
            return
        after = records[-1].number


def _csv_rows(record: CandidateRecord) -> Iterator[list[object]]:
    head: list[object] = [
        record.number, record.label, record.origin, record.config["method"], record.state, record.note,
        record.predicted_ms, record.macs, not plan_of(record).is_static, record.config_hash,
    ]  # fmt: skip
    evaluations: Sequence[EvaluationRecord | None] = record.evaluations or (None,)
    measurements: Sequence[MeasurementRecord | None] = record.measurements or (None,)
    for evaluation in evaluations:
        for measurement in measurements:
            accuracy = [getattr(evaluation, name, None) for name in EVALUATION_COLUMNS]
            latency = [getattr(measurement, name, None) for name in MEASUREMENT_COLUMNS]
            yield [*head, *accuracy, *latency]


def _csv_line(row: Sequence[object]) -> str:
    buffer = io.StringIO()
    # Spreadsheets run a cell that starts like a formula.
    csv.writer(buffer).writerow(
        f"'{cell}" if isinstance(cell, str) and cell.startswith(("=", "+", "-", "@")) else cell for cell in row
    )
    return buffer.getvalue()
