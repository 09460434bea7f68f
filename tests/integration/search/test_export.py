"""`prunefront jobs export-study`: a search, read back by Optuna itself."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.importance import FanovaImportanceEvaluator, get_param_importances
from optuna.storages import RDBStorage
from optuna.trial import TrialState

from prunefront.cli.app import run
from prunefront.config import load_config
from search.controller import Controller
from search.pareto import evaluation_of, measurement_of
from store import JobRecord, Store
from store.records import CandidateRecord, JobState
from tests.integration.search.conftest import run_to_end, search_body, submit
from tests.integration.search.fake_engine import TINY, FakeEngine


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PRUNEFRONT_DEBUG", raising=False)


@pytest.fixture
def job(store: Store, settings: Any) -> JobRecord:
    body = search_body(budget={"trials": 20, "finetune_top": 1}, space={"min_keep_ratio": 0.8})
    return run_to_end(store, FakeEngine(), settings, body)


@pytest.fixture
def storage(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/study.db"


@contextlib.contextmanager
def loaded(storage: str, name: str) -> Iterator[optuna.Study]:
    """The study as any Optuna program sees it."""
    backend = RDBStorage(storage)
    try:
        yield optuna.load_study(study_name=name, storage=backend)
    finally:
        backend.remove_session()
        backend.engine.dispose()


def names_in(storage: str) -> list[str]:
    backend = RDBStorage(storage)
    try:
        return optuna.get_all_study_names(backend)
    finally:
        backend.remove_session()
        backend.engine.dispose()


def export(job_id: str, storage: str, database_url: str, *arguments: str) -> int:
    return run(["jobs", "export-study", job_id, "--storage", storage, "--database-url", database_url, *arguments])


def points(store: Store, job: JobRecord) -> list[CandidateRecord]:
    """What the sampler learnt from: neither the dense model nor smaller images."""
    return [c for c in store.list_candidates(job.id) if c.origin in ("published", "sampler")]


def test_a_study_has_a_trial_for_every_evaluated_point_of_the_space(store, database_url, job, storage):
    candidates = points(store, job)
    assert export(job.id, storage, database_url) == 0
    with loaded(storage, job.id) as study:
        trials = study.get_trials()
        assert [d.name for d in study.directions] == ["MAXIMIZE", "MINIMIZE"]
        assert study.metric_names == ["top1", "predicted_ms"]
        assert (study.user_attrs["job"], study.user_attrs["spec"]["model"]["name"]) == (job.id, TINY["name"])
        dense = store.get_candidate(job.id, 0)
        assert study.user_attrs["dense_predicted_ms"] == dense.predicted_ms
        assert study.user_attrs["dense_top1"] == evaluation_of(dense, "screened").top1
    assert {t.state for t in trials} == {TrialState.COMPLETE}
    assert [t.user_attrs["number"] for t in trials] == [c.number for c in candidates]
    for trial, candidate in zip(trials, candidates, strict=True):
        screened = evaluation_of(candidate, "screened")
        assert trial.values == [screened.top1, candidate.predicted_ms]
        assert trial.datetime_complete.astimezone() == screened.created_at


def test_proposals_keep_the_parameters_that_the_sampler_chose(store, database_url, job, storage):
    assert export(job.id, storage, database_url) == 0
    chosen = {c.number: c.params["optuna"] for c in points(store, job) if "optuna" in c.params}
    assert len(chosen) >= 10
    with loaded(storage, job.id) as study:
        assert {n: t.params for t in study.trials if (n := t.user_attrs["number"]) in chosen} == chosen


def test_published_schedules_have_the_parameters_of_the_nearest_point(store, database_url, job, storage):
    assert export(job.id, storage, database_url) == 0
    dense_ms = store.get_candidate(job.id, 0).predicted_ms
    with loaded(storage, job.id) as study:
        published = [t for t in study.trials if t.user_attrs["origin"] == "published"]
        assert published
        for trial in published:
            assert trial.params["share"] == pytest.approx(trial.values[1] / dense_ms)
            assert trial.params["method"] == trial.user_attrs["config"]["method"]
            reduced = {site["block"] for site in trial.user_attrs["config"]["sites"]}
            weights = {block: trial.params[f"drop_{block}"] for block in range(3)}
            assert min(weights[block] for block in reduced) > max([0.0, *(weights[b] for b in {0, 1, 2} - reduced)])


def test_user_attributes_lead_back_to_the_config_and_its_results(store, database_url, job, storage):
    assert export(job.id, storage, database_url) == 0
    candidates = {c.number: c for c in points(store, job)}
    with loaded(storage, job.id) as study:
        attributes = {t.user_attrs["number"]: t.user_attrs for t in study.trials}
    for number, candidate in candidates.items():
        found = attributes[number]
        assert found["config_hash"] == candidate.config_hash
        assert load_config(found["config"]).content_hash() == candidate.config_hash
        assert (found["label"], found["macs"]) == (candidate.label, candidate.macs)
        measured = measurement_of(candidate, "cpu")
        assert found["measured_ms"] == (None if measured is None else measured.median_ms)
        tested = {f"{e.fidelity}_test_top1": e.top1 for e in candidate.evaluations if e.split == "test"}
        assert {name: value for name, value in found.items() if name.endswith("_test_top1")} == tested
    assert any("finetuned_test_top1" in found for found in attributes.values())


def test_optunas_own_tools_work_on_the_study(store, database_url, job, storage):
    assert export(job.id, storage, database_url, "--name", "digits") == 0
    values = [(evaluation_of(c, "screened").top1, c.predicted_ms) for c in points(store, job)]
    best = {v for v in values if not any(o[0] >= v[0] and o[1] <= v[1] and o != v for o in values)}
    with loaded(storage, "digits") as study:
        assert {tuple(trial.values) for trial in study.best_trials} == best
        evaluator = FanovaImportanceEvaluator(n_trees=16, seed=0)
        importances = get_param_importances(study, evaluator=evaluator, target=lambda trial: trial.values[1])
        assert {"share", "method", "op_0", "drop_0", "op_2", "drop_2"} <= set(importances)
        study.add_trial(study.trials[0])  # it is an ordinary study, to go on with
        study.ask(study.trials[0].distributions)


def test_a_running_search_gives_what_it_has_evaluated_so_far(store, settings, database_url, storage):
    job_id = submit(store, search_body())
    engine = FakeEngine()
    Controller(store, engine, settings).run_once(lambda: len(engine.evaluated) >= 8)
    assert store.get_job(job_id).state is JobState.QUEUED
    assert export(job_id, storage, database_url) == 0
    candidates = store.list_candidates(job_id)
    expected = [c.number for c in candidates if c.evaluations and c.origin in ("published", "sampler")]
    assert 0 < len(expected) < len(candidates)
    with loaded(storage, job_id) as study:
        assert [t.user_attrs["number"] for t in study.trials] == expected


def test_a_search_without_evaluated_candidates_leaves_no_study(store, database_url, storage, tmp_path, capfd):
    job_id = submit(store, search_body())
    assert export(job_id, storage, database_url) == 2
    assert f"Job {job_id} has no evaluated candidate yet" in sentence(capfd)
    assert not (tmp_path / "study.db").exists()


def test_a_name_that_is_taken_is_refused_and_its_study_stays(store, database_url, job, storage, capfd):
    assert export(job.id, storage, database_url, "--name", "digits") == 0
    with loaded(storage, "digits") as study:
        before = [trial.params for trial in study.trials]
    capfd.readouterr()
    assert export(job.id, storage, database_url, "--name", "digits") == 2
    assert "has a study 'digits' already; choose another name" in sentence(capfd)
    with loaded(storage, "digits") as study:
        assert [trial.params for trial in study.trials] == before
    assert export(job.id, storage, database_url) == 0
    assert sorted(names_in(storage)) == sorted(["digits", job.id])


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("study.db", "such as sqlite:///study.db"),
        ("sqlite:////proc/nowhere/study.db", "cannot be written to sqlite:////proc/nowhere/study.db: unable to open"),
        ("nonsense://me:hunter2@here/study", "cannot be written to nonsense://me:***@here/study"),
        ("nonsense://here/study?password=hunter2", "cannot be written to nonsense://here/study:"),
        ("nonsense://me:hunter2", "such as sqlite:///study.db"),
        ("nonsense://me:my@hunter2@here/study", "Write %40"),
    ],
)
def test_a_storage_that_cannot_be_used_is_told_in_one_sentence(store, database_url, job, url, words, capfd):
    assert export(job.id, url, database_url) == 2
    shown = sentence(capfd)
    assert words in shown
    assert "hunter2" not in shown


def test_other_jobs_and_unknown_ones_have_no_study(store, settings, database_url, storage, capfd):
    table = run_to_end(store, FakeEngine(), settings, {"kind": "table", "model": TINY, "validate_schedules": 0})
    assert export(table.id, storage, database_url) == 2
    assert f"Job {table.id} is a table job, but only a search has a study." in sentence(capfd)
    assert export("nothing", storage, database_url) == 2
    assert "nothing" in sentence(capfd)


@pytest.mark.parametrize("error", [KeyboardInterrupt, optuna.exceptions.StorageInternalError("disk full")])
def test_a_study_that_could_not_be_written_whole_is_taken_back(
    store, database_url, job, storage, monkeypatch, capfd, error
):
    add_trial = optuna.Study.add_trial

    def fragile(study: optuna.Study, trial: Any) -> None:
        if len(study.get_trials(deepcopy=False)) == 3:
            raise error
        add_trial(study, trial)

    monkeypatch.setattr(optuna.Study, "add_trial", fragile)
    assert export(job.id, storage, database_url) == (130 if error is KeyboardInterrupt else 2)
    if error is not KeyboardInterrupt:
        assert "cannot be written to" in sentence(capfd) and "disk full" in error.args
    monkeypatch.undo()
    assert names_in(storage) == []


def sentence(capfd: pytest.CaptureFixture[str]) -> str:
    """The one line of an error."""
    shown = capfd.readouterr()
    assert shown.out == ""
    lines = shown.err.strip().splitlines()
    assert len(lines) == 1, shown.err
    return lines[0]
