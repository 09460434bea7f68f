"""What routes may ask for."""

from __future__ import annotations

from typing import Annotated, cast

from fastapi import Depends, Path, Query, Request, params
from fastapi.dependencies.utils import get_flat_params

from service.problems import FieldProblem, Problem
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


async def refuse_unknown_parameters(request: Request) -> None:
    """Refuse a query that names what the matched route does not take: a misspelt filter would list everything.

    Raises:
        Problem: If it does; the sentence names those parameters and the ones that the route takes.
    """
    if not request.query_params:
        return
    # What the OpenAPI document lists comes from the same declarations.
    declared = get_flat_params(request.scope["route"].dependant)
    known = sorted(field.alias for field in declared if isinstance(field.field_info, params.Query))
    unknown = [name for name in dict.fromkeys(request.query_params) if name not in known]
    if not unknown:
        return
    names = " or ".join(repr(name) for name in unknown)
    advice = f"use {', '.join(known)}, or leave it out" if known else "leave it out"
    raise Problem(
        422,
        "invalid_request",
        f"{request.method} {request.url.path} has no query parameter {names}; {advice}.",
        errors=[
            FieldProblem(
                pointer=f"?{name}",
                message="no such parameter is known; correct its name or leave it out",
                code="extra_forbidden",
            )
            for name in unknown
        ],
    )
