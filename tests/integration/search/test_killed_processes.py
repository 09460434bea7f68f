"""A search under real processes: the controller and a task's child are killed, and nothing is lost or doubled."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from prunefront.config import ModelSpec
from prunefront.training.digit_scenes import DigitSplitName, render_scenes
from service.routes.tables import save
from store import JobRecord, Store, open_store
from store.records import CandidateRecord, JobState
from tests.integration.search.conftest import submit
from tests.integration.search.fake_engine import synthetic_table
from tests.integration.workers.conftest import PATIENCE_S, is_alive, wait_for

ROOT = Path(__file__).parents[3]
MODEL = "digit_vit_patch6_48"
NUM_THREADS = "1"  # two threads that wait for each other are slow beyond measure on a machine with other work
# Which candidate is promoted depends on the clock; where it is one that lost something it is fine-tuned, which takes a
# batch of 64 training images.
NUM_IMAGES: dict[DigitSplitName, int] = {"train": 100, "search": 60, "test": 60}
TRIALS, BATCH = 12, 4
FIRST_KILL = 5  # proposals evaluated before the controller is killed: within the second batch
ENDED = (JobState.SUCCEEDED, JobState.FAILED)
BODY: dict[str, Any] = {
    "kind": "search",
    "model": {"name": MODEL},
    "dataset": "imagefolder:scenes",
    "space": {"methods": ["hybrid"], "min_keep_ratio": 0.5},
    # Nothing is fine-tuned unless the weights that ship lose something on so few images.
    "budget": {"trials": TRIALS, "measure_top": 2, "finetune_top": 1, "finetune_epochs": 1},
    "batch_size": 2,
}


@pytest.fixture(scope="module")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few of the scenes that the model knows, as a folder of images: the whole splits would take minutes."""
    root = tmp_path_factory.mktemp("scenes")
    for split, count in NUM_IMAGES.items():
        scenes = render_scenes(split, range(count))
        for number, (pixels, label) in enumerate(zip(scenes.images, scenes.labels, strict=True)):
            folder = root / "scenes" / split / str(label)
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / f"{number}.png")
    return root


class Controllers:
    """Starts ``python -m search`` on one database, one controller after the other, and ends what is left."""

    def __init__(self, database_url: str, data_dir: Path, data_root: Path) -> None:
        data_dir.mkdir(parents=True, exist_ok=True)
        self.log_path = data_dir / "controller.log"
        self._processes: list[subprocess.Popen[bytes]] = []
        self._environment = {
            **os.environ,
            "PRUNEFRONT_DATABASE_URL": database_url,
            "PRUNEFRONT_DATA_DIR": str(data_dir),
            "PRUNEFRONT_DATA_ROOTS": str(data_root),
            "PRUNEFRONT_LEASE_S": "3",
            "PRUNEFRONT_PROPOSALS_PER_BATCH": str(BATCH),
            "OMP_NUM_THREADS": NUM_THREADS,
            # What others measure meanwhile is no reason to wait: nobody will use these latencies.
            "PRUNEFRONT_LOCK_DIR": str(data_dir / "locks"),
        }

    def start(self) -> subprocess.Popen[bytes]:
        with self.log_path.open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "search"], cwd=ROOT, env=self._environment, stdout=log, stderr=log
            )
        self._processes.append(process)
        return process

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()


@contextlib.contextmanager
def controllers_of(database_url: str, data_dir: Path, data_root: Path) -> Iterator[Controllers]:
    controllers = Controllers(database_url, data_dir, data_root)
    try:
        yield controllers
    finally:
        controllers.close()


def put_table(store: Store) -> None:
    """A made-up table in which only tokens count, so that no table is built and aims are the same everywhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", NUM_THREADS)  # a part of what the table is valid for
        table = synthetic_table(ModelSpec(name=MODEL), runtime="eager", dtype="fp32", batch_size=BODY["batch_size"])
    save(table, store, "import")


def children_of(process: subprocess.Popen[bytes]) -> list[int]:
    """Living processes that a process has started itself, whichever of its threads it was."""
    found: list[int] = []
    for thread in Path(f"/proc/{process.pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            found += [int(pid) for pid in (thread / "children").read_text().split()]
    return [pid for pid in found if is_alive(pid)]


def screened(candidates: list[CandidateRecord]) -> list[CandidateRecord]:
    return [c for c in candidates if any(e.fidelity == "screened" for e in c.evaluations)]


def wait_until(store: Store, job_id: str, reached: Callable[[JobRecord], bool]) -> JobRecord:
    """Wait until a job has got somewhere, or has ended before."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        job = store.get_job(job_id)
        if reached(job) or job.state in ENDED:
            return job
        time.sleep(0.02)
    raise AssertionError(f"The job is still at {job.stage}: {job.progress}")


