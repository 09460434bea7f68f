"""A small dataset, settings, and ways to run a job to its end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from search.controller import Controller
from search.settings import ControllerSettings
from store import JobRecord, Store
from tests.integration.search.fake_engine import NUM_IMAGES, TINY, FakeEngine
from tests.integration.store.conftest import MovableClock
from tests.integration.training.image_folders import write_images

LEASE_S = 20.0


@pytest.fixture(scope="session")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    for split in ("train", "search", "test"):
        write_images(root / "grey" / split, [NUM_IMAGES.get(split, 20) // 10] * 10)
    return root


@pytest.fixture
def settings(data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ControllerSettings:
    monkeypatch.setenv("PRUNEFRONT_DATA_ROOTS", str(data_root))
    monkeypatch.delenv("PRUNEFRONT_DATASETS", raising=False)
    return ControllerSettings(data_dir=tmp_path / "app", lease_s=LEASE_S, proposals_per_batch=4, calibration_images=8)


@pytest.fixture
def clock(store: Store, monkeypatch: pytest.MonkeyPatch) -> MovableClock:
    """The store's clock; leases expire when a test says so."""
    clock = MovableClock()
    monkeypatch.setattr(store._database, "clock", clock)
    return clock


def search_body(**changes: Any) -> dict[str, Any]:
    """A small search job."""
    budget = {"trials": 10, "measure_top": 3, "finetune_top": 2, "finetune_epochs": 1, **changes.pop("budget", {})}
    space = {"methods": ["evit", "ppt", "hybrid"], **changes.pop("space", {})}
    return {"kind": "search", "model": TINY, "dataset": "imagefolder:grey", "budget": budget, "space": space, **changes}


def submit(store: Store, body: dict[str, Any]) -> str:
    return store.create_job(body["kind"], "a job", body).id


def run_to_end(store: Store, engine: FakeEngine, settings: ControllerSettings, body: dict[str, Any]) -> JobRecord:
    job_id = submit(store, body)
    assert Controller(store, engine, settings).run_once()
    return store.get_job(job_id)


def run_until(
    store: Store, settings: ControllerSettings, job_id: str, should_stop: Callable[[], bool], engine: FakeEngine
) -> JobRecord:
    Controller(store, engine, settings).run_once(should_stop)
    return store.get_job(job_id)


def results_of(store: Store, job_id: str) -> list[dict[str, Any]]:
    """Everything a job found out, without what depends on when and under which ids it was written."""
    volatile = {"id", "job_id", "created_at", "updated_at", "path"}

    def plain(record: Any) -> dict[str, Any]:
        return {name: value for name, value in vars(record).items() if name not in volatile}

    found = []
    for candidate in store.list_candidates(job_id):
        evaluations = sorted((plain(e) for e in candidate.evaluations), key=lambda e: (e["fidelity"], e["split"]))
        measurements = sorted((plain(m) for m in candidate.measurements), key=lambda m: m["stage"])
        artifacts = [plain(a) for a in store.list_artifacts(job_id, candidate.number)]
        parts = {"evaluations": evaluations, "measurements": measurements, "artifacts": artifacts}
        found.append({**plain(candidate), **parts})
    return found
