"""Jobs: what users submit, who works on them, and what happened. The only place that changes a job's state.

Guarantees, on SQLite and Postgres alike:

* A queued job is handed to exactly one claimer, by one statement, highest priority first, then oldest.
* Every claim raises the job's fence; writes with an older fence, or to a job that is not running, are refused with
  :class:`LeaseLostError` inside the transaction that would have written. A late write of a holder that nobody has
  superseded yet is welcome, even when its lease has expired.
* A job whose lease expired returns to the queue; after ``max_times_lost`` losses in a row without a new result
  it fails.
* A state change and its event are one transaction. Event ids of a job grow in the order of commits.
"""

from __future__ import annotations

import base64
import binascii
import json
import logging
import secrets
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, Literal

from sqlalchemy import delete, func, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from store.errors import ConflictError, InvalidCursorError, LeaseLostError, NotFoundError
from store.models import Artifact, Event, IdempotencyKey, Job, is_storable_text
from store.records import FINISHED_STATES, EventRecord, JobRecord, JobState, JsonObject, Progress
from store.session import Database

logger = logging.getLogger(__name__)

DEFAULT_MAX_TIMES_LOST = 5
# More progress than this per second helps nobody who watches; the job row always has the latest.
PROGRESS_EVENT_INTERVAL_S = 1.0
MAX_PAGE_SIZE = 500
MAX_INT64 = 2**63 - 1
_ID_BYTES = 8


