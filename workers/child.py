"""The process that runs tasks for one device slot: ``python -m workers.child``, started by the local engine.

Commands arrive as JSON lines on what was its standard input, events leave as JSON lines through the descriptor it was
given. Standard output and error belong to the tasks: they go to the log of the task that runs. The process leads a
process group of its own; when its controller is gone, the whole group ends.
"""

from __future__ import annotations

import argparse
import ctypes
import faulthandler
import fcntl
import hashlib
import importlib
import json
import logging
import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

from prunefront.errors import is_out_of_memory
from workers.device_lock import CPU, RETRY_S, hold_device
from workers.machine import resident_mib
from workers.tasks import (
    TASK_KINDS,
    FailureCause,
    JsonDict,
    TaskBody,
    TaskContext,
    TaskFailure,
    TaskResult,
    TaskSpec,
    TaskState,
    TaskStopped,
)

PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
EXIT_ORPHANED = 70  # the controller was gone before this process could watch it
WAITING_FOR_DEVICE = "waiting for device"
WAITING_FOR_EARLIER_RUN = "waiting for an earlier run of this task to end"


class TaskTerminated(BaseException):
    """SIGTERM arrived: unwinds the task's ``finally`` blocks, and no ``except Exception`` can swallow it."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run tasks until the controller closes the command pipe."""
    parser = argparse.ArgumentParser(prog="python -m workers.child", description=__doc__)
    parser.add_argument("--device", required=True)
    parser.add_argument("--events-fd", type=int, required=True)
    parser.add_argument("--controller-pid", type=int, required=True)
    parser.add_argument("--lock-dir", type=Path, required=True)
    parser.add_argument("--log", type=Path, required=True, help="where output goes while no task runs")
    parser.add_argument("--run-lock", type=Path, required=True, help="keeps two processes from running one task")
    parser.add_argument("--task-module", action="append", default=[], help="module with further TASK_KINDS")
    options = parser.parse_args(arguments)

    _end_with_controller(options.controller_pid)
    commands_fd = os.dup(0)  # dup'ed descriptors are not inherited by programs that tasks start
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    os.set_inheritable(options.events_fd, False)
    faulthandler.enable()  # a crash in native code leaves its Python stack in the task's log
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")

    child = _Child(options)
    signal.signal(signal.SIGTERM, child.on_terminate)
    threading.Thread(target=child.read_commands, args=(commands_fd,), name="commands", daemon=True).start()
    child.run()
    return 0


def _end_with_controller(controller_pid: int) -> None:
    """Have the kernel signal the controller's death, for moments in which the command pipe is not being read.

    The signal also comes when merely the controller's *thread* that started us ends, so the handler looks twice.
    """

    def on_parent_gone(signum: int, frame: FrameType | None) -> None:
        if os.getppid() != controller_pid:
            _end_group()

    signal.signal(signal.SIGHUP, on_parent_gone)
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, int(signal.SIGHUP), 0, 0, 0)
    if os.getppid() != controller_pid:  # it died before prctl: no signal will come
        os._exit(EXIT_ORPHANED)


def _end_group() -> None:
    """Kill this process and everything it started."""
    os.killpg(os.getpgrp(), signal.SIGKILL)


