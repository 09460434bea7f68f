"""Server-sent events of a job: what happened, resumed where the reader left off, ended with the job."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx

from store import JobState
from tests.acceptance.conftest import Server


def read_events(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """Events as dictionaries of their fields, ``data`` decoded."""
    event: dict[str, Any] = {}
    for line in lines:
        if line == "":
            if "data" in event:
                yield event
            event = {}
        elif not line.startswith(":"):
            name, _, value = line.partition(": ")
            event[name] = json.loads(value) if name == "data" else value


def events_of(http: httpx.Client, job_id: str, last_event_id: str | None = None) -> list[dict[str, Any]]:
    headers = {} if last_event_id is None else {b"Last-Event-ID": last_event_id.encode()}
    with http.stream("GET", f"/jobs/{job_id}/events", headers=headers) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        return list(read_events(answer.iter_lines()))


def test_finished_job_sends_itself_all_events_and_ends(server: Server, http: httpx.Client) -> None:
    events = events_of(http, server.search_id)
    assert events[0]["event"] == "job" and events[0]["data"]["state"] == "succeeded"
    assert [event["data"]["message"] for event in events if event["event"] == "note"] == ["first", "second"]
    assert events[-1]["event"] == "end" and events[-1]["data"] == {"state": "succeeded"}
    ids = [int(event["id"]) for event in events if "id" in event]
    assert ids == sorted(set(ids))


def test_reader_that_comes_back_gets_only_what_it_missed(server: Server, http: httpx.Client) -> None:
    first = next(event for event in events_of(http, server.search_id) if event["event"] == "note")
    messages = [
        e["data"].get("message") for e in events_of(http, server.search_id, first["id"]) if e["event"] == "note"
    ]
    assert messages == ["second"]


def test_strange_last_event_id_sends_everything(server: Server, http: httpx.Client) -> None:
    everything = [event.get("id") for event in events_of(http, server.search_id)]
    for strange in ("abc", "-1", "٣", ""):
        sent = events_of(http, server.search_id, strange)
        assert [event.get("id") for event in sent] == everything
    assert [event["event"] for event in events_of(http, server.search_id, "9" * 30)] == ["job", "end"]


def test_progress_arrives_while_the_job_runs(server: Server, http: httpx.Client) -> None:
    job = server.store.create_job("measure", "watched", {"device": "cpu"}, priority=1000)
    claimed = server.store.claim_job("test", 60.0)
    assert claimed is not None and claimed.id == job.id
    with http.stream("GET", f"/jobs/{job.id}/events") as answer:
        events = read_events(answer.iter_lines())
        assert next(events)["data"]["state"] == "running"
        server.store.set_progress(job.id, claimed.fence, "measure", 1, 4, "1 of 4 configs")
        changed = next(event for event in events if event["event"] == "job" and event["data"]["stage"] == "measure")
        assert changed["data"]["progress"] == {"done": 1.0, "total": 4.0, "message": "1 of 4 configs"}
        server.store.finish_job(job.id, claimed.fence, JobState.SUCCEEDED)
        assert [event["event"] for event in events][-1] == "end"


def test_events_of_an_unknown_job_are_not_found(http: httpx.Client) -> None:
    answer = http.get("/jobs/nope/events")
    assert (answer.status_code, answer.json()["code"]) == (404, "not_found")
