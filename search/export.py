"""A search as a standard Optuna study, for any Optuna tool: plots, importances, the dashboard.

The study holds what the search's own one knew: the candidates of its space and the values told of them. Everything
else that is known of a candidate goes into its user attributes.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from typing import Any

import optuna
from optuna.exceptions import DuplicatedStudyError, ExperimentalWarning, OptunaError
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, create_trial
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from prunefront.config import PruneConfig
from prunefront.errors import ConfigError, PrunefrontError
from prunefront.geometry import geometry_for
from search.documents import SearchJob
from search.pareto import evaluation_of, measurement_of
from search.space import distributions_of, nearest_params
from store.records import CandidateRecord, JobRecord
from store.urls import mask_passwords, show_url, split_url

VALUES = ("top1", "predicted_ms")  # the first is maximised, the second minimised
TESTED = ("evaluated", "finetuned")
# Origins that the sampler learns from; the dense model and smaller images are no points of the space.
ORIGINS = ("published", "sampler")


class ExportError(PrunefrontError, RuntimeError):
    """A study that could not be written; nothing of it is left in the storage."""


def export_study(
    job: JobRecord,
    candidates: Sequence[CandidateRecord],
    *,
    storage: str,
    name: str,
    progress: Callable[[float, float, str], None] = lambda done, total, message: None,
) -> int:
    """Write the evaluated candidates of a search as a new study.

    Args:
        job: The search.
        candidates: All of its candidates.
        storage: Optuna storage URL of a database, such as ``sqlite:///study.db``.
        name: Of the study.
        progress: Told how many trials of how many are written.

    Returns:
        Number of trials.

    Raises:
        ConfigError: If the job is no search.
        StoreError: If ``storage`` is not the URL of a database.
        ExportError: If nothing is evaluated yet, the name is taken, or the storage cannot be used.
    """
    if job.kind != "search":
        raise ConfigError(f"Job {job.id} is a {job.kind} job, but only a search has a study.")
    search = SearchJob.model_validate(job.spec)
    trials = study_trials(search, candidates)
    if not trials:
        raise ExportError(f"Job {job.id} has no evaluated candidate yet; wait until it has screened some.")
    dense = evaluation_of(candidates[0], "screened")
    attributes = {
        "job": job.id,
        "job_name": job.name,
        "spec": search.model_dump(mode="json"),
        "dense_top1": None if dense is None else dense.top1,
        "dense_predicted_ms": candidates[0].predicted_ms,
    }
    with _open_storage(storage, name) as backend:
        study = optuna.create_study(study_name=name, storage=backend, directions=["maximize", "minimize"])
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ExperimentalWarning)
                study.set_metric_names(list(VALUES))
            for key, value in attributes.items():
                study.set_user_attr(key, value)
            for number, trial in enumerate(trials):
                progress(number, len(trials), f"trial {number}")
                study.add_trial(trial)
        except BaseException:
            # Half a study would pass for a whole one.
            with contextlib.suppress(OptunaError, SQLAlchemyError):
                optuna.delete_study(study_name=name, storage=backend)
            raise
    return len(trials)


def study_trials(search: SearchJob, candidates: Sequence[CandidateRecord]) -> list[FrozenTrial]:
    """Finished trials of the candidates that have both values, in the order of their numbers.

    Proposals have the parameters that the sampler chose. Published schedules, and those taken over from other searches,
    have those of the nearest point of the space, as the sampler learnt them.
    """
    geometry = geometry_for(search.model.spec())
    dense_ms = next((c.predicted_ms for c in candidates if c.origin == "dense"), None)
    found = []
    for candidate in candidates:
        evaluation, predicted_ms = evaluation_of(candidate, "screened"), candidate.predicted_ms
        if candidate.origin not in ORIGINS or evaluation is None or predicted_ms is None or not dense_ms:
            continue
        config, share = PruneConfig.model_validate(candidate.config), predicted_ms / dense_ms
        params = candidate.params.get("optuna") or nearest_params(config, search.space, geometry, share=share)
        found.append((candidate, evaluation, predicted_ms, params))
    # The search aimed within what its latency table allowed. Here one range has to hold for all trials: Optuna's tools
    # leave out parameters whose range changes.
    most = max([1.0, *(params["share"] for *_, params in found)])
    distributions = distributions_of(search.space, geometry, least_share=0.0, greatest_share=most)
    trials = []
    for candidate, evaluation, predicted_ms, params in found:
        trial = create_trial(
            params=params,
            distributions=distributions,
            values=[evaluation.top1, predicted_ms],
            user_attrs=_attributes(candidate, search.device, evaluation.num_images),
        )
        trial.datetime_start, trial.datetime_complete = _local(candidate.created_at), _local(evaluation.created_at)
        trials.append(trial)
    return trials


def _attributes(candidate: CandidateRecord, device: str, num_images: int) -> dict[str, Any]:
    measurement = measurement_of(candidate, device)
    attributes: dict[str, Any] = {
        "number": candidate.number,
        "label": candidate.label,
        "origin": candidate.origin,
        "config_hash": candidate.config_hash,
        "config": candidate.config,
        "macs": candidate.macs,
        "num_images": num_images,
        "measured_ms": None if measurement is None else measurement.median_ms,
        "speedup": None if measurement is None else measurement.speedup,
    }
    for evaluation in candidate.evaluations:
        if evaluation.split == "test" and evaluation.fidelity in TESTED:
            attributes[f"{evaluation.fidelity}_test_top1"] = evaluation.top1
    return attributes


def _local(moment: datetime) -> datetime:
    """Optuna's times are local ones without a zone."""
    return moment.astimezone().replace(tzinfo=None)


@contextlib.contextmanager
def _open_storage(url: str, name: str) -> Iterator[RDBStorage]:
    """An Optuna storage for the length of a block; what goes wrong with it becomes one sentence.

    Raises:
        StoreError: If ``url`` is none.
        ExportError: If it cannot be used, or has a study of that name.
    """
    parsed = split_url(url, "Expected a storage URL such as sqlite:///study.db")
    shown = show_url(parsed)
    backend: RDBStorage | None = None
    try:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        backend = RDBStorage(url)
        yield backend
    except DuplicatedStudyError as error:
        raise ExportError(f"{shown} has a study {name!r} already; choose another name, or another storage.") from error
    except (OptunaError, SQLAlchemyError, ImportError) as error:
        reason = mask_passwords(_reason(error), parsed)
        raise ExportError(f"The study cannot be written to {shown}: {reason}.") from error
    finally:
        if backend is not None:
            backend.remove_session()
            backend.engine.dispose()


def _reason(error: Exception) -> str:
    """The database's own words, without SQLAlchemy's around them."""
    cause: BaseException = error.__cause__ if isinstance(error, OptunaError) and error.__cause__ else error
    if isinstance(cause, DBAPIError) and cause.orig is not None:
        cause = cause.orig
    return " ".join(str(cause).split()).rstrip(".")
