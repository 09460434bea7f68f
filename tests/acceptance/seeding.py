"""Fills a store, through its own interface, with what a controller would have written: a search, a table, devices."""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import prunefront
from latency_tables.schema import DeviceInfo, LatencyEntry, LatencyTable, ValidationPoint, ValidationReport
from prunefront.config import ModelSpec, PruneConfig, Site
from prunefront.geometry import block_key, geometry_for
from prunefront.schedule import plan_schedule
from search.documents import SearchJob
from service.routes.tables import save
from store import CandidateRecord, JobState, Store

MODEL = ModelSpec(name="digit_vit_patch6_48")
DEVICE = DeviceInfo(kind="cpu", name="Test CPU", logical_cores=2, threads=2)
BATCH_SIZE = 8
DENSE_TOP1 = 0.984
NUM_TEST_IMAGES = 4000


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """One candidate to be: method and sites, and how it came up."""

    label: str
    method: str
    sites: tuple[Site, ...]
    origin: str = "sampler"
    is_noisy: bool = False
    is_measured: bool = True


def fuse(*places: tuple[int, float]) -> tuple[Site, ...]:
    return tuple(Site(block=block, op="fuse", keep_ratio=ratio) for block, ratio in places)


def merge(remove: int) -> tuple[Site, ...]:
    return tuple(Site(block=block, op="merge", remove=remove) for block in range(6))


SCHEDULES = (
    Schedule(label="dense", method="hybrid", sites=(), origin="dense"),
    Schedule(label="EViT keep 0.7 at 1, 3", method="evit", sites=fuse((1, 0.7), (3, 0.7)), origin="published"),
    Schedule(label="EViT keep 0.5 at 1, 3", method="evit", sites=fuse((1, 0.5), (3, 0.5)), origin="published"),
    Schedule(label="ToMe r=8", method="tome", sites=merge(8), origin="published"),
    *(
        Schedule(label=f"evit {keep:.2f}", method="evit", sites=fuse((0, keep), (2, keep)))
        for keep in (0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.75, 0.8, 0.85)
    ),
    *(Schedule(label=f"hybrid merge {r}", method="hybrid", sites=merge(r)) for r in (3, 5, 6, 9)),
    Schedule(label="evit 0.90", method="evit", sites=fuse((1, 0.9)), is_noisy=True),
    Schedule(label="evit 0.95", method="evit", sites=fuse((1, 0.95)), is_measured=False),
)


def search_body(**changes: Any) -> dict[str, Any]:
    """A search that can be submitted to the seeded server."""
    body = {
        "kind": "search",
        "model": {"name": MODEL.name},
        "dataset": "digit-scenes",
        "device": "cpu",
        "batch_size": BATCH_SIZE,
        "budget": {"trials": 20},
    }
    return {**body, **changes}


def seed_devices(store: Store) -> None:
    store.save_device("cpu", DEVICE.name, "cpu", {"num_threads": 2})


def config_of(schedule: Schedule) -> PruneConfig:
    return PruneConfig(model=MODEL, method=schedule.method, sites=schedule.sites)


def latency_ms(config: PruneConfig) -> float:
    """A smooth stand-in for a measurement: linear in MACs with a little overhead per site."""
    return (
        2.0
        + 9.0 * prunefront.macs(config) / prunefront.macs(PruneConfig(model=MODEL, method="hybrid"))
        + 0.05 * len(config.sites)
    )


def top1_of(config: PruneConfig) -> float:
    """A stand-in for an accuracy: it falls faster the fewer tokens are left."""
    left = plan_schedule(config).blocks[-1].tokens_out / 65
    return DENSE_TOP1 - 0.12 * (1 - left) ** 4


def seed_search(store: Store, *, name: str = "Digits on this CPU", state: JobState | None = JobState.SUCCEEDED) -> str:
    """A search with every kind of candidate; ``state`` None leaves it running.

    Returns:
        The id of the job.
    """
    spec = SearchJob.model_validate(search_body(name=name)).model_dump(mode="json")
    job = store.create_job("search", name, spec, tags=("demo",))
    claimed = store.claim_job("test", 3600.0)
    assert claimed is not None and claimed.id == job.id
    fence = claimed.fence
    for schedule in SCHEDULES:
        config = config_of(schedule)
        predicted = latency_ms(config) * (1 + 0.02 * math.sin(len(schedule.label)))
        candidate = store.add_candidate(
            job.id,
            fence,
            config=config.model_dump(mode="json"),
            config_hash=config.content_hash(),
            label=schedule.label,
            origin=schedule.origin,
            params={},
            predicted_ms=predicted,
            macs=prunefront.macs(config),
        )
        if schedule.is_measured:
            _measure(store, job.id, fence, candidate, schedule, config)
    store.set_progress(job.id, fence, "search", 12, 20, "12 of 20 proposals")
    store.add_event(job.id, "note", {"message": "first"})
    store.add_event(job.id, "note", {"message": "second"})
    if state is not None:
        store.finish_job(job.id, fence, state, result={"candidates": len(SCHEDULES)})
    return job.id


