"""The controller: claims a job, carries it through its stages, writes everything down.

It is the one writer of results. It holds a job by a lease with a fencing number; when it dies, the next controller
claims the job and goes on from what the store holds.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import traceback
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from pydantic import ValidationError

from prunefront.config import PruneConfig, describe_validation_error
from prunefront.errors import PrunefrontError
from prunefront.geometry import geometry_for
from prunefront.macs import macs
from search.checkpoints import find_checkpoint
from search.documents import JobAdapter, MeasureJob, SearchJob, TableJob
from search.job_run import ControllerStopping, JobCancelled, JobFailure, JobPaused, JobRun, Resources
from search.search_run import MEASURED_FIRST, SearchRun, store_measurement
from search.settings import ControllerSettings
from search.tables import Place, build_table, find_table, predicted_ms
from store import JobRecord, LeaseLostError, Store
from workers.engines.base import Engine

logger = logging.getLogger(__name__)

KINDS = ("search", "table", "measure")


class Controller:
    """Works on jobs, one at a time."""

    def __init__(self, store: Store, engine: Engine, settings: ControllerSettings) -> None:
        self._store = store
        self._engine = engine
        self._settings = settings
        self.owner = f"{socket.gethostname()}:{os.getpid()}"

    def register_devices(self) -> None:
        """Tell the store which devices jobs may name."""
        for slot in self._engine.devices():
            self._store.save_device(slot.name, slot.description, slot.kind, {"num_threads": slot.num_threads})

    def run_forever(self, stop: threading.Event) -> None:
        """Claim and run jobs until ``stop`` is set; the job at hand goes back to the queue."""
        self.register_devices()
        while not stop.is_set():
            if not self.run_once(stop.is_set):
                self._engine.poll(0)  # lets idle children be looked after
                stop.wait(self._settings.claim_interval_s)

    def run_once(self, should_stop: Callable[[], bool] = lambda: False) -> bool:
        """Claim one job and run it to its end, or until it is given back. Returns whether there was one."""
        job = self._store.claim_job(self.owner, self._settings.lease_s, KINDS)
        if job is None:
            return False
        logger.info("Claimed a job", extra={"action": "claim_job", "job_id": job.id, "attempt": job.attempts})
        resources = Resources(store=self._store, engine=self._engine, settings=self._settings, should_stop=should_stop)
        run = JobRun(resources, job)
        try:
            self._finish(run)
        except LeaseLostError:
            # Somebody else has the job now; whatever was not written is theirs to do.
            logger.warning("Lost the lease of a job", extra={"action": "lose_lease", "job_id": job.id})
        return True

    def _finish(self, run: JobRun) -> None:
        try:
            result = self._execute(run, run.job)
        except JobCancelled:
            self._store.finish_job(run.id, run.fence, "cancelled")
        except JobPaused:
            self._store.release_job(run.id, run.fence, "paused")
        except ControllerStopping:
            self._store.release_job(run.id, run.fence, "queued")
        except LeaseLostError:
            raise
        except JobFailure as error:
            self._store.finish_job(run.id, run.fence, "failed", failure=error.details)
        except PrunefrontError as error:
            failure = {"type": type(error).__name__, "message": str(error), "cause": "input"}
            self._store.finish_job(run.id, run.fence, "failed", failure=failure)
        except Exception as error:
            logger.exception("A job failed by a defect of ours", extra={"action": "fail_job", "job_id": run.id})
            failure = {
                "type": type(error).__name__,
                "message": f"The controller failed unexpectedly: {error}. Please report it with the traceback.",
                "cause": "error",
                "traceback": traceback.format_exc(),
            }
            self._store.finish_job(run.id, run.fence, "failed", failure=failure)
        else:
            self._store.finish_job(run.id, run.fence, "succeeded", result=result)

    def _execute(self, run: JobRun, record: JobRecord) -> dict[str, Any]:
        try:
            job = JobAdapter.validate_python(record.spec)
        except ValidationError as error:
            raise JobFailure(f"The job's body cannot be used: {describe_validation_error(error)}.") from error
        # Defaults count as written from here on.
        run.job = replace(record, spec=job.model_dump(mode="json"))
        offered = {slot.name for slot in self._engine.devices()}
        if job.device not in offered:
            raise JobFailure(
                f"The job needs device {job.device!r}, but this controller offers {', '.join(sorted(offered))}. "
                "Start a controller on the machine that has it, and retry the job."
            )
        if isinstance(job, SearchJob):
            return SearchRun(run, job).execute()
        if isinstance(job, TableJob):
            return _run_table(run, job)
        return _run_measure(run, job)


def _run_table(run: JobRun, job: TableJob) -> dict[str, Any]:
    spec = job.model.spec()
    table_record, table = build_table(
        run,
        spec,
        geometry_for(spec),
        Place.of_job(run.job.spec),
        detail=job.detail,
        validate_schedules=job.validate_schedules,
        max_foreign_cores=job.max_foreign_cores,
    )
    error = table.validation.mape if table.validation is not None else None
    return {"table_id": table_record.id, "mape": error}


def _run_measure(run: JobRun, job: MeasureJob) -> dict[str, Any]:
    """Measure the configs; candidates keep the order of the body, the dense model being number 0."""
    spec = job.configs[0].model
    geometry = geometry_for(spec)
    place = Place.of_job(run.job.spec)
    found = find_table(run, geometry, place)
    checkpoint = None
    if job.checkpoint is not None:
        checkpoint = str(find_checkpoint(run.settings.checkpoints_dir, job.checkpoint).path)
    dense = PruneConfig(model=spec, method="hybrid")
    waiting = {}
    dense_measured = False
    for number, config in enumerate((dense, *job.configs)):
        candidate = run.store.add_candidate(
            run.id,
            run.fence,
            config=config.to_dict(),
            config_hash=config.content_hash(),
            label="dense" if number == 0 else f"{config.method} #{number}",
            origin="dense" if number == 0 else "sampler",
            params={},
            predicted_ms=None if found is None else predicted_ms(found[1], config),
            macs=macs(config),
        )
        if number == 0:
            dense_measured = bool(candidate.measurements)
        if candidate.number and not candidate.measurements:
            waiting[str(candidate.number)] = candidate

    def store(key: str, value: dict[str, Any]) -> None:
        store_measurement(run, place, waiting.pop(key).number, MEASURED_FIRST, value)

    def payload() -> dict[str, Any]:
        return {
            "model": spec.model_dump(mode="json"),
            # Without a dataset the images are noise, and so may the weights be: latency does not read them.
            "weights": {"pretrained": checkpoint is None and job.dataset is not None, "checkpoint": checkpoint},
            "runtime": place.runtime,
            "dtype": place.dtype,
            "batch_size": place.batch_size,
            "dataset": job.dataset,
            "entries": [{"key": key, "config": c.config, "checkpoint": None} for key, c in waiting.items()],
        }

    # The dense model's own latency comes last, so it may be all that is missing.
    if waiting or not dense_measured:
        value = run.run_task("measure", payload(), stage="measuring", on_item=store, remaining=payload, exclusive=True)
        store_measurement(run, place, 0, MEASURED_FIRST, {**value["dense"], "speedup": 1.0})
    return {"num_candidates": len(run.store.list_candidates(run.id))}
