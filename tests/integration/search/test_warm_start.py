"""Searches that begin with the fronts of earlier ones."""

from __future__ import annotations

from typing import Any

import pytest

from prunefront.config import ModelSpec, PruneConfig
from prunefront.schedule import plan_schedule
from search.controller import Controller
from search.documents import FrontPoint
from search.pareto import build_front
from search.settings import ControllerSettings
from store import JobRecord, Store
from store.records import CandidateRecord, JobState
from tests.integration.search.conftest import results_of, run_to_end, search_body, submit
from tests.integration.search.fake_engine import TINY, FakeEngine
from tests.integration.search.test_interruption import run_with_kills
from tests.integration.store.conftest import MovableClock

DEEPER = {**TINY, "kwargs": {**TINY["kwargs"], "depth": 6}}


@pytest.fixture
def earlier(store: Store, settings: ControllerSettings) -> JobRecord:
    """A finished search whose front has proposals on it."""
    return run_to_end(
        store, FakeEngine(), settings, search_body(budget={"trials": 20, "measure_top": 12, "finetune_top": 0})
    )


def schedules_on_front(store: Store, job: JobRecord) -> list[FrontPoint]:
    """Points of a job's front that took a method: neither dense nor smaller images."""
    front = build_front(job, store.list_candidates(job.id))
    return [point for point in front.points if point.origin in ("sampler", "published")]


def hash_of(point: FrontPoint) -> str:
    return point.config.evolve(results=None, weights=None).content_hash()


def later_body(earlier: JobRecord, **changes: Any) -> dict[str, Any]:
    return search_body(seed=1, warm_start_from=[earlier.id], **changes)


def taken_over(store: Store, job: JobRecord, earlier: JobRecord) -> list[CandidateRecord]:
    return [c for c in store.list_candidates(job.id) if c.params.get("warm_start_from") == earlier.id]


def test_the_front_of_an_earlier_search_is_evaluated_before_anything_is_proposed(store, settings, earlier):
    points = schedules_on_front(store, earlier)
    proposed = [point for point in points if point.origin == "sampler"]
    assert proposed, "or this test shows nothing"
    engine = FakeEngine()
    job = run_to_end(store, engine, settings, later_body(earlier))
    assert job.state is JobState.SUCCEEDED, job.failure
    candidates = store.list_candidates(job.id)
    assert {hash_of(point) for point in points} <= {c.config_hash for c in candidates}
    found = taken_over(store, job, earlier)
    # What the papers published is among the candidates of every search, and stays a mark.
    assert [(c.config_hash, c.label, c.origin) for c in found] == [
        (hash_of(point), f"{point.label} of {earlier.id}", "sampler") for point in proposed
    ]
    first_proposal = next(c.number for c in candidates if "proposal" in c.params)
    assert max(c.number for c in found) < first_proposal
    order = [int(key) for split, key in engine.evaluated if split == "search"]
    assert order.index(found[-1].number) < order.index(first_proposal)


def test_an_earlier_front_leaves_no_results_in_the_later_search(store, settings, earlier):
    job = run_to_end(store, FakeEngine(), settings, later_body(earlier))
    for candidate in taken_over(store, job, earlier):
        assert PruneConfig.model_validate(candidate.config).results is None
        assert {e.job_id for e in candidate.evaluations} == {job.id}
        assert any(e.fidelity == "screened" for e in candidate.evaluations)


