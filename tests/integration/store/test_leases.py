"""Claims, leases, fences: who may write to a job."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from store import JobRecord, JobState, LeaseLostError, Store
from tests.integration.store.conftest import MovableClock
from tests.integration.store.writes import evaluate, measure, propose, queue, start

Write = Callable[[Store, JobRecord], object]

FENCED_WRITES: dict[str, Write] = {
    "renew_lease": lambda store, job: store.renew_lease(job.id, job.fence, 60),
    "set_progress": lambda store, job: store.set_progress(job.id, job.fence, "screen", 1, 2, "late"),
    "finish_job": lambda store, job: store.finish_job(job.id, job.fence, "succeeded"),
    "release_job": lambda store, job: store.release_job(job.id, job.fence),
    "add_candidate": lambda store, job: propose(store, job, "late"),
    "update_candidate": lambda store, job: store.update_candidate(job.id, job.fence, 0, state="late"),
    "add_evaluation": lambda store, job: evaluate(store, job, split="late"),
    "add_measurement": lambda store, job: measure(store, job, stage="late"),
    "add_artifact": lambda store, job: store.add_artifact(job.id, job.fence, None, "log", "late", "ab", 1),
}


def test_a_claim_takes_the_highest_priority_then_the_oldest(store: Store) -> None:
    for name, priority in (("low", -1), ("old", 0), ("new", 0), ("high", 5)):
        queue(store, name, priority=priority)
    claimed = [store.claim_job("c", 60) for _ in range(5)]
    assert [job and job.name for job in claimed] == ["high", "old", "new", "low", None]


def test_a_claim_takes_only_the_kinds_asked_for(store: Store) -> None:
    queue(store, "table", kind="table")
    queue(store, "search", kind="search")
    assert store.claim_job("c", 60, kinds=[]) is None
    assert store.claim_job("c", 60, kinds=["finetune"]) is None
    job = store.claim_job("c", 60, kinds=["search", "finetune"])
    assert job is not None and job.name == "search"


def test_a_claim_records_owner_lease_and_fence(timed_store: Store, clock: MovableClock) -> None:
    queue(timed_store)
    job = timed_store.claim_job("host:42", 60)
    assert job is not None
    assert (job.state, job.lease_owner, job.fence, job.attempts) == (JobState.RUNNING, "host:42", 1, 1)
    assert job.lease_expires_at is not None and (job.lease_expires_at - clock.now).total_seconds() == 60
    assert job.started_at == clock.now
    assert timed_store.get_job(job.id) == job


def test_a_live_lease_keeps_others_away(timed_store: Store, clock: MovableClock) -> None:
    job = start(timed_store, lease_s=60)
    clock.advance(59.9)
    assert timed_store.claim_job("other", 60) is None
    timed_store.renew_lease(job.id, job.fence, 60)
    clock.advance(59.9)
    assert timed_store.claim_job("other", 60) is None


def test_an_expired_lease_is_taken_over_with_a_higher_fence(timed_store: Store, clock: MovableClock) -> None:
    job = start(timed_store, lease_s=60)
    clock.advance(60)
    taken = timed_store.claim_job("other", 60)
    assert taken is not None and taken.id == job.id
    assert (taken.fence, taken.attempts, taken.times_lost, taken.lease_owner) == (job.fence + 1, 2, 1, "other")
    assert taken.started_at == job.started_at


@pytest.mark.parametrize("name", FENCED_WRITES)
def test_a_superseded_holder_can_write_nothing(timed_store: Store, clock: MovableClock, name: str) -> None:
    job = start(timed_store, lease_s=60)
    propose(timed_store, job)
    clock.advance(61)
    taken = timed_store.claim_job("other", 60)
    assert taken is not None
    events = timed_store.events_after(job.id)
    with pytest.raises(LeaseLostError, match="Stop working on it"):
        FENCED_WRITES[name](timed_store, job)
    assert timed_store.get_job(job.id) == taken
    assert timed_store.events_after(job.id) == events
    (candidate,) = timed_store.list_candidates(job.id)
    assert (candidate.state, candidate.evaluations, candidate.measurements) == ("proposed", (), ())
    assert timed_store.list_artifacts(job.id) == []


@pytest.mark.parametrize("name", FENCED_WRITES)
@pytest.mark.parametrize("end", ["finish", "release", "delete"])
def test_whoever_gave_the_job_up_can_write_nothing(store: Store, name: str, end: str) -> None:
    job = start(store)
    propose(store, job)
    if end == "release":
        store.release_job(job.id, job.fence)
    else:
        store.finish_job(job.id, job.fence, "succeeded")
    if end == "delete":
        store.delete_job(job.id)
    with pytest.raises(LeaseLostError):
        FENCED_WRITES[name](store, job)


def test_a_late_result_counts_while_nobody_took_over(timed_store: Store, clock: MovableClock) -> None:
    job = start(timed_store, lease_s=60)
    clock.advance(3600)
    assert propose(timed_store, job).number == 0
    timed_store.renew_lease(job.id, job.fence, 60)
    assert timed_store.claim_job("other", 60) is None
    assert timed_store.get_job(job.id).times_lost == 0


def test_a_job_lost_too_often_fails_with_the_cause(timed_store: Store, clock: MovableClock) -> None:
    job = queue(timed_store)
    for times_lost in range(3):
        claimed = timed_store.claim_job(f"c{times_lost}", 60)
        assert claimed is not None and claimed.times_lost == times_lost
        clock.advance(61)
    assert timed_store.claim_job("c3", 60) is None
    failed = timed_store.get_job(job.id)
    assert failed.state == JobState.FAILED and failed.failure is not None and failed.finished_at == clock.now
    assert failed.failure["cause"] == "lost 3 times"
    assert "c2" in failed.failure["message"]


def test_a_job_that_gets_somewhere_between_losses_goes_on(timed_store: Store, clock: MovableClock) -> None:
    job = queue(timed_store)
    for number in range(6):
        claimed = timed_store.claim_job("c", 60)
        assert claimed is not None
        propose(timed_store, claimed, f"h{number}")
        clock.advance(61)
    assert timed_store.get_job(job.id).state == JobState.RUNNING


def test_a_retried_job_may_be_lost_as_often_again(timed_store: Store, clock: MovableClock) -> None:
    job = queue(timed_store)
    for _ in range(3):
        timed_store.claim_job("c", 60)
        clock.advance(61)
    assert timed_store.claim_job("c", 60) is None
    timed_store.retry_job(job.id)
    claimed = timed_store.claim_job("c", 60)
    assert claimed is not None and (claimed.times_lost, claimed.attempts) == (0, 4)


@pytest.mark.parametrize(("request_name", "state"), [("request_cancel", "cancelled"), ("request_pause", "paused")])
def test_what_was_asked_of_a_lost_holder_happens(
    timed_store: Store, clock: MovableClock, request_name: str, state: str
) -> None:
    job = start(timed_store, lease_s=60)
    getattr(timed_store, request_name)(job.id)
    clock.advance(61)
    assert timed_store.claim_job("other", 60) is None
    assert timed_store.get_job(job.id).state == state


def test_releasing_is_not_losing(timed_store: Store) -> None:
    job = queue(timed_store)
    for _ in range(5):
        claimed = timed_store.claim_job("c", 60)
        assert claimed is not None
        timed_store.release_job(job.id, claimed.fence)
    assert timed_store.get_job(job.id).times_lost == 0


def test_the_store_keeps_its_own_time_when_none_is_given(store: Store) -> None:
    job = start(store, lease_s=-1)
    taken = store.claim_job("other", 60)
    assert taken is not None and taken.id == job.id
    assert taken.lease_expires_at is not None and taken.lease_expires_at > taken.created_at
