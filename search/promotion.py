"""Which screened candidates are worth the clock and the test split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from search.pareto import pareto_front
from store import CandidateRecord, EvaluationRecord

# Candidates per place that are judged on all search images first: of hundreds judged on a sample, the best are also the
# luckiest.
FINALISTS_PER_PLACE = 2
# Loss of top-1 off the shelf that fine-tuning is spent on: few epochs would not bring more back, and what lost nothing
# needs none.
RECOVERABLE = (0.003, 0.10)
MARKS_PER_METHOD = 2  # of a method's published schedules; the others run as candidates


@dataclass(frozen=True, kw_only=True)
class Rival:
    """A candidate among others."""

    candidate: CandidateRecord
    top1: float
    measured_ms: float


def choose_promising(
    candidates: Sequence[CandidateRecord],
    count: int,
    *,
    num_images: int,
    least_top1: float,
    max_latency_ms: float | None,
) -> list[CandidateRecord]:
    """Non-dominated candidates by estimated accuracy and predicted latency, then the next fronts behind them.

    Args:
        candidates: Screened ones; others are ignored.
        count: How many.
        num_images: Search images that the estimates to compare were made on.
        least_top1: Candidates below are taken only when too few reach it.
        max_latency_ms: Slower ones are left out.
    """
    points = []
    for candidate in candidates:
        evaluation = screened_on(candidate, num_images)
        if evaluation is None or candidate.predicted_ms is None:
            continue
        if max_latency_ms is None or candidate.predicted_ms <= max_latency_ms:
            points.append(Rival(candidate=candidate, top1=evaluation.top1, measured_ms=candidate.predicted_ms))
    chosen: list[CandidateRecord] = []
    for rivals in ([p for p in points if p.top1 >= least_top1], [p for p in points if p.top1 < least_top1]):
        while rivals and len(chosen) < count:
            front = pareto_front(rivals)
            chosen += spread([point.candidate for point in front], count - len(chosen))
            rivals = [point for point in rivals if point not in front]
    return chosen


def choose_recoverable(leaders: Sequence[Rival], count: int, *, dense_top1: float) -> list[CandidateRecord]:
    """Candidates to fine-tune: proposals and published schedules that lost a little.

    Args:
        leaders: Those that a front stands on.
        count: How many.
        dense_top1: Of the dense model on the same images.
    """
    least, most = RECOVERABLE
    return spread([one.candidate for one in _reductions(leaders) if least <= dense_top1 - one.top1 <= most], count)


def why_none_is_recoverable(leaders: Sequence[Rival], *, dense_top1: float) -> str:
    """Why `choose_recoverable` chose nobody, in one sentence."""
    least, most = RECOVERABLE
    losses = [dense_top1 - one.top1 for one in _reductions(leaders)]
    if not losses:
        return "Nothing was fine-tuned: no schedule that reduces tokens is on the measured front."
    less = sum(loss < least for loss in losses)
    more = len(losses) - less
    return (
        f"Nothing was fine-tuned: that is for schedules on the measured front that lost {100 * least:g} to "
        f"{100 * most:g} points of top-1, but of the {len(losses)} there {less} lost less and {more} more."
    )


def _reductions(leaders: Sequence[Rival]) -> list[Rival]:
    return [one for one in leaders if one.candidate.origin in ("sampler", "published")]


def screened_on(candidate: CandidateRecord, num_images: int) -> EvaluationRecord | None:
    """The estimate that was made on so many search images."""
    found = (e for e in candidate.evaluations if e.fidelity == "screened" and e.num_images == num_images)
    return next(found, None)


def choose_marks(candidates: Sequence[CandidateRecord]) -> list[CandidateRecord]:
    """Marks to measure and test: resolutions, siblings, and of each method its fastest and a middle schedule."""
    marks = [c for c in candidates if c.origin in ("resolution", "sibling")]
    by_method: dict[str, list[CandidateRecord]] = {}
    for candidate in candidates:
        if candidate.origin == "published":
            by_method.setdefault(candidate.config["method"], []).append(candidate)
    for published in by_method.values():
        # Most reduced first; the middle one stands for what the paper recommends.
        ordered = sorted(published, key=lambda c: c.macs or 0)
        marks += spread(ordered[: len(ordered) // 2 + 1], MARKS_PER_METHOD)
    return marks


def spread(candidates: Sequence[CandidateRecord], count: int) -> list[CandidateRecord]:
    """``count`` of the candidates, evenly over their order, both ends included."""
    if len(candidates) <= count:
        return list(candidates)
    if count == 1:
        return [candidates[-1]]
    return [candidates[round(place * (len(candidates) - 1) / (count - 1))] for place in range(count)]
