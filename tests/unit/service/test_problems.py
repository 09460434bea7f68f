"""Problem documents: stable codes, one sentence, the fields at fault, nothing echoed."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from prunefront.errors import CheckpointError, ConfigError, DatasetError, ModelError, PrunefrontError, UnknownNameError
from search.documents import Job
from service.problems import MEDIA_TYPE, Problem, problem_of, status_and_code, validation_problem
from service.submissions import naming_field
from store import ConflictError, NotFoundError, StoreError, StoreLockedError, StoreSchemaError, StoreUnavailableError


def problem_for(body: dict[str, Any]) -> Problem:
    with pytest.raises(ValidationError) as caught:
        TypeAdapter(Job).validate_python(body)
    errors = [{**error, "loc": ("body", *error["loc"])} for error in caught.value.errors()]
    return validation_problem(errors)


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (NotFoundError("x"), 404, "not_found"),
        (ConflictError("x"), 409, "conflict"),
        (StoreLockedError("x"), 503, "store_busy"),
        (StoreUnavailableError("x"), 503, "store_unavailable"),
        (StoreSchemaError("x"), 503, "store_schema"),
        (UnknownNameError("x"), 422, "unknown_name"),
        (ModelError("x"), 422, "unsupported_model"),
        (DatasetError("x"), 422, "dataset"),
        (CheckpointError("x"), 422, "checkpoint"),
        (ConfigError("x"), 422, "invalid_config"),
        (PrunefrontError("x"), 500, "internal_error"),
    ],
)
def test_every_domain_error_has_a_status_and_a_stable_code(error: PrunefrontError, status: int, code: str) -> None:
    assert status_and_code(error) == (status, code)


def test_document_has_the_members_of_rfc_9457() -> None:
    answer = Problem(409, "no_feasible_point", "No point fits.", extra={"nearest": {"max_latency_ms": 4}}).response(
        "/x"
    )
    document = json.loads(bytes(answer.body))
    assert answer.media_type == MEDIA_TYPE
    assert document == {
        "type": "urn:prunefront:problem:no_feasible_point",
        "title": "Conflict",
        "status": 409,
        "code": "no_feasible_point",
        "detail": "No point fits.",
        "instance": "/x",
        "nearest": {"max_latency_ms": 4},
    }


def test_busy_database_says_when_to_come_back() -> None:
    assert problem_of(StoreLockedError("Busy.")).headers == {"Retry-After": "2"}


@pytest.mark.parametrize(
    ("error", "has_traceback"), [(StoreLockedError("Busy."), False), (PrunefrontError("Odd"), True)]
)
def test_only_what_nobody_foresaw_is_logged_with_its_traceback(
    error: PrunefrontError, has_traceback: bool, caplog: pytest.LogCaptureFixture
) -> None:
    problem_of(error)
    (record,) = caplog.records
    assert record.getMessage() == f"Request failed: {error}"
    assert bool(record.exc_info) is has_traceback


@pytest.mark.parametrize("error", [StoreUnavailableError("Away."), StoreLockedError("Busy."), StoreError("Full.")])
def test_a_database_that_is_away_is_no_fault_of_the_body(error: PrunefrontError) -> None:
    with pytest.raises(type(error)), naming_field("/device"):
        raise error
    with pytest.raises(Problem) as caught, naming_field("/device"):
        raise UnknownNameError("Unknown device.")
    assert caught.value.errors[0].pointer == "/device"


def test_unknown_method_in_a_job_keeps_the_sentence_and_the_code_of_the_library() -> None:
    problem = problem_for({"kind": "search", "model": {"name": "m"}, "dataset": "d", "space": {"methods": ["evitt"]}})
    assert problem.code == "unknown_name"
    assert problem.detail == "Unknown method 'evitt': did you mean 'evit' or 'spvit'?"
    assert problem.errors[0].pointer == "/space"


def test_several_errors_are_all_listed_and_the_first_is_the_sentence() -> None:
    problem = problem_for({"kind": "search", "model": {"name": "m"}, "dataset": "d", "batch_size": 0, "bogus": 1})
    assert problem.code == "invalid_request"
    assert [field.pointer for field in problem.errors] == ["/batch_size", "/bogus"]
    assert "/batch_size" in problem.detail and "1 more" in problem.detail


def test_a_list_whose_item_is_refused_is_not_called_too_short_as_well() -> None:
    config = {"model": {"name": "m"}, "method": "evit", "sites": [{"block": 0, "op": "fuse", "keep_ratio": 1.5}]}
    problem = problem_for({"kind": "measure", "configs": [config]})
    assert [field.pointer for field in problem.errors] == ["/configs/0/sites/0/keep_ratio"]


@pytest.mark.parametrize("body", [{}, {"kind": "dance"}, {"kind": 3}])
def test_a_job_of_no_known_kind_is_told_the_kinds_there_are(body: dict[str, Any]) -> None:
    (field,) = problem_for(body).errors
    assert (field.pointer, field.message) == ("/kind", "Input should be one of search, table, measure")


def test_values_that_were_sent_are_not_echoed_by_the_framework_errors() -> None:
    problem = problem_for({"kind": "search", "model": {"name": "m"}, "dataset": "d", "seed": "hunter2"})
    assert "hunter2" not in json.dumps([field.model_dump() for field in problem.errors])


def test_unknown_kind_of_job_names_the_kinds() -> None:
    problem = problem_for({"kind": "dance"})
    assert "search" in problem.detail and problem.status == 422


def test_field_error_of_the_library_is_never_a_server_error() -> None:
    problem = Problem.in_field("/dataset", PrunefrontError("Broken."))
    assert (problem.status, problem.errors[0].pointer) == (422, "/dataset")
