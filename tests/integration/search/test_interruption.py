"""Wherever a controller ends, the next one ends the job with the same results."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from search.controller import Controller
from search.settings import ControllerSettings
from store import Store
from store.records import JobState
from tests.integration.search.conftest import LEASE_S, results_of, run_to_end, search_body, submit
from tests.integration.search.fake_engine import TINY, FakeEngine
from tests.integration.store.conftest import MovableClock

WRITES = ("add_candidate", "add_evaluation", "add_measurement", "add_artifact")
MAX_LIVES = 400


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the controller may handle it, and nothing is written after it."""


class Fuse:
    """Burns down with every event and every write, before and after it."""

    def __init__(self, length: int) -> None:
        self.left = length

    def burn(self) -> None:
        self.left -= 1
        if self.left <= 0:
            raise Killed


class FragileStore:
    """A store whose user may be killed right before and right after each write of a result."""

    def __init__(self, store: Store, fuse: Fuse) -> None:
        self._store = store
        self._fuse = fuse

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._store, name)
        if name not in WRITES:
            return method

        def write(*args: Any, **kwargs: Any) -> Any:
            # What every controller adds anew comes without danger here, or none would ever get further.
            if name == "add_candidate" and not kwargs["params"]:
                return method(*args, **kwargs)
            self._fuse.burn()
            written = method(*args, **kwargs)
            self._fuse.burn()
            return written

        return write


def run_with_kills(
    store: Store, settings: ControllerSettings, clock: MovableClock, body: dict[str, Any], every: int
) -> tuple[str, int]:
    """Kill each controller after so many steps until one ends the job; returns the job and the number of lives."""
    job_id = submit(store, body)
    for life in range(1, MAX_LIVES):
        fuse = Fuse(every)
        engine = FakeEngine(tick=fuse.burn)
        fragile: Any = FragileStore(store, fuse)
        try:
            assert Controller(fragile, engine, settings).run_once()
            return job_id, life
        except Killed:
            clock.advance(LEASE_S + 1)
    raise AssertionError(f"The job did not end within {MAX_LIVES} controllers.")


@pytest.mark.parametrize(("every", "sampler"), [(10, "tpe"), (17, "nsga2"), (29, "qmc"), (41, "random")])
def test_a_search_killed_again_and_again_ends_like_one_that_was_not(store, settings, clock, every, sampler):
    body = search_body(sampler=sampler)
    whole = run_to_end(store, FakeEngine(), settings, body)
    assert whole.state is JobState.SUCCEEDED, whole.failure
    job_id, lives = run_with_kills(store, settings, clock, body, every)
    job = store.get_job(job_id)
    assert job.state is JobState.SUCCEEDED, job.failure
    assert lives > 5
    assert results_of(store, job_id) == results_of(store, whole.id)
    assert job.result == whole.result
    assert [c.number for c in store.list_candidates(job_id)] == list(range(len(store.list_candidates(job_id))))


@pytest.mark.parametrize("every", [5, 6, 8])
def test_a_killed_measure_job_loses_and_doubles_nothing(store, settings, clock, every):
    body = measure_body()
    whole = run_to_end(store, FakeEngine(), settings, body)
    assert whole.state is JobState.SUCCEEDED, whole.failure
    job_id, _ = run_with_kills(store, settings, clock, body, every)
    assert store.get_job(job_id).state is JobState.SUCCEEDED
    assert results_of(store, job_id) == results_of(store, whole.id)


def test_a_controller_that_is_told_to_stop_gives_the_job_back_and_the_next_goes_on(store, settings):
    body = search_body()
    whole = run_to_end(store, FakeEngine(), settings, body)
    job_id = submit(store, body)
    handed_out = lives = 0
    while True:
        lives += 1
        calls = itertools.count()
        engine = FakeEngine()
        Controller(store, engine, settings).run_once(lambda calls=calls: next(calls) > 70)
        assert not engine.running, "the task ends before the job is let go"
        handed_out += len(engine.evaluated)
        job = store.get_job(job_id)
        if job.state is not JobState.QUEUED:
            break
    assert lives > 1
    assert job.state is JobState.SUCCEEDED, job.failure
    assert results_of(store, job_id) == results_of(store, whole.id)
    assert handed_out == sum(len(c.evaluations) for c in store.list_candidates(job_id)), "nothing evaluated twice"


def measure_body() -> dict[str, Any]:
    model = {**TINY, "in_chans": 3}
    configs = [
        {"model": model, "method": "evit", "sites": [{"block": 1, "op": "fuse", "keep_ratio": share}]}
        for share in (0.8, 0.6, 0.4)
    ]
    return {"kind": "measure", "configs": configs}