def _measure(
    store: Store, job_id: str, fence: int, candidate: CandidateRecord, schedule: Schedule, config: PruneConfig
) -> None:
    dense_ms = latency_ms(PruneConfig(model=MODEL, method="hybrid"))
    median_ms, top1 = latency_ms(config), top1_of(config)
    store.add_measurement(
        job_id,
        fence,
        candidate.number,
        stage="screened",
        device="cpu",
        runtime="eager",
        dtype="fp32",
        batch_size=BATCH_SIZE,
        median_ms=median_ms,
        iqr_ms=0.012 * median_ms + 0.05,
        speedup=dense_ms / median_ms,
        dense_ms=dense_ms,
        state="noisy" if schedule.is_noisy else "ok",
    )
    for fidelity, split, num_images in (("screened", "search", 500), ("evaluated", "test", NUM_TEST_IMAGES)):
        half = 1.96 * math.sqrt(top1 * (1 - top1) / num_images)
        store.add_evaluation(
            job_id,
            fence,
            candidate.number,
            fidelity=fidelity,
            split=split,
            dataset="digit-scenes",
            num_images=num_images,
            top1=top1,
            top5=min(1.0, top1 + 0.01),
            loss=0.1,
            ci_low=top1 - half,
            ci_high=min(1.0, top1 + half),
            details={},
        )
    store.update_candidate(job_id, fence, candidate.number, state="evaluated")


def latency_table() -> LatencyTable:
    """A small table for the demo model's blocks."""
    counts = (9, 17, 25, 33, 41, 49, 57, 65)
    entries = [
        LatencyEntry(entry="stem", tokens_in=64, tokens_out=65, median_ms=0.9, iqr_ms=0.02, samples=30),
        LatencyEntry(entry="head", tokens_in=65, tokens_out=1, median_ms=0.12, iqr_ms=0.01, samples=30),
    ]
    for tokens in counts:
        for name, per_token in (("attention", 0.011), ("mlp", 0.009)):
            median_ms = 0.1 + per_token * tokens + (2e-5 * tokens**2 if name == "attention" else 0)
            entries.append(
                LatencyEntry(
                    entry=name,
                    tokens_in=tokens,
                    tokens_out=tokens,
                    median_ms=median_ms,
                    iqr_ms=0.03 * median_ms,
                    samples=30,
                    state="noisy" if tokens == 41 else "ok",
                )
            )
    for tokens_in, tokens_out in ((65, 33), (65, 17), (33, 17), (65, 9), (33, 9), (17, 9)):
        entries.append(
            LatencyEntry(
                entry="block.evit.fuse",
                tokens_in=tokens_in,
                tokens_out=tokens_out,
                median_ms=0.3 + 0.011 * tokens_in + 0.009 * tokens_out,
                iqr_ms=0.03,
                samples=30,
            )
        )
    entries.append(LatencyEntry.unfit(("block.tome.merge", 65, 49), "ran out of memory at batch size 8 on Test CPU"))
    return LatencyTable(
        name="digit_vit on Test CPU",
        device=DEVICE,
        runtime="eager",
        dtype="fp32",
        batch_size=BATCH_SIZE,
        block_key=block_key(geometry_for(MODEL)),
        model=MODEL,
        created_at=datetime.now(UTC),
        build_s=41.0,
        dense_ms=11.0,
        entries=tuple(entries),
        validation=_report(),
    )


def _report() -> ValidationReport:
    points = tuple(
        ValidationPoint(
            config=config_of(schedule),
            predicted_ms=latency_ms(config_of(schedule)) * (1 + 0.03 * math.cos(number)),
            measured_ms=latency_ms(config_of(schedule)),
            iqr_ms=0.1,
        )
        for number, schedule in enumerate(SCHEDULES[4:16])
    )
    errors = [point.relative_error for point in points]
    return ValidationReport(
        num_schedules=len(points),
        seed=0,
        mape=sum(map(abs, errors)) / len(errors),
        bias=sum(errors) / len(errors),
        within_5_percent=1.0,
        within_10_percent=1.0,
        kendall_tau=0.97,
        dense_ms=11.0,
        dense_predicted_ms=11.1,
        noise=0.01,
        num_noisy=0,
        device=DEVICE,
        created_at=datetime.now(UTC),
        points=points,
    )


def seed_table(store: Store) -> str:
    """The small table, imported.

    Returns:
        Its id.
    """
    return save(latency_table(), store, "import").id
