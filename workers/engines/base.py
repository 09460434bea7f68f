"""What an engine promises, whatever it runs tasks on.

An engine takes tasks (plain data), places them on devices and reports what becomes of them. Every engine keeps these
promises; the suite in ``tests/integration/workers`` tries them:

1. **Placement.** A task runs on the device it names. Tasks for one device run one after the other, in the order of
   submission; different devices work at the same time.
2. **Exclusive use.** While a task with ``exclusive`` runs, no other task of ours touches that device, also none of
   another engine or controller on the same machine. While the CPU is used exclusively, nothing of ours runs on the
   machine. A task that has to wait for this says so by a ``Progress`` with the message "waiting for device".
3. **Reports.** ``Started`` once, then ``Progress`` and ``Item`` in the order of their making, then ``Finished`` exactly
   once, for every task that ``submit`` took (a task cancelled before it started has only the last). An item that was
   reported stays valid, whatever happens to its task afterwards.
4. **Cancellation ends the process.** The task is asked first, so that it can store a checkpoint; if it does not
   listen it is terminated, then killed, together with every process it started.
5. **Lost is not failed.** ``failed`` means that the task's own code raised. ``lost`` means that its process vanished:
   killed, crashed in native code, out of memory. The failure names the cause and carries the end of the task's log.
6. **No task runs twice at once.** An id that the engine has or had is refused, and a task whose earlier run (under a
   controller that died) is still ending waits for that end.
7. **No orphans.** When the controller ends, also by SIGKILL, every process of the engine ends.

An engine is used from one thread: whoever calls ``submit`` calls ``poll``, several times a second.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from prunefront.errors import PrunefrontError
from workers.tasks import TaskResult, TaskSpec


class EngineError(PrunefrontError, RuntimeError):
    """A request that the engine cannot take: an id used twice, a closed engine, a device that it does not have."""


@dataclass(frozen=True, kw_only=True)
class DeviceSlot:
    """A device of an engine; it runs one task at a time."""

    name: str  # what TaskSpec.device says: "cpu", "cuda:0"
    kind: str  # "cpu" or "cuda"
    description: str  # the hardware's own name
    num_threads: int  # CPU threads that a task on it uses
    running_task: str | None = None  # id of the task on it now
    num_queued: int = 0  # tasks that wait for it


@dataclass(frozen=True, kw_only=True)
class Started:
    """The task's process has taken it up."""

    task_id: str
    device: str
    pid: int
    num_threads: int
    log_path: str


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far the task is; ``message`` says at what."""

    task_id: str
    done: float
    total: float
    message: str


@dataclass(frozen=True, kw_only=True)
class Item:
    """A finished piece of a task, valid from now on."""

    task_id: str
    key: str
    value: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Finished:
    """The last word on a task."""

    task_id: str
    result: TaskResult


EngineEvent = Started | Progress | Item | Finished


class Engine(ABC):
    """Places tasks on devices; the module's docstring lists what it promises."""

    @abstractmethod
    def submit(self, spec: TaskSpec) -> None:
        """Queue a task for its device and return at once.

        Raises:
            EngineError: If the id was used before, the device is not one of :meth:`devices`, the payload is not JSON,
                or the engine is closed.
        """

    @abstractmethod
    def poll(self, timeout_s: float) -> list[EngineEvent]:
        """Return what happened since the last call, waiting up to ``timeout_s`` seconds for the first event.

        Time limits, cancellations and replacements advance only inside this call.
        """

    @abstractmethod
    def cancel(self, task_id: str) -> None:
        """Ask for a task's end; its ``Finished`` follows through :meth:`poll`. Unknown and ended tasks are ignored."""

    @abstractmethod
    def devices(self) -> list[DeviceSlot]:
        """Return the devices a task may name, with what they are doing."""

    @abstractmethod
    def close(self) -> list[EngineEvent]:
        """End every task and process; return the events that nobody polled, items finished meanwhile included."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
