"""Errors as RFC 9457 problem documents: one sentence, a stable code, no stack trace.

Every refusal of the API passes through here, whoever raised it: a route (`Problem`), the library or the store
(`PrunefrontError`), FastAPI's validation, Starlette's routing, or a bug.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from latency_tables.schema import LatencyTableError
from prunefront.config import readable_errors
from prunefront.errors import (
    CheckpointError,
    ConfigError,
    DatasetError,
    FileWriteError,
    ModelError,
    PrunefrontError,
    UnknownNameError,
)
from search.pareto import NoFeasiblePoint
from service.web import TEMPLATES
from store import (
    ConflictError,
    DocumentError,
    InvalidCursorError,
    NotFoundError,
    StoreError,
    StoreLockedError,
    StoreSchemaError,
    StoreUnavailableError,
)

logger = logging.getLogger(__name__)

MEDIA_TYPE = "application/problem+json"
JOB_KINDS = ("search", "table", "measure")
RETRY_AFTER_S = "2"
"""What a client is told to wait while the database is busy or away."""


class FieldProblem(BaseModel):
    """One value of the request that cannot be used."""

    pointer: str = Field(description="Where it stands: a JSON pointer into the body, or `?name`, or a header's name.")
    message: str = Field(description="What is wrong with it, in one sentence.")
    code: str = Field(description="Stable name of the rule it breaks.")


class ProblemDocument(BaseModel):
    """RFC 9457 problem details."""

    type: str = Field(description="`urn:prunefront:problem:` and the code.")
    title: str = Field(description="The status in words.")
    status: int
    code: str = Field(description="Stable name of the problem, to be compared by programs.")
    detail: str = Field(description="One sentence for the reader: expected, got, what to do.")
    instance: str = Field(description="Path of the request.")
    errors: list[FieldProblem] = Field(default_factory=list, description="The fields at fault, when there are any.")


class Problem(PrunefrontError):
    """A refusal, raised anywhere below a route.

    Args:
        status: HTTP status.
        code: Stable name of the problem.
        detail: One sentence for the reader.
        errors: The fields at fault.
        extra: Further members of the document, such as the nearest feasible value.
        headers: Further headers of the answer.
    """

    def __init__(
        self,
        status: int,
        code: str,
        detail: str,
        *,
        errors: Sequence[FieldProblem] = (),
        extra: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.code = code
        self.detail = detail
        self.errors = tuple(errors)
        self.extra = dict(extra or {})
        self.headers = dict(headers or {})

    @classmethod
    def in_field(cls, pointer: str, error: PrunefrontError) -> Problem:
        """A library error about one value of the body."""
        status, code = status_and_code(error)
        field = FieldProblem(pointer=pointer, message=str(error), code=code)
        return cls(status if status < 500 else 422, code, str(error), errors=[field])

    @property
    def title(self) -> str:
        """The status in words."""
        return HTTPStatus(self.status).phrase

    def response(self, instance: str) -> JSONResponse:
        """The problem document as an answer to the request at ``instance``."""
        document = ProblemDocument(
            type=f"urn:prunefront:problem:{self.code}",
            title=self.title,
            status=self.status,
            code=self.code,
            detail=self.detail,
            instance=instance,
            errors=list(self.errors),
        ).model_dump(mode="json")
        if not self.errors:
            del document["errors"]
        return JSONResponse(
            {**document, **self.extra}, status_code=self.status, headers=self.headers, media_type=MEDIA_TYPE
        )


# The first class that matches decides, so subclasses stand before their parents.
ERROR_STATUS: tuple[tuple[type[PrunefrontError], int, str], ...] = (
    (NotFoundError, 404, "not_found"),
    (ConflictError, 409, "conflict"),
    (InvalidCursorError, 422, "invalid_cursor"),
    (DocumentError, 422, "invalid_value"),
    (StoreLockedError, 503, "store_busy"),
    (StoreUnavailableError, 503, "store_unavailable"),
    (StoreSchemaError, 503, "store_schema"),
    (StoreError, 503, "store_error"),
    (NoFeasiblePoint, 409, "no_feasible_point"),
    (UnknownNameError, 422, "unknown_name"),
    (ModelError, 422, "unsupported_model"),
    (DatasetError, 422, "dataset"),
    (LatencyTableError, 422, "latency_table"),
    (CheckpointError, 422, "checkpoint"),
    (ConfigError, 422, "invalid_config"),
    (FileWriteError, 507, "write_failed"),
)


def status_and_code(error: PrunefrontError) -> tuple[int, str]:
    """How an error of the library, the store or the search is answered."""
    for kind, status, code in ERROR_STATUS:
        if isinstance(error, kind):
            return status, code
    return (422, "invalid_value") if isinstance(error, ValueError) else (500, "internal_error")


def validation_problem(errors: Sequence[Any]) -> Problem:
    """Pydantic's list of errors as one problem; values that were sent are not echoed."""
    fields = [_field_problem(item) for item in readable_errors(errors)]
    first = fields[0]
    more = f" ({len(fields) - 1} more in errors.)" if len(fields) > 1 else ""
    where = f"{first.pointer}: " if first.pointer else ""
    if len(fields) == 1 and first.code == "json_invalid":
        return Problem(400, "json_invalid", "The body is not valid JSON; send one JSON object.", errors=fields)
    # An error of the library keeps its own code, so that a program need not look into errors.
    own_code = first.code if first.code in {code for _, _, code in ERROR_STATUS} else "invalid_request"
    detail = first.message if own_code != "invalid_request" else f"{where}{first.message}"
    end = "" if detail.endswith("?") else "."
    return Problem(422, own_code, f"{detail.rstrip('.')}{end}{more}", errors=fields)


