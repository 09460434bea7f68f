"""The end of the main story: the best config of a job, fetched over HTTP, trained, and confirmed."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import pytest

import prunefront
from prunefront.cli.app import run
from tests.acceptance.conftest import Server


def test_the_best_config_of_a_job_is_trained_and_eval_confirms_it(
    server: Server,
    http: httpx.Client,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    job = f"{server.api}/jobs/{server.search_id}"
    best = http.get(f"/jobs/{server.search_id}/best", params={"min_speedup": 1.5}).json()

    arguments = f"train --config {job}?min_speedup=1.5 --dataset digit-scenes --out run --epochs 1 --device cpu --json"
    assert run(arguments.split()) == 0
    trained = json.loads(capfd.readouterr().out)
    assert run("eval run/model.safetensors --dataset digit-scenes --json".split()) == 0
    evaluated = json.loads(capfd.readouterr().out)

    assert (trained["top1"], trained["num_images"]) == (evaluated["top1"], evaluated["num_images"])
    assert trained["top1"] > 0.9
    config = prunefront.load_model("run/model.safetensors").prune_config
    assert config.content_hash() == prunefront.load_config(best).content_hash()
    assert config.results is not None and config.results.top1 == evaluated["top1"]
