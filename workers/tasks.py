"""What a task is: plain JSON data in, plain JSON data out.

The controller builds a :class:`TaskSpec`, an engine places it on a device, and the function that ``TASK_KINDS`` names
for its kind does the work and returns a dictionary. Nothing here imports torch: a controller may look at tasks without
paying for it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

JsonDict = dict[str, Any]

PROGRESS_INTERVAL_S = 0.2  # progress is sent at most this often: a message per batch would slow small models down


class TaskState(StrEnum):
    """How a task ended."""

    SUCCEEDED = "succeeded"  # it returned a value
    FAILED = "failed"  # it raised: running it again would most likely raise again
    CANCELLED = "cancelled"  # somebody asked for its end
    TIMED_OUT = "timed_out"  # it ran longer than its ``timeout_s``
    LOST = "lost"  # its process vanished under it: running it again may well succeed


class FailureCause(StrEnum):
    """Why a task did not succeed, for a controller that decides whether to try again."""

    ERROR = "error"  # the task raised an exception
    INPUT = "input"  # its payload, config, checkpoint or dataset cannot be right: trying again is pointless
    OUT_OF_MEMORY = "out_of_memory"  # an allocation failed, or the kernel killed the process for its memory
    SIGNAL = "signal"  # a signal ended the process
    EXIT = "exit"  # the process left by itself
    TIME_OUT = "time_out"  # it was ended at its time limit
    START = "start"  # the process that should run it did not come up


@dataclass(frozen=True, kw_only=True)
class TaskSpec:
    """One piece of a job, as an engine takes it."""

    id: str  # unique for ever: an engine refuses an id that it has or had
    kind: str  # a key of TASK_KINDS
    device: str  # "cpu", "cuda:0", ...: one of the engine's slots
    payload: JsonDict  # what the kind needs; JSON values only
    timeout_s: float | None = None  # counted from the moment the device is free for it; None: no limit
    exclusive: bool = False  # nothing else of ours may use the device meanwhile: for measurements

    def to_json(self) -> JsonDict:
        """Return the spec as plain data."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: JsonDict) -> TaskSpec:
        """Build a spec from what :meth:`to_json` returned."""
        return cls(**data)


@dataclass(frozen=True, kw_only=True)
class TaskFailure:
    """What went wrong, for the user and for whoever repairs it."""

    type: str  # name of the exception, or "ProcessEnded" when the process vanished
    message: str  # one sentence
    cause: str  # a FailureCause
    traceback: str | None = None
    log_tail: str = ""  # last lines of the task's log
    log_path: str | None = None


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """How a task ended and what it returned."""

    task_id: str
    state: TaskState
    value: JsonDict | None = None  # what the task returned; None unless it succeeded
    failure: TaskFailure | None = None  # None when it succeeded or was cancelled
    duration_s: float | None = None  # from the moment the device was free for it; None when it never got there


class TaskStopped(Exception):
    """Raised inside a task that was asked to stop; the engine knows whether by cancellation or by time-out."""


class TaskContext:
    """What a running task may use: a way to report, and a flag that asks it to stop."""

    def __init__(
        self,
        spec: TaskSpec,
        *,
        send: Callable[[JsonDict], None],
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        """Connect a task with whoever runs it.

        Args:
            spec: The task.
            send: Takes each report as plain data with the key ``event``.
            should_stop: Becomes true when the task is to end soon.
        """
        self.spec = spec
        self.device = spec.device
        self._send = send
        self._should_stop = should_stop
        self._last_progress_s = float("-inf")

    def progress(self, done: float, total: float, message: str = "") -> None:
        """Report how far the task is; calls in quick succession are dropped, the last step never is."""
        now = time.monotonic()
        if now - self._last_progress_s < PROGRESS_INTERVAL_S and done < total:
            return
        self._last_progress_s = now
        self._send({"event": "progress", "done": float(done), "total": float(total), "message": message})

    def item(self, key: str, value: JsonDict) -> None:
        """Hand out a finished piece at once, so that it survives whatever happens to the rest of the task."""
        self._send({"event": "item", "key": key, "value": value})

    def should_stop(self) -> bool:
        """Return whether the task was asked to end."""
        return self._should_stop()

    def stop_if_asked(self) -> None:
        """End the task here if it was asked to.

        Raises:
            TaskStopped: If it was.
        """
        if self._should_stop():
            raise TaskStopped


TaskBody = Callable[[JsonDict, TaskContext], JsonDict]


# The bodies are imported by the process that runs them: they need torch, naming them does not.


def _table(payload: JsonDict, context: TaskContext) -> JsonDict:
    from workers.profiling import run_table

    return run_table(payload, context)


def _measure(payload: JsonDict, context: TaskContext) -> JsonDict:
    from workers.profiling import run_measure

    return run_measure(payload, context)


def _evaluate(payload: JsonDict, context: TaskContext) -> JsonDict:
    from workers.evaluate import run_evaluate

    return run_evaluate(payload, context)


def _finetune(payload: JsonDict, context: TaskContext) -> JsonDict:
    from workers.finetune import run_finetune

    return run_finetune(payload, context)


def _calibrate(payload: JsonDict, context: TaskContext) -> JsonDict:
    from workers.calibrate import run_calibrate

    return run_calibrate(payload, context)


TASK_KINDS: dict[str, TaskBody] = {
    "table": _table,
    "measure": _measure,
    "evaluate": _evaluate,
    "finetune": _finetune,
    "calibrate": _calibrate,
}
