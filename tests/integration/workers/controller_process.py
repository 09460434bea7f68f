"""A controller to be killed: starts an engine, submits one task, polls for ever."""

from __future__ import annotations

import json
import sys

from workers.engines.local import LocalEngine
from workers.tasks import TaskSpec

if __name__ == "__main__":
    options = json.loads(sys.argv[1])
    engine = LocalEngine(
        options["work_dir"],
        slots=["cpu"],
        lock_dir=options["lock_dir"],
        task_modules=["tests.integration.workers.stand_in_tasks"],
    )
    engine.submit(TaskSpec(id="task", kind=options["kind"], device="cpu", payload=options["payload"]))
    while True:
        engine.poll(1.0)
