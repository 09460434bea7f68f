"""Candidates of a job with their accuracies, latencies and files.

Every write carries the fence of the job's holder and is refused inside its transaction when the holder was superseded.
Writes are repeatable: a controller that was killed after a write and writes the same again gets the stored record.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from typing import Any, Literal, TypedDict, TypeVar, Unpack

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from store.errors import ConflictError, NotFoundError
from store.jobs import fenced_job, find_job
from store.models import Artifact, Candidate, Evaluation, Job, Measurement
from store.records import ArtifactRecord, CandidateRecord, EvaluationRecord, MeasurementRecord
from store.session import Database

CandidateOrigin = Literal["dense", "published", "resolution", "sibling", "sampler"]
Fidelity = Literal["screened", "evaluated", "finetuned"]

_MAX_INT32 = 2**31 - 1
_Part = TypeVar("_Part", Evaluation, Measurement)


class CandidateChanges(TypedDict, total=False):
    """What may change about a candidate; a field that is not named stays."""

    predicted_ms: float | None
    state: str
    note: str | None


class CandidateStore:
    """Methods of :class:`store.Store` about candidates."""

    _database: Database

    def add_candidate(
        self,
        job_id: str,
        fence: int,
        *,
        number: int | None = None,
        config: Mapping[str, Any],
        config_hash: str,
        label: str,
        origin: CandidateOrigin | str,
        params: Mapping[str, Any],
        predicted_ms: float | None,
        macs: float | None,
    ) -> CandidateRecord:
        """Record a schedule of a job; one with the same ``config_hash`` is the same candidate and is returned as it is.

        Args:
            job_id: The job.
            fence: From the claim.
            number: Number within the job, from 0; None for the next one, which leaves no gaps.
            config: The PruneConfig, JSON.
            config_hash: Its content hash.
            label: For people.
            origin: Where the schedule comes from.
            params: The sampler's parameters, JSON.
            predicted_ms: Predicted latency; None where no table covers it.
            macs: Multiply-accumulates; rounded.

        Raises:
            LeaseLostError: If somebody else took the job, or it ended.
            ConflictError: If ``number`` belongs to another config.
        """
        with self._database.write() as session:
            job = fenced_job(session, job_id, fence)
            known = session.scalars(
                select(Candidate).where(Candidate.job_id == job_id, Candidate.config_hash == config_hash)
            ).one_or_none()
            if known is not None:
                return _load(session, known)
            if number is None:
                last = session.scalar(select(func.max(Candidate.number)).where(Candidate.job_id == job_id))
                number = 0 if last is None else last + 1
            elif session.get(Candidate, (job_id, number)) is not None:
                raise ConflictError(
                    f"Expected candidate {number} of job {job_id} to be free, but it has another config. "
                    "Leave the number to the store."
                )
            now = self._database.now(session)
            candidate = Candidate(
                job_id=job_id,
                number=number,
                config=dict(config),
                config_hash=config_hash,
                label=label,
                origin=origin,
                params=dict(params),
                predicted_ms=predicted_ms,
                macs=None if macs is None else round(macs),
                state="proposed",
                note=None,
                created_at=now,
                updated_at=now,
            )
            session.add(candidate)
            _note_result(job)
            session.flush()
            return _candidate_record(candidate, (), ())

    def update_candidate(
        self, job_id: str, fence: int, number: int, **fields: Unpack[CandidateChanges]
    ) -> CandidateRecord:
        """Change ``predicted_ms``, ``state`` or ``note`` of a candidate.

        Raises:
            LeaseLostError: If somebody else took the job, or it ended.
            NotFoundError: If the job has no such candidate.
        """
        unknown = set(fields) - CandidateChanges.__annotations__.keys()
        if unknown:
            raise TypeError(f"update_candidate() has no field {', '.join(sorted(unknown))}.")
        with self._database.write() as session:
            fenced_job(session, job_id, fence)
            candidate = _find_candidate(session, job_id, number)
            for field, value in fields.items():
                setattr(candidate, field, value)
            candidate.updated_at = self._database.now(session)
            session.flush()
            return _load(session, candidate)

    def add_evaluation(
        self,
        job_id: str,
        fence: int,
        number: int,
        *,
        fidelity: Fidelity | str,
        split: str,
        dataset: str,
        num_images: int,
        top1: float,
        top5: float | None = None,
        loss: float | None = None,
        ci_low: float | None = None,
        ci_high: float | None = None,
        details: Mapping[str, Any] | None = None,
    ) -> EvaluationRecord:
        """Record an accuracy; the first one of a fidelity, split and number of images stays.

        Args:
            job_id: The job.
            fence: From the claim.
            number: The candidate.
            fidelity: screened, evaluated or finetuned.
            split: Which images.
            dataset: Registered id of the dataset.
            num_images: How many images.
            top1: Share of correct images, 0-1.
            top5: Share with the label among the best five, 0-1.
            loss: Mean cross-entropy; stored as None when it is not finite.
            ci_low: Lower end of the interval of ``top1``.
            ci_high: Upper end.
            details: Whatever else belongs to it, JSON.

        Raises:
            LeaseLostError: If somebody else took the job, or it ended.
            NotFoundError: If the job has no such candidate.
        """
        with self._database.write() as session:
            job = fenced_job(session, job_id, fence)
            _find_candidate(session, job_id, number)
            evaluation = session.scalars(
                select(Evaluation).where(
                    Evaluation.job_id == job_id,
                    Evaluation.number == number,
                    Evaluation.fidelity == fidelity,
                    Evaluation.split == split,
                    Evaluation.num_images == num_images,
                )
            ).one_or_none()
            if evaluation is None:
                evaluation = Evaluation(
                    job_id=job_id,
                    number=number,
                    fidelity=fidelity,
                    split=split,
                    dataset=dataset,
                    num_images=num_images,
                    top1=top1,
                    top5=top5,
                    loss=loss if loss is not None and math.isfinite(loss) else None,
                    ci_low=ci_low,
                    ci_high=ci_high,
                    details=dict(details or {}),
                    created_at=self._database.now(session),
                )
                session.add(evaluation)
                _note_result(job)
                session.flush()
            return _evaluation_record(evaluation)

    def add_measurement(
        self,
        job_id: str,
        fence: int,
        number: int,
        *,
        stage: str,
        device: str,
        runtime: str,
        dtype: str,
        batch_size: int,
        median_ms: float,
        iqr_ms: float,
        speedup: float | None = None,
        dense_ms: float | None = None,
        state: str = "ok",
        details: Mapping[str, Any] | None = None,
    ) -> MeasurementRecord:
        """Record a latency; a good one of the same stage and setting stays, a noisy one gives way to the new one.

        Args:
            job_id: The job.
            fence: From the claim.
            number: The candidate.
            stage: What was measured: screened (weights as they were), finetuned, ...
            device: Registered id of the device.
            runtime: eager, compile, ...
            dtype: fp32, bf16, ...
            batch_size: Images per forward pass.
            median_ms: Median latency of a forward pass.
            iqr_ms: Interquartile range.
            speedup: Dense latency divided by this one.
            dense_ms: Dense latency measured in between.
            state: ok or noisy.
            details: Percentiles, samples, memory, ..., JSON.

        Raises:
            LeaseLostError: If somebody else took the job, or it ended.
            NotFoundError: If the job has no such candidate.
        """
        with self._database.write() as session:
            job = fenced_job(session, job_id, fence)
            _find_candidate(session, job_id, number)
            measurement = session.scalars(
                select(Measurement).where(
                    Measurement.job_id == job_id,
                    Measurement.number == number,
                    Measurement.stage == stage,
                    Measurement.device == device,
                    Measurement.runtime == runtime,
                    Measurement.dtype == dtype,
                    Measurement.batch_size == batch_size,
                )
            ).one_or_none()
            if measurement is not None and measurement.state == "ok":
                return _measurement_record(measurement)
            if measurement is None:
                measurement = Measurement(
                    job_id=job_id,
                    number=number,
                    stage=stage,
                    device=device,
                    runtime=runtime,
                    dtype=dtype,
                    batch_size=batch_size,
                )
                session.add(measurement)
            measurement.median_ms = median_ms
            measurement.iqr_ms = iqr_ms
            measurement.speedup = speedup
            measurement.dense_ms = dense_ms
            measurement.state = state
            measurement.details = dict(details or {})
            measurement.created_at = self._database.now(session)
            _note_result(job)
            session.flush()
            return _measurement_record(measurement)

    def list_candidates(self, job_id: str, after: int | None = None, limit: int | None = None) -> list[CandidateRecord]:
        """List the candidates of a job by number, with all their evaluations and measurements.

        Args:
            job_id: The job.
            after: Only numbers above this one.
            limit: At most so many.

        Raises:
            NotFoundError: If there is no such job.
        """
        with self._database.read() as session:
            find_job(session, job_id)
            statement = select(Candidate).where(Candidate.job_id == job_id).order_by(Candidate.number)
            if after is not None:
                statement = statement.where(Candidate.number > max(-1, min(after, _MAX_INT32)))
            if limit is not None:
                statement = statement.limit(max(0, min(limit, _MAX_INT32)))
            candidates = list(session.scalars(statement))
            if not candidates:
                return []
            first, last = candidates[0].number, candidates[-1].number
            evaluations = _by_number(session, Evaluation, job_id, first, last)
            measurements = _by_number(session, Measurement, job_id, first, last)
        return [
            _candidate_record(
                candidate,
                tuple(_evaluation_record(row) for row in evaluations[candidate.number]),
                tuple(_measurement_record(row) for row in measurements[candidate.number]),
            )
            for candidate in candidates
        ]

    def get_candidate(self, job_id: str, number: int) -> CandidateRecord:
        """Return one candidate with all its evaluations and measurements.

        Raises:
            NotFoundError: If there is no such job or candidate.
        """
        with self._database.read() as session:
            find_job(session, job_id)
            return _load(session, _find_candidate(session, job_id, number))

    def add_artifact(
        self, job_id: str, fence: int, number: int | None, kind: str, path: str, sha256: str, size: int
    ) -> ArtifactRecord:
        """Record a file of a job; a path recorded before is updated, since the file was written again.

        Args:
            job_id: The job.
            fence: From the claim.
            number: The candidate it belongs to; None for the job as a whole.
            kind: What it is: checkpoint, partial_table, log, ...
            path: Where it lies.
            sha256: Hash of its content, hex.
            size: Bytes.

        Raises:
            LeaseLostError: If somebody else took the job, or it ended.
            NotFoundError: If the job has no such candidate.
        """
        with self._database.write() as session:
            job = fenced_job(session, job_id, fence)
            if number is not None:
                _find_candidate(session, job_id, number)
            artifact = session.scalars(
                select(Artifact).where(Artifact.job_id == job_id, Artifact.path == path)
            ).one_or_none()
            if artifact is None:
                artifact = Artifact(job_id=job_id, path=path, created_at=self._database.now(session))
                session.add(artifact)
                _note_result(job)
            artifact.number = number
            artifact.kind = kind
            artifact.sha256 = sha256
            artifact.size = size
            session.flush()
            return _artifact_record(artifact)

    def list_artifacts(self, job_id: str, number: int | None = None) -> list[ArtifactRecord]:
        """List the files of a job, or of one candidate, in the order they were recorded.

        Raises:
            NotFoundError: If there is no such job.
        """
        with self._database.read() as session:
            find_job(session, job_id)
            statement = select(Artifact).where(Artifact.job_id == job_id).order_by(Artifact.id)
            if number is not None:
                statement = statement.where(Artifact.number == max(-1, min(number, _MAX_INT32)))
            return [_artifact_record(artifact) for artifact in session.scalars(statement)]


def _note_result(job: Job) -> None:
    # The job is getting somewhere: earlier losses were the machine's fault rather than its own.
    job.times_lost = 0


def _find_candidate(session: Session, job_id: str, number: int) -> Candidate:
    candidate = session.get(Candidate, (job_id, number)) if 0 <= number <= _MAX_INT32 else None
    if candidate is None:
        raise NotFoundError(f"Job {job_id} has no candidate {number}. List its trials to see which there are.")
    return candidate


def _by_number(
    session: Session, model: type[_Part], job_id: str, first: int, last: int
) -> defaultdict[int, list[_Part]]:
    rows: defaultdict[int, list[_Part]] = defaultdict(list)
    statement = select(model).where(model.job_id == job_id, model.number.between(first, last)).order_by(model.id)
    for row in session.scalars(statement):
        rows[row.number].append(row)
    return rows


def _load(session: Session, candidate: Candidate) -> CandidateRecord:
    job_id, number = candidate.job_id, candidate.number
    return _candidate_record(
        candidate,
        tuple(_evaluation_record(row) for row in _by_number(session, Evaluation, job_id, number, number)[number]),
        tuple(_measurement_record(row) for row in _by_number(session, Measurement, job_id, number, number)[number]),
    )


def _candidate_record(
    row: Candidate, evaluations: tuple[EvaluationRecord, ...], measurements: tuple[MeasurementRecord, ...]
) -> CandidateRecord:
    return CandidateRecord(
        job_id=row.job_id,
        number=row.number,
        config=row.config,
        config_hash=row.config_hash,
        label=row.label,
        origin=row.origin,
        params=row.params,
        predicted_ms=row.predicted_ms,
        macs=row.macs,
        state=row.state,
        note=row.note,
        created_at=row.created_at,
        updated_at=row.updated_at,
        evaluations=evaluations,
        measurements=measurements,
    )


def _evaluation_record(row: Evaluation) -> EvaluationRecord:
    return EvaluationRecord(
        id=row.id,
        job_id=row.job_id,
        number=row.number,
        fidelity=row.fidelity,
        split=row.split,
        dataset=row.dataset,
        num_images=row.num_images,
        top1=row.top1,
        top5=row.top5,
        loss=row.loss,
        ci_low=row.ci_low,
        ci_high=row.ci_high,
        details=row.details,
        created_at=row.created_at,
    )


def _measurement_record(row: Measurement) -> MeasurementRecord:
    return MeasurementRecord(
        id=row.id,
        job_id=row.job_id,
        number=row.number,
        stage=row.stage,
        device=row.device,
        runtime=row.runtime,
        dtype=row.dtype,
        batch_size=row.batch_size,
        median_ms=row.median_ms,
        iqr_ms=row.iqr_ms,
        speedup=row.speedup,
        dense_ms=row.dense_ms,
        state=row.state,
        details=row.details,
        created_at=row.created_at,
    )


def _artifact_record(row: Artifact) -> ArtifactRecord:
    return ArtifactRecord(
        id=row.id,
        job_id=row.job_id,
        number=row.number,
        kind=row.kind,
        path=row.path,
        sha256=row.sha256,
        size=row.size,
        created_at=row.created_at,
    )
