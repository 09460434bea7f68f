"""Pareto front, hypervolume, and the choice of one config under a budget.

A front is computed from what the store holds, whenever somebody asks: nothing here is stored.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol, TypeVar

from prunefront.config import EvalInfo, LatencyInfo, PruneConfig
from prunefront.errors import PrunefrontError
from search.documents import Fidelity, Front, FrontPoint
from store.records import CandidateRecord, EvaluationRecord, JobRecord, MeasurementRecord

# Later is better known. A front shows one of them.
FIDELITIES: tuple[Fidelity, ...] = ("screened", "evaluated", "finetuned")
USEFUL_LOSS = 0.05  # of top-1 against dense: what fronts of two fidelities are compared over
MARK_ORIGINS = ("published", "resolution", "sibling")


class NoFeasiblePoint(PrunefrontError, ValueError):
    """No point meets what was asked; ``nearest`` is the one that comes closest, or None on an empty front."""

    def __init__(self, message: str, nearest: FrontPoint | None) -> None:
        super().__init__(message)
        self.nearest = nearest


class _HasObjectives(Protocol):
    @property
    def top1(self) -> float: ...

    @property
    def measured_ms(self) -> float: ...


PointT = TypeVar("PointT", bound=_HasObjectives)


def pareto_front(points: Iterable[PointT]) -> list[PointT]:
    """Points that no other beats in accuracy and latency, fastest first; of equal points the first stays."""
    front: list[PointT] = []
    for point in sorted(points, key=lambda p: (p.measured_ms, -p.top1)):
        if not front or point.top1 > front[-1].top1:
            front.append(point)
    return front


def hypervolume(points: Iterable[tuple[float, float]], reference_point: tuple[float, float]) -> float:
    """Area dominated by (top1, latency_ms) points within a reference point of low accuracy and high latency.

    Points outside the reference point add nothing.
    """
    worst_top1, worst_ms = reference_point
    area, best_top1 = 0.0, worst_top1
    for top1, ms in sorted(points, key=lambda p: (p[1], -p[0])):
        if ms < worst_ms and top1 > best_top1:
            area += (worst_ms - ms) * (top1 - best_top1)
            best_top1 = top1
    return area


def build_front(
    job: JobRecord,
    candidates: Sequence[CandidateRecord],
    fidelity: Fidelity | None = None,
    device: str | None = None,
) -> Front:
    """The front of a search or measure job from its candidates' evaluations and measurements.

    Every point was measured end to end without noise. Points slower than dense on this device are left out, and the
    notes say so; the same for noisy ones. Accuracies are those of the test split, except ``screened`` ones.

    Args:
        job: Names device, runtime, dtype and batch size.
        candidates: All of the job's.
        fidelity: Which accuracy; None takes the one that offers most. Only a few candidates are fine-tuned, so their
            front may well lie behind that of all tested ones.
        device: Which device's measurements; None is the job's.
    """
    place = device or str(job.spec.get("device", "cpu"))
    if fidelity is None:
        fronts = [build_front(job, candidates, level, place) for level in _known_fidelities(candidates, place)]
        # Of equal ones the better known, which comes last.
        chosen = max(reversed(fronts), key=_useful_area)
        more = [f"There is a front of fidelity {one.fidelity!r} as well." for one in fronts if one is not chosen]
        return chosen.model_copy(update={"notes": (*chosen.notes, *more)})
    points, notes = [], []
    noisy = 0
    dense_ms = next(
        (m.median_ms for c in candidates if c.origin == "dense" and (m := measurement_of(c, place)) is not None), None
    )
    for candidate in candidates:
        evaluation = evaluation_of(candidate, fidelity)
        if evaluation is None:
            continue
        measurement = measurement_of(candidate, place)
        if measurement is None:
            noisy += any(m.device == place and m.state == "noisy" for m in candidate.measurements)
            continue
        points.append(_point(job, candidate, evaluation, measurement, fidelity, dense_ms))
    dense = next((p for p in points if p.origin == "dense"), None)
    marks = tuple(p for p in points if p.origin in MARK_ORIGINS)
    contenders = [p for p in points if p.origin != "dense"]
    slower = [p for p in contenders if p.speedup < 1.0]
    front = pareto_front([p for p in points if p.origin == "dense" or p.speedup >= 1.0])
    if noisy:
        notes.append(f"{noisy} candidate(s) are left out because their latency stayed noisy after three attempts.")
    if slower:
        notes.append(f"{len(slower)} candidate(s) are left out of the front because they are slower than dense here.")
    if dense is not None and contenders and all(p.origin == "dense" for p in front):
        notes.append("Dense wins here: no measured candidate is faster.")
    winners = [p.label for p in front if p.origin in ("resolution", "sibling")]
    if winners:
        notes.append(f"On the front without any token reduction: {', '.join(winners)}.")
    untuned = (job.result or {}).get("untuned")
    if untuned:
        notes.append(untuned)
    return Front(
        job=job.id,
        device=place,
        runtime=job.spec.get("runtime", "eager"),
        dtype=job.spec.get("dtype", "fp32"),
        batch_size=int(job.spec.get("batch_size", 8)),
        fidelity=fidelity,
        split="search" if fidelity == "screened" else "test",
        dense=dense,
        marks=marks,
        points=tuple(front),
        notes=tuple(notes),
    )


def _known_fidelities(candidates: Sequence[CandidateRecord], device: str) -> list[Fidelity]:
    """Fidelities that a measured candidate has; estimates on search images only where there is nothing else."""
    measured = [c for c in candidates if c.origin != "dense" and measurement_of(c, device) is not None]
    known = {e.fidelity for c in measured for e in c.evaluations}
    tested: list[Fidelity] = [level for level in FIDELITIES if level in known and level != "screened"]
    fallback: Fidelity = "screened" if "screened" in known else "evaluated"
    return tested or [fallback]


def _useful_area(front: Front) -> float:
    """Hypervolume of a front over what anyone would deploy: faster than dense, not much worse."""
    if front.dense is None:
        return 0.0
    reference_point = (front.dense.top1 - USEFUL_LOSS, front.dense.measured_ms)
    return hypervolume([(p.top1, p.measured_ms) for p in front.points], reference_point)


def pick_best(
    front: Front,
    max_latency_ms: float | None = None,
    min_top1: float | None = None,
    min_speedup: float | None = None,
) -> FrontPoint:
    """The most accurate point within the latency budget (or speed-up), or the fastest of at least some accuracy.

    Without any bound, the fastest point whose accuracy is within one point of the best on the front.

    Raises:
        NoFeasiblePoint: When none meets the bounds; names the nearest value that is feasible.
    """
    points = front.points
    if not points:
        raise NoFeasiblePoint("The front has no point yet; wait until the job has measured some.", None)
    feasible = [
        p
        for p in points
        if (max_latency_ms is None or p.measured_ms <= max_latency_ms)
        and (min_top1 is None or p.top1 >= min_top1)
        and (min_speedup is None or p.speedup >= min_speedup)
    ]
    if feasible:
        if max_latency_ms is None and min_speedup is None:
            floor = min_top1 if min_top1 is not None else max(p.top1 for p in feasible) - 0.01
            return min((p for p in feasible if p.top1 >= floor), key=lambda p: p.measured_ms)
        return max(feasible, key=lambda p: p.top1)
    if max_latency_ms is not None and min(p.measured_ms for p in points) > max_latency_ms:
        nearest = min(points, key=lambda p: p.measured_ms)
        raise NoFeasiblePoint(
            f"No point takes at most {max_latency_ms:g} ms; the fastest takes {nearest.measured_ms:.4g} ms "
            f"at top-1 {nearest.top1:.4f}. Raise max_latency_ms.",
            nearest,
        )
    if min_speedup is not None and max(p.speedup for p in points) < min_speedup:
        nearest = max(points, key=lambda p: p.speedup)
        raise NoFeasiblePoint(
            f"No point is {min_speedup:g} x faster than dense; the fastest is {nearest.speedup:.3g} x "
            f"at top-1 {nearest.top1:.4f}. Lower min_speedup.",
            nearest,
        )
    if min_top1 is not None and max(p.top1 for p in points) < min_top1:
        nearest = max(points, key=lambda p: p.top1)
        raise NoFeasiblePoint(
            f"No point reaches top-1 {min_top1:g}; the best reaches {nearest.top1:.4f} "
            f"in {nearest.measured_ms:.4g} ms. Lower min_top1.",
            nearest,
        )
    within = [p for p in points if max_latency_ms is None or p.measured_ms <= max_latency_ms]
    nearest = max(within, key=lambda p: p.top1)
    raise NoFeasiblePoint(
        f"No point meets all bounds at once; within the latency bound the best reaches top-1 {nearest.top1:.4f} "
        f"at {nearest.speedup:.3g} x. Relax one of them.",
        nearest,
    )


def measurement_of(candidate: CandidateRecord, device: str) -> MeasurementRecord | None:
    """The newest measurement of a candidate on a device that is not noisy."""
    usable = [m for m in candidate.measurements if m.device == device and m.state == "ok"]
    return max(usable, key=lambda m: m.created_at, default=None)


def evaluation_of(candidate: CandidateRecord, fidelity: str) -> EvaluationRecord | None:
    """The evaluation on most images of a fidelity; dense and marks stand beside fine-tuned points as they are."""
    fidelities = {fidelity}
    if fidelity == "finetuned" and candidate.origin in ("dense", *MARK_ORIGINS):
        fidelities |= {"evaluated"}
    if fidelity == "finetuned" and any(e.fidelity == "finetuned" for e in candidate.evaluations):
        fidelities = {"finetuned"}
    split = "search" if fidelity == "screened" else "test"
    found = [e for e in candidate.evaluations if e.fidelity in fidelities and e.split == split]
    return max(found, key=lambda e: e.num_images, default=None)


def _point(
    job: JobRecord,
    candidate: CandidateRecord,
    evaluation: EvaluationRecord,
    measurement: MeasurementRecord,
    fidelity: Fidelity,
    dense_ms: float | None,
) -> FrontPoint:
    # Runs hours apart meet a machine of another speed. Each was interleaved with the dense model, so all are shown as
    # of the moment at which the dense model itself was measured; the trial list has the milliseconds of each run.
    factor = dense_ms / measurement.dense_ms if dense_ms and measurement.dense_ms else 1.0
    config = PruneConfig.model_validate(candidate.config)
    latency = LatencyInfo(
        device=str(measurement.details.get("device_name") or measurement.device),
        runtime=measurement.runtime,
        dtype=measurement.dtype,
        batch_size=measurement.batch_size,
        measured_ms=factor * measurement.median_ms,
        iqr_ms=factor * measurement.iqr_ms,
        predicted_ms=candidate.predicted_ms,
    )
    info = EvalInfo(
        dataset=evaluation.dataset,
        split=evaluation.split,
        num_images=evaluation.num_images,
        **{key: value for key, value in evaluation.details.get("data_config", {}).items() if key in EVAL_FIELDS},
    )
    results = {
        "macs": candidate.macs,
        # results.top1 is by definition the test split's.
        "top1": evaluation.top1 if evaluation.split == "test" else None,
        "top5": evaluation.top5 if evaluation.split == "test" else None,
        "eval": info if evaluation.split == "test" else None,
        "latency": (latency,),
        "job": job.id,
        "trial": candidate.number,
    }
    interval = None
    if evaluation.ci_low is not None and evaluation.ci_high is not None:
        interval = (evaluation.ci_low, evaluation.ci_high)
    delta = evaluation.details.get("delta")
    return FrontPoint(
        label=candidate.label,
        config=config.evolve(results=results),
        fidelity=fidelity,
        top1=evaluation.top1,
        top1_ci=interval,
        measured_ms=factor * measurement.median_ms,
        iqr_ms=factor * measurement.iqr_ms,
        predicted_ms=candidate.predicted_ms,
        # Against the canary of the same interleaved run, so that drift between runs cancels.
        speedup=measurement.speedup if measurement.speedup is not None else 1.0,
        macs=float(candidate.macs or 0),
        trial=candidate.number,
        top1_delta=None if delta is None else delta["difference"],
        top1_delta_ci=None if delta is None else (delta["low"], delta["high"]),
        origin=candidate.origin,
    )


EVAL_FIELDS = ("crop_pct", "interpolation", "mean", "std", "dtype")
