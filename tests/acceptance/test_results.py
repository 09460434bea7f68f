"""Results over HTTP: candidates, front, best config, checkpoints."""

from __future__ import annotations

import csv
import hashlib
import io

import httpx
import pytest
import yaml

import prunefront
from prunefront.config import PruneConfig, Site
from search.documents import Front
from store import JobState
from tests.acceptance.conftest import Server
from tests.acceptance.seeding import MODEL, SCHEDULES, search_body


def test_candidates_come_in_pages_with_every_number(server: Server, http: httpx.Client) -> None:
    seen: list[int] = []
    cursor = None
    while True:
        params = {"limit": 7, **({"cursor": cursor} if cursor else {})}
        page = http.get(f"/jobs/{server.search_id}/trials", params=params).json()
        seen += [trial["number"] for trial in page["items"]]
        cursor = page["next_cursor"]
        if cursor is None:
            break
    assert seen == list(range(len(SCHEDULES)))
    trial = http.get(f"/jobs/{server.search_id}/trials/1").json()
    assert trial["origin"] == "published"
    assert {evaluation["fidelity"] for evaluation in trial["evaluations"]} == {"screened", "evaluated"}
    assert trial["measurements"][0]["median_ms"] != trial["predicted_ms"]


def test_candidate_shows_its_tokens_per_block(server: Server, http: httpx.Client) -> None:
    schedule = http.get(f"/jobs/{server.search_id}/trials/2").json()["schedule"]
    # 64 patches and a class token; ceil(0.5 * 64) stay and one fused token comes, in blocks 1 and 3.
    assert [block["tokens_in"] for block in schedule] == [65, 65, 34, 34, 19, 19]
    assert [block["ops"] for block in schedule] == [[], ["fuse"], [], ["fuse"], [], []]


@pytest.mark.parametrize("how", [{"params": {"format": "csv"}}, {"headers": {"Accept": "text/csv"}}])
def test_candidates_come_as_csv_too(server: Server, http: httpx.Client, how: dict[str, dict[str, str]]) -> None:
    answer = http.get(f"/jobs/{server.search_id}/trials", **how)  # type: ignore[arg-type]
    assert answer.headers["content-type"] == "text/csv; charset=utf-8"
    rows = list(csv.DictReader(io.StringIO(answer.text)))
    assert {row["number"] for row in rows} == {str(number) for number in range(len(SCHEDULES))}
    evaluated = [row for row in rows if row["number"] == "1" and row["fidelity"] == "evaluated"]
    assert len(evaluated) == 1 and float(evaluated[0]["top1"]) < 1 and evaluated[0]["measurement_state"] == "ok"


def test_front_is_the_document_and_holds_no_noisy_or_slow_point(server: Server, http: httpx.Client) -> None:
    front = Front.model_validate(http.get(f"/jobs/{server.search_id}/front").json())
    assert front.fidelity == "evaluated" and front.dense is not None
    assert front.points and all(point.speedup >= 1 for point in front.points)
    assert "evit 0.90" not in {point.label for point in front.points}
    assert {"EViT keep 0.7 at 1, 3", "ToMe r=8"} <= {mark.label for mark in front.marks}


def test_front_of_another_fidelity_or_device_is_never_mixed(server: Server, http: httpx.Client) -> None:
    screened = http.get(f"/jobs/{server.search_id}/front", params={"fidelity": "screened"}).json()
    assert {point["fidelity"] for point in [*screened["points"], *screened["marks"]]} == {"screened"}
    server.store.save_device("cuda:0", "a device that measured nothing of this job", "cuda", {})
    elsewhere = http.get(f"/jobs/{server.search_id}/front", params={"device": "cuda:0"}).json()
    assert elsewhere["points"] == [] and elsewhere["dense"] is None
    assert http.get(f"/jobs/{server.search_id}/front", params={"fidelity": "guessed"}).status_code == 422
    nowhere = http.get(f"/jobs/{server.search_id}/front", params={"device": "cdua:0"})
    assert (nowhere.status_code, nowhere.json()["code"]) == (422, "unknown_name")
    assert "did you mean 'cuda:0'" in nowhere.json()["detail"]


