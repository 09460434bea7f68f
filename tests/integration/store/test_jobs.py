"""Jobs: submission, lists, what users may do to them."""

from __future__ import annotations

from typing import Any

import pytest

from store import ConflictError, DocumentError, InvalidCursorError, JobState, NotFoundError, Store
from tests.integration.store.writes import evaluate, measure, propose, queue, start


def test_a_new_job_is_queued_as_submitted(store: Store) -> None:
    job = queue(store, "säge 🌲", spec={"b": 1, "a": [1.0, None, "\\u0000"]}, tags=["x", "y"], priority=-3)
    assert (job.state, job.name, job.tags, job.priority) == (JobState.QUEUED, "säge 🌲", ("x", "y"), -3)
    assert (job.attempts, job.fence, job.stage, job.started_at, job.failure) == (0, 0, None, None, None)
    assert store.get_job(job.id) == job


def test_documents_come_back_with_their_key_order_and_number_types(store: Store) -> None:
    spec = {"z": 1, "a": 1.0, "m": {"y": 1e16, "b": 10**20}}
    stored = store.get_job(queue(store, spec=spec).id).spec
    assert repr(stored) == repr(spec)


def test_timestamps_are_aware_utc(store: Store) -> None:
    created_at = store.get_job(queue(store).id).created_at
    assert str(created_at.tzinfo) == "UTC"


@pytest.mark.parametrize(
    "fields",
    [
        {"spec": {"lr": float("nan")}},
        {"spec": {"lr": float("inf")}},
        {"spec": {"name": "a\x00b"}},
        {"spec": {"name": "\ud800"}},
        {"spec": {"when": object()}},
        {"name": "a\x00b"},
        {"name": "\udfff"},
        {"tags": ["a\x00"]},
        {"priority": 10**30},
    ],
)
def test_values_that_a_database_would_change_are_refused(store: Store, fields: dict[str, Any]) -> None:
    with pytest.raises(DocumentError, match="Expected"):
        queue(store, **fields)
    assert store.list_jobs() == ([], None)


@pytest.mark.parametrize("job_id", ["nope", "", "\x00", "\ud800", "x" * 10_000])
def test_an_unknown_job_is_not_found(store: Store, job_id: str) -> None:
    for call in (
        store.get_job,
        store.delete_job,
        store.request_cancel,
        store.request_pause,
        store.resume_job,
        store.retry_job,
        store.events_after,
        store.list_candidates,
        store.list_artifacts,
    ):
        with pytest.raises(NotFoundError, match="There is no job"):
            call(job_id)


def test_a_repeated_request_returns_the_first_job(store: Store) -> None:
    first = queue(store, idempotency_key="k", request_hash="h")
    assert queue(store, idempotency_key="k", request_hash="h") == first
    assert len(store.list_jobs()[0]) == 1


def test_a_repeated_request_sees_the_job_as_it_is_now(store: Store) -> None:
    first = queue(store, idempotency_key="k", request_hash="h")
    store.request_cancel(first.id)
    assert queue(store, idempotency_key="k", request_hash="h").state == JobState.CANCELLED


def test_a_key_that_returns_with_another_request_is_refused(store: Store) -> None:
    queue(store, idempotency_key="k", request_hash="h")
    with pytest.raises(ConflictError, match="Use a new key"):
        queue(store, idempotency_key="k", request_hash="other")
    assert len(store.list_jobs()[0]) == 1


def test_a_key_goes_with_its_job(store: Store) -> None:
    first = queue(store, idempotency_key="k", request_hash="h")
    store.delete_job(first.id)
    assert queue(store, idempotency_key="k", request_hash="h").id != first.id


def test_a_key_without_a_hash_is_a_programming_error(store: Store) -> None:
    with pytest.raises(ValueError, match="belong together"):
        queue(store, idempotency_key="k")


