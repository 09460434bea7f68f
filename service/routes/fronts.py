"""The Pareto front of a job, and the one config to take from it."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response

from prunefront import PruneConfig
from prunefront.errors import UnknownNameError
from search.documents import Fidelity, Front, FrontPoint
from search.pareto import NoFeasiblePoint, build_front, pick_best
from service.deps import JobDep, StoreDep
from service.problems import Problem
from service.routes.trials import Download, Format, config_response
from store import JobRecord, Store

router = APIRouter(prefix="/jobs/{job_id}", tags=["results"])

FidelityQuery = Annotated[
    Fidelity | None,
    Query(description="How well accuracies are known; left out, the best that the job has reached."),
]
DeviceQuery = Annotated[
    str | None, Query(max_length=200, description="Device of the latencies; left out, the job's own.")
]


@router.get("/front", summary="Accuracy against measured latency")
def get_front(job: JobDep, store: StoreDep, fidelity: FidelityQuery = None, device: DeviceQuery = None) -> Front:
    """The front document, the same as `prunefront search --out` writes; empty while nothing is measured."""
    return front_of(job, store, fidelity, device)


@router.get(
    "/best",
    summary="The best config under a limit",
    response_model=PruneConfig,
    responses={200: {"content": {"application/yaml": {"schema": {"$ref": "#/components/schemas/PruneConfig"}}}}},
)
def get_best(
    request: Request,
    job: JobDep,
    store: StoreDep,
    max_latency_ms: Annotated[
        float | None, Query(gt=0, allow_inf_nan=False, description="The most accurate config that is this fast.")
    ] = None,
    min_top1: Annotated[
        float | None, Query(ge=0, le=1, description="The fastest config that is this accurate, 0-1.")
    ] = None,
    min_speedup: Annotated[
        float | None,
        Query(gt=0, allow_inf_nan=False, description="The most accurate config that is this much faster than dense."),
    ] = None,
    fidelity: FidelityQuery = None,
    device: DeviceQuery = None,
    format: Format = None,
    download: Download = False,
) -> Response:
    """One PruneConfig with its results; 409 with the nearest feasible value when no point of the front fits."""
    front = front_of(job, store, fidelity, device)
    if front.dense is None and not front.points:
        raise Problem(
            409,
            "front_empty",
            f"Job {job.id} has no point measured on {front.device} at fidelity {front.fidelity}; wait for it, or name "
            "another fidelity or device.",
        )
    try:
        point = pick_best(front, max_latency_ms=max_latency_ms, min_top1=min_top1, min_speedup=min_speedup)
    except NoFeasiblePoint as error:
        raise Problem(409, "no_feasible_point", str(error), extra=_nearest(error.nearest)) from error
    return config_response(request, point.config, f"{job.id}-best", format, download)


def front_of(job: JobRecord, store: Store, fidelity: Fidelity | None, device: str | None) -> Front:
    """The front of a search or measure job.

    Raises:
        Problem: If this kind of job has none.
        UnknownNameError: If nobody offered the device.
    """
    if job.kind == "table":
        raise Problem(
            409, "no_front", f"Job {job.id} is a {job.kind} job and has no front; its result names its latency table."
        )
    if device is not None:
        known = [record.id for record in store.list_devices()]
        if device not in known:
            raise UnknownNameError.of("device", device, known, hint="GET /api/v1/devices lists them.")
    return build_front(job, store.list_candidates(job.id), fidelity, device)


def _nearest(point: FrontPoint | None) -> dict[str, Any]:
    # Under the names of the limits, so that a client can ask again with one of these values.
    if point is None:
        return {}
    values = {"max_latency_ms": point.measured_ms, "min_top1": point.top1, "min_speedup": point.speedup}
    return {"nearest": {**values, "trial": point.trial, "label": point.label}}
