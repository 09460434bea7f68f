"""Jobs from their claim to their end, on an engine without processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from latency_tables.schema import WeightMemory
from prunefront.config import ModelSpec, PruneConfig
from search.controller import Controller
from search.pareto import build_front
from service.routes.tables import save
from store import Store
from store.records import JobState
from tests.integration.search.conftest import LEASE_S, run_to_end, search_body, submit
from tests.integration.search.fake_engine import NUM_IMAGES, STUBBORN, TINY, FakeEngine, synthetic_table
from tests.integration.search.test_interruption import measure_body
from workers.payloads import TablePayload, parse_payload
from workers.tasks import TaskFailure


def test_a_search_goes_through_all_stages_in_order_of_cost(store, settings):
    engine = FakeEngine()
    job = run_to_end(store, engine, settings, search_body())
    assert job.state is JobState.SUCCEEDED, job.failure
    kinds = [kind for place, kind in enumerate(engine.kinds()) if place == 0 or engine.kinds()[place - 1] != kind]
    assert kinds == ["table", "calibrate", "evaluate", "measure", "finetune", "measure", "evaluate"]
    assert {spec.kind for spec in engine.submitted if spec.exclusive} == {"table", "measure"}
    candidates = store.list_candidates(job.id)
    assert [c.number for c in candidates] == list(range(len(candidates)))
    assert candidates[0].origin == "dense"
    assert sum(c.origin == "sampler" for c in candidates) <= 10
    assert all(any(e.fidelity == "screened" for e in c.evaluations) for c in candidates)


def test_the_test_split_is_seen_only_by_what_was_promoted_and_only_once(store, settings):
    engine = FakeEngine()
    job = run_to_end(store, engine, settings, search_body(budget={"finetune_top": 0}))
    tested = [key for split, key in engine.evaluated if split == "test"]
    assert sorted(tested) == sorted(set(tested))
    measured = {str(c.number) for c in store.list_candidates(job.id) if c.measurements}
    assert set(tested) == measured
    splits = [split for split, _ in engine.evaluated]
    assert splits == sorted(splits), "search images first, test images last"


def test_test_accuracies_come_with_a_paired_interval_against_dense(store, settings):
    job = run_to_end(store, FakeEngine(), settings, search_body())
    for candidate in store.list_candidates(job.id):
        for evaluation in candidate.evaluations:
            assert evaluation.num_images == NUM_IMAGES[evaluation.split]
            assert evaluation.ci_low <= evaluation.top1 <= evaluation.ci_high
            if candidate.origin == "dense":
                assert "delta" not in evaluation.details
            else:
                delta = evaluation.details["delta"]
                assert delta["low"] <= delta["difference"] <= delta["high"]


def test_the_front_of_a_finished_search_is_measured_and_not_slower_than_dense(store, settings):
    job = run_to_end(store, FakeEngine(), settings, search_body())
    front = build_front(job, store.list_candidates(job.id), fidelity="evaluated")
    assert front.dense is not None
    assert front.points
    assert all(point.speedup >= 1.0 for point in front.points)
    assert job.result is not None
    assert job.result["num_candidates"] == len(store.list_candidates(job.id))


def test_a_search_that_fine_tunes_nothing_says_why(store, settings, monkeypatch):
    monkeypatch.setattr("search.promotion.RECOVERABLE", (0.99, 1.0))
    engine = FakeEngine()
    job = run_to_end(store, engine, settings, search_body())
    assert "finetune" not in engine.kinds()
    (event,) = [event for event in store.events_after(job.id, 0, 1000) if event.type == "not_finetuned"]
    said = event.payload["message"]
    assert said.startswith(
        "Nothing was fine-tuned: that is for schedules on the measured front that lost 99 to 100 points"
    )
    assert said in job.result["notes"]
    assert said in build_front(job, store.list_candidates(job.id)).notes


def test_fine_tuned_candidates_are_measured_and_tested_with_their_own_weights(store, settings):
    engine = FakeEngine()
    # Every candidate is within what fine-tuning is spent on, so that some are chosen whatever is proposed.
    job = run_to_end(store, engine, settings, search_body(space={"min_keep_ratio": 0.8}))
    tuned = [c for c in store.list_candidates(job.id) if any(e.fidelity == "finetuned" for e in c.evaluations)]
    assert 1 <= len(tuned) <= 2
    for candidate in tuned:
        (artifact,) = store.list_artifacts(job.id, candidate.number)
        assert Path(artifact.path).is_relative_to(settings.artifacts_dir / job.id)
        by_fidelity = {e.fidelity: e for e in candidate.evaluations if e.split == "test"}
        assert by_fidelity["finetuned"].top1 > by_fidelity["evaluated"].top1
        assert "finetuned" in {m.stage for m in candidate.measurements}


def test_a_second_search_uses_the_table_of_the_first(store, settings):
    engine = FakeEngine()
    run_to_end(store, engine, settings, search_body())
    run_to_end(store, engine, settings, search_body(seed=1))
    assert engine.kinds().count("table") == 1


def put_table(store: Store, *, tells_memory: bool) -> None:
    """1 MiB a token in a block, 40 MiB where it fuses, and 3 MiB of weights in each of three blocks."""
    table = synthetic_table(ModelSpec.model_validate(TINY), runtime="eager", dtype="fp32", batch_size=8)
    if tells_memory:
        mib = {"block.evit.fuse": 40.0}
        entries = [e.model_copy(update={"peak_memory_mib": mib.get(e.entry, 1.0 * e.tokens_in)}) for e in table.entries]
        table = table.evolve(entries=entries, weights=WeightMemory(block_mib=3.0, rest_mib=0.0))
    save(table, store, "import")


def memory_body(max_memory_mib: float) -> dict[str, Any]:
    """One site each, which prunes or fuses."""
    return search_body(
        constraints={"max_memory_mib": max_memory_mib},
        space={"methods": ["evit"], "locations": [1]},
        budget={"trials": 16, "finetune_top": 0},
    )


def test_candidates_over_the_limit_of_memory_are_not_promoted(store, settings):
    put_table(store, tells_memory=True)
    job = run_to_end(store, FakeEngine(), settings, memory_body(30.0))
    assert job.state is JobState.SUCCEEDED, job.failure
    proposed = [c for c in store.list_candidates(job.id) if c.origin == "sampler"]
    assert {c.config["sites"][0]["op"] for c in proposed} == {"prune", "fuse"}
    assert {c.config["sites"][0]["op"] for c in proposed if c.measurements} == {"prune"}


@pytest.mark.parametrize(
    ("tells_memory", "limit_mib", "words"),
    [
        (False, 30.0, ["'synthetic'", "does not tell peak memory", "max_memory_mib"]),
        (True, 25.0, ["max_memory_mib 25", "26.0 MiB", "batch size 8"]),  # 9 of weights, 17 tokens in the first block
    ],
)
def test_a_limit_of_memory_that_cannot_be_kept_fails_before_any_task(store, settings, tells_memory, limit_mib, words):
    put_table(store, tells_memory=tells_memory)
    engine = FakeEngine()
    job = run_to_end(store, engine, settings, memory_body(limit_mib))
    assert job.state is JobState.FAILED
    assert all(word in job.failure["message"] for word in words), job.failure
    assert not engine.submitted


def test_noisy_candidates_stay_off_the_front_and_the_job_says_so(store, settings):
    job = run_to_end(store, FakeEngine(noisy_above=0.5), settings, search_body())
    assert job.state is JobState.SUCCEEDED, job.failure
    assert any("noisy" in note for note in job.result["notes"])


def test_a_table_job_stores_a_table(store, settings):
    job = run_to_end(store, FakeEngine(), settings, {"kind": "table", "model": TINY, "validate_schedules": 0})
    assert job.state is JobState.SUCCEEDED, job.failure
    assert store.get_table(job.result["table_id"]).source == job.id


@pytest.mark.parametrize(
    ("asked", "detail", "schedules"),
    [({}, "full", 20), ({"detail": "quick"}, "quick", 20), ({"detail": "full", "validate_schedules": 3}, "full", 3)],
)
def test_a_table_job_tells_its_task_how_much_to_measure(store, settings, asked, detail, schedules):
    engine = FakeEngine()
    place = {"runtime": "compile", "dtype": "bf16", "batch_size": 3}
    body = {"kind": "table", "model": TINY, **place, **asked, "max_foreign_cores": 1.5}
    job = run_to_end(store, engine, settings, body)
    assert job.state is JobState.SUCCEEDED, job.failure
    (spec,) = engine.submitted
    payload = parse_payload(TablePayload, spec.payload)
    assert (payload.detail, payload.validate_schedules) == (detail, schedules)
    assert payload.max_foreign_cores == 1.5
    assert (payload.runtime, payload.dtype, payload.batch_size) == ("compile", "bf16", 3)
    assert payload.model == ModelSpec.model_validate(TINY)
    assert payload.partial_path.is_relative_to(settings.artifacts_dir / job.id), "where the next controller looks"


def test_a_search_builds_a_full_table_and_leaves_its_validation_to_table_jobs(store, settings):
    engine = FakeEngine()
    run_to_end(store, engine, settings, search_body())
    payload = parse_payload(TablePayload, next(spec for spec in engine.submitted if spec.kind == "table").payload)
    assert (payload.detail, payload.validate_schedules) == ("full", 0)


def test_a_measure_job_measures_every_config_and_the_dense_model(store, settings):
    job = run_to_end(store, FakeEngine(), settings, measure_body())
    assert job.state is JobState.SUCCEEDED, job.failure
    candidates = store.list_candidates(job.id)
    assert [len(c.measurements) for c in candidates] == [1, 1, 1, 1]
    speedups = [c.measurements[0].speedup for c in candidates]
    assert speedups == sorted(speedups)
    assert speedups[0] == 1.0
    assert [PruneConfig.model_validate(c.config).method for c in candidates[1:]] == ["evit"] * 3


def test_a_measure_job_of_the_dense_model_alone_ends(store, settings):
    body = measure_body()
    body["configs"] = [{"model": body["configs"][0]["model"], "method": "hybrid", "sites": []}]
    job = run_to_end(store, FakeEngine(), settings, body)
    assert job.state is JobState.SUCCEEDED, job.failure
    (dense,) = store.list_candidates(job.id)
    assert [m.median_ms for m in dense.measurements] == [100.0]


@pytest.mark.parametrize(("ask", "state"), [("request_cancel", JobState.CANCELLED), ("request_pause", JobState.PAUSED)])
def test_a_job_ends_or_pauses_on_request_with_its_task(store, settings, monkeypatch, ask, state):
    engine = FakeEngine()
    job_id = submit(store, search_body())

    def on_item(item):
        if len(engine.evaluated) == 5:
            getattr(store, ask)(job_id)

    engine.on_item = on_item
    monkeypatch.setattr("search.job_run.JobRun._flags_due", lambda self, now: True)
    assert Controller(store, engine, settings).run_once()
    assert store.get_job(job_id).state is state
    assert not engine.running
    assert len(engine.evaluated) < 20
    assert not Controller(store, engine, settings).run_once(), "nobody claims it"
    if state is JobState.PAUSED:
        engine.on_item = lambda item: None
        store.resume_job(job_id)
        assert Controller(store, engine, settings).run_once()
        job = store.get_job(job_id)
        assert job.state is JobState.SUCCEEDED, job.failure
        assert len(engine.evaluated) == len(set(engine.evaluated)) + _finetuned(store, job_id)


def test_methods_that_ran_out_of_memory_are_left_out_and_the_rest_is_searched(store, settings):
    engine = FakeEngine(unfit_entries=("block.tome.merge",))
    job = run_to_end(store, engine, settings, search_body(space={"methods": ["evit", "tome", "hybrid"]}))
    assert job.state is JobState.SUCCEEDED, job.failure
    (left_out,) = [e.payload for e in store.events_after(job.id, 0, 500) if e.type == "methods_left_out"]
    assert left_out["methods"] == ["tome"]
    assert "ran out of memory at batch size" in left_out["message"]
    proposed = [c for c in store.list_candidates(job.id) if c.origin == "sampler"]
    assert proposed and all(c.predicted_ms is not None and c.predicted_ms > 0 for c in proposed)
    assert "tome" not in {c.config["method"] for c in proposed}
    # Hybrid merges as ToMe does; its other operations are proposed.
    assert not any(site["op"] == "merge" for c in proposed for site in c.config["sites"])


@pytest.mark.parametrize("entry", ["mlp", "block.tome.merge"])
def test_a_search_in_which_nothing_fits_fails_with_one_sentence(store, settings, entry):
    engine = FakeEngine(unfit_entries=(entry,))
    job = run_to_end(store, engine, settings, search_body(space={"methods": ["tome"]}))
    assert job.state is JobState.FAILED
    assert "memory" in job.failure["message"] and "smaller batch size" in job.failure["message"]


def test_a_task_lost_twice_is_run_again_without_what_it_had_finished(store, settings):
    engine = FakeEngine(lose_after_items={"evaluate": [3, 2], "measure": [1], "calibrate": [0]})
    job = run_to_end(store, engine, settings, search_body(budget={"finetune_top": 0}))
    assert job.state is JobState.SUCCEEDED, job.failure
    assert len(engine.evaluated) == len(set(engine.evaluated))
    lost = [e.payload for e in store.events_after(job.id, 0, 500) if e.type == "task_lost"]
    assert [(event["kind"], event["attempt"]) for event in lost] == [
        ("calibrate", 1), ("evaluate", 1), ("evaluate", 2), ("measure", 1),
    ]  # fmt: skip


def test_a_task_lost_after_its_last_item_loses_nothing(store, settings):
    engine = FakeEngine(lose_after_items={"measure": [3]})
    job = run_to_end(store, engine, settings, measure_body())
    assert job.state is JobState.SUCCEEDED, job.failure
    assert [len(c.measurements) for c in store.list_candidates(job.id)] == [1, 1, 1, 1]
    assert [len(spec.payload["entries"]) for spec in engine.submitted] == [3, 0]


def test_a_task_lost_three_times_fails_the_job_with_its_cause(store, settings):
    engine = FakeEngine(lose_after_items={"evaluate": [1, 1, 1]})
    job = run_to_end(store, engine, settings, search_body())
    assert job.state is JobState.FAILED
    assert job.failure["message"] == "The evaluate task lost: The task's process was killed by SIGKILL."
    assert job.failure["cause"] == "signal"
    assert job.failure["task_state"] == "lost"
    assert engine.kinds().count("evaluate") == 3


def test_a_failed_task_fails_the_job_at_once_and_a_retry_goes_on(store, settings):
    engine = FakeEngine(failures={"measure": STUBBORN})
    job = run_to_end(store, engine, settings, search_body())
    assert job.state is JobState.FAILED
    assert job.failure["message"] == "The measure task failed: The images are upside down."
    assert job.failure["log_tail"] == "upside"
    assert engine.kinds().count("measure") == 1
    screened = len(engine.evaluated)
    engine.failures.clear()
    store.retry_job(job.id)
    assert Controller(store, engine, settings).run_once()
    assert store.get_job(job.id).state is JobState.SUCCEEDED
    assert all(split == "test" for split, _ in engine.evaluated[screened:])


def test_bad_input_found_by_a_task_is_told_in_the_tasks_own_words(store, settings):
    wrong = TaskFailure(type="CheckpointError", message="The checkpoint is of another model.", cause="input")
    job = run_to_end(store, FakeEngine(failures={"calibrate": wrong}), settings, search_body())
    assert job.failure["message"] == "The checkpoint is of another model."


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"device": "cuda:3"}, ["'cuda:3'", "cpu"]),
        ({"dataset": "imagefolder:missing"}, ["missing"]),
        ({"model": {**TINY, "num_classes": 7}}, ["10 classes", "7"]),
        ({"model": {**TINY, "checkpoint": "nothing"}}, ["nothing", "checkpoint"]),
        ({"space": {"methods": ["nonsense"]}}, ["nonsense"]),
    ],
)
def test_what_cannot_be_done_fails_with_one_sentence_before_any_task(store, settings, changes, words):
    engine = FakeEngine()
    job = run_to_end(store, engine, settings, search_body(**changes))
    assert job.state is JobState.FAILED
    assert all(word in job.failure["message"] for word in words), job.failure
    assert "traceback" not in job.failure
    assert not engine.submitted


def test_a_controller_that_lost_its_lease_ends_its_task_and_writes_nothing(store, settings, clock):
    engine = FakeEngine()
    job_id = submit(store, search_body())
    at_takeover = []

    def on_item(item):
        if len(engine.evaluated) == 4:
            clock.advance(LEASE_S + 1)
            assert store.claim_job("another controller", LEASE_S).id == job_id
            at_takeover.append([len(c.evaluations) for c in store.list_candidates(job_id)])

    engine.on_item = on_item
    assert Controller(store, engine, settings).run_once()
    assert [len(c.evaluations) for c in store.list_candidates(job_id)] == at_takeover[0]
    assert sum(at_takeover[0]) == 3
    assert store.get_job(job_id).lease_owner == "another controller"
    assert not engine.running, "its device is free for the next job"


def test_jobs_run_by_priority_and_only_kinds_that_a_controller_knows(store, settings):
    store.create_job("finetune", "unknown", {"kind": "finetune"})
    low = submit(store, measure_body())
    high = store.create_job("measure", "first", measure_body(), priority=5).id
    controller = Controller(store, FakeEngine(), settings)
    assert controller.run_once()
    assert store.get_job(high).state is JobState.SUCCEEDED
    assert store.get_job(low).state is JobState.QUEUED
    assert controller.run_once()
    assert not controller.run_once()


def _finetuned(store, job_id) -> int:
    """Candidates whose key appears twice for the test split, off the shelf and fine-tuned."""
    return sum(any(e.fidelity == "finetuned" for e in c.evaluations) for c in store.list_candidates(job_id))


def test_what_was_screened_on_a_sample_is_judged_on_all_search_images_before_it_is_promoted(store, settings):
    engine = FakeEngine()
    job = run_to_end(store, engine, settings, search_body(budget={"search_images": 4}))
    assert job.state is JobState.SUCCEEDED, job.failure
    candidates = store.list_candidates(job.id)
    images = {c.number: sorted(e.num_images for e in c.evaluations if e.split == "search") for c in candidates}
    assert all(min(found) == 4 for found in images.values())
    everything = max(images[0])
    assert everything > 4
    measured = [c.number for c in candidates if c.measurements]
    judged = [number for number, found in images.items() if everything in found]
    assert set(measured) <= set(judged), "nothing is measured that was only judged on a sample"
    assert len(measured) < len(judged) < len(candidates)
