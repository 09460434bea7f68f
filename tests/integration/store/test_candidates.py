"""Candidates with their numbers; every write can be repeated."""

from __future__ import annotations

from typing import Any

import pytest

from store import ConflictError, DocumentError, NotFoundError, Store
from tests.integration.store.writes import evaluate, measure, propose, queue, start


def test_numbers_start_at_0_and_have_no_gaps(store: Store) -> None:
    job = start(store)
    assert [propose(store, job, f"h{index}").number for index in range(4)] == [0, 1, 2, 3]


def test_numbers_of_two_jobs_are_independent(store: Store) -> None:
    first, second = start(store), start(store)
    assert (propose(store, first).number, propose(store, second).number) == (0, 0)


def test_equal_hashes_are_one_candidate_as_first_recorded(store: Store) -> None:
    job = start(store)
    first = propose(store, job, "h", origin="published", label="EViT 0.7")
    again = propose(store, job, "h", origin="sampler", label="trial 9")
    assert again == first
    assert propose(store, job, "other").number == 1


def test_a_repeated_candidate_comes_with_its_numbers(store: Store) -> None:
    job = start(store)
    propose(store, job, "h")
    evaluation = evaluate(store, job)
    measurement = measure(store, job)
    again = propose(store, job, "h")
    assert (again.evaluations, again.measurements) == ((evaluation,), (measurement,))


def test_a_number_may_be_given_but_not_taken_twice(store: Store) -> None:
    job = start(store)
    assert propose(store, job, "a", number=3).number == 3
    assert propose(store, job, "b").number == 4
    with pytest.raises(ConflictError, match="candidate 3"):
        propose(store, job, "c", number=3)
    assert propose(store, job, "a", number=7).number == 3


def test_a_candidate_is_stored_as_given(store: Store) -> None:
    job = start(store)
    config = {"method": "evit", "sites": [{"block": 3, "op": "fuse", "keep_ratio": 0.7}]}
    candidate = propose(store, job, config=config, predicted_ms=None, macs=3.03e9, origin="dense")
    assert (candidate.config, candidate.predicted_ms, candidate.macs) == (config, None, 3_030_000_000)
    assert (candidate.state, candidate.note, candidate.origin) == ("proposed", None, "dense")
    assert store.get_candidate(job.id, 0) == candidate


def test_only_named_fields_of_a_candidate_change(store: Store) -> None:
    job = start(store)
    propose(store, job)
    changed = store.update_candidate(job.id, job.fence, 0, state="measured", note="noisy twice")
    assert (changed.state, changed.note, changed.predicted_ms) == ("measured", "noisy twice", 12.5)
    assert store.update_candidate(job.id, job.fence, 0, predicted_ms=None).predicted_ms is None
    assert store.get_candidate(job.id, 0).note == "noisy twice"


def test_other_fields_of_a_candidate_do_not_change(store: Store) -> None:
    job = start(store)
    propose(store, job)
    with pytest.raises(TypeError, match="config_hash"):
        store.update_candidate(job.id, job.fence, 0, config_hash="x")  # type: ignore[call-arg]


def test_a_repeated_evaluation_returns_the_first(store: Store) -> None:
    job = start(store)
    propose(store, job)
    first = evaluate(store, job, top1=0.75)
    assert evaluate(store, job, top1=0.5) == first
    assert store.get_candidate(job.id, 0).evaluations == (first,)


@pytest.mark.parametrize("change", [{"fidelity": "evaluated"}, {"split": "test"}, {"num_images": 2048}])
def test_evaluations_differ_by_fidelity_split_and_images(store: Store, change: dict[str, Any]) -> None:
    job = start(store)
    propose(store, job)
    evaluate(store, job)
    evaluate(store, job, **change)
    assert len(store.get_candidate(job.id, 0).evaluations) == 2


def test_a_loss_that_is_not_finite_is_stored_as_none(store: Store) -> None:
    job = start(store)
    propose(store, job)
    assert evaluate(store, job, loss=float("nan")).loss is None
    assert store.get_candidate(job.id, 0).evaluations[0].loss is None