def test_a_search_that_fine_tuned_a_few_hands_over_all_that_it_tested(store, settings):
    budget = {"trials": 20, "measure_top": 12, "finetune_top": 1, "finetune_epochs": 1}
    space = {"min_keep_ratio": 0.6}
    # What a search finds depends on its proposals: take the first that fine-tuned, and found more than that.
    for seed in range(20):
        earlier = run_to_end(store, FakeEngine(), settings, search_body(budget=budget, space=space, seed=seed))
        candidates = store.list_candidates(earlier.id)
        fronts = [build_front(earlier, candidates, level).points for level in ("evaluated", "finetuned")]
        expected, tuned = ({hash_of(point) for point in front if point.origin == "sampler"} for front in fronts)
        if any(e.fidelity == "finetuned" for c in candidates for e in c.evaluations) and expected - tuned:
            break
    else:
        raise AssertionError("no search both fine-tuned and found more")
    job = run_to_end(store, FakeEngine(), settings, later_body(earlier))
    assert {c.config_hash for c in taken_over(store, job, earlier)} == expected | tuned


def test_the_sampler_learns_from_an_earlier_front(store, settings, earlier):
    """With TPE past its random start, knowing more points of the space changes what is proposed."""
    budget = {"trials": 24, "finetune_top": 0}

    def proposals(body: dict[str, Any]) -> list[Any]:
        job = run_to_end(store, FakeEngine(), settings, body)
        return [c.params["optuna"] for c in store.list_candidates(job.id) if "optuna" in c.params]

    assert proposals(later_body(earlier, budget=budget)) != proposals(search_body(seed=1, budget=budget))


def test_only_methods_that_the_later_search_allows_are_taken_over(store, settings, earlier):
    proposed = [point for point in schedules_on_front(store, earlier) if point.origin == "sampler"]
    known = proposed[0].config.method
    for methods in ([known], [method for method in ("evit", "ppt", "hybrid") if method != known]):
        job = run_to_end(store, FakeEngine(), settings, later_body(earlier, space={"methods": methods}))
        expected = [hash_of(point) for point in proposed if point.config.method in methods]
        assert [c.config_hash for c in taken_over(store, job, earlier)] == expected
        assert {c.config["method"] for c in store.list_candidates(job.id) if c.config["sites"]} <= set(methods)


def test_schedules_of_another_model_are_transferred_by_relative_depth(store, settings, earlier):
    points = schedules_on_front(store, earlier)
    job = run_to_end(store, FakeEngine(), settings, later_body(earlier, model=DEEPER))
    assert job.state is JobState.SUCCEEDED, job.failure
    found = taken_over(store, job, earlier)
    assert len(found) == len(points)
    for candidate, point in zip(found, points, strict=True):
        config = PruneConfig.model_validate(candidate.config)
        assert config.model == ModelSpec.model_validate(DEEPER)
        assert config.method == point.config.method
        # Twice as many blocks: what left at block n leaves at block 2 n.
        source, target = plan_schedule(point.config), plan_schedule(config)
        assert [target.blocks[2 * b.index].tokens_out for b in source.blocks] == [b.tokens_out for b in source.blocks]
        assert {site.block for site in config.sites} == {2 * b.index for b in source.blocks if b.steps}


def test_a_killed_search_takes_an_earlier_front_over_once(store, settings, clock: MovableClock, earlier):
    body = later_body(earlier)
    whole = run_to_end(store, FakeEngine(), settings, body)
    job_id, lives = run_with_kills(store, settings, clock, body, 23)
    assert lives > 3
    assert results_of(store, job_id) == results_of(store, whole.id)


def test_an_earlier_search_that_was_deleted_meanwhile_is_named(store, settings, earlier):
    job_id = submit(store, later_body(earlier))
    store.delete_job(earlier.id)
    assert Controller(store, FakeEngine(), settings).run_once()
    job = store.get_job(job_id)
    assert job.state is JobState.FAILED
    assert earlier.id in job.failure["message"]
    assert "traceback" not in job.failure


def test_a_search_without_a_front_yet_starts_another_like_none(store, settings):
    waiting = store.create_job("search", "not begun", search_body(), priority=-1)
    job = run_to_end(store, FakeEngine(), settings, later_body(waiting))
    assert job.state is JobState.SUCCEEDED, job.failure
    assert taken_over(store, job, waiting) == []
