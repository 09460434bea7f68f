from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from search.pareto import NoFeasiblePoint, build_front, hypervolume, pareto_front, pick_best
from store.records import CandidateRecord
from tests.unit.search.records import candidate, evaluation, job_record, measured

REFERENCE = (0.1, 100.0)


@dataclass(frozen=True)
class Point:
    top1: float
    measured_ms: float


points = st.builds(Point, st.integers(0, 20).map(lambda n: n / 20), st.integers(1, 40).map(lambda n: n * 3.0))


def dominates(one: Point, other: Point) -> bool:
    as_good = one.top1 >= other.top1 and one.measured_ms <= other.measured_ms
    return as_good and (one.top1 > other.top1 or one.measured_ms < other.measured_ms)


@given(st.lists(points))
def test_the_front_is_what_nothing_dominates(given_points: list[Point]) -> None:
    front = pareto_front(given_points)
    expected = {p for p in given_points if not any(dominates(other, p) for other in given_points)}
    assert set(front) == expected
    assert len(front) == len(expected)
    assert [p.measured_ms for p in front] == sorted(p.measured_ms for p in front)


@given(st.lists(points), points)
def test_the_hypervolume_never_falls_and_only_the_front_counts(given_points: list[Point], new: Point) -> None:
    def area(of: list[Point]) -> float:
        return hypervolume([(p.top1, p.measured_ms) for p in of], REFERENCE)

    assert area([*given_points, new]) >= area(given_points)
    assert area(pareto_front(given_points)) == pytest.approx(area(given_points))


def test_the_hypervolume_of_two_points_is_the_area_of_their_staircase() -> None:
    assert hypervolume([(0.5, 20.0), (0.9, 60.0), (0.05, 1.0)], REFERENCE) == pytest.approx(80 * 0.4 + 40 * 0.4)


DENSE = candidate(0, [evaluation(0.95)], [measured(100.0)], origin="dense")


def front_of(*candidates: CandidateRecord, **choice: Any) -> Any:
    return build_front(job_record(), [DENSE, *candidates], **choice)


def test_a_front_holds_what_was_measured_and_tested_fastest_first() -> None:
    front = front_of(
        candidate(1, [evaluation(0.94)], [measured(60.0)]),
        candidate(2, [evaluation(0.90)], [measured(40.0)]),
        candidate(3, [evaluation(0.89)], [measured(50.0)]),
        candidate(4, [evaluation(0.99, "screened", "search")], [measured(10.0)]),
        candidate(5, [evaluation(0.99)]),
    )
    assert [p.trial for p in front.points] == [2, 1, 0]
    assert front.dense.trial == 0
    assert front.fidelity == "evaluated"
    assert front.split == "test"
    best = front.points[0]
    assert (best.top1, best.top1_ci, best.measured_ms, best.speedup) == (0.90, (0.89, 0.91), 40.0, 2.5)
    assert best.config.results.top1 == 0.90
    assert best.config.results.latency[0].measured_ms == 40.0


def test_noisy_candidates_are_left_out_and_counted() -> None:
    front = front_of(candidate(1, [evaluation(0.94)], [measured(60.0, "noisy")]))
    assert [p.trial for p in front.points] == [0]
    assert any("1 candidate(s)" in note and "noisy" in note for note in front.notes)


def test_a_noisy_repetition_does_not_undo_a_good_measurement() -> None:
    front = front_of(candidate(1, [evaluation(0.94)], [measured(60.0), measured(10.0, "noisy", later=5)]))
    assert front.points[0].measured_ms == 60.0


def test_candidates_slower_than_dense_are_left_out_with_a_note_even_if_more_accurate() -> None:
    front = front_of(candidate(1, [evaluation(0.99)], [measured(120.0)]))
    assert [p.trial for p in front.points] == [0]
    assert any("slower than dense" in note for note in front.notes)
    assert any("Dense wins" in note for note in front.notes)


def test_fidelities_are_never_mixed_but_dense_stands_beside_fine_tuned_points() -> None:
    tuned = candidate(1, [evaluation(0.90), evaluation(0.94, "finetuned")], [measured(60.0)])
    plain = candidate(2, [evaluation(0.93)], [measured(50.0)])
    assert [p.trial for p in front_of(tuned, plain, fidelity="finetuned").points] == [1, 0]
    evaluated = front_of(tuned, plain, fidelity="evaluated")
    assert [(p.trial, p.top1) for p in evaluated.points] == [(2, 0.93), (0, 0.95)]