def _field_problem(item: Mapping[str, Any]) -> FieldProblem:
    place, *path = item["loc"] or ("body",)
    if item["type"] == "json_invalid":
        path = []
    elif place == "body" and path and path[0] in JOB_KINDS:
        path = path[1:]  # The tag by which pydantic chose the kind of job is no part of the document.
    cause = item.get("ctx", {}).get("error")
    message = str(cause) if isinstance(cause, Exception) else str(item["msg"])
    if item["type"] in ("union_tag_not_found", "union_tag_invalid"):
        # What tells the kinds of job apart is a field like any other.
        path = [*path, "kind"]
        message = f"Input should be one of {', '.join(JOB_KINDS)}"
    code = status_and_code(cause)[1] if isinstance(cause, PrunefrontError) else str(item["type"])
    if place == "body":
        pointer = "".join(f"/{part}" for part in path)
    elif place in ("query", "header", "path"):
        name = ".".join(str(part) for part in path)
        pointer = f"?{name}" if place == "query" else name
    else:
        pointer = "/".join(str(part) for part in (place, *path))
    return FieldProblem(pointer=pointer, message=message, code=code)


def install(app: FastAPI) -> None:
    """Make every error of the application a problem document, or a page where a browser asked for one."""

    @app.exception_handler(PrunefrontError)
    async def on_domain_error(request: Request, error: PrunefrontError) -> Response:
        return respond(request, problem_of(error))

    @app.exception_handler(RequestValidationError)
    async def on_invalid_request(request: Request, error: RequestValidationError) -> Response:
        return respond(request, validation_problem(error.errors()))

    @app.exception_handler(HTTPException)
    async def on_http_error(request: Request, error: HTTPException) -> Response:
        return respond(request, http_problem(error, request))

    @app.exception_handler(Exception)
    async def on_bug(request: Request, error: Exception) -> Response:
        # Starlette logs the traceback and raises the error again for the server; the client gets none of it.
        detail = "The server met an error of its own; its log has the details."
        return respond(request, Problem(500, "internal_error", detail))


def respond(request: Request, problem: Problem) -> Response:
    """The answer that the client can show."""
    is_page = request.method == "GET" and not request.url.path.startswith("/api/")
    if is_page and "text/html" in request.headers.get("accept", ""):
        context = {
            "section": "",
            "problem": {"status": problem.status, "title": problem.title, "detail": problem.detail},
        }
        return TEMPLATES.TemplateResponse(
            request, "problem.html", context, status_code=problem.status, headers=problem.headers
        )
    return problem.response(request.url.path)


def problem_of(error: PrunefrontError) -> Problem:
    """The problem document of a domain error."""
    if isinstance(error, Problem):
        return error
    status, code = status_and_code(error)
    if status >= 500:
        # A database that is away or a full disk is told in a sentence; only what nobody foresaw needs its traceback.
        is_foreseen = status in (503, 507)
        logger.error(
            "Request failed: %s",
            error,
            exc_info=None if is_foreseen else error,
            extra={"action": "request_failed", "code": code},
        )
    headers = {"Retry-After": RETRY_AFTER_S} if status == 503 else {}
    return Problem(status, code, str(error), headers=headers)


def http_problem(error: HTTPException, request: Request) -> Problem:
    """The problem document of an error raised by the framework."""
    sentences = {
        400: "The request could not be read; send JSON with Content-Type application/json.",
        404: f"Nothing is at {request.url.path}; /openapi.json lists what there is.",
        405: f"{request.method} is not possible at {request.url.path}.",
    }
    codes = {400: "bad_request", 404: "not_found", 405: "method_not_allowed", 413: "body_too_large"}
    status = error.status_code
    return Problem(
        status,
        codes.get(status, "http_error"),
        sentences.get(status, str(error.detail)),
        headers=dict(error.headers or {}),
    )


RESPONSES: dict[int | str, dict[str, Any]] = {
    "default": {
        "description": "A problem document (RFC 9457).",
        "model": ProblemDocument,
        "content": {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/ProblemDocument"}}},
    }
}
"""What every operation may answer besides its own statuses."""