def test_pages_are_newest_first_and_stable_while_jobs_arrive(store: Store) -> None:
    ids = [queue(store).id for _ in range(5)]
    page, cursor = store.list_jobs(limit=2)
    assert [job.id for job in page] == ids[:2:-1]
    queue(store)
    store.delete_job(ids[3])
    page, cursor = store.list_jobs(limit=2, cursor=cursor)
    assert [job.id for job in page] == [ids[2], ids[1]]
    page, cursor = store.list_jobs(limit=2, cursor=cursor)
    assert ([job.id for job in page], cursor) == ([ids[0]], None)


def test_a_page_that_ends_the_list_has_no_cursor(store: Store) -> None:
    queue(store)
    queue(store)
    assert store.list_jobs(limit=2)[1] is None


def test_lists_filter_by_state_and_kind(store: Store) -> None:
    table = queue(store, kind="table")
    search = queue(store)
    store.request_cancel(search.id)
    assert [job.id for job in store.list_jobs(kind="table")[0]] == [table.id]
    assert [job.id for job in store.list_jobs(state=JobState.CANCELLED)[0]] == [search.id]
    assert store.list_jobs(state="cancelled", kind="table") == ([], None)


@pytest.mark.parametrize("cursor", ["", "x", "!!!", "e30", "eyJhZnRlciI6LTF9", "bnVsbA", "ünï", "W10", "a" * 10_000])
def test_a_foreign_cursor_is_refused(store: Store, cursor: str) -> None:
    with pytest.raises(InvalidCursorError, match="Start without a cursor"):
        store.list_jobs(cursor=cursor)
    with pytest.raises(InvalidCursorError):
        store.list_tables(cursor=cursor)


def test_jobs_are_counted_by_state(store: Store) -> None:
    start(store)
    queue(store)
    queue(store)
    counts = store.count_jobs()
    assert counts == {state: 0 for state in JobState} | {JobState.RUNNING: 1, JobState.QUEUED: 2}


def test_a_waiting_job_is_cancelled_at_once(store: Store) -> None:
    job = store.request_cancel(queue(store).id)
    assert job.state == JobState.CANCELLED and job.finished_at is not None and not job.cancel_requested
    assert store.claim_job("c", 60) is None


def test_cancelling_twice_changes_nothing(store: Store) -> None:
    job = store.request_cancel(queue(store).id)
    assert store.request_cancel(job.id) == job


def test_a_running_job_is_asked_to_cancel(store: Store) -> None:
    job = start(store)
    assert store.request_cancel(job.id).state == JobState.RUNNING
    renewed = store.renew_lease(job.id, job.fence, 60)
    assert renewed.cancel_requested and not renewed.pause_requested
    done = store.finish_job(job.id, job.fence, "cancelled")
    assert done.state == JobState.CANCELLED and not done.cancel_requested


@pytest.mark.parametrize("state", ["succeeded", "failed"])
def test_an_ended_job_cannot_be_cancelled_paused_or_resumed(store: Store, state: Any) -> None:
    job = start(store)
    ended = store.finish_job(job.id, job.fence, state)
    for call in (store.request_cancel, store.request_pause, store.resume_job):
        with pytest.raises(ConflictError, match=job.id):
            call(job.id)
    assert store.get_job(job.id) == ended


def test_a_queued_job_is_paused_at_once_and_resumed(store: Store) -> None:
    job = queue(store)
    assert store.request_pause(job.id).state == JobState.PAUSED
    assert store.request_pause(job.id).state == JobState.PAUSED
    assert store.claim_job("c", 60) is None
    assert store.resume_job(job.id).state == JobState.QUEUED
    assert store.claim_job("c", 60) is not None


def test_a_running_job_is_asked_to_pause_and_keeps_its_place_when_resumed(store: Store) -> None:
    job = start(store)
    later = queue(store)
    store.request_pause(job.id)
    assert store.renew_lease(job.id, job.fence, 60).pause_requested
    paused = store.release_job(job.id, job.fence, "paused")
    assert (paused.state, paused.pause_requested, paused.lease_owner) == (JobState.PAUSED, False, None)
    store.resume_job(job.id)
    claimed = store.claim_job("c", 60)
    assert claimed is not None and claimed.id == job.id != later.id
    assert claimed.started_at == job.started_at