class JobStore:
    """Methods of :class:`store.Store` about jobs and their events."""

    _database: Database
    _max_times_lost: int

    def create_job(
        self,
        kind: str,
        name: str,
        spec: Mapping[str, Any],
        tags: Sequence[str] = (),
        priority: int = 0,
        idempotency_key: str | None = None,
        request_hash: str | None = None,
    ) -> JobRecord:
        """Queue a job.

        Args:
            kind: What it is: search, table, finetune, measure.
            name: For people; need not be unique.
            spec: The body as submitted, JSON.
            tags: For people.
            priority: Higher runs first.
            idempotency_key: A client's key; a second request with it returns the first job.
            request_hash: Hash of the request, given together with a key.

        Raises:
            ConflictError: If the key was used for another request.
            DocumentError: If a text or the spec is nothing that both databases can store.
        """
        if (idempotency_key is None) != (request_hash is None):
            raise ValueError("idempotency_key and request_hash belong together; give both or neither.")
        try:
            return self._create_job(kind, name, spec, tags, priority, idempotency_key, request_hash)
        except ConflictError as e:
            if not isinstance(e.__cause__, IntegrityError):
                raise
            # Another request with the same key committed between our look and our insert: now it is found.
            return self._create_job(kind, name, spec, tags, priority, idempotency_key, request_hash)

    def _create_job(
        self,
        kind: str,
        name: str,
        spec: Mapping[str, Any],
        tags: Sequence[str],
        priority: int,
        idempotency_key: str | None,
        request_hash: str | None,
    ) -> JobRecord:
        with self._database.write() as session:
            if idempotency_key is not None:
                known = session.get(IdempotencyKey, idempotency_key)
                if known is not None and known.request_hash != request_hash:
                    raise ConflictError(
                        f"Expected the request that idempotency key {idempotency_key!r} was first used for, got "
                        "another one. Use a new key for a new request."
                    )
                if known is not None:
                    return _record(_find(session, known.job_id))
            now = self._database.now(session)
            job = Job(
                id=secrets.token_hex(_ID_BYTES),
                kind=kind,
                name=name,
                tags=list(tags),
                priority=priority,
                spec=dict(spec),
                state=JobState.QUEUED.value,
                progress_done=0.0,
                progress_total=0.0,
                progress_message="",
                cancel_requested=False,
                pause_requested=False,
                attempts=0,
                times_lost=0,
                fence=0,
                created_at=now,
                updated_at=now,
            )
            session.add(job)
            session.flush()
            if idempotency_key is not None and request_hash is not None:
                session.add(
                    IdempotencyKey(key=idempotency_key, request_hash=request_hash, job_id=job.id, created_at=now)
                )
            _emit_state(session, job, now)
            session.flush()
            record = _record(job)
        logger.info("Queued a job", extra={"action": "create_job", "job_id": record.id, "kind": kind})
        return record

    def get_job(self, job_id: str) -> JobRecord:
        """Return a job.

        Raises:
            NotFoundError: If there is none of that id.
        """
        with self._database.read() as session:
            return _record(_find(session, job_id))

    def list_jobs(
        self,
        limit: int = 50,
        cursor: str | None = None,
        state: JobState | str | None = None,
        kind: str | None = None,
    ) -> tuple[list[JobRecord], str | None]:
        """List jobs, newest first; jobs submitted meanwhile do not shift later pages.

        Args:
            limit: Jobs per page, brought into 1..500.
            cursor: Where the last page ended.
            state: Only jobs in this state.
            kind: Only jobs of this kind.

        Returns:
            The page, and the cursor of the next one or None at the end.

        Raises:
            InvalidCursorError: If the cursor was not handed out by this method.
        """
        statement = select(Job).order_by(Job.seq.desc())
        if state is not None:
            statement = statement.where(Job.state == JobState(state).value)
        if kind is not None:
            statement = statement.where(Job.kind == kind)
        if cursor is not None:
            statement = statement.where(Job.seq < decode_cursor(cursor))
        size = page_size(limit)
        with self._database.read() as session:
            jobs = list(session.scalars(statement.limit(size + 1)))
        next_cursor = encode_cursor(jobs[size - 1].seq) if len(jobs) > size else None
        return [_record(job) for job in jobs[:size]], next_cursor

    def count_jobs(self) -> dict[JobState, int]:
        """Count the jobs in each state, all states included."""
        with self._database.read() as session:
            rows = session.execute(select(Job.state, func.count()).group_by(Job.state))
            counts: dict[str, int] = {row[0]: row[1] for row in rows}
        return {state: counts.get(state.value, 0) for state in JobState}

    def delete_job(self, job_id: str) -> list[str]:
        """Delete a job with everything that belongs to it.

        Returns:
            Paths of its artifacts, for the caller to delete.

        Raises:
            NotFoundError: If there is none of that id.
            ConflictError: If it is running.
        """
        with self._database.write() as session:
            job = _find(session, job_id, lock=True)
            if job.state == JobState.RUNNING:
                raise ConflictError(f"Expected job {job_id} not to be running. Cancel it first, then delete it.")
            paths = list(session.scalars(select(Artifact.path).where(Artifact.job_id == job_id).order_by(Artifact.id)))
            session.execute(delete(Job).where(Job.id == job_id))
        logger.info("Deleted a job", extra={"action": "delete_job", "job_id": job_id})
        return paths

    def request_cancel(self, job_id: str) -> JobRecord:
        """Cancel a waiting job at once; ask the controller of a running one to (see ``cancel_requested``).

        Raises:
            NotFoundError: If there is none of that id.
            ConflictError: If it has already succeeded or failed.
        """
        with self._database.write() as session:
            job = _find(session, job_id, lock=True)
            now = self._database.now(session)
            if job.state in (JobState.QUEUED, JobState.PAUSED):
                _end(session, job, JobState.CANCELLED, now)
            elif job.state == JobState.RUNNING:
                if not job.cancel_requested:
                    job.cancel_requested = True
                    _emit_state(session, job, now)
            elif job.state != JobState.CANCELLED:
                raise ConflictError(
                    f"Expected job {job_id} to be unfinished, but it has {job.state}. Nothing to cancel."
                )
            session.flush()
            return _record(job)

    def request_pause(self, job_id: str) -> JobRecord:
        """Pause a queued job at once; ask the controller of a running one to (see ``pause_requested``).

        Raises:
            NotFoundError: If there is none of that id.
            ConflictError: If it is finished or about to be cancelled.
        """
        with self._database.write() as session:
            job = _find(session, job_id, lock=True)
            now = self._database.now(session)
            if job.cancel_requested or JobState(job.state).is_finished:
                raise ConflictError(
                    f"Expected job {job_id} to be queued or running, but it is {_state_text(job)}. Nothing to pause."
                )
            if job.state == JobState.QUEUED:
                _set_state(session, job, JobState.PAUSED, now)
            elif job.state == JobState.RUNNING and not job.pause_requested:
                job.pause_requested = True
                _emit_state(session, job, now)
            session.flush()
            return _record(job)

    def resume_job(self, job_id: str) -> JobRecord:
        """Put a paused job back into the queue; withdraw a pause that has not happened yet.

        Raises:
            NotFoundError: If there is none of that id.
            ConflictError: If it is finished.
        """
        with self._database.write() as session:
            job = _find(session, job_id, lock=True)
            now = self._database.now(session)
            if JobState(job.state).is_finished:
                raise ConflictError(
                    f"Expected job {job_id} to be paused, but it is {_state_text(job)}. Retry or clone it instead."
                )
            if job.state == JobState.PAUSED:
                _set_state(session, job, JobState.QUEUED, now)
            elif job.pause_requested:
                job.pause_requested = False
                _emit_state(session, job, now)
            session.flush()
            return _record(job)

    def retry_job(self, job_id: str) -> JobRecord:
        """Queue a failed or cancelled job again; what it has found so far is kept.

        Raises:
            NotFoundError: If there is none of that id.
            ConflictError: If it is neither failed nor cancelled.
        """
        with self._database.write() as session:
            job = _find(session, job_id, lock=True)
            now = self._database.now(session)
            if job.state not in (JobState.FAILED, JobState.CANCELLED):
                raise ConflictError(
                    f"Expected job {job_id} to have failed or been cancelled, but it is {_state_text(job)}. "
                    "Clone it to run it once more."
                )
            job.failure = None
            job.finished_at = None
            job.times_lost = 0
            _set_state(session, job, JobState.QUEUED, now)
            session.flush()
            return _record(job)

    def claim_job(self, owner: str, lease_s: float, kinds: Sequence[str] | None = None) -> JobRecord | None:
        """Take the next queued job, if any; jobs with expired leases return to the queue first.

        Args:
            owner: Name of the claimer, for people.
            lease_s: Seconds until others may take the job, unless the lease is renewed.
            kinds: Only jobs of these kinds; None for all.

        Returns:
            The job, now running, with the fence that all its writes must carry.
        """
        with self._database.write() as session:
            now = self._database.now(session)
            self._return_expired(session, now)
            session.flush()
            # FOR UPDATE SKIP LOCKED on Postgres; SQLite ignores it, its transaction is the only writer anyway.
            chosen = (
                select(Job.seq)
                .where(Job.state == JobState.QUEUED.value)
                .order_by(Job.priority.desc(), Job.seq)
                .limit(1)
                .with_for_update(skip_locked=True)
            )
            if kinds is not None:
                chosen = chosen.where(Job.kind.in_(list(kinds)))
            claim = (
                update(Job)
                .where(Job.seq == chosen.scalar_subquery())
                .values(
                    state=JobState.RUNNING.value,
                    attempts=Job.attempts + 1,
                    fence=Job.fence + 1,
                    lease_owner=owner,
                    lease_expires_at=now + timedelta(seconds=lease_s),
                    started_at=func.coalesce(Job.started_at, now, type_=Job.started_at.type),
                    waiting_reason=None,
                    updated_at=now,
                )
                .returning(Job)
                .execution_options(synchronize_session=False, populate_existing=True)
            )
            job = session.scalars(claim).one_or_none()
            if job is None:
                return None
            _emit_state(session, job, now)
            session.flush()
            record = _record(job)
        logger.info(
            "Claimed a job",
            extra={"action": "claim_job", "job_id": record.id, "owner": owner, "fence": record.fence},
        )
        return record

    def _return_expired(self, session: Session, now: datetime) -> None:
        """End or requeue the jobs whose holder has gone silent."""
        expired = session.scalars(
            select(Job)
            .where(Job.state == JobState.RUNNING.value, Job.lease_expires_at <= now)
            .order_by(Job.seq)
            .with_for_update(skip_locked=True)
        )
        for job in expired:
            job.times_lost += 1
            logger.warning(
                "A job's lease expired",
                extra={
                    "action": "lease_expired",
                    "job_id": job.id,
                    "owner": job.lease_owner,
                    "fence": job.fence,
                    "times_lost": job.times_lost,
                },
            )
            if job.cancel_requested:
                _end(session, job, JobState.CANCELLED, now)
            elif job.times_lost >= self._max_times_lost:
                _end(session, job, JobState.FAILED, now, failure=_lost_failure(job))
            else:
                _set_state(session, job, JobState.PAUSED if job.pause_requested else JobState.QUEUED, now)

    def renew_lease(self, job_id: str, fence: int, lease_s: float) -> JobRecord:
        """Keep a claimed job for another ``lease_s`` seconds.

        Returns:
            The job; look at ``cancel_requested`` and ``pause_requested``.

        Raises:
            LeaseLostError: If somebody else took the job, or it ended.
        """
        with self._database.write() as session:
            job = fenced_job(session, job_id, fence)
            job.lease_expires_at = self._database.now(session) + timedelta(seconds=lease_s)
            session.flush()
            return _record(job)

    def set_progress(
        self,
        job_id: str,
        fence: int,
        stage: str,
        done: float,
        total: float,
        message: str,
        waiting_reason: str | None = None,
    ) -> None:
        """Record how far a job is. Watchers get an event for every new stage or reason, else about one a second.

        Args:
            job_id: The job.
            fence: From the claim.
            stage: Name of the current stage.
            done: How much of the stage is done, in the unit of ``total``.
            total: Size of the stage; 0 while unknown.
            message: For people.
            waiting_reason: Why the job does not move; None while it does.

        Raises:
            LeaseLostError: If somebody else took the job, or it ended.
        """
        with self._database.write() as session:
            job = fenced_job(session, job_id, fence)
            now = self._database.now(session)
            is_news = job.stage != stage or job.waiting_reason != waiting_reason or (done >= total > job.progress_done)
            job.stage, job.waiting_reason = stage, waiting_reason
            job.progress_done, job.progress_total, job.progress_message = float(done), float(total), message
            job.updated_at = now
            last = job.progress_event_at
            # A clock set back must not silence the job.
            if is_news or last is None or not timedelta(0) <= now - last < timedelta(seconds=PROGRESS_EVENT_INTERVAL_S):
                job.progress_event_at = now
                # Only the latest counts, so a job of many hours leaves one row.
                session.execute(delete(Event).where(Event.job_id == job_id, Event.type == "progress"))
                _emit(session, job, "progress", _snapshot(job), now)

    def finish_job(
        self,
        job_id: str,
        fence: int,
        state: JobState | Literal["succeeded", "failed", "cancelled"],
        result: Mapping[str, Any] | None = None,
        failure: Mapping[str, Any] | None = None,
    ) -> JobRecord:
        """End a claimed job.

        Args:
            job_id: The job.
            fence: From the claim.
            state: succeeded, failed or cancelled.
            result: What a succeeded job leaves, JSON.
            failure: Of a failed job: type, message, cause, traceback, ..., JSON.

        Raises:
            LeaseLostError: If somebody else took the job, or it ended.
        """
        state = JobState(state)
        if not state.is_finished:
            raise ValueError(f"Expected one of {sorted(FINISHED_STATES)}, got {state.value!r}. See release_job.")
        with self._database.write() as session:
            job = fenced_job(session, job_id, fence)
            job.result = None if result is None else dict(result)
            _end(session, job, state, self._database.now(session), failure=None if failure is None else dict(failure))
            session.flush()
            record = _record(job)
        logger.info("Finished a job", extra={"action": "finish_job", "job_id": job_id, "state": state.value})
        return record

    def release_job(
        self, job_id: str, fence: int, state: JobState | Literal["queued", "paused"] = "queued"
    ) -> JobRecord:
        """Give a claimed job back, because it is paused or its controller stops.

        A cancellation or pause requested meanwhile is honoured: the job ends up cancelled or paused.

        Raises:
            LeaseLostError: If somebody else took the job, or it ended.
        """
        state = JobState(state)
        if state not in (JobState.QUEUED, JobState.PAUSED):
            raise ValueError(f"Expected 'queued' or 'paused', got {state.value!r}. See finish_job.")
        with self._database.write() as session:
            job = fenced_job(session, job_id, fence)
            now = self._database.now(session)
            if job.cancel_requested:
                _end(session, job, JobState.CANCELLED, now)
            else:
                _set_state(session, job, JobState.PAUSED if job.pause_requested else state, now)
            session.flush()
            return _record(job)

    def add_event(self, job_id: str, type: str, payload: Mapping[str, Any]) -> EventRecord:
        """Tell watchers of a job something.

        Raises:
            NotFoundError: If there is no such job.
        """
        with self._database.write() as session:
            job = _find(session, job_id, lock=True)
            event = _emit(session, job, type, dict(payload), self._database.now(session))
            session.flush()
            return _event_record(event)

    def events_after(self, job_id: str, event_id: int = 0, limit: int = 100) -> list[EventRecord]:
        """Return the events of a job with an id above ``event_id``, oldest first.

        Of progress only the newest event exists, so whoever reconnects gets the present state at once.

        Raises:
            NotFoundError: If there is no such job (any more).
        """
        with self._database.read() as session:
            _find(session, job_id)
            events = session.scalars(
                select(Event)
                .where(Event.job_id == job_id, Event.id > max(-1, min(event_id, MAX_INT64)))
                .order_by(Event.id)
                .limit(page_size(limit))
            )
            return [_event_record(event) for event in events]


