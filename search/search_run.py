"""A search job, in order of cost: propose and look latency up, estimate accuracy, measure, fine-tune, test.

Every stage looks at the store for what is missing and does only that, so a job that was interrupted anywhere goes on
where it was. Nothing about a trial is kept only in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from latency_tables.device import describe_device
from latency_tables.errors import LatencyTableError
from latency_tables.predict import predict, predict_latency_ms
from latency_tables.schema import LatencyTable
from prunefront.config import ModelSpec, PruneConfig
from prunefront.errors import ConfigError
from prunefront.geometry import ModelGeometry, build_timm_model, geometry_for
from prunefront.macs import macs
from prunefront.schedule import plan_schedule
from prunefront.training.data import SplitName, check_classes, data_config_of, open_split
from prunefront.training.evaluate import unpack_correct
from prunefront.training.statistics import paired_interval, top1_interval
from search.checkpoints import find_checkpoint
from search.documents import Fidelity, SearchJob
from search.job_run import JobFailure, JobRun
from search.pareto import USEFUL_LOSS, build_front, evaluation_of, measurement_of, pareto_front
from search.promotion import (
    FINALISTS_PER_PLACE,
    Rival,
    choose_marks,
    choose_promising,
    choose_recoverable,
    screened_on,
    why_none_is_recoverable,
)
from search.proposals import Proposer, Told
from search.seeds import seeds_for, transfer
from search.space import ScheduleSpace, Variances
from search.tables import Place, build_table, find_table, latency_or_inf_ms, predicted_ms
from store import CandidateRecord

MAX_EMPTY_PROPOSALS = 200  # proposals in a row that are all known or do not fit: the space is exhausted
MEASURED_FIRST = "screened"  # stages of measurements
MEASURED_AGAIN = "confirmed"
MEASURED_FINETUNED = "finetuned"


class SearchRun:
    """Carries one search job through its stages."""

    def __init__(self, run: JobRun, job: SearchJob) -> None:
        self.run = run
        self.store = run.store
        self.job = job
        self.spec: ModelSpec = job.model.spec()
        self.geometry: ModelGeometry = geometry_for(self.spec)
        self.place = Place.of_job(run.job.spec)
        checkpoint = None
        if job.model.checkpoint is not None:
            checkpoint = str(find_checkpoint(run.settings.checkpoints_dir, job.model.checkpoint).path)
        self.weights = {"pretrained": checkpoint is None, "checkpoint": checkpoint}
        with torch.device("meta"):
            self.data_config = data_config_of(build_timm_model(self.spec))
        self._untuned: str | None = None  # why nothing was fine-tuned, although it was asked for
        self._images: dict[tuple[str, int | None], tuple[int, np.ndarray | None]] = {}

    def execute(self) -> dict[str, Any]:
        """Run all stages; returns the job's result."""
        self._check_data()
        self.run.progress("preparing", 0, 1, "reading the model and its published schedules")
        table = self._table()
        dense = self._dense(table)
        variances = self._calibrate()
        space = self._space(table, variances)
        self._add_seeds(table, variances)
        self._screen(space)
        promoted = self._promote(dense, table)
        self._measure(promoted, MEASURED_FIRST, "measuring")
        finetuned = self._finetune()
        self._measure(finetuned, MEASURED_FINETUNED, "measuring again")
        self._measure([one.candidate for one in self._leaders()], MEASURED_AGAIN, "measuring again")
        self._test(promoted, "evaluated")
        self._test(finetuned, "finetuned")
        front = build_front(self.run.job, self._candidates())
        self.run.progress("done", 1, 1, f"{len(front.points)} points on the front")
        return {
            "num_candidates": len(self._candidates()),
            "num_points": len(front.points),
            "fidelity": front.fidelity,
            "untuned": self._untuned,
            "notes": [*front.notes, *([] if self._untuned is None else [self._untuned])],
        }

    # Preparing -----------------------------------------------------------------------------------------------------

    def _check_data(self) -> None:
        splits: tuple[SplitName, ...] = ("search", "test")
        for split in splits:
            check_classes(
                open_split(self.job.dataset, split, data_config=self.data_config),
                self.geometry.num_classes,
            )

    def _table(self) -> LatencyTable:
        found = find_table(self.run, self.geometry, self.place)
        if found is None:
            found = build_table(self.run, self.spec, self.geometry, self.place)
        table = found[1]
        if self.job.constraints.max_memory_mib is not None and self._dense_memory_mib(table) is None:
            raise JobFailure(
                f"Table {table.name!r} does not tell peak memory, so max_memory_mib cannot be kept. Build it again on "
                "Linux or a CUDA device with `prunefront table build` and push it, or leave max_memory_mib out."
            )
        return table

    def _dense_memory_mib(self, table: LatencyTable) -> float | None:
        return predict(table, PruneConfig(model=self.spec, method="hybrid")).peak_memory_mib

    def _dense(self, table: LatencyTable) -> CandidateRecord:
        config = PruneConfig(model=self.spec, method="hybrid")
        return self._add(config, label="dense", origin="dense", params={}, table=table)

    def _calibrate(self) -> Variances | None:
        if "ppt" not in self.job.space.methods or not self.geometry.has_class_token:
            return None
        value = self.run.run_task(
            "calibrate",
            {
                **self._model_payload(),
                "dataset": self.job.dataset,
                "num_images": min(self.run.settings.calibration_images, self._num_images("search", None)),
                "batch_size": self.run.settings.eval_batch_size,
            },
            stage="preparing",
        )
        return Variances(by_block={int(block): row for block, row in value["ppt_variance"].items()})

    def _space(self, table: LatencyTable, variances: Variances | None) -> ScheduleSpace:
        try:
            predict_latency_ms(table, PruneConfig(model=self.spec, method="hybrid"))
            space = ScheduleSpace(
                self.spec,
                self.geometry,
                self.job.space,
                latency_ms=lambda schedule: latency_or_inf_ms(table, schedule),
                max_latency_ms=self.job.constraints.max_latency_ms,
                variances=variances,
            )
        except (LatencyTableError, ConfigError) as error:
            raise JobFailure(f"The latency table does not cover this search space: {error}") from error
        left_out = [method for method in self.job.space.methods if method not in space.methods]
        if left_out:
            message = (
                f"{', '.join(left_out)} ran out of memory at batch size {self.place.batch_size} while the latency "
                "table was measured, and will not be proposed."
            )
            self.store.add_event(self.run.id, "methods_left_out", {"methods": left_out, "message": message})
        self._require_room(table, space)
        return space

    def _require_room(self, table: LatencyTable, space: ScheduleSpace) -> None:
        """Refuse a limit of memory that neither the dense model nor the most reduced one keeps."""
        limit_mib = self.job.constraints.max_memory_mib
        if limit_mib is None:
            return
        reduced = (predict(table, space.most_reduced(method)).peak_memory_mib for method in space.methods)
        least_mib = min(mib for mib in (self._dense_memory_mib(table), *reduced) if mib is not None)
        if least_mib > limit_mib:
            raise JobFailure(
                f"Nothing fits into max_memory_mib {limit_mib:g}: even reduced the most, {self.spec.name} is predicted "
                f"to need {least_mib:.1f} MiB at batch size {self.place.batch_size}. Raise the limit, or choose a "
                "smaller batch size or model."
            )

    def _add_seeds(self, table: LatencyTable, variances: Variances | None) -> None:
        for seed in seeds_for(self.spec, self.geometry, self.job.space.methods, variances):
            self._add(seed.config, label=seed.label, origin=seed.origin, params={}, table=table)
            self.run.checkpoint()
        for job_id in self.job.warm_start_from:
            job, candidates = self.store.get_job(job_id), self.store.list_candidates(job_id)
            # Few candidates are fine-tuned, so their front alone would hand over little of what the search found.
            evaluated, finetuned = (build_front(job, candidates, level).points for level in ("evaluated", "finetuned"))
            known = {point.trial for point in evaluated}
            recovered = [p for p in finetuned if p.trial not in known and p.origin == "sampler"]
            for point in (*evaluated, *recovered):
                if point.origin not in ("sampler", "published") or point.config.method not in self.job.space.methods:
                    continue
                config = point.config.evolve(results=None, weights=None)
                if config.model != self.spec:
                    config = transfer(config, self.spec, self.geometry)
                label = f"{point.label} of {job_id}"
                self._add(config, label=label, origin="sampler", params={"warm_start_from": job_id}, table=table)
            self.run.checkpoint()

    def _add(
        self, config: PruneConfig, *, label: str, origin: str, params: dict[str, Any], table: LatencyTable
    ) -> CandidateRecord:
        return self.store.add_candidate(
            self.run.id,
            self.run.fence,
            config=config.to_dict(),
            config_hash=config.content_hash(),
            label=label,
            origin=origin,
            params=params,
            predicted_ms=predicted_ms(table, config),
            macs=macs(config),
        )

    # Screening -----------------------------------------------------------------------------------------------------

    def _screen(self, space: ScheduleSpace) -> None:
        """Evaluate the seeds, then ask and evaluate batch by batch until the budget is spent."""
        candidates = self._candidates()
        self._evaluate_screened([c for c in candidates if "proposal" not in c.params], 0)
        candidates = self._candidates()
        hashes = {c.config_hash for c in candidates}
        proposed = [c for c in candidates if "proposal" in c.params]
        size = self.run.settings.proposals_per_batch
        # A batch is told when all of it has been evaluated; the last one may have been interrupted before.
        open_batch = {c.params["batch"] for c in proposed if evaluation_of(c, "screened") is None}
        pending = [c for c in proposed if c.params["batch"] in open_batch]
        done = [c for c in candidates if c.origin in ("published", "sampler") and c not in pending]
        proposer = Proposer(
            space,
            sampler=self.job.sampler,
            seed=self.job.seed,
            history=[told for c in done if (told := self._told(c, space)) is not None],
        )
        trials = {
            c.number: proposer.add(Told(params=c.params["optuna"], values=None, generation=_generation(c)))
            for c in pending
        }
        last = max((c.params["proposal"] for c in proposed), default=-1)
        proposal = last + 1 if pending else (last // size + 1) * size
        batch = list(pending)
        empty = proposal - last - 1
        while batch or (proposal < self.job.budget.trials and empty < MAX_EMPTY_PROPOSALS and not self._out_of_time()):
            number = batch[0].params["batch"] if batch else proposal // size
            while proposal < min((number + 1) * size, self.job.budget.trials):
                trial, params = proposer.ask(proposal)
                config = space.config(params)
                config_hash = config.content_hash()
                latency_ms = space.latency_ms(plan_schedule(config, self.geometry))
                if config_hash in hashes or latency_ms == math.inf:
                    proposer.drop(trial)
                    empty += 1
                else:
                    empty = 0
                    hashes.add(config_hash)
                    candidate = self._propose(
                        config, config_hash, proposal, number, params, latency_ms, proposer.generation(trial)
                    )
                    trials[candidate.number] = trial
                    batch.append(candidate)
                proposal += 1
                self.run.checkpoint()
            self._evaluate_screened(batch, proposal)
            # Only the batch is read again: reading all of a thousand candidates each time would cost more than asking.
            before = batch[0].number - 1 if batch else None
            evaluated = {c.number: c for c in self.store.list_candidates(self.run.id, before)} if batch else {}
            for candidate in batch:
                told = self._told(evaluated[candidate.number], space)
                if told is not None and told.values is not None:
                    proposer.tell(trials[candidate.number], told.values)
            self.store.add_event(self.run.id, "screened", {"proposals": proposal, "candidates": len(hashes)})
            batch = []

    def _propose(
        self,
        config: PruneConfig,
        config_hash: str,
        proposal: int,
        batch: int,
        params: dict[str, Any],
        latency_ms: float,
        generation: int,
    ) -> CandidateRecord:
        return self.store.add_candidate(
            self.run.id,
            self.run.fence,
            config=config.to_dict(),
            config_hash=config_hash,
            label=f"{config.method} #{proposal}",
            origin="sampler",
            params={"proposal": proposal, "batch": batch, "optuna": params, "generation": generation},
            predicted_ms=latency_ms,
            macs=macs(config),
        )

    def _told(self, candidate: CandidateRecord, space: ScheduleSpace) -> Told | None:
        """What the study learns from a candidate: accuracy estimate off the shelf, predicted latency."""
        evaluation = evaluation_of(candidate, "screened")
        if evaluation is None or candidate.predicted_ms is None:
            return None
        params = candidate.params.get("optuna") or space.params_of(PruneConfig.model_validate(candidate.config))
        values = (evaluation.top1, candidate.predicted_ms)
        return Told(params=params, values=values, generation=_generation(candidate))

    def _out_of_time(self) -> bool:
        limit = self.job.budget.max_minutes
        started = self.run.job.started_at
        return limit is not None and started is not None and (datetime.now(UTC) - started).total_seconds() > 60 * limit

    def _evaluate_screened(self, candidates: Sequence[CandidateRecord], proposals: int) -> None:
        missing = [c for c in candidates if evaluation_of(c, "screened") is None]
        budget = self.job.budget.trials
        self._evaluate(
            missing,
            "screened",
            "search",
            self.job.budget.search_images,
            stage="screening",
            progress=lambda done, total, message: (proposals, budget, f"{message} ({int(done)}/{int(total)} of batch)"),
        )

    # Evaluating ----------------------------------------------------------------------------------------------------

    def _test(self, candidates: Sequence[CandidateRecord], fidelity: Fidelity) -> None:
        """Evaluate on the test split, once each, the dense model first since all others are compared with it."""
        current = {c.number: c for c in self._candidates()}
        wanted = [current[c.number] for c in candidates]
        missing = [c for c in wanted if not any(e.fidelity == fidelity and e.split == "test" for e in c.evaluations)]
        missing.sort(key=lambda c: c.origin != "dense")
        self._evaluate(missing, fidelity, "test", None, stage="testing")

    def _evaluate(
        self,
        candidates: Sequence[CandidateRecord],
        fidelity: Fidelity,
        split: SplitName,
        num_images: int | None,
        *,
        stage: str,
        progress: Any = None,
    ) -> None:
        if not candidates:
            return
        by_key = {str(c.number): c for c in candidates}
        reference = self._dense_correct(split, num_images)

        def store(key: str, value: dict[str, Any]) -> None:
            nonlocal reference
            candidate = by_key.pop(key)
            correct = unpack_correct(value["correct"], value["num_images"])
            if candidate.origin == "dense":
                reference = correct
            self._store_evaluation(candidate, fidelity, split, num_images, value, correct, reference)

        def payload() -> dict[str, Any] | None:
            if not by_key:
                return None
            return {
                **self._model_payload(),
                "dataset": self.job.dataset,
                "split": split,
                "num_images": num_images,
                "batch_size": self.run.settings.eval_batch_size,
                # Accuracy belongs to the numbers that will be computed, so it is evaluated in the job's dtype.
                "dtype": self.job.dtype,
                "entries": [self._entry(c, fidelity) for c in by_key.values()],
            }

        first = payload()
        assert first is not None
        self.run.run_task("evaluate", first, stage=stage, on_item=store, remaining=payload, progress=progress)

    def _store_evaluation(
        self,
        candidate: CandidateRecord,
        fidelity: Fidelity,
        split: SplitName,
        num_images: int | None,
        value: dict[str, Any],
        correct: np.ndarray,
        reference: np.ndarray | None,
    ) -> None:
        clusters = self._clusters(split, num_images)
        low, high = top1_interval(correct, clusters)
        config = self.data_config.to_dict()
        details: dict[str, Any] = {
            "correct": value["correct"],
            "data_config": {
                "crop_pct": config.get("crop_pct"),
                "interpolation": config.get("interpolation"),
                "mean": config.get("mean"),
                "std": config.get("std"),
                "dtype": self.job.dtype,
            },
        }
        if reference is not None and candidate.origin != "dense":
            difference, below, above = paired_interval(correct, reference, clusters)
            details["delta"] = {"difference": difference, "low": below, "high": above}
        self.store.add_evaluation(
            self.run.id,
            self.run.fence,
            candidate.number,
            fidelity=fidelity,
            split=split,
            dataset=self.job.dataset,
            num_images=value["num_images"],
            top1=value["top1"],
            top5=value["top5"],
            loss=value["loss"],
            ci_low=low,
            ci_high=high,
            details=details,
        )

    def _dense_correct(self, split: SplitName, num_images: int | None) -> np.ndarray | None:
        dense = self.store.get_candidate(self.run.id, 0)
        expected = self._num_images(split, num_images)
        for evaluation in dense.evaluations:
            if evaluation.split == split and evaluation.num_images == expected:
                return unpack_correct(evaluation.details["correct"], evaluation.num_images)
        return None

    # Measuring -----------------------------------------------------------------------------------------------------

    def _promote(self, dense: CandidateRecord, table: LatencyTable) -> list[CandidateRecord]:
        """Dense, the marks, and the most promising of all others by (accuracy on search images, predicted latency)."""
        candidates = self._candidates()
        marks = choose_marks(candidates)
        contenders = [
            c
            for c in candidates
            if c.origin in ("published", "sampler") and c not in marks and self._fits_memory(c, table)
        ]
        places, sample = self.job.budget.measure_top, self._num_images("search", self.job.budget.search_images)
        finalists = self._most_promising(contenders, FINALISTS_PER_PLACE * places, sample)
        everything = self._num_images("search", None)
        judged = [candidates[0], *marks, *finalists]  # as the store has them now
        self._judge([c for c in judged if screened_on(c, everything) is None])
        current = {c.number: c for c in self._candidates()}
        return [dense, *marks, *self._most_promising([current[c.number] for c in finalists], places, everything)]

    def _fits_memory(self, candidate: CandidateRecord, table: LatencyTable) -> bool:
        limit_mib = self.job.constraints.max_memory_mib
        if limit_mib is None or candidate.predicted_ms is None:  # without a prediction it is not promoted anyway
            return True
        peak_mib = predict(table, PruneConfig.model_validate(candidate.config)).peak_memory_mib
        return peak_mib is not None and peak_mib <= limit_mib

    def _most_promising(
        self, contenders: Sequence[CandidateRecord], count: int, num_images: int
    ) -> list[CandidateRecord]:
        dense = screened_on(self.store.get_candidate(self.run.id, 0), num_images)
        assert dense is not None
        return choose_promising(
            contenders,
            count,
            num_images=num_images,
            least_top1=dense.top1 - USEFUL_LOSS,
            max_latency_ms=self.job.constraints.max_latency_ms,
        )

    def _judge(self, candidates: Sequence[CandidateRecord]) -> None:
        """Estimate accuracy on all search images, dense first since the others are compared with it."""
        self._evaluate(
            sorted(candidates, key=lambda c: c.origin != "dense"),
            "screened",
            "search",
            None,
            stage="screening finalists",
        )

    def _measure(self, candidates: Sequence[CandidateRecord], stage: str, title: str) -> None:
        done = {
            c.number
            for c in self._candidates()
            for m in c.measurements
            if m.stage == stage and m.device == self.place.device
        }
        waiting = {str(c.number): c for c in candidates if c.number not in done and c.origin != "dense"}
        # The dense model's own latency comes last, so it may be all that is missing.
        if not candidates or (not waiting and 0 in done):
            return
        device_name = describe_device(self.place.device).name

        def store(key: str, value: dict[str, Any]) -> None:
            store_measurement(self.run, self.place, waiting.pop(key).number, stage, value, device_name=device_name)

        def payload() -> dict[str, Any]:
            return {
                **self._model_payload(),
                "runtime": self.place.runtime,
                "dtype": self.place.dtype,
                "batch_size": self.place.batch_size,
                "dataset": self.job.dataset,
                "seed": self.job.seed,
                "entries": [self._entry(c, stage) for c in waiting.values()],
            }

        value = self.run.run_task("measure", payload(), stage=title, on_item=store, remaining=payload, exclusive=True)
        dense = {**value["dense"], "speedup": 1.0}
        store_measurement(self.run, self.place, 0, stage, dense, device_name=device_name)

    def _leaders(self) -> list[Rival]:
        """What the front stands on so far. Measured twice, since the fastest of many is also the luckiest."""
        measured = [
            (c, e.top1, m)
            for c in self._candidates()
            if (m := measurement_of(c, self.place.device)) is not None
            and (e := evaluation_of(c, "screened")) is not None
        ]
        points = [Rival(candidate=c, top1=top1, measured_ms=m.median_ms) for c, top1, m in measured]
        return pareto_front(points)

    # Fine-tuning ---------------------------------------------------------------------------------------------------

    def _finetune(self) -> list[CandidateRecord]:
        """Train the top candidates further; returns those that have fine-tuned weights."""
        top = self.job.budget.finetune_top
        if not top:
            return []
        dense = evaluation_of(self._candidates()[0], "screened")
        assert dense is not None
        leaders = self._leaders()
        chosen = choose_recoverable(leaders, top, dense_top1=dense.top1)
        if not chosen:
            self._untuned = why_none_is_recoverable(leaders, dense_top1=dense.top1)
            self.store.add_event(self.run.id, "not_finetuned", {"message": self._untuned})
        for place, candidate in enumerate(chosen):
            if self._finetuned_path(candidate.number) is not None:
                continue
            value = self.run.run_task(
                "finetune",
                {
                    **self._model_payload(),
                    "config": candidate.config,
                    "dataset": self.job.dataset,
                    "epochs": self.job.budget.finetune_epochs,
                    "checkpoint_dir": str(self.run.folder / f"trial-{candidate.number}"),
                    "seed": self.job.seed,
                },
                stage="fine-tuning",
                progress=_counting(place, len(chosen)),
            )
            path = Path(value["checkpoint"])
            self.store.add_artifact(
                self.run.id,
                self.run.fence,
                candidate.number,
                kind="checkpoint",
                path=str(path),
                sha256=value["sha256"],
                size=path.stat().st_size,
            )
        return [c for c in self._candidates() if self._finetuned_path(c.number) is not None]

    def _finetuned_path(self, number: int) -> str | None:
        found = [a.path for a in self.store.list_artifacts(self.run.id, number) if a.kind == "checkpoint"]
        return found[-1] if found else None

    # Shared --------------------------------------------------------------------------------------------------------

    def _candidates(self) -> list[CandidateRecord]:
        return self.store.list_candidates(self.run.id)

    def _model_payload(self) -> dict[str, Any]:
        return {"model": self.spec.model_dump(mode="json"), "weights": self.weights}

    def _entry(self, candidate: CandidateRecord, purpose: str) -> dict[str, Any]:
        """A candidate for a task, with its fine-tuned weights where those are meant."""
        checkpoint = self._finetuned_path(candidate.number) if purpose == "finetuned" else None
        return {"key": str(candidate.number), "config": candidate.config, "checkpoint": checkpoint}

    def _split(self, split: SplitName, num_images: int | None) -> tuple[int, np.ndarray | None]:
        key = (split, num_images)
        if key not in self._images:
            images = open_split(self.job.dataset, split, data_config=self.data_config, num_images=num_images)
            self._images[key] = (len(images), images.clusters)
        return self._images[key]

    def _num_images(self, split: SplitName, num_images: int | None) -> int:
        return self._split(split, num_images)[0]

    def _clusters(self, split: SplitName, num_images: int | None) -> np.ndarray | None:
        return self._split(split, num_images)[1]


def _generation(candidate: CandidateRecord) -> int:
    return int(candidate.params.get("generation", 0))


def store_measurement(
    run: JobRun, place: Place, number: int, stage: str, value: dict[str, Any], **details: str
) -> None:
    """Write down what a measure task reported about one candidate."""
    run.store.add_measurement(
        run.id,
        run.fence,
        number,
        stage=stage,
        device=place.device,
        runtime=place.runtime,
        dtype=place.dtype,
        batch_size=place.batch_size,
        median_ms=value["median_ms"],
        iqr_ms=value["iqr_ms"],
        speedup=value["speedup"],
        dense_ms=value["canary_ms"],
        state=value["state"],
        details={**value, **details},
    )


def _counting(place: int, count: int) -> Callable[[float, float, str], tuple[float, float, str]]:
    """Progress of one task among several."""
    return lambda done, total, message: (place + done / max(total, 1e-9), count, message)