def test_a_pause_that_has_not_happened_is_withdrawn_by_resume(store: Store) -> None:
    job = start(store)
    store.request_pause(job.id)
    resumed = store.resume_job(job.id)
    assert (resumed.state, resumed.pause_requested) == (JobState.RUNNING, False)


def test_a_job_about_to_be_cancelled_cannot_be_paused(store: Store) -> None:
    job = start(store)
    store.request_cancel(job.id)
    with pytest.raises(ConflictError, match="about to be cancelled"):
        store.request_pause(job.id)


@pytest.mark.parametrize(("request_name", "state"), [("request_cancel", "cancelled"), ("request_pause", "paused")])
def test_what_was_asked_for_happens_when_the_job_is_given_back(store: Store, request_name: str, state: str) -> None:
    job = start(store)
    getattr(store, request_name)(job.id)
    assert store.release_job(job.id, job.fence, "queued").state == state


def test_a_released_job_is_queued_again(store: Store) -> None:
    job = start(store)
    assert store.release_job(job.id, job.fence).state == JobState.QUEUED
    again = store.claim_job("another", 60)
    assert again is not None and (again.id, again.fence, again.attempts) == (job.id, job.fence + 1, 2)


def test_a_failed_job_keeps_why_and_can_be_retried(store: Store) -> None:
    job = start(store)
    failure = {"type": "ModelError", "message": "no", "traceback": "…"}
    assert store.finish_job(job.id, job.fence, "failed", failure=failure).failure == failure
    again = store.retry_job(job.id)
    assert (again.state, again.failure, again.finished_at) == (JobState.QUEUED, None, None)


def test_a_job_that_did_not_fail_is_not_retried(store: Store) -> None:
    job = start(store)
    with pytest.raises(ConflictError, match="it is running"):
        store.retry_job(job.id)
    store.finish_job(job.id, job.fence, "succeeded", result={"points": 3})
    with pytest.raises(ConflictError, match="Clone it"):
        store.retry_job(job.id)
    assert store.get_job(job.id).result == {"points": 3}


def test_finish_and_release_take_only_their_own_states(store: Store) -> None:
    job = start(store)
    with pytest.raises(ValueError, match="release_job"):
        store.finish_job(job.id, job.fence, JobState.PAUSED)
    with pytest.raises(ValueError, match="finish_job"):
        store.release_job(job.id, job.fence, JobState.FAILED)


def test_a_running_job_is_not_deleted(store: Store) -> None:
    job = start(store)
    with pytest.raises(ConflictError, match="Cancel it first"):
        store.delete_job(job.id)
    assert store.get_job(job.id) == job


def test_deleting_a_job_removes_all_of_it_and_names_its_files(store: Store) -> None:
    kept = start(store)
    propose(store, kept)
    job = start(store, idempotency_key="k", request_hash="h")
    propose(store, job)
    evaluate(store, job)
    measure(store, job)
    store.add_artifact(job.id, job.fence, 0, "checkpoint", "jobs/1/0.safetensors", "ab", 7)
    store.add_artifact(job.id, job.fence, None, "log", "jobs/1/log", "cd", 9)
    store.finish_job(job.id, job.fence, "succeeded")
    assert store.delete_job(job.id) == ["jobs/1/0.safetensors", "jobs/1/log"]
    with pytest.raises(NotFoundError):
        store.get_job(job.id)
    assert len(store.list_candidates(kept.id)) == 1


def test_an_id_of_a_deleted_row_never_returns(store: Store) -> None:
    job = queue(store)
    last = store.events_after(job.id)[-1].id
    store.delete_job(job.id)
    assert store.events_after(queue(store).id)[0].id > last
