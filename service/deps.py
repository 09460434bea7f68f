"""What routes may ask for."""

from __future__ import annotations

from typing import Annotated, cast

from fastapi import Depends, Path, Query, Request

from service.settings import Settings
from store import CandidateRecord, JobRecord, Store

MAX_PAGE = 500
"""Rows one page of a list holds at most."""


def get_settings(request: Request) -> Settings:
    return cast(Settings, request.app.state.settings)


def get_store(request: Request) -> Store:
    return cast(Store, request.app.state.store)


SettingsDep = Annotated[Settings, Depends(get_settings)]
StoreDep = Annotated[Store, Depends(get_store)]

JobId = Annotated[str, Path(min_length=1, max_length=64, description="Id of a job.")]
TrialNumber = Annotated[int, Path(ge=0, le=2**31 - 1, description="Number of a candidate within its job.")]
Limit = Annotated[int, Query(ge=1, le=MAX_PAGE, description="Rows of this page at most.")]
Cursor = Annotated[
    str | None, Query(max_length=400, description="`next_cursor` of the page before; left out for the first page.")
]


def get_job(job_id: JobId, store: StoreDep) -> JobRecord:
    return store.get_job(job_id)


JobDep = Annotated[JobRecord, Depends(get_job)]


def get_trial(job: JobDep, number: TrialNumber, store: StoreDep) -> CandidateRecord:
    return store.get_candidate(job.id, number)


TrialDep = Annotated[CandidateRecord, Depends(get_trial)]