def test_by_default_a_front_has_the_fidelity_that_offers_most() -> None:
    tuned = candidate(1, [evaluation(0.90), evaluation(0.94, "finetuned")], [measured(60.0)])
    plain = candidate(2, [evaluation(0.93)], [measured(50.0)])
    # Within 5 points below dense (0.95 at 100 ms): 40 ms x 0.04 fine-tuned against 50 ms, then 60 ms, x 0.03.
    chosen = front_of(tuned, plain)
    assert (chosen.fidelity, [p.trial for p in chosen.points]) == ("finetuned", [1, 0])
    assert "There is a front of fidelity 'evaluated' as well." in chosen.notes
    plain = candidate(2, [evaluation(0.93)], [measured(40.0)])
    chosen = front_of(tuned, plain)
    assert (chosen.fidelity, [p.trial for p in chosen.points]) == ("evaluated", [2, 0])


def test_search_images_are_shown_only_while_nothing_is_tested() -> None:
    estimated = candidate(1, [evaluation(0.94, "screened", "search")], [measured(60.0)])
    tested = candidate(2, [evaluation(0.80)], [measured(50.0)])
    assert front_of(estimated).fidelity == "screened"
    assert front_of(estimated, tested).fidelity == "evaluated"


def test_search_images_never_become_a_configs_result() -> None:
    screened = candidate(1, [evaluation(0.94, "screened", "search")], [measured(60.0)])
    front = front_of(screened, fidelity="screened")
    assert front.split == "search"
    assert front.points[0].config.results.top1 is None


def test_published_schedules_and_resolutions_are_marks() -> None:
    mark = candidate(1, [evaluation(0.90)], [measured(60.0)], origin="published")
    smaller = replace(candidate(2, [evaluation(0.94)], [measured(55.0)], origin="resolution"), label="dense at 32 px")
    smallest = replace(candidate(3, [evaluation(0.5)], [measured(30.0)], origin="resolution"), label="dense at 24 px")
    front = front_of(mark, smaller, smallest)
    assert [p.trial for p in front.marks] == [1, 2, 3]
    assert "On the front without any token reduction: dense at 24 px, dense at 32 px." in front.notes


def test_another_devices_measurements_do_not_count() -> None:
    elsewhere = replace(measured(10.0), device="cuda:0")
    assert [p.trial for p in front_of(candidate(1, [evaluation(0.94)], [elsewhere])).points] == [0]


def test_runs_on_a_slower_moment_of_the_machine_are_brought_to_the_dense_models() -> None:
    front = front_of(candidate(1, [evaluation(0.94)], [measured(120.0, dense_ms=200.0)]))
    assert front.points[0].measured_ms == pytest.approx(60.0)
    assert front.points[0].speedup == pytest.approx(200 / 120)


FRONT = front_of(
    candidate(1, [evaluation(0.945)], [measured(60.0)]), candidate(2, [evaluation(0.90)], [measured(40.0)])
)


@pytest.mark.parametrize(
    ("bounds", "trial"),
    [
        ({"max_latency_ms": 70.0}, 1),
        ({"max_latency_ms": 45.0}, 2),
        ({"max_latency_ms": 1000.0}, 0),
        ({"min_speedup": 2.0}, 2),
        ({"min_top1": 0.92}, 1),
        ({"min_top1": 0.5}, 2),
        ({"max_latency_ms": 70.0, "min_top1": 0.93}, 1),
        ({}, 1),
    ],
)
def test_the_best_point_within_bounds_is_picked(bounds: dict[str, float], trial: int) -> None:
    assert pick_best(FRONT, **bounds).trial == trial


@pytest.mark.parametrize(
    ("bounds", "words", "nearest"),
    [
        ({"max_latency_ms": 30.0}, ["30 ms", "40 ms", "0.9000"], 2),
        ({"min_speedup": 4.0}, ["4 x", "2.5 x"], 2),
        ({"min_top1": 0.99}, ["0.99", "0.9500", "100 ms"], 0),
        ({"max_latency_ms": 50.0, "min_top1": 0.94}, ["0.9000"], 2),
    ],
)
def test_when_nothing_is_feasible_the_nearest_value_is_named(
    bounds: dict[str, float], words: list[str], nearest: int
) -> None:
    with pytest.raises(NoFeasiblePoint) as caught:
        pick_best(FRONT, **bounds)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert caught.value.nearest is not None
    assert caught.value.nearest.trial == nearest


def test_an_empty_front_has_no_best_point() -> None:
    with pytest.raises(NoFeasiblePoint, match="no point yet") as caught:
        pick_best(build_front(job_record(), []))
    assert caught.value.nearest is None
