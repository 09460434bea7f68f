"""Jobs: submit, list, watch and steer."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from typing import Annotated

from fastapi import APIRouter, Header, Query, Response

from search.documents import Job, JobAdapter, MeasureJob, SearchJob, TableJob
from service.artifacts import contained_path
from service.deps import Cursor, JobDep, JobId, Limit, SettingsDep, StoreDep
from service.schemas import JobKind, JobPage, JobPublic, JobStateName
from service.settings import Settings
from service.submissions import check_job
from store import JobRecord, JobState, Store

logger = logging.getLogger(__name__)
router = APIRouter(prefix="/jobs", tags=["jobs"])

IdempotencyKey = Annotated[
    str | None,
    Header(
        min_length=1,
        max_length=200,
        pattern=r"^[\x21-\x7e]+$",
        description="Any word of the client's: a repeated request with the same word and body returns the first job.",
    ),
]


@router.post("", status_code=202, summary="Submit a job")
def submit_job(
    body: Job, store: StoreDep, settings: SettingsDep, response: Response, idempotency_key: IdempotencyKey = None
) -> JobPublic:
    """Accept a job, or refuse it with the reason: every name in it is checked first."""
    return _accept(body, store, settings, response, idempotency_key)


@router.get("", summary="List jobs, newest first")
def list_jobs(
    store: StoreDep,
    limit: Limit = 50,
    cursor: Cursor = None,
    state: Annotated[JobStateName | None, Query(description="Only jobs in this state.")] = None,
    kind: Annotated[JobKind | None, Query(description="Only jobs of this kind.")] = None,
) -> JobPage:
    records, next_cursor = store.list_jobs(
        limit=limit, cursor=cursor, state=JobState(state) if state else None, kind=kind
    )
    return JobPage(items=[JobPublic.of(record) for record in records], next_cursor=next_cursor)


@router.get("/{job_id}", summary="One job with its progress")
def get_job(job: JobDep) -> JobPublic:
    return JobPublic.of(job)


@router.delete("/{job_id}", status_code=204, summary="Delete a finished job, its results and its files")
def delete_job(job: JobDep, store: StoreDep, settings: SettingsDep) -> None:
    # Rows first: a file without a row wastes space, a row without its file would break a download.
    for name in store.delete_job(job.id):
        if (path := contained_path(settings, name)) is not None:
            path.unlink(missing_ok=True)
    root = settings.artifacts_dir.resolve()
    folder = root / job.id
    if folder.parent == root and folder.is_dir():
        shutil.rmtree(folder)


@router.post("/{job_id}/cancel", status_code=202, summary="Stop a job for good")
def cancel_job(job_id: JobId, store: StoreDep) -> JobPublic:
    """A running job ends within seconds; what it has measured so far stays."""
    return JobPublic.of(store.request_cancel(job_id))


@router.post("/{job_id}/pause", status_code=202, summary="Let a job rest")
def pause_job(job_id: JobId, store: StoreDep) -> JobPublic:
    return JobPublic.of(store.request_pause(job_id))


@router.post("/{job_id}/resume", status_code=202, summary="Go on with a paused job")
def resume_job(job_id: JobId, store: StoreDep) -> JobPublic:
    return JobPublic.of(store.resume_job(job_id))


@router.post("/{job_id}/retry", status_code=202, summary="Go on with a failed or cancelled job")
def retry_job(job_id: JobId, store: StoreDep) -> JobPublic:
    """The job keeps every result it has and goes on from there."""
    return JobPublic.of(store.retry_job(job_id))


@router.post("/{job_id}/clone", status_code=202, summary="Submit the same job anew")
def clone_job(
    job: JobDep, store: StoreDep, settings: SettingsDep, response: Response, idempotency_key: IdempotencyKey = None
) -> JobPublic:
    return _accept(JobAdapter.validate_python(job.spec), store, settings, response, idempotency_key)


def _accept(
    job: SearchJob | TableJob | MeasureJob,
    store: Store,
    settings: Settings,
    response: Response,
    idempotency_key: str | None,
) -> JobPublic:
    check_job(job, store, settings)
    record = _create(job, store, idempotency_key)
    response.headers["Location"] = f"/api/v1/jobs/{record.id}"
    logger.info("job accepted", extra={"action": "accept_job", "job_id": record.id, "kind": record.kind})
    return JobPublic.of(record)


def _create(job: SearchJob | TableJob | MeasureJob, store: Store, idempotency_key: str | None) -> JobRecord:
    spec = job.model_dump(mode="json")
    canonical = json.dumps(spec, sort_keys=True, separators=(",", ":"))
    return store.create_job(
        job.kind,
        job.name or default_name(job),
        spec,
        tags=job.tags,
        priority=job.priority,
        idempotency_key=idempotency_key,
        request_hash=hashlib.sha256(canonical.encode()).hexdigest() if idempotency_key else None,
    )


def default_name(job: SearchJob | TableJob | MeasureJob) -> str:
    """What a job is called when its submitter did not say."""
    model = job.configs[0].model.name if isinstance(job, MeasureJob) else job.model.name
    verb = {"search": "Search", "table": "Table", "measure": "Measure"}[job.kind]
    return f"{verb} {model} on {job.device}"[:200]
