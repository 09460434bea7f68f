"""One claimed job in this process: its lease, its flags, its tasks. What every kind of job builds on."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from prunefront.errors import PrunefrontError
from search.settings import ControllerSettings
from store import JobRecord, Store
from workers.engines.base import Engine, Finished, Item, Progress
from workers.tasks import TaskFailure, TaskResult, TaskSpec, TaskState

logger = logging.getLogger(__name__)

POLL_S = 0.1
RENEWALS_PER_LEASE = 4
DEVICE_WAIT_MESSAGE = "waiting for device"  # an engine's word for it


class JobCancelled(Exception):
    """The user asked for the job's end."""


class JobPaused(Exception):
    """The user asked the job to wait."""


class ControllerStopping(Exception):
    """This controller ends; the job goes back to the queue."""


class JobFailure(PrunefrontError, RuntimeError):
    """The job cannot go on; ``details`` are what the store keeps about it."""

    def __init__(self, message: str, details: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.details = {"type": type(self).__name__, "message": message, **(details or {})}

    @classmethod
    def of_task(cls, kind: str, result: TaskResult) -> JobFailure:
        failure = result.failure or TaskFailure(type="Unknown", message=f"The task {result.state}.", cause="error")
        sentence = failure.message if failure.cause == "input" else f"The {kind} task {result.state}: {failure.message}"
        return cls(sentence, {**asdict(failure), "message": sentence, "task_state": str(result.state)})


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What jobs run with."""

    store: Store
    engine: Engine
    settings: ControllerSettings
    should_stop: Callable[[], bool]


class JobRun:
    """The lease of a claimed job and the tasks placed under it."""

    def __init__(self, resources: Resources, job: JobRecord) -> None:
        self.resources = resources
        self.store = resources.store
        self.settings = resources.settings
        self.job = job
        self.fence = job.fence
        self._renewed_s = time.monotonic()
        self._stage = job.stage or "preparing"

    @property
    def id(self) -> str:
        return self.job.id

    @property
    def folder(self) -> Path:
        """Files of the job: partial tables, fine-tuned weights."""
        return self.settings.artifacts_dir / self.id

    def checkpoint(self) -> None:
        """Keep the lease; leave if somebody asked for it. Called often, cheap unless a renewal is due.

        Raises:
            JobCancelled, JobPaused, ControllerStopping: As asked.
            LeaseLostError: If another controller took the job over.
        """
        if self.resources.should_stop():
            raise ControllerStopping
        now = time.monotonic()
        if now - self._renewed_s < self.settings.lease_s / RENEWALS_PER_LEASE and not self._flags_due(now):
            return
        self._renewed_s = now
        self.job = self.store.renew_lease(self.id, self.fence, self.settings.lease_s)
        if self.job.cancel_requested:
            raise JobCancelled
        if self.job.pause_requested:
            raise JobPaused

    def _flags_due(self, now: float) -> bool:
        # A person who cancels should not wait for the next renewal.
        return now - self._renewed_s >= 1.0

    def progress(self, stage: str, done: float, total: float, message: str, waiting: str | None = None) -> None:
        self._stage = stage
        self.store.set_progress(self.id, self.fence, stage, done, total, message, waiting_reason=waiting)

    def run_task(
        self,
        kind: str,
        payload: dict[str, Any],
        *,
        stage: str,
        on_item: Callable[[str, dict[str, Any]], None] | None = None,
        remaining: Callable[[], dict[str, Any] | None] | None = None,
        progress: Callable[[float, float, str], tuple[float, float, str]] | None = None,
        exclusive: bool = False,
        timeout_s: float | None = None,
    ) -> dict[str, Any]:
        """Run a task to its end and return its value.

        A task whose process was lost runs again, without what it had finished, a few times.

        Args:
            kind: Of the task.
            payload: Its data.
            stage: Of the job, for its progress.
            on_item: Takes finished pieces at once.
            remaining: The payload of what is left, before another attempt; None when nothing is.
            progress: Maps the task's progress onto the stage's.
            exclusive: Keep everything else of ours off the device.
            timeout_s: Limit of one attempt.

        Raises:
            JobFailure: If it failed, timed out, or was lost too often.
            JobCancelled, JobPaused, ControllerStopping: After the task has ended.
        """
        engine = self.resources.engine
        for attempt in range(1, self.settings.max_task_attempts + 1):
            spec = TaskSpec(
                id=f"{self.id}-{kind}-{uuid.uuid4().hex[:8]}",
                kind=kind,
                device=str(self.job.spec.get("device", "cpu")),
                payload=payload,
                timeout_s=timeout_s,
                exclusive=exclusive,
            )
            engine.submit(spec)
            result = self._follow(spec, stage, on_item, progress)
            if result.state is TaskState.SUCCEEDED:
                return result.value or {}
            if result.state is not TaskState.LOST or attempt == self.settings.max_task_attempts:
                raise JobFailure.of_task(kind, result)
            sentence = result.failure.message if result.failure else "its process vanished"
            logger.warning("Task lost", extra={"action": "retry_task", "job_id": self.id, "task_id": spec.id})
            self.store.add_event(self.id, "task_lost", {"kind": kind, "attempt": attempt, "message": sentence})
            if remaining is not None:
                left = remaining()
                if left is None:
                    return {}
                payload = left
        raise AssertionError("unreachable")

    def _follow(
        self,
        spec: TaskSpec,
        stage: str,
        on_item: Callable[[str, dict[str, Any]], None] | None,
        progress: Callable[[float, float, str], tuple[float, float, str]] | None,
    ) -> TaskResult:
        engine = self.resources.engine
        leaving: BaseException | None = None
        while True:
            for event in engine.poll(POLL_S):
                if getattr(event, "task_id", None) != spec.id:
                    continue  # the last words of a task that an earlier job left behind
                if isinstance(event, Finished):
                    if leaving is not None:
                        raise leaving
                    return event.result
                try:
                    if isinstance(event, Item) and on_item is not None and not isinstance(leaving, PrunefrontError):
                        on_item(event.key, event.value)
                    elif isinstance(event, Progress) and leaving is None:
                        self._report(spec, event, stage, progress)
                except BaseException as error:
                    leaving = error
                    engine.cancel(spec.id)
            try:
                if leaving is None:
                    self.checkpoint()
            except BaseException as error:
                # The task has to end before the job is let go, so that nobody runs it twice.
                leaving = error
                engine.cancel(spec.id)

    def _report(
        self,
        spec: TaskSpec,
        event: Progress,
        stage: str,
        progress: Callable[[float, float, str], tuple[float, float, str]] | None,
    ) -> None:
        done, total, message = event.done, event.total, event.message
        if progress is not None:
            done, total, message = progress(done, total, message)
        waiting = None
        if event.message == DEVICE_WAIT_MESSAGE:
            waiting = f"Another task of prunefront is using device {spec.device}; this one goes on after it."
        self.progress(stage, done, total, message, waiting)
