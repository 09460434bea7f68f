"""The default engine: one child process per device slot of this machine.

A child is started with ``subprocess`` (never forked from a process that may hold torch's threads and locks), kept for
many tasks because importing torch takes seconds, and replaced after a crash, a cancellation, a time-out or when its
memory has grown. See ``workers.child`` for the other end of the pipes.
"""

from __future__ import annotations

import json
import logging
import os
import selectors
import signal
import subprocess
import sys
import time
import urllib.parse
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from prunefront.errors import UnknownNameError
from workers.device_lock import default_lock_dir
from workers.devices import LocalDevice, list_local_devices
from workers.engines.base import (
    DeviceSlot,
    Engine,
    EngineError,
    EngineEvent,
    Finished,
    Item,
    Progress,
    Started,
)
from workers.machine import count_oom_kills, total_memory_mib
from workers.tasks import FailureCause, TaskFailure, TaskResult, TaskSpec, TaskState

logger = logging.getLogger(__name__)

START_TIMEOUT_S = 300.0  # for a child to import its modules, from a cold network disk if need be
STOP_GRACE_S = 20.0  # a task that was asked to stop may finish its step and store a checkpoint in this time
TERMINATE_GRACE_S = 3.0  # after SIGTERM, before SIGKILL
MAX_MEMORY_GROWTH_MIB = 4096.0  # resident memory a child may gain over its start before it is replaced
TICK_S = 0.1  # how often the deaths of children are looked for; a pipe that closes wakes the engine earlier
READ_BYTES = 1 << 20
LOG_TAIL_BYTES = 4000
LOG_TAIL_LINES = 30
KEPT_LOGS = 1000  # older logs are removed when an engine starts
MAX_LOG_NAME = 200  # characters of a task id, percent-encoded: file systems allow 255 with an extension
PACKAGE_ROOT = Path(__file__).parents[2]


@dataclass(kw_only=True, eq=False)
class _Child:
    """One process and its pipes."""

    process: subprocess.Popen[bytes]
    commands_fd: int
    events_fd: int
    log_path: Path
    started_s: float
    unsent: bytes = b""
    unread: bytes = b""
    first_resident_mib: float | None = None  # known once it is ready


@dataclass(kw_only=True, eq=False)
class _Run:
    """A task on a child."""

    spec: TaskSpec
    log_path: Path
    num_oom_kills: int  # the machine's count when the task was handed over
    was_child_idle: bool  # the child was up and had nothing to do when the task was handed over
    is_taken_up: bool = False  # the child has said that it started
    running_since_s: float | None = None  # since the device was free for it
    stop_state: TaskState | None = None  # CANCELLED or TIMED_OUT once it was asked to stop
    next_signal: signal.Signals | None = None
    next_signal_s: float = 0.0


@dataclass(kw_only=True, eq=False)
class _Slot:
    """A device, its process, and the tasks for it."""

    device: LocalDevice
    queue: deque[TaskSpec] = field(default_factory=deque)
    child: _Child | None = None
    run: _Run | None = None