def fenced_job(session: Session, job_id: str, fence: int) -> Job:
    """Lock a job for a write of its holder.

    Raises:
        LeaseLostError: Unless the job is running and this fence is its latest.
    """
    job = session.scalars(select(Job).where(Job.id == job_id).with_for_update()).one_or_none()
    if job is None:
        raise LeaseLostError(f"Expected to hold job {job_id}, but it was deleted. Stop working on it.")
    if job.fence != fence or job.state != JobState.RUNNING:
        raise LeaseLostError(
            f"Expected to hold job {job_id} with fence {fence}, but it is {_state_text(job)} with fence {job.fence}. "
            "Stop working on it."
        )
    return job


def encode_cursor(seq: int) -> str:
    """Make an opaque cursor that says where a page ended."""
    return base64.urlsafe_b64encode(json.dumps({"after": seq}).encode()).decode().rstrip("=")


def decode_cursor(cursor: str) -> int:
    """Read a cursor.

    Raises:
        InvalidCursorError: If it was not made by :func:`encode_cursor`.
    """
    try:
        document = json.loads(base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars="-_", validate=True))
    except (binascii.Error, ValueError, RecursionError):
        document = None
    seq = document.get("after") if isinstance(document, dict) else None
    if type(seq) is not int or not 0 <= seq <= MAX_INT64:
        raise InvalidCursorError("Expected a cursor from an earlier page, got something else. Start without a cursor.")
    return seq