@pytest.mark.parametrize("change", [{"top1": float("nan")}, {"ci_low": float("-inf")}])
def test_an_accuracy_that_is_not_finite_is_refused(store: Store, change: dict[str, Any]) -> None:
    job = start(store)
    propose(store, job)
    with pytest.raises(DocumentError, match="finite"):
        evaluate(store, job, **change)
    assert store.get_candidate(job.id, 0).evaluations == ()


def test_a_repeated_measurement_returns_the_first(store: Store) -> None:
    job = start(store)
    propose(store, job)
    first = measure(store, job, median_ms=10.0)
    assert measure(store, job, median_ms=11.0) == first
    assert store.get_candidate(job.id, 0).measurements == (first,)


def test_a_noisy_measurement_gives_way_to_the_next(store: Store) -> None:
    job = start(store)
    propose(store, job)
    noisy = measure(store, job, state="noisy", median_ms=30.0, speedup=None, dense_ms=None)
    good = measure(store, job, state="ok", median_ms=10.0, details={"p99_ms": 12.0})
    assert (good.id, good.state, good.median_ms, good.speedup) == (noisy.id, "ok", 10.0, 1.5)
    assert store.get_candidate(job.id, 0).measurements == (good,)


@pytest.mark.parametrize(
    "change", [{"stage": "finetuned"}, {"device": "b"}, {"runtime": "compile"}, {"dtype": "bf16"}, {"batch_size": 1}]
)
def test_measurements_differ_by_stage_and_setting(store: Store, change: dict[str, Any]) -> None:
    job = start(store)
    propose(store, job)
    measure(store, job)
    measure(store, job, **change)
    assert len(store.get_candidate(job.id, 0).measurements) == 2


@pytest.mark.parametrize("number", [-1, 1, 10**30])
def test_an_unknown_candidate_is_not_found(store: Store, number: int) -> None:
    job = start(store)
    propose(store, job)
    for call in (
        lambda: store.get_candidate(job.id, number),
        lambda: store.update_candidate(job.id, job.fence, number, state="x"),
        lambda: evaluate(store, job, number),
        lambda: measure(store, job, number),
        lambda: store.add_artifact(job.id, job.fence, number, "log", "p", "ab", 1),
    ):
        with pytest.raises(NotFoundError, match=f"no candidate {number}"):
            call()


def test_candidates_are_listed_by_number_each_with_its_own_numbers(store: Store) -> None:
    job = start(store)
    for index in range(6):
        propose(store, job, f"h{index}")
    for number in (4, 1):
        evaluate(store, job, number, top1=number / 10)
        measure(store, job, number, median_ms=float(number))
    listed = store.list_candidates(job.id)
    assert [candidate.number for candidate in listed] == list(range(6))
    assert [[e.top1 for e in c.evaluations] for c in listed] == [[], [0.1], [], [], [0.4], []]
    assert [[m.median_ms for m in c.measurements] for c in listed] == [[], [1.0], [], [], [4.0], []]
    assert store.list_candidates(job.id, after=1, limit=3) == listed[2:5]
    assert store.list_candidates(job.id, after=10**30) == []
    assert store.list_candidates(job.id, after=-(10**30), limit=0) == []


def test_a_job_without_candidates_has_an_empty_list(store: Store) -> None:
    assert store.list_candidates(queue(store).id) == []


def test_a_file_written_again_is_one_artifact(store: Store) -> None:
    job = start(store)
    propose(store, job)
    store.add_artifact(job.id, job.fence, 0, "checkpoint", "a.safetensors", "old", 1)
    again = store.add_artifact(job.id, job.fence, 0, "checkpoint", "a.safetensors", "new", 2**40)
    whole = store.add_artifact(job.id, job.fence, None, "log", "log", "ab", 3)
    assert store.list_artifacts(job.id) == [again, whole]
    assert (again.sha256, again.size) == ("new", 2**40)
    assert store.list_artifacts(job.id, 0) == [again]
    assert store.list_artifacts(job.id, 10**30) == []
