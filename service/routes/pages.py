"""The web page: shells that JavaScript fills from the API."""

from __future__ import annotations

from typing import get_args

from fastapi import APIRouter, Request, Response
from fastapi.responses import HTMLResponse

from prunefront.config import Runtime
from service.deps import JobDep, StoreDep
from service.routes.tables import TableId
from service.web import TEMPLATES

router = APIRouter(default_response_class=HTMLResponse)


@router.get("/")
def show_jobs(request: Request) -> Response:
    return TEMPLATES.TemplateResponse(request, "jobs.html", {"section": "jobs"})


@router.get("/jobs/new")
def show_job_form(request: Request) -> Response:
    return TEMPLATES.TemplateResponse(request, "new_job.html", {"section": "jobs", "runtimes": get_args(Runtime)})


@router.get("/jobs/{job_id}")
def show_job(request: Request, job: JobDep) -> Response:
    return TEMPLATES.TemplateResponse(request, "job.html", {"section": "jobs", "job": job})


@router.get("/latency-tables")
def show_tables(request: Request) -> Response:
    return TEMPLATES.TemplateResponse(request, "tables.html", {"section": "tables"})


@router.get("/latency-tables/{table_id}")
def show_table(request: Request, table_id: TableId, store: StoreDep) -> Response:
    context = {"section": "tables", "table": store.get_table(table_id)}
    return TEMPLATES.TemplateResponse(request, "table.html", context)
