"""The benchmark of the controller still runs a whole job; how fast it is stands in ``benchmarks/results``."""

from __future__ import annotations

from pathlib import Path

from benchmarks.controller_overhead import run, synthetic_table


def test_overhead_benchmark_ends_its_job_and_counts_every_trial(tmp_path: Path) -> None:
    record = run(trials=80, sampler="auto", table=synthetic_table(), folder=tmp_path)

    assert record["trials"] == 80
    assert record["candidates"] >= 80
    assert record["overhead_ms_per_trial"] > 0
