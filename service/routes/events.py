"""Events of a job as they happen (server-sent events)."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Annotated

import anyio
from anyio.to_thread import run_sync
from fastapi import APIRouter, Header, Request
from fastapi.sse import EventSourceResponse, ServerSentEvent

from service.deps import JobDep, SettingsDep, StoreDep
from service.schemas import JobPublic
from store import NotFoundError

router = APIRouter(prefix="/jobs", tags=["jobs"])

EVENTS_PER_LOOK = 200
MAX_EVENT_ID = 2**63 - 1
RETRY_MS = 2000
"""How long a browser waits before it connects again."""


@router.get("/{job_id}/events", response_class=EventSourceResponse, summary="Watch a job")
async def watch_job(
    request: Request,
    job: JobDep,
    store: StoreDep,
    settings: SettingsDep,
    last_event_id: Annotated[
        str | None, Header(description="Id of the last event received: only later ones are sent.")
    ] = None,
) -> AsyncIterator[ServerSentEvent]:
    """Server-sent events: `job` with the whole job whenever it changed, and every stored event with its id.

    The stream begins with the job as it is and the events after `Last-Event-ID`, sends a comment every 15 s while
    nothing happens, and ends with `end` once the job has ended.
    """
    after = _event_id(last_event_id)
    yield ServerSentEvent(event="job", data=JobPublic.of(job).model_dump(mode="json"), retry=RETRY_MS)
    seen = job.updated_at
    while not request.app.state.is_stopping.is_set():
        started = time.monotonic()
        # The job is read before its events: when it has ended, none of them can be missing.
        try:
            job = await run_sync(store.get_job, job.id)
        except NotFoundError:
            break
        events = await run_sync(store.events_after, job.id, after, EVENTS_PER_LOOK)
        for event in events:
            after = event.id
            data = {**event.payload, "at": event.created_at.isoformat()}
            yield ServerSentEvent(event=event.type, id=str(event.id), data=data)
        if job.updated_at != seen:
            seen = job.updated_at
            yield ServerSentEvent(event="job", data=JobPublic.of(job).model_dump(mode="json"))
        if len(events) == EVENTS_PER_LOOK:
            continue
        if job.state.is_finished:
            yield ServerSentEvent(event="end", data={"state": job.state})
            break
        await anyio.sleep(max(0.0, settings.event_poll_s - (time.monotonic() - started)))


def _event_id(header: str | None) -> int:
    # Whatever else a client remembers is no id of ours: it gets everything.
    return min(int(header), MAX_EVENT_ID) if header and header.isascii() and header.isdigit() else 0