class _Child:
    """The state of this process: what it runs, and how it talks."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._tasks: queue.SimpleQueue[tuple[TaskSpec, Path, threading.Event]] = queue.SimpleQueue()
        self._stop_flags: dict[str, threading.Event] = {}
        self._send_lock = threading.Lock()
        self._is_running = False
        self._log_fd = os.open(options.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._run_lock_fd = os.open(options.run_lock, os.O_RDWR | os.O_CREAT, 0o644)

    # -- the command thread

    def read_commands(self, descriptor: int) -> None:
        """Take commands until the pipe closes, which means that the controller ended or has no more use for us."""
        try:
            with os.fdopen(descriptor, "rb") as lines:
                for line in lines:
                    command = json.loads(line)
                    if command["command"] == "run":
                        spec = TaskSpec.from_json(command["spec"])
                        flag = self._stop_flags[spec.id] = threading.Event()
                        self._tasks.put((spec, Path(command["log_path"]), flag))
                    elif stop_flag := self._stop_flags.get(command["task_id"]):
                        stop_flag.set()
        finally:
            _end_group()

    # -- the main thread

    def on_terminate(self, signum: int, frame: FrameType | None) -> None:
        """Leave the task at once."""
        if self._is_running:
            raise TaskTerminated
        os._exit(128 + signum)

    def run(self) -> None:
        """Announce readiness, then run one task after the other."""
        kinds = dict(TASK_KINDS)
        for name in self._options.task_module:
            kinds.update(importlib.import_module(name).TASK_KINDS)
        self._send({"event": "ready", "resident_mib": resident_mib()})
        while True:
            spec, log_path, stop_flag = self._tasks.get()
            try:
                self._is_running = True
                with self._output_to(log_path):
                    result, needs_fresh_process = self._run_task(spec, kinds, stop_flag)
                self._is_running = False
            except TaskTerminated:
                os._exit(128 + signal.SIGTERM)  # the engine sent the signal and knows what it means
            del self._stop_flags[spec.id]
            self._send(
                {
                    "event": "finished",
                    "task_id": spec.id,
                    "result": asdict(result),
                    "resident_mib": resident_mib(),
                    "needs_fresh_process": needs_fresh_process,
                }
            )

    def _run_task(
        self, spec: TaskSpec, kinds: dict[str, TaskBody], stop_flag: threading.Event
    ) -> tuple[TaskResult, bool]:
        """Run one task under its locks; return its result and whether this process should not run another."""
        started_s: float | None = None

        def send(event: JsonDict) -> None:
            self._send({**event, "task_id": spec.id})

        def result(state: TaskState, **fields: Any) -> TaskResult:
            duration_s = None if started_s is None else time.monotonic() - started_s
            return TaskResult(task_id=spec.id, state=state, duration_s=duration_s, **fields)

        def waiting(message: str) -> None:
            send({"event": "progress", "done": 0.0, "total": 1.0, "message": message})

        context = TaskContext(spec, send=send, should_stop=stop_flag.is_set)
        send({"event": "started", "pid": os.getpid()})
        try:
            body = kinds.get(spec.kind)
            if body is None:
                failure = TaskFailure(
                    type="UnknownNameError",
                    message=f"Unknown task kind {spec.kind!r}: known are {', '.join(sorted(kinds))}.",
                    cause=FailureCause.INPUT,
                )
                return result(TaskState.FAILED, failure=failure), False
            with (
                self._only_run_of(spec.id, context, lambda: waiting(WAITING_FOR_EARLIER_RUN)),
                hold_device(
                    physical_device(spec.device),
                    exclusive=spec.exclusive,
                    lock_dir=self._options.lock_dir,
                    on_wait=lambda: waiting(WAITING_FOR_DEVICE),
                    should_stop=stop_flag.is_set,
                ),
            ):
                started_s = time.monotonic()
                send({"event": "running"})
                value = body(spec.payload, context)
                if stop_flag.is_set():  # what a task returns after being told to stop may be half a result
                    raise TaskStopped
                json.dumps(value)
                return result(TaskState.SUCCEEDED, value=value), False
        except Exception as error:
            if stop_flag.is_set():
                return result(TaskState.CANCELLED), False
            traceback.print_exc()
            failure = describe_failure(error)
            needs_fresh_process = failure.cause == FailureCause.OUT_OF_MEMORY or _breaks_the_device(error)
            return result(TaskState.FAILED, failure=failure), needs_fresh_process

    @contextmanager
    def _only_run_of(self, task_id: str, context: TaskContext, on_wait: Any) -> Iterator[None]:
        """Keep a second process from running this task, such as the child of a controller that was just killed.

        One byte per task id in one file: a record lock belongs to this process alone and falls with it.
        """
        offset = int.from_bytes(hashlib.sha256(task_id.encode()).digest()[:7], "big")
        told = False
        while True:
            try:
                fcntl.lockf(self._run_lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, offset)
                break
            except (BlockingIOError, PermissionError):  # POSIX leaves the choice of EAGAIN or EACCES
                if not told:
                    told = True
                    on_wait()
                context.stop_if_asked()
                time.sleep(RETRY_S)
        try:
            yield
        finally:
            fcntl.lockf(self._run_lock_fd, fcntl.LOCK_UN, 1, offset)

    @contextmanager
    def _output_to(self, log_path: Path) -> Iterator[None]:
        """Send this process's output, native libraries' included, to a task's log."""
        log_fd = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            self._redirect(log_fd)
            yield
        finally:
            self._redirect(self._log_fd)
            os.close(log_fd)

    @staticmethod
    def _redirect(descriptor: int) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)

    def _send(self, event: JsonDict) -> None:
        data = json.dumps(event, separators=(",", ":")).encode() + b"\n"
        with self._send_lock:
            while data:
                data = data[os.write(self._options.events_fd, data) :]


def physical_device(device: str) -> str:
    """Return the name that every process on this machine gives the device, whatever it numbers it."""
    if device.partition(":")[0] != "cuda":
        return CPU if device == CPU else device.replace(":", "-").replace("/", "-")
    import torch

    return f"cuda-{torch.cuda.get_device_properties(device).uuid}"


def describe_failure(error: Exception) -> TaskFailure:
    """Turn an exception into plain data, with what it means for another try."""
    return TaskFailure(
        type=type(error).__name__,
        message=str(error) or type(error).__name__,
        cause=_cause_of(error),
        traceback="".join(traceback.format_exception(error)),
    )


def _cause_of(error: Exception) -> FailureCause:
    if is_out_of_memory(error):
        return FailureCause.OUT_OF_MEMORY
    # Our own errors about documents, checkpoints and data are all ValueErrors of prunefront's tree.
    roots = {base.__name__ for base in type(error).__mro__}
    return FailureCause.INPUT if {"PrunefrontError", "ValueError"} <= roots else FailureCause.ERROR


def _breaks_the_device(error: Exception) -> bool:
    """Return whether a CUDA error was met, after which every later call of this process fails."""
    return type(error).__name__ == "AcceleratorError" or "CUDA error" in str(error)


if __name__ == "__main__":
    sys.exit(main())
