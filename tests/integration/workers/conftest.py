"""Engines with stand-in tasks, and ways to wait for what they do."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from workers.engines.base import EngineEvent, Finished
from workers.engines.local import LocalEngine
from workers.tasks import TaskResult, TaskSpec

PATIENCE_S = 300.0  # before a test gives up on something that must happen
EngineFactory = Callable[..., LocalEngine]


@pytest.fixture
def lock_dir(tmp_path: Path) -> Path:
    return tmp_path / "locks"


@pytest.fixture
def make_engine(tmp_path: Path, lock_dir: Path) -> Iterator[EngineFactory]:
    engines: list[LocalEngine] = []

    def make(**options: Any) -> LocalEngine:
        settings = {
            "work_dir": tmp_path / "work",
            "slots": ["cpu"],
            "lock_dir": lock_dir,
            "task_modules": ["tests.integration.workers.stand_in_tasks"],
            **options,
        }
        engines.append(LocalEngine(**settings))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


@pytest.fixture
def engine(make_engine: EngineFactory) -> LocalEngine:
    return make_engine(stop_grace_s=0.3, terminate_grace_s=0.3)


def task(kind: str, *, id: str = "task", **fields: Any) -> TaskSpec:
    payload = fields.pop("payload", {})
    return TaskSpec(id=id, kind=kind, device=fields.pop("device", "cpu"), payload=payload, **fields)


def events_until_finished(engine: LocalEngine, *task_ids: str) -> list[EngineEvent]:
    """Poll until every named task has finished; return all events on the way."""
    events: list[EngineEvent] = []
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        events += engine.poll(0.2)
        if set(task_ids) <= {event.task_id for event in events if isinstance(event, Finished)}:
            return events
    raise AssertionError(f"{task_ids} did not finish; the last events are {events[-3:]}")


def run(engine: LocalEngine, spec: TaskSpec) -> TaskResult:
    engine.submit(spec)
    return results_of(events_until_finished(engine, spec.id))[spec.id]


def results_of(events: list[EngineEvent]) -> dict[str, TaskResult]:
    return {event.task_id: event.result for event in events if isinstance(event, Finished)}


def wait_for(condition: Callable[[], Any], engine: LocalEngine | None = None) -> list[EngineEvent]:
    """Wait until a condition holds, polling the engine meanwhile; return the events that came."""
    events: list[EngineEvent] = []
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "what the test waits for did not happen"
        if engine is not None:
            events += engine.poll(0.05)
        else:
            time.sleep(0.02)
    return events


def is_alive(pid: int) -> bool:
    """Return whether a process runs; a zombie that waits for its parent does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state not in "ZX"


def child_pids() -> set[int]:
    """Return the living direct children of this process."""
    return {
        int(entry.name)
        for entry in Path("/proc").iterdir()
        if entry.name.isdigit() and _parent(entry) == os.getpid() and is_alive(int(entry.name))
    }


def _parent(entry: Path) -> int | None:
    try:
        return int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return None
