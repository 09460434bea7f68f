"""Probes, metrics, pages and headers of the running server."""

from __future__ import annotations

from pathlib import Path

import anyio
import httpx
import pytest

from service.app import create_app
from service.settings import Settings
from store import Store, StoreError
from store.session import Database
from store.urls import parse_url
from tests.acceptance.conftest import Server


def test_probes_answer(server: Server) -> None:
    for path in ("/healthz", "/readyz"):
        answer = httpx.get(server.url + path)
        assert (answer.status_code, answer.json()) == (200, {"status": "ok"})


def test_metrics_count_jobs_by_state_and_requests_by_route_not_by_id(server: Server) -> None:
    httpx.get(f"{server.api}/jobs/{server.search_id}")
    text = httpx.get(f"{server.url}/metrics").text
    assert "prunefront_store_up 1.0" in text
    assert 'prunefront_jobs{state="succeeded"}' in text
    assert 'route="/api/v1/jobs/{job_id}"' in text
    assert server.search_id not in text


def test_pages_are_html_and_errors_are_pages_where_a_browser_asks(server: Server) -> None:
    html = {"Accept": "text/html"}
    for path in (
        "/",
        "/jobs/new",
        f"/jobs/{server.search_id}",
        "/latency-tables",
        f"/latency-tables/{server.table_id}",
    ):
        answer = httpx.get(server.url + path, headers=html)
        assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/html")
    missing = httpx.get(f"{server.url}/jobs/nope", headers=html)
    assert missing.status_code == 404 and "nope" in missing.text and missing.text.startswith("<!doctype html>")
    assert httpx.get(f"{server.url}/jobs/nope").headers["content-type"] == "application/problem+json"


def test_name_of_a_job_cannot_inject_markup(server: Server) -> None:
    job = server.store.create_job("table", "<script>alert(1)</script>", {"device": "cpu"})
    page = httpx.get(f"{server.url}/jobs/{job.id}", headers={"Accept": "text/html"}).text
    assert "<script>alert" not in page and "&lt;script&gt;alert" in page
    server.store.delete_job(job.id)


def test_a_database_that_went_away_is_told_without_its_password(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    app = create_app(Settings(data_dir=tmp_path, database_url=""))
    app.state.store = Store(Database(parse_url("postgresql://me:hunter2@127.0.0.1:1/x")))

    async def ask() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
            return await client.get("/readyz")

    answer = anyio.run(ask)
    assert (answer.status_code, answer.json()["code"]) == (503, "store_unavailable")
    assert "127.0.0.1:1/x" in answer.json()["detail"] and "127.0.0.1:1/x" in caplog.text
    assert "hunter2" not in answer.text + caplog.text


def test_application_does_not_start_without_its_database(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("stands where a folder should be")
    app = create_app(Settings(data_dir=tmp_path, database_url=f"sqlite:///{tmp_path}/file/store.db"))

    async def start() -> None:
        async with app.router.lifespan_context(app):
            pass

    with pytest.raises(StoreError):
        anyio.run(start)
