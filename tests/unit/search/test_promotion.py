from __future__ import annotations

import re

import pytest

from search.promotion import Rival, choose_promising, choose_recoverable, spread, why_none_is_recoverable
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


def leader(number: int, top1: float, origin: str = "sampler") -> Rival:
    return Rival(candidate=candidate(number, origin=origin), top1=top1, measured_ms=number)


def test_fine_tuning_is_for_schedules_that_lost_between_a_little_and_a_tenth() -> None:
    leaders = [
        leader(1, 0.80),
        leader(2, 0.83),
        leader(3, 0.90, "published"),
        leader(4, 0.918),
        leader(5, 0.85, "dense"),
    ]
    assert [c.number for c in choose_recoverable(leaders, 9, dense_top1=0.92)] == [2, 3]
    assert [c.number for c in choose_recoverable(leaders, 1, dense_top1=0.92)] == [3]


@pytest.mark.parametrize(
    ("leaders", "sentence"),
    [
        (
            [leader(1, 0.7), leader(2, 0.6), leader(3, 0.919)],
            "lost 0.3 to 10 points .* of the 3 there 1 lost less and 2 more",
        ),
        (
            [leader(0, 0.92, "dense"), leader(1, 0.9, "resolution")],
            "no schedule that reduces tokens is on the measured",
        ),
        ([], "no schedule that reduces tokens"),
    ],
)
def test_it_is_said_why_nothing_is_worth_fine_tuning(leaders: list[Rival], sentence: str) -> None:
    assert choose_recoverable(leaders, 9, dense_top1=0.92) == []
    said = why_none_is_recoverable(leaders, dense_top1=0.92)
    assert re.search(sentence, said) and said.startswith("Nothing was fine-tuned: ")
