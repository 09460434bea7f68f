from __future__ import annotations

from search.promotion import choose_promising, spread
from store.records import CandidateRecord
from tests.unit.search.records import candidate, evaluation


def screened(number: int, top1: float, predicted_ms: float) -> CandidateRecord:
    return candidate(number, [evaluation(top1, "screened", "search")], predicted_ms=predicted_ms)


def promoted(candidates: list[CandidateRecord], count: int, max_latency_ms: float | None = None) -> list[int]:
    chosen = choose_promising(candidates, count, num_images=100, least_top1=0.90, max_latency_ms=max_latency_ms)
    return [c.number for c in chosen]


def test_the_front_comes_first_then_the_front_behind_it() -> None:
    rivals = [screened(1, 0.95, 60), screened(2, 0.92, 40), screened(3, 0.94, 70), screened(4, 0.91, 80)]
    assert promoted(rivals, 2) == [2, 1]
    assert promoted(rivals, 3) == [2, 1, 3]
    assert promoted(rivals, 9) == [2, 1, 3, 4]


def test_schedules_that_lose_too_much_wait_until_the_others_are_in() -> None:
    rivals = [screened(1, 0.95, 60), screened(2, 0.40, 10), screened(3, 0.94, 70), screened(4, 0.60, 20)]
    assert promoted(rivals, 2) == [1, 3]
    assert promoted(rivals, 4) == [1, 3, 2, 4]


def test_schedules_over_the_latency_bound_or_never_screened_are_not_promoted() -> None:
    rivals = [screened(1, 0.95, 60), screened(2, 0.92, 40), candidate(3, predicted_ms=1.0)]
    assert promoted(rivals, 9, max_latency_ms=50) == [2]


def test_a_choice_is_spread_over_the_whole_row() -> None:
    row = [screened(number, 0.95, number) for number in range(9)]
    assert [c.number for c in spread(row, 3)] == [0, 4, 8]
    assert [c.number for c in spread(row, 1)] == [8]
    assert spread(row, 20) == row
