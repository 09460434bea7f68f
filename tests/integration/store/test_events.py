"""Events and progress: what watchers of a job see."""

from __future__ import annotations

import pytest

from store import NotFoundError, Store
from tests.integration.store.conftest import MovableClock
from tests.integration.store.writes import queue, start


def progress_of(store: Store, job_id: str, after: int = 0) -> list[float]:
    events = store.events_after(job_id, after)
    return [event.payload["progress"]["done"] for event in events if event.type == "progress"]


def test_every_state_change_is_an_event(store: Store) -> None:
    job = start(store)
    store.request_pause(job.id)
    store.release_job(job.id, job.fence, "paused")
    store.resume_job(job.id)
    store.request_cancel(job.id)
    store.retry_job(job.id)
    events = store.events_after(job.id)
    assert {event.type for event in events} == {"state"}
    assert [(event.payload["state"], event.payload["pause_requested"]) for event in events] == [
        ("queued", False),
        ("running", False),
        ("running", True),
        ("paused", False),
        ("queued", False),
        ("cancelled", False),
        ("queued", False),
    ]


def test_a_failure_is_told_without_its_traceback(store: Store) -> None:
    job = start(store)
    store.finish_job(job.id, job.fence, "failed", failure={"type": "T", "message": "m", "traceback": "secret paths"})
    assert store.events_after(job.id)[-1].payload["failure"] == {"type": "T", "message": "m"}


def test_progress_is_kept_with_every_call_and_told_once_a_second(timed_store: Store, clock: MovableClock) -> None:
    job = start(timed_store)
    for done in range(1, 40):
        timed_store.set_progress(job.id, job.fence, "screen", done, 100, f"{done} done")
        assert timed_store.get_job(job.id).progress.done == done
        clock.advance(0.1)
    assert timed_store.get_job(job.id).progress.message == "39 done"
    assert progress_of(timed_store, job.id) == [31]


def test_a_new_stage_reason_or_the_end_is_told_at_once(timed_store: Store) -> None:
    job = start(timed_store)
    last = 0
    for stage, done, reason in (
        ("table", 1, None),
        ("screen", 2, None),
        ("screen", 3, "no worker offers cuda:0"),
        ("screen", 4, None),
        ("screen", 10, None),
    ):
        timed_store.set_progress(job.id, job.fence, stage, done, 10, "", waiting_reason=reason)
        (event,) = timed_store.events_after(job.id, last)[-1:]
        assert (event.payload["stage"], event.payload["progress"]["done"]) == (stage, done)
        assert event.payload["waiting_reason"] == reason
        last = event.id


def test_repeating_the_end_is_not_told_again(timed_store: Store) -> None:
    job = start(timed_store)
    timed_store.set_progress(job.id, job.fence, "screen", 10, 10, "")
    last = timed_store.events_after(job.id)[-1].id
    timed_store.set_progress(job.id, job.fence, "screen", 10, 10, "")
    assert timed_store.events_after(job.id, last) == []


def test_a_clock_set_back_does_not_silence_a_job(timed_store: Store, clock: MovableClock) -> None:
    job = start(timed_store)
    timed_store.set_progress(job.id, job.fence, "screen", 1, 10, "")
    clock.advance(-3600)
    timed_store.set_progress(job.id, job.fence, "screen", 2, 10, "")
    assert progress_of(timed_store, job.id) == [2]


def test_only_the_newest_progress_is_kept(timed_store: Store, clock: MovableClock) -> None:
    job = start(timed_store)
    for done in range(5):
        timed_store.set_progress(job.id, job.fence, "screen", done, 100, "")
        clock.advance(2)
    assert [event.type for event in timed_store.events_after(job.id)] == ["state", "state", "progress"]
    assert progress_of(timed_store, job.id) == [4]


def test_a_claim_clears_the_waiting_reason(timed_store: Store) -> None:
    job = start(timed_store)
    timed_store.set_progress(job.id, job.fence, "screen", 0, 0, "", waiting_reason="no worker")
    assert timed_store.get_job(job.id).waiting_reason == "no worker"
    timed_store.release_job(job.id, job.fence)
    assert timed_store.get_job(job.id).waiting_reason is None


def test_events_resume_after_an_id(store: Store) -> None:
    job, other = queue(store), queue(store)
    first = store.add_event(job.id, "note", {"text": "one"})
    store.add_event(other.id, "note", {"text": "elsewhere"})
    second = store.add_event(job.id, "note", {"text": "two"})
    assert store.events_after(job.id, first.id) == [second]
    assert store.events_after(job.id, second.id) == []
    assert store.events_after(job.id, first.id - 1, limit=1) == [first]


@pytest.mark.parametrize(("event_id", "count"), [(-(10**30), 1), (10**30, 0)])
def test_any_integer_is_a_place_to_resume(store: Store, event_id: int, count: int) -> None:
    assert len(store.events_after(queue(store).id, event_id)) == count


def test_events_of_an_unknown_job_are_refused(store: Store) -> None:
    with pytest.raises(NotFoundError):
        store.add_event("nope", "note", {})
