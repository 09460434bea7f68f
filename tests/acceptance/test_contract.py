"""The running server keeps what its OpenAPI document promises, whatever is sent (schemathesis)."""

from __future__ import annotations

import re
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from schemathesis.checks import not_a_server_error
from schemathesis.core.result import Ok
from schemathesis.specs.openapi.checks import content_type_conformance, response_schema_conformance

from service.openapi import build_openapi
from service.problems import MEDIA_TYPE
from tests.acceptance.conftest import Server

MAX_EXAMPLES = 4

schema = schemathesis.openapi.from_dict(build_openapi()).exclude(path_regex="/events$")


def _contract_of(method: str, path: str) -> Any:
    """A test of one operation: no request breaks the server, and answers fit their schema.

    Each is a function of its own, as pytest 9.2 leaves out of a test's id which operation schemathesis made it for, and
    several test processes run one test of those with the same id.
    """

    @pytest.mark.slow
    @schema.include(method=method, path=path).parametrize()
    @settings(
        max_examples=MAX_EXAMPLES,
        deadline=None,
        derandomize=True,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def test(case: schemathesis.Case, server: Server) -> None:
        if case.method != "DELETE":
            # Made-up ids would all end in 404, and what lies behind them would never be tried.
            known = {"job_id": server.search_id, "table_id": server.table_id, "number": 1}
            case.path_parameters = {name: known[name] for name in case.path_parameters}
        response = case.call(base_url=server.url)
        if response.status_code >= 400:
            assert response.headers["content-type"][0] == MEDIA_TYPE, response.text
        case.validate_response(
            response, checks=[not_a_server_error, content_type_conformance, response_schema_conformance]
        )

    return test


for result in schema.get_all_operations():
    assert isinstance(result, Ok), result
    operation = result.ok()
    name = re.sub(r"\W+", "_", f"test_no_request_breaks_{operation.label}")
    assert name not in globals(), f"two operations would be tested as {name}"
    globals()[name] = _contract_of(operation.method, operation.path)