class LocalEngine(Engine):
    """Runs tasks in child processes of this machine, one per device."""

    def __init__(
        self,
        work_dir: str | os.PathLike[str],
        *,
        slots: Sequence[str] | None = None,
        task_modules: Sequence[str] = (),
        lock_dir: str | os.PathLike[str] | None = None,
        stop_grace_s: float = STOP_GRACE_S,
        terminate_grace_s: float = TERMINATE_GRACE_S,
        max_memory_growth_mib: float = MAX_MEMORY_GROWTH_MIB,
    ) -> None:
        """Prepare the folders; children start when there is work for them.

        Args:
            work_dir: Folder for logs; created if missing. Controllers that may succeed each other should share it: it
                also holds the lock that keeps a task from running twice at once.
            slots: Names of the devices to use; None uses every device of the machine.
            task_modules: Modules whose ``TASK_KINDS`` the children know as well.
            lock_dir: Folder of the machine's device locks; the same for every engine on a machine.
            stop_grace_s: Time between asking a task to stop and SIGTERM.
            terminate_grace_s: Time between SIGTERM and SIGKILL.
            max_memory_growth_mib: Resident memory that a child may gain before it is replaced; never more than a
                quarter of the machine's memory.

        Raises:
            UnknownNameError: If a slot is not a device of this machine.
        """
        self._work_dir = Path(work_dir).absolute()
        self._log_dir = self._work_dir / "logs"
        self._log_dir.mkdir(parents=True, exist_ok=True)
        _remove_old_logs(self._log_dir)
        self._lock_dir = Path(lock_dir).absolute() if lock_dir is not None else default_lock_dir()
        self._task_modules = tuple(task_modules)
        self._stop_grace_s = stop_grace_s
        self._terminate_grace_s = terminate_grace_s
        self._max_memory_growth_mib = min(max_memory_growth_mib, total_memory_mib() / 4)
        present = {device.name: device for device in list_local_devices()}
        names = list(present) if slots is None else list(dict.fromkeys(slots))
        for name in names:
            if name not in present:
                raise UnknownNameError.of("device", name, present, "`prunefront devices` lists this machine's.")
        self._slots = {name: _Slot(device=present[name]) for name in names}
        self._selector = selectors.DefaultSelector()
        self._events: list[EngineEvent] = []
        self._known_ids: set[str] = set()
        self._is_closed = False

    # -- the promises of Engine

    def submit(self, spec: TaskSpec) -> None:
        """Queue a task for its device; see :meth:`Engine.submit`."""
        if self._is_closed:
            raise EngineError("A task needs a running engine, but this one is closed. Create another.")
        if spec.id in self._known_ids:
            raise EngineError(f"Task id {spec.id!r} was used before, and a task runs once. Give a repetition a new id.")
        if spec.device not in self._slots:
            raise UnknownNameError.of("device", spec.device, self._slots, "`prunefront devices` lists this machine's.")
        if not spec.id or len(_log_name(spec.id)) > MAX_LOG_NAME:
            raise EngineError(f"A task id needs 1 to {MAX_LOG_NAME} characters to name its log, but got {spec.id!r}.")
        try:
            json.dumps(spec.to_json())
        except (TypeError, ValueError) as error:
            raise EngineError(
                f"A payload holds JSON values only, but that of task {spec.id!r} does not: {error}."
            ) from error
        self._known_ids.add(spec.id)
        self._slots[spec.device].queue.append(spec)

    def poll(self, timeout_s: float) -> list[EngineEvent]:
        """Advance everything and return what happened; see :meth:`Engine.poll`."""
        deadline = time.monotonic() + timeout_s
        while True:
            for slot in self._slots.values():
                self._advance(slot)
            remaining = deadline - time.monotonic()
            if self._events or remaining <= 0:
                events, self._events = self._events, []
                return events
            is_idle = all(slot.child is None for slot in self._slots.values())
            self._wait(remaining if is_idle else min(remaining, TICK_S))

    def cancel(self, task_id: str) -> None:
        """Ask for a task's end; see :meth:`Engine.cancel`."""
        for slot in self._slots.values():
            for spec in slot.queue:
                if spec.id == task_id:
                    slot.queue.remove(spec)
                    self._finish(TaskResult(task_id=task_id, state=TaskState.CANCELLED))
                    return
            if slot.run is not None and slot.run.spec.id == task_id:
                self._ask_to_stop(slot, TaskState.CANCELLED)
                return

    def devices(self) -> list[DeviceSlot]:
        """Return this engine's slots."""
        return [
            DeviceSlot(
                name=slot.device.name,
                kind=slot.device.kind,
                description=slot.device.description,
                num_threads=slot.device.num_threads,
                running_task=slot.run.spec.id if slot.run else None,
                num_queued=len(slot.queue),
            )
            for slot in self._slots.values()
        ]

    def close(self) -> list[EngineEvent]:
        """Cancel what is left, end the children and return the last events; see :meth:`Engine.close`."""
        if self._is_closed:
            return []
        events: list[EngineEvent] = []
        for slot in self._slots.values():
            for spec in list(slot.queue):
                self.cancel(spec.id)
            if slot.run is not None:
                self._ask_to_stop(slot, TaskState.CANCELLED)
        while any(slot.run is not None for slot in self._slots.values()):
            events += self.poll(TICK_S)
        for slot in self._slots.values():
            self._discard_child(slot)
        self._is_closed = True
        self._selector.close()
        events += self._events
        self._events = []
        return events

    # -- one slot, one step

    def _advance(self, slot: _Slot) -> None:
        """Notice deaths and deadlines, then give the slot its next task."""
        child = slot.child
        if child is not None and child.process.poll() is not None:
            self._on_exit(slot, child)
        if slot.run is not None:
            self._check_clocks(slot, slot.run)
        if slot.run is None and slot.queue:
            self._start_next(slot)

    def _start_next(self, slot: _Slot) -> None:
        spec = slot.queue.popleft()
        if slot.child is None:
            try:
                slot.child = self._start_child(slot.device)
            except OSError as error:  # no memory for a process, no space for its log
                self._finish(_not_started(spec, error))
                return
        run = _Run(
            spec=spec,
            log_path=self._log_dir / f"{_log_name(spec.id)}.log",
            num_oom_kills=count_oom_kills(),
            was_child_idle=slot.child.first_resident_mib is not None,
        )
        slot.run = run
        self._command(slot.child, {"command": "run", "spec": spec.to_json(), "log_path": str(run.log_path)})

    def _check_clocks(self, slot: _Slot, run: _Run) -> None:
        """Carry out what is due: the task's time limit, the next harsher signal, the limit for starting up."""
        now = time.monotonic()
        child = slot.child
        assert child is not None
        if child.first_resident_mib is None and now - child.started_s > START_TIMEOUT_S:
            _kill_group(child.process)
        limit_s = run.spec.timeout_s
        if (
            run.stop_state is None
            and limit_s is not None
            and run.running_since_s is not None
            and now - run.running_since_s > limit_s
        ):
            self._ask_to_stop(slot, TaskState.TIMED_OUT)
        if run.next_signal is not None and now >= run.next_signal_s:
            _signal_group(child.process, run.next_signal)
            if run.next_signal is signal.SIGTERM:
                run.next_signal, run.next_signal_s = signal.SIGKILL, now + self._terminate_grace_s
            else:
                run.next_signal = None

    def _ask_to_stop(self, slot: _Slot, state: TaskState) -> None:
        run, child = slot.run, slot.child
        assert run is not None and child is not None
        if run.stop_state is not None:  # it was asked before; the first reason counts
            return
        run.stop_state = state
        run.next_signal, run.next_signal_s = signal.SIGTERM, time.monotonic() + self._stop_grace_s
        self._command(child, {"command": "stop", "task_id": run.spec.id})

    # -- what children say

    def _wait(self, timeout_s: float) -> None:
        for key, mask in self._selector.select(timeout_s):
            slot: _Slot = key.data
            child = slot.child
            if child is None:  # discarded by an earlier event of this round
                continue
            if mask & selectors.EVENT_READ:
                self._read(slot, child)
            if mask & selectors.EVENT_WRITE and slot.child is child:
                self._write(child)

    def _read(self, slot: _Slot, child: _Child) -> bool:
        """Handle what the child sent; return whether there may be more."""
        try:
            data = os.read(child.events_fd, READ_BYTES)
        except BlockingIOError:
            return False
        if not data:  # nobody holds the other end any more: it is dead or about to be
            with suppress(KeyError):
                self._selector.unregister(child.events_fd)
            return False
        *lines, child.unread = (child.unread + data).split(b"\n")
        for line in lines:
            self._on_event(slot, child, json.loads(line))
        return slot.child is child

    def _on_event(self, slot: _Slot, child: _Child, event: dict[str, Any]) -> None:
        if event["event"] == "ready":
            child.first_resident_mib = event["resident_mib"]
            return
        run = slot.run
        assert run is not None and run.spec.id == event["task_id"], f"{event} from a child that runs {run}"
        match event["event"]:
            case "started":
                run.is_taken_up = True
                self._events.append(
                    Started(
                        task_id=run.spec.id,
                        device=slot.device.name,
                        pid=event["pid"],
                        num_threads=slot.device.num_threads,
                        log_path=str(run.log_path),
                    )
                )
            case "running":
                run.running_since_s = time.monotonic()
            case "progress":
                self._events.append(
                    Progress(task_id=run.spec.id, done=event["done"], total=event["total"], message=event["message"])
                )
            case "item":
                self._events.append(Item(task_id=run.spec.id, key=event["key"], value=event["value"]))
            case "finished":
                self._on_finished(slot, child, run, event)

    def _on_finished(self, slot: _Slot, child: _Child, run: _Run, event: dict[str, Any]) -> None:
        data = event["result"]
        failure = None if data["failure"] is None else TaskFailure(**data["failure"])
        result = TaskResult(**{**data, "state": TaskState(data["state"]), "failure": failure})
        if failure is not None:
            failure = replace(failure, log_tail=_tail(run.log_path), log_path=str(run.log_path))
            result = replace(result, failure=failure)
        if result.state is TaskState.CANCELLED and run.stop_state is TaskState.TIMED_OUT:
            result = self._timed_out(run)
        growth_mib = event["resident_mib"] - (child.first_resident_mib or 0.0)
        slot.run = None
        if run.stop_state is not None or event["needs_fresh_process"] or growth_mib > self._max_memory_growth_mib:
            logger.info(
                "Replacing the child process of a device",
                extra={"action": "replace_child", "device": slot.device.name, "growth_mib": round(growth_mib)},
            )
            self._discard_child(slot)
        if result.state is TaskState.SUCCEEDED and run.log_path.exists() and run.log_path.stat().st_size == 0:
            run.log_path.unlink()  # thousands of tasks have nothing to say
        self._finish(result)

    def _on_exit(self, slot: _Slot, child: _Child) -> None:
        """The child's process ended by itself, or by somebody's signal."""
        while self._read(slot, child):  # what it said before is still in the pipe
            pass
        if slot.child is not child:  # its last words were a result
            return
        run, slot.run = slot.run, None
        exit_code = child.process.returncode
        is_ready = child.first_resident_mib is not None
        self._discard_child(slot)
        if run is None:
            logger.warning(
                "The idle child process of a device ended",
                extra={"action": "child_lost", "device": slot.device.name, "exit_code": exit_code},
            )
        elif run.was_child_idle and not run.is_taken_up and run.stop_state is None:
            # It died while idle, unnoticed when the task was handed over: a killed process with several threads can be
            # waited for only when the last of them is gone. A fresh process is never idle then, so this happens once.
            logger.warning(
                "The idle child process of a device ended; its next task gets a fresh one",
                extra={"action": "child_lost", "device": slot.device.name, "exit_code": exit_code},
            )
            slot.queue.appendleft(run.spec)
        elif run.stop_state is TaskState.TIMED_OUT:
            self._finish(self._timed_out(run))
        elif run.stop_state is not None:
            self._finish(TaskResult(task_id=run.spec.id, state=run.stop_state, duration_s=_duration_s(run)))
        else:
            log_path = run.log_path if run.log_path.exists() else child.log_path
            self._finish(self._lost(run, exit_code, is_ready, log_path))

    def _timed_out(self, run: _Run) -> TaskResult:
        failure = TaskFailure(
            type="TimeoutError",
            message=f"The task was ended because it ran longer than its limit of {run.spec.timeout_s:g} s.",
            cause=FailureCause.TIME_OUT,
            log_tail=_tail(run.log_path),
            log_path=str(run.log_path),
        )
        return TaskResult(task_id=run.spec.id, state=TaskState.TIMED_OUT, failure=failure, duration_s=_duration_s(run))

    def _lost(self, run: _Run, exit_code: int, is_ready: bool, log_path: Path) -> TaskResult:
        """Say why a task's process vanished."""
        if not is_ready:
            cause, how = FailureCause.START, f"did not come up ({_exit_text(exit_code)})"
        elif exit_code == -signal.SIGKILL and count_oom_kills() > run.num_oom_kills:
            cause = FailureCause.OUT_OF_MEMORY
            how = "was killed by the kernel because memory ran out; use a smaller batch size, or free memory"
        elif exit_code < 0:
            cause, how = FailureCause.SIGNAL, f"was ended by {_exit_text(exit_code)}"
        else:
            cause, how = FailureCause.EXIT, f"left with {_exit_text(exit_code)}"
        duration_s = _duration_s(run)
        after = "" if duration_s is None else f" after {duration_s:.1f} s"
        failure = TaskFailure(
            type="ProcessEnded",
            message=f"The process of this {run.spec.kind} task {how}{after}. Its log is {log_path}.",
            cause=cause,
            log_tail=_tail(log_path),
            log_path=str(log_path),
        )
        return TaskResult(task_id=run.spec.id, state=TaskState.LOST, failure=failure, duration_s=duration_s)

    def _finish(self, result: TaskResult) -> None:
        self._events.append(Finished(task_id=result.task_id, result=result))

    # -- processes and pipes

    def _start_child(self, device: LocalDevice) -> _Child:
        events_read, events_write = os.pipe()
        commands_read, commands_write = os.pipe()
        log_path = self._log_dir / f"child-{device.name.replace(':', '-')}.txt"
        command = [sys.executable, "-m", "workers.child"]
        command += ["--device", device.name, "--events-fd", str(events_write), "--controller-pid", str(os.getpid())]
        command += ["--lock-dir", str(self._lock_dir), "--run-lock", str(self._work_dir / "run.lock")]
        command += ["--log", str(log_path)]
        for module in self._task_modules:
            command += ["--task-module", module]
        try:
            with open(log_path, "wb") as log:
                process = subprocess.Popen(
                    command,
                    stdin=commands_read,
                    stdout=log,
                    stderr=log,
                    pass_fds=(events_write,),
                    env=_child_environment(device),
                    start_new_session=True,
                )
        except BaseException:
            os.close(events_read)
            os.close(commands_write)
            raise
        finally:
            os.close(events_write)
            os.close(commands_read)
        os.set_blocking(events_read, False)
        os.set_blocking(commands_write, False)
        child = _Child(
            process=process,
            commands_fd=commands_write,
            events_fd=events_read,
            log_path=log_path,
            started_s=time.monotonic(),
        )
        self._selector.register(events_read, selectors.EVENT_READ, self._slots[device.name])
        return child

    def _command(self, child: _Child, command: dict[str, Any]) -> None:
        child.unsent += json.dumps(command, separators=(",", ":")).encode() + b"\n"
        self._write(child)

    def _write(self, child: _Child) -> None:
        """Send what the pipe takes now; the selector calls again when it takes more."""
        try:
            while child.unsent:
                child.unsent = child.unsent[os.write(child.commands_fd, child.unsent) :]
        except BlockingIOError:
            pass
        except BrokenPipeError:  # it died; its exit is noticed and explained elsewhere
            child.unsent = b""
        is_watched = child.commands_fd in self._selector.get_map()
        if child.unsent and not is_watched:
            slot = next(slot for slot in self._slots.values() if slot.child is child)
            self._selector.register(child.commands_fd, selectors.EVENT_WRITE, slot)
        elif not child.unsent and is_watched:
            self._selector.unregister(child.commands_fd)

    def _discard_child(self, slot: _Slot) -> None:
        """End the slot's process and all that it started; the next task gets a fresh one."""
        child, slot.child = slot.child, None
        if child is None:
            return
        _kill_group(child.process)
        child.process.wait()
        for descriptor in (child.events_fd, child.commands_fd):
            with suppress(KeyError):
                self._selector.unregister(descriptor)
            os.close(descriptor)


