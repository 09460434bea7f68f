"""Short forms of the store's writes, for tests."""

from __future__ import annotations

from typing import Any

from store import CandidateRecord, EvaluationRecord, JobRecord, MeasurementRecord, Store


def queue(store: Store, name: str = "a job", **fields: Any) -> JobRecord:
    """Queue a job."""
    return store.create_job(**({"kind": "search", "name": name, "spec": {"model": {"name": "deit"}}} | fields))


def start(store: Store, lease_s: float = 60.0, **fields: Any) -> JobRecord:
    """Queue a job and claim it."""
    queue(store, **fields)
    job = store.claim_job("a controller", lease_s)
    assert job is not None
    return job


def propose(store: Store, job: JobRecord, config_hash: str = "h0", **fields: Any) -> CandidateRecord:
    """Record a candidate."""
    values: dict[str, Any] = {
        "config": {"method": "evit", "sites": []},
        "config_hash": config_hash,
        "label": f"candidate {config_hash}",
        "origin": "sampler",
        "params": {"drop_0": 0.25},
        "predicted_ms": 12.5,
        "macs": 3.03e9,
    }
    return store.add_candidate(job.id, job.fence, **(values | fields))


def evaluate(store: Store, job: JobRecord, number: int = 0, **fields: Any) -> EvaluationRecord:
    """Record an accuracy."""
    values: dict[str, Any] = {
        "fidelity": "screened",
        "split": "search",
        "dataset": "digit-scenes",
        "num_images": 512,
        "top1": 0.75,
        "top5": 0.95,
        "loss": 0.5,
        "ci_low": 0.7,
        "ci_high": 0.8,
        "details": {"correct": "AAAA"},
    }
    return store.add_evaluation(job.id, job.fence, number, **(values | fields))


def measure(store: Store, job: JobRecord, number: int = 0, **fields: Any) -> MeasurementRecord:
    """Record a latency."""
    values: dict[str, Any] = {
        "stage": "screened",
        "device": "cpu",
        "runtime": "eager",
        "dtype": "fp32",
        "batch_size": 8,
        "median_ms": 10.0,
        "iqr_ms": 0.25,
        "speedup": 1.5,
        "dense_ms": 15.0,
        "details": {"p99_ms": 11.0},
    }
    return store.add_measurement(job.id, job.fence, number, **(values | fields))
