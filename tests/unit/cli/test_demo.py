"""`prunefront demo` with a service that answers at once."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from latency_tables.schema import load_table
from prunefront.cli import demo
from prunefront.cli.app import run
from prunefront.client import JobNotSucceededError
from prunefront.config import PruneConfig, load_config
from search.documents import JobAdapter, SearchJob, TableJob
from tests.acceptance.seeding import latency_table
from tests.unit.search.test_pareto import FRONT

FILES = ["best.json", "front.json", "front.png", "table.json"]


class FakeService:
    """Answers like the service whose jobs have all ended; remembers what it was asked."""

    url = "http://127.0.0.1:1"

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.environment: dict[str, str] = {}
        self.with_controller = False
        self.is_open = False
        self.on_wait: dict[str, BaseException] = {}  # kind of a job -> what waiting for it raises

    @contextmanager
    def connect(self, url: str | None, *, with_controller: bool = False) -> Iterator[FakeService]:
        assert url is None
        self.environment = {name: value for name, value in os.environ.items() if name.startswith("PRUNEFRONT_")}
        self.with_controller = with_controller
        self.is_open = True
        try:
            yield self
        finally:
            self.is_open = False

    def submit(self, body: dict[str, Any]) -> dict[str, Any]:
        self.bodies.append(body)
        return {"id": body["kind"]}

    def wait(self, job_id: str, *, progress: Any) -> dict[str, Any]:
        running = {"done": 1, "total": 2, "message": "half"}
        progress({"state": "running", "stage": "measuring", "waiting_reason": None, "progress": running})
        if job_id in self.on_wait:
            raise self.on_wait[job_id]
        return {"id": job_id, "result": {"table_id": "the table"}}

    def table(self, table_id: str) -> dict[str, Any]:
        assert table_id == "the table"
        return {"document": latency_table().model_dump(mode="json")}

    def front(self, job_id: str) -> dict[str, Any]:
        assert job_id == "search"
        return FRONT.model_dump(mode="json")

    def best(self, job_id: str) -> PruneConfig:
        assert job_id == "search"
        return FRONT.points[0].config


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> FakeService:
    """The service that the demo finds; the environment is put back afterwards."""
    monkeypatch.setenv("PRUNEFRONT_DATA_DIR", "the user's own")
    monkeypatch.setenv("PRUNEFRONT_DATABASE_URL", "postgresql://the.users/own")
    monkeypatch.setenv("PRUNEFRONT_LOG_LEVEL", "ERROR")
    monkeypatch.delenv("PRUNEFRONT_DEBUG", raising=False)
    fake = FakeService()
    monkeypatch.setattr(demo, "connect", fake.connect)
    return fake


@pytest.mark.parametrize("arguments", [[], ["--quick"]])
def test_the_demo_writes_four_files_that_say_what_the_service_said(
    service: FakeService, tmp_path: Path, capfd: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    out = tmp_path / "new" / "results"
    assert run(["demo", *arguments, "--no-serve", "--out", str(out)]) == 0
    assert sorted(path.name for path in out.iterdir()) == FILES
    assert json.loads((out / "front.json").read_text()) == service.front("search")
    assert load_config(out / "best.json") == service.best("search")
    assert load_table(out / "table.json").entries == latency_table().entries
    assert (out / "front.png").read_bytes().startswith(b"\x89PNG")
    shown = capfd.readouterr()
    assert "c2" in shown.out and "2.50 ×" in shown.out, "the front, as a table"
    assert f"to {out}" in shown.err
    assert not service.is_open


def test_the_search_finds_the_table_that_the_demo_builds_first(service: FakeService, tmp_path: Path) -> None:
    assert run(["demo", "--no-serve", "--out", str(tmp_path)]) == 0
    assert run(["demo", "--quick", "--no-serve", "--out", str(tmp_path)]) == 0
    jobs = [JobAdapter.validate_python(body) for body in service.bodies]
    for table, search in zip(jobs[::2], jobs[1::2], strict=True):
        assert isinstance(table, TableJob) and isinstance(search, SearchJob)
        for field in ("model", "device", "runtime", "dtype", "batch_size"):
            assert getattr(table, field) == getattr(search, field), field
    details = [job.detail for job in jobs if isinstance(job, TableJob)]
    trials = [job.budget.trials for job in jobs if isinstance(job, SearchJob)]
    assert details == ["full", "quick"]
    assert trials[1] < trials[0]


def test_a_demo_beside_other_work_says_what_its_table_may_put_up_with(service: FakeService, tmp_path: Path) -> None:
    assert run(["demo", "--quick", "--no-serve", "--max-foreign-cores", "3", "--out", str(tmp_path)]) == 0
    assert run(["demo", "--quick", "--no-serve", "--out", str(tmp_path)]) == 0
    jobs = [JobAdapter.validate_python(body) for body in service.bodies]
    assert [job.max_foreign_cores for job in jobs if isinstance(job, TableJob)] == [3.0, None]


def test_the_demo_leaves_the_users_own_jobs_alone(service: FakeService, tmp_path: Path) -> None:
    assert run(["demo", "--quick", "--no-serve", "--out", str(tmp_path)]) == 0
    assert service.with_controller
    assert Path(service.environment["PRUNEFRONT_DATA_DIR"]).is_relative_to(tmp_path)
    assert "PRUNEFRONT_DATABASE_URL" not in service.environment
    assert service.environment["PRUNEFRONT_LOG_LEVEL"] == "ERROR", "asked for by the user"


def test_the_page_stays_until_ctrl_c(
    service: FakeService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    was_open = []

    def interrupted(seconds: float) -> None:
        was_open.append(service.is_open)
        raise KeyboardInterrupt

    monkeypatch.setattr(demo.time, "sleep", interrupted)
    assert run(["demo", "--quick", "--out", str(tmp_path)]) == 0
    assert was_open == [True]
    assert not service.is_open
    shown = capfd.readouterr().err
    assert f"{service.url}/jobs/search" in shown
    assert "Traceback" not in shown
    assert sorted(path.name for path in tmp_path.iterdir()) == FILES


@pytest.mark.parametrize(("kind", "written"), [("table", []), ("search", ["table.json"])])
def test_ctrl_c_while_it_searches_ends_the_service_and_leaves_no_half_file(
    service: FakeService, tmp_path: Path, capfd: pytest.CaptureFixture[str], kind: str, written: list[str]
) -> None:
    service.on_wait[kind] = KeyboardInterrupt()
    assert run(["demo", "--quick", "--out", str(tmp_path)]) == 130
    assert not service.is_open
    assert sorted(path.name for path in tmp_path.iterdir()) == written
    shown = capfd.readouterr().err
    assert "Stopped." in shown and "Traceback" not in shown


def test_a_search_that_fails_is_told_in_its_own_words(
    service: FakeService, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    failed = {"id": "search", "state": "failed", "failure": {"message": "There is no memory left."}}
    service.on_wait["search"] = JobNotSucceededError(failed)
    assert run(["demo", "--quick", "--out", str(tmp_path)]) == 1
    assert "did not succeed: There is no memory left." in capfd.readouterr().err
    assert not service.is_open