def _child_environment(device: LocalDevice) -> dict[str, str]:
    environment = dict(os.environ)
    # Read by OpenMP and MKL when torch is imported; task bodies repeat it with torch.set_num_threads.
    environment["OMP_NUM_THREADS"] = environment["MKL_NUM_THREADS"] = str(device.num_threads)
    environment["PYTHONUNBUFFERED"] = "1"  # the log must hold the last words of a process that is killed
    paths = [str(PACKAGE_ROOT), *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]
    environment["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))
    if device.kind == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""  # a stray CUDA context would cost memory on a device of others
    return environment


def _not_started(spec: TaskSpec, error: OSError) -> TaskResult:
    failure = TaskFailure(
        type=type(error).__name__,
        message=f"No process could be started for this {spec.kind} task: {error}. Free memory or disk space.",
        cause=FailureCause.START,
    )
    return TaskResult(task_id=spec.id, state=TaskState.LOST, failure=failure)


def _signal_group(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with suppress(ProcessLookupError, PermissionError):  # gone; macOS says PermissionError for a zombie's group
        os.killpg(process.pid, number)


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    _signal_group(process, signal.SIGKILL)


def _exit_text(exit_code: int) -> str:
    if exit_code >= 0:
        return f"exit code {exit_code}"
    try:
        return f"{signal.Signals(-exit_code).name} (signal {-exit_code})"
    except ValueError:  # a real-time signal has no name
        return f"signal {-exit_code}"


def _duration_s(run: _Run) -> float | None:
    return None if run.running_since_s is None else time.monotonic() - run.running_since_s


def _log_name(task_id: str) -> str:
    """Return a file name for a task id, different for different ids."""
    return urllib.parse.quote(task_id, safe="").replace(".", "%2E")


def _tail(path: Path) -> str:
    """Return the last lines of a log, or nothing if the task never opened it."""
    try:
        with open(path, "rb") as log:
            log.seek(max(0, os.fstat(log.fileno()).st_size - LOG_TAIL_BYTES))
            text = log.read().decode(errors="replace")
    except FileNotFoundError:
        return ""
    return "\n".join(text.splitlines()[-LOG_TAIL_LINES:])


def _remove_old_logs(log_dir: Path) -> None:
    logs = sorted(log_dir.glob("*.log"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in logs[KEPT_LOGS:]:
        path.unlink(missing_ok=True)