def page_size(limit: int) -> int:
    """Bring a page size into what the store hands out at once."""
    return max(1, min(limit, MAX_PAGE_SIZE))


def _find(session: Session, job_id: str, *, lock: bool = False) -> Job:
    statement = select(Job).where(Job.id == job_id)
    if lock:
        statement = statement.with_for_update()
    job = session.scalars(statement).one_or_none() if is_storable_text(job_id) else None
    if job is None:
        raise NotFoundError(f"There is no job {job_id!r}. `prunefront jobs list` lists them.")
    return job


def find_job(session: Session, job_id: str) -> None:
    """Raise :class:`NotFoundError` unless the job exists."""
    _find(session, job_id)


def _set_state(session: Session, job: Job, state: JobState, now: datetime) -> None:
    """Change the state; whoever held the job holds it no longer, and what was asked of them is settled."""
    job.state = state.value
    job.lease_owner = None
    job.lease_expires_at = None
    job.cancel_requested = False
    job.pause_requested = False
    job.waiting_reason = None
    _emit_state(session, job, now)


def _end(session: Session, job: Job, state: JobState, now: datetime, failure: JsonObject | None = None) -> None:
    job.failure = failure
    job.finished_at = now
    _set_state(session, job, state, now)


def _lost_failure(job: Job) -> JsonObject:
    cause = f"lost {job.times_lost} times"
    return {
        "type": "JobLost",
        "message": (
            f"The job was {cause} in a row without a new result: its controller ended or hung each time, "
            f"last {job.lease_owner}. See the controller's log, then retry the job."
        ),
        "cause": cause,
        "traceback": None,
    }


