"""The outermost layer: hosts, origins, body sizes and headers, around a toy application."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from anyio import run
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from service.security import SECURITY_HEADERS, Gatekeeper, host_of
from service.settings import Settings

MAX_BODY_BYTES = 1024


async def echo_length(request: Request) -> PlainTextResponse:
    return PlainTextResponse(str(len(await request.body())))


def ask(method: str, headers: dict[str, str], content: bytes | AsyncIterator[bytes] = b"") -> httpx.Response:
    settings = Settings(data_dir=Path("/data"), allowed_hosts=("lab.example",), max_body_bytes=MAX_BODY_BYTES)
    app = Gatekeeper(Starlette(routes=[Route("/{rest:path}", echo_length, methods=["GET", "POST"])]), settings)

    async def send() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost:8000") as client:
            return await client.request(method, "/api/v1/jobs", headers=headers, content=content)

    return run(send)


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8000", "127.0.0.1:1", "[::1]:8000", "lab.example"])
def test_listed_hosts_are_answered_with_any_port(host: str) -> None:
    assert ask("GET", {"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "localhost.evil.example", "", "127.0.0.1@evil.example", "[::1", "lab"]
)
def test_other_hosts_are_refused(host: str) -> None:
    answer = ask("GET", {"Host": host})
    assert answer.status_code == 421
    assert answer.json()["code"] == "host_not_allowed"


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://localhost:9999"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ],
)
def test_pages_of_other_origins_may_read_nothing_and_change_nothing(headers: dict[str, str]) -> None:
    assert ask("POST", headers).json()["code"] == "cross_origin"
    assert "access-control-allow-origin" not in ask("GET", headers).headers


@pytest.mark.parametrize("headers", [{}, {"Origin": "http://localhost:8000"}, {"Sec-Fetch-Site": "same-origin"}])
def test_own_page_and_programs_may_post(headers: dict[str, str]) -> None:
    assert ask("POST", headers).status_code == 200


def test_body_over_the_limit_is_refused_by_its_announced_length() -> None:
    answer = ask("POST", {}, b"x" * (MAX_BODY_BYTES + 1))
    assert answer.status_code == 413
    assert answer.json()["code"] == "body_too_large"
    assert ask("POST", {}, b"x" * MAX_BODY_BYTES).text == str(MAX_BODY_BYTES)


def test_body_without_a_length_is_counted_while_it_arrives() -> None:
    async def endless() -> AsyncIterator[bytes]:
        for _ in range(1000):
            yield b"x" * 100

    assert ask("POST", {}, endless()).status_code == 413


def test_every_answer_carries_the_security_headers() -> None:
    for answer in (ask("GET", {}), ask("GET", {"Host": "evil.example"})):
        assert {name: answer.headers[name] for name in SECURITY_HEADERS} == SECURITY_HEADERS
        assert answer.headers["cache-control"] == "no-store"


def test_content_policy_allows_nothing_from_elsewhere_and_nothing_inline() -> None:
    policy = SECURITY_HEADERS["Content-Security-Policy"]
    assert policy.startswith("default-src 'self';")
    assert "unsafe" not in policy and "http" not in policy


def test_host_of_understands_ports_brackets_and_origins() -> None:
    assert host_of("[::1]:80") == "::1"
    assert host_of("https://Lab.example:1") == "lab.example"
