"""Tasks that misbehave on purpose; children of the engines under test import this module. No torch: they start fast."""

from __future__ import annotations

import ctypes
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

from workers.tasks import JsonDict, TaskContext


def echo(payload: JsonDict, context: TaskContext) -> JsonDict:
    print("a line in the log")
    context.progress(1, 1, "echoed")
    return {"pid": os.getpid(), **payload}


def quiet(payload: JsonDict, context: TaskContext) -> JsonDict:
    return {"omp": os.environ["OMP_NUM_THREADS"], "devices": os.environ.get("CUDA_VISIBLE_DEVICES")}


def several_items(payload: JsonDict, context: TaskContext) -> JsonDict:
    for key in payload["keys"]:
        context.item(key, {"pid": os.getpid()})
    if payload.get("then_die"):
        os.kill(os.getpid(), 9)
    return {}


def crash(payload: JsonDict, context: TaskContext) -> JsonDict:
    print("about to go down", flush=True)
    match payload["how"]:
        case "raise":
            raise RuntimeError("the body broke")
        case "exit":
            os._exit(7)
        case "segfault":
            ctypes.string_at(0)
        case "memory":
            resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))
            return {"never": len(bytearray(2**32))}
    raise AssertionError(payload)


def unknown_value(payload: JsonDict, context: TaskContext) -> JsonDict:
    return {"not json": object()}


def wait(payload: JsonDict, context: TaskContext) -> JsonDict:
    """Wait for the end that others bring; listen to requests, or not."""
    Path(payload["started"]).write_text(str(os.getpid()))
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            if payload.get("listens"):
                context.stop_if_asked()
            time.sleep(0.01)
        except Exception:
            Path(payload["started"] + ".checkpoint").write_text("stored")
            raise
        except BaseException:
            if not payload.get("stubborn"):
                Path(payload["started"] + ".unwound").write_text("yes")
                raise
    return {}


def with_grandchild(payload: JsonDict, context: TaskContext) -> JsonDict:
    """Start a process that would outlive everybody, then hang."""
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
    Path(payload["started"]).write_text(f"{os.getpid()} {sleeper.pid}")
    time.sleep(300)
    return {}


def grow(payload: JsonDict, context: TaskContext) -> JsonDict:
    grow.kept = b"x" * payload["num_bytes"]  # type: ignore[attr-defined]
    return {"pid": os.getpid()}


def overlap(payload: JsonDict, context: TaskContext) -> JsonDict:
    """Record when this task had its device."""
    began = time.monotonic()
    time.sleep(payload["length_s"])
    return {"began": began, "ended": time.monotonic()}


TASK_KINDS = {
    "echo": echo,
    "quiet": quiet,
    "several_items": several_items,
    "crash": crash,
    "unknown_value": unknown_value,
    "wait": wait,
    "with_grandchild": with_grandchild,
    "grow": grow,
    "overlap": overlap,
}