def _state_text(job: Job) -> str:
    return "about to be cancelled" if job.cancel_requested else job.state


def _emit_state(session: Session, job: Job, now: datetime) -> None:
    job.updated_at = now
    _emit(session, job, "state", _snapshot(job), now)


def _emit(session: Session, job: Job, type: str, payload: JsonObject, now: datetime) -> Event:
    event = Event(job_id=job.id, type=type, payload=payload, created_at=now)
    session.add(event)
    return event


def _snapshot(job: Job) -> JsonObject:
    """What a watcher needs to show a job."""
    failure = job.failure or {}
    return {
        "state": job.state,
        "stage": job.stage,
        "progress": {"done": job.progress_done, "total": job.progress_total, "message": job.progress_message},
        "waiting_reason": job.waiting_reason,
        "cancel_requested": job.cancel_requested,
        "pause_requested": job.pause_requested,
        "failure": {"type": failure.get("type"), "message": failure.get("message")} if failure else None,
    }


def _record(job: Job) -> JobRecord:
    return JobRecord(
        id=job.id,
        kind=job.kind,
        name=job.name,
        tags=tuple(job.tags),
        priority=job.priority,
        spec=job.spec,
        state=JobState(job.state),
        stage=job.stage,
        progress=Progress(done=job.progress_done, total=job.progress_total, message=job.progress_message),
        waiting_reason=job.waiting_reason,
        failure=job.failure,
        result=job.result,
        cancel_requested=job.cancel_requested,
        pause_requested=job.pause_requested,
        attempts=job.attempts,
        times_lost=job.times_lost,
        fence=job.fence,
        lease_owner=job.lease_owner,
        lease_expires_at=job.lease_expires_at,
        created_at=job.created_at,
        started_at=job.started_at,
        finished_at=job.finished_at,
        updated_at=job.updated_at,
    )


def _event_record(event: Event) -> EventRecord:
    return EventRecord(
        id=event.id, job_id=event.job_id, type=event.type, payload=event.payload, created_at=event.created_at
    )