def deterministic(candidates: list[CandidateRecord]) -> list[dict[str, Any]]:
    """What a search finds out that does not depend on how fast the machine was at the time."""
    return [
        {
            "config_hash": c.config_hash,
            "label": c.label,
            "origin": c.origin,
            "params": c.params,
            "predicted_ms": c.predicted_ms,
            "macs": c.macs,
            "top1": {
                (e.fidelity, e.split): (e.top1, e.num_images, e.details["correct"])
                for e in c.evaluations
                if e.fidelity != "finetuned"
            },
        }
        for c in candidates
    ]


@pytest.fixture(scope="module")
def uninterrupted(data_root: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The search with nobody disturbing it."""
    data_dir = tmp_path_factory.mktemp("uninterrupted")
    url = f"sqlite:///{data_dir}/store.db"
    with open_store(url) as store, controllers_of(url, data_dir, data_root) as controllers:
        put_table(store)
        job_id = submit(store, BODY)
        controllers.start()
        job = wait_until(store, job_id, lambda job: False)
        assert job.state is JobState.SUCCEEDED, (job.failure, controllers.log_path.read_text())
        return deterministic(store.list_candidates(job_id))


@pytest.mark.slow
def test_a_search_whose_processes_are_killed_ends_like_one_that_was_left_alone(
    store: Store, database_url: str, data_root: Path, tmp_path: Path, uninterrupted: list[dict[str, Any]]
) -> None:
    with controllers_of(database_url, tmp_path / "data", data_root) as controllers:
        put_table(store)
        job_id = submit(store, BODY)

        def proposals_evaluated(_: JobRecord) -> bool:
            return sum(c.origin == "sampler" for c in screened(store.list_candidates(job_id))) >= FIRST_KILL

        first = controllers.start()
        job = wait_until(store, job_id, proposals_evaluated)
        orphans = children_of(first)
        first.kill()
        first.wait()
        assert job.stage == "screening", (job.failure, controllers.log_path.read_text())
        assert len(orphans) == 1, "the task's process"
        wait_for(lambda: not any(is_alive(pid) for pid in orphans))
        before = store.list_candidates(job_id)
        assert len(screened(before)) < len(uninterrupted), "it was killed in the middle"

        second = controllers.start()
        job = wait_until(store, job_id, lambda job: job.stage == "measuring")
        (child,) = children_of(second)
        os.kill(child, signal.SIGKILL)
        job = wait_until(store, job_id, lambda job: False)
        assert job.state is JobState.SUCCEEDED, (job.failure, controllers.log_path.read_text())
        lost = [event.payload["kind"] for event in store.events_after(job_id, limit=500) if event.type == "task_lost"]
        assert lost == ["measure"]
        assert (job.attempts, job.times_lost) == (2, 0), "two controllers; the losses end with the first new result"

        candidates = store.list_candidates(job_id)
        assert [c.number for c in candidates] == list(range(len(candidates)))
        assert len({c.config_hash for c in candidates}) == len(candidates)
        for candidate in candidates:
            accuracies = [(e.fidelity, e.split) for e in candidate.evaluations]
            assert len(accuracies) == len(set(accuracies)), candidate
            stages = [m.stage for m in candidate.measurements]
            assert len(stages) == len(set(stages)), candidate
        stored = {evaluation.id for candidate in candidates for evaluation in candidate.evaluations}
        assert {evaluation.id for candidate in before for evaluation in candidate.evaluations} <= stored
        assert deterministic(candidates) == uninterrupted

        leftovers = children_of(second)
        second.terminate()
        assert second.wait(PATIENCE_S) == 0
        assert not any(is_alive(pid) for pid in leftovers)