def test_best_under_a_latency_is_the_most_accurate_that_fits(server: Server, http: httpx.Client) -> None:
    front = Front.model_validate(http.get(f"/jobs/{server.search_id}/front").json())
    budget = front.points[len(front.points) // 2].measured_ms + 1e-6
    config = prunefront.load_config(
        http.get(f"/jobs/{server.search_id}/best", params={"max_latency_ms": budget}).json()
    )
    fitting = [point for point in front.points if point.measured_ms <= budget]
    best = max(fitting, key=lambda point: point.top1)
    assert config.content_hash() == best.config.content_hash()


@pytest.mark.parametrize("limit", [{"max_latency_ms": 0.5}, {"min_top1": 0.9999}, {"min_speedup": 50}])
def test_limit_that_nothing_meets_is_a_conflict_with_the_nearest_value(
    server: Server, http: httpx.Client, limit: dict[str, float]
) -> None:
    answer = http.get(f"/jobs/{server.search_id}/best", params=limit)
    document = answer.json()
    assert (answer.status_code, document["code"]) == (409, "no_feasible_point")
    name = next(iter(limit))
    value = document["nearest"][name]
    assert http.get(f"/jobs/{server.search_id}/best", params={name: value}).status_code == 200


@pytest.mark.parametrize("limit", [{"max_latency_ms": -1}, {"max_latency_ms": "nan"}, {"min_top1": 98}])
def test_limit_out_of_range_is_refused(server: Server, http: httpx.Client, limit: dict[str, float]) -> None:
    answer = http.get(f"/jobs/{server.search_id}/best", params=limit)
    assert (answer.status_code, answer.json()["errors"][0]["pointer"]) == (422, f"?{next(iter(limit))}")


def test_job_without_results_has_an_empty_front_and_no_best(http: httpx.Client) -> None:
    job_id = http.post("/jobs", json=search_body()).json()["id"]
    assert http.get(f"/jobs/{job_id}/front").json()["points"] == []
    answer = http.get(f"/jobs/{job_id}/best")
    assert (answer.status_code, answer.json()["code"]) == (409, "front_empty")


def test_table_job_has_no_front(http: httpx.Client) -> None:
    body = {"kind": "table", "model": {"name": "digit_vit_patch6_48"}, "device": "cpu"}
    job_id = http.post("/jobs", json=body).json()["id"]
    answer = http.get(f"/jobs/{job_id}/front")
    assert (answer.status_code, answer.json()["code"]) == (409, "no_front")


def test_config_comes_as_json_or_yaml_and_means_the_same(server: Server, http: httpx.Client) -> None:
    path = f"/jobs/{server.search_id}/trials/1/config"
    as_json = http.get(path)
    as_yaml = http.get(path, headers={"Accept": "application/yaml"})
    assert as_json.headers["content-type"] == "application/json"
    assert as_yaml.headers["content-type"] == "application/yaml"
    assert yaml.safe_load(as_yaml.text) == as_json.json()
    config = prunefront.load_config(as_json.json())
    assert config.method == "evit" and config.results is not None
    assert config.results.top1 is not None and config.results.latency[0].measured_ms is not None
    saved = http.get(path, params={"format": "yaml", "download": True})
    assert f'filename="{server.search_id}-trial-1.yaml"' in saved.headers["content-disposition"]


def test_checkpoint_is_served_from_the_data_folder_only(server: Server, http: httpx.Client) -> None:
    job = server.store.create_job("measure", "fine-tuned", {"device": "cpu"}, priority=1000)
    claimed = server.store.claim_job("test", 60.0)
    assert claimed is not None and claimed.id == job.id
    config = http.get(f"/jobs/{server.search_id}/trials/1/config").json()
    for number, path in enumerate((f"jobs/{job.id}/best.safetensors", "/etc/passwd")):
        server.store.add_candidate(
            job.id,
            claimed.fence,
            config=config,
            config_hash=str(number),
            label="x",
            origin="sampler",
            params={},
            predicted_ms=None,
            macs=None,
        )
        server.store.add_artifact(
            job.id, claimed.fence, number, "checkpoint", path, hashlib.sha256(b"w").hexdigest(), 1
        )
    server.store.finish_job(job.id, claimed.fence, JobState.SUCCEEDED)
    folder = server.settings.artifacts_dir / job.id
    folder.mkdir(parents=True)
    (folder / "best.safetensors").write_bytes(b"w")
    assert http.get(f"/jobs/{job.id}/trials/0/checkpoint").content == b"w"
    assert http.get(f"/jobs/{job.id}/trials/1/checkpoint").json()["code"] == "checkpoint_gone"
    assert http.get(f"/jobs/{server.search_id}/trials/1/checkpoint").json()["code"] == "no_checkpoint"


def test_candidates_say_whether_images_keep_counts_of_their_own(server: Server, http: httpx.Client) -> None:
    job = server.store.create_job("measure", "adaptive", {"device": "cpu"}, priority=1000)
    claimed = server.store.claim_job("test", 60.0)
    assert claimed is not None and claimed.id == job.id
    for mode in ("adaptive", "fixed"):
        site = Site(block=1, op="select", keep_ratio=0.5)
        config = PruneConfig(model=MODEL, method="spvit", sites=(site,), options={"mode": mode})
        server.store.add_candidate(
            job.id,
            claimed.fence,
            config=config.to_dict(),
            config_hash=mode,
            label=mode,
            origin="sampler",
            params={},
            predicted_ms=1.0,
            macs=1.0,
        )
    server.store.finish_job(job.id, claimed.fence, JobState.SUCCEEDED)
    trials = http.get(f"/jobs/{job.id}/trials").json()["items"]
    assert [(trial["label"], trial["is_nominal"]) for trial in trials] == [("adaptive", True), ("fixed", False)]
    assert http.get(f"/jobs/{job.id}/trials/0").json()["is_nominal"] is True
    rows = list(csv.DictReader(io.StringIO(http.get(f"/jobs/{job.id}/trials", params={"format": "csv"}).text)))
    assert [row["is_nominal"] for row in rows] == ["True", "False"]


@pytest.mark.parametrize("number", ["9999", "99999999999", "-1", "x"])
def test_unknown_candidate_is_a_problem_document(server: Server, http: httpx.Client, number: str) -> None:
    answer = http.get(f"/jobs/{server.search_id}/trials/{number}")
    assert answer.status_code in (404, 422)
    assert answer.headers["content-type"] == "application/problem+json"
