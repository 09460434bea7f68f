"""The checked-in OpenAPI document is that of the code, and promises what the design does."""

from __future__ import annotations

from service.openapi import DEFAULT_PATH, build_openapi, render_openapi
from service.problems import MEDIA_TYPE

EXPECTED_OPERATIONS = {
    "POST /api/v1/jobs",
    "GET /api/v1/jobs",
    "GET /api/v1/jobs/{job_id}",
    "DELETE /api/v1/jobs/{job_id}",
    *(f"POST /api/v1/jobs/{{job_id}}/{verb}" for verb in ("cancel", "pause", "resume", "retry", "clone")),
    "GET /api/v1/jobs/{job_id}/events",
    "GET /api/v1/jobs/{job_id}/trials",
    "GET /api/v1/jobs/{job_id}/trials/{number}",
    "GET /api/v1/jobs/{job_id}/trials/{number}/config",
    "GET /api/v1/jobs/{job_id}/trials/{number}/checkpoint",
    "GET /api/v1/jobs/{job_id}/front",
    "GET /api/v1/jobs/{job_id}/best",
    "POST /api/v1/latency-tables",
    "GET /api/v1/latency-tables",
    "GET /api/v1/latency-tables/{table_id}",
    "DELETE /api/v1/latency-tables/{table_id}",
    "POST /api/v1/latency-tables/{table_id}/predict",
    "GET /api/v1/devices",
    "POST /api/v1/devices",
    "GET /api/v1/models",
    "GET /api/v1/methods",
    "GET /api/v1/datasets",
    "GET /healthz",
    "GET /readyz",
    "GET /metrics",
}


def test_checked_in_document_is_up_to_date() -> None:
    assert DEFAULT_PATH.read_text(encoding="utf-8") == render_openapi(), "run `python -m service.openapi` and commit"


def test_operations_are_those_of_the_design() -> None:
    paths = build_openapi()["paths"]
    operations = {f"{method.upper()} {path}" for path, methods in paths.items() for method in methods}
    assert operations == EXPECTED_OPERATIONS


def test_document_is_openapi_3_1_and_every_operation_promises_problem_documents() -> None:
    document = build_openapi()
    assert document["openapi"].startswith("3.1")
    for methods in document["paths"].values():
        for operation in methods.values():
            assert MEDIA_TYPE in operation["responses"]["default"]["content"]
            assert operation["summary"]
