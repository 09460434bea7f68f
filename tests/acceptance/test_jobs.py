"""Jobs over HTTP: submit, list, steer, delete."""

from __future__ import annotations

import httpx
import pytest

from store import JobState
from tests.acceptance.conftest import ANSWER_TIMEOUT_S, Server
from tests.acceptance.seeding import search_body


def submit(http: httpx.Client, **changes: object) -> str:
    answer = http.post("/jobs", json=search_body(**changes))
    assert answer.status_code == 202, answer.text
    return str(answer.json()["id"])


def test_submitted_job_is_queued_and_found_at_its_location(server: Server, http: httpx.Client) -> None:
    answer = http.post("/jobs", json=search_body(name="Mine", tags=["a"], priority=3))
    assert answer.status_code == 202
    location = answer.headers["location"]
    job = httpx.get(server.url + location, timeout=ANSWER_TIMEOUT_S).json()
    assert location == f"/api/v1/jobs/{job['id']}"
    assert (job["state"], job["kind"], job["name"], job["tags"], job["priority"]) == (
        "queued",
        "search",
        "Mine",
        ["a"],
        3,
    )
    assert job["spec"]["space"]["methods"] == ["evit", "ppt", "tome", "diffrate", "hybrid"]
    assert server.store.get_job(job["id"]).spec == job["spec"]


def test_table_and_measure_jobs_are_accepted(server: Server, http: httpx.Client) -> None:
    model = {"name": "digit_vit_patch6_48"}
    config = http.get(f"/jobs/{server.search_id}/trials/1/config").json()
    for body in ({"kind": "table", "model": model}, {"kind": "measure", "configs": [config]}):
        answer = http.post("/jobs", json={**body, "device": "cpu"})
        assert answer.status_code == 202, answer.text
        assert answer.json()["name"].endswith("digit_vit_patch6_48 on cpu")


def test_repeated_request_with_its_key_returns_the_first_job(http: httpx.Client) -> None:
    headers = {"Idempotency-Key": "retry-me"}
    first = http.post("/jobs", json=search_body(), headers=headers)
    # Spelled otherwise, but the same job once defaults are filled in.
    second = http.post("/jobs", json=search_body(runtime="eager"), headers=headers)
    assert first.json()["id"] == second.json()["id"]
    assert first.headers["location"] == second.headers["location"]


def test_key_of_another_request_is_refused(http: httpx.Client) -> None:
    headers = {"Idempotency-Key": "used-once"}
    http.post("/jobs", json=search_body(), headers=headers)
    answer = http.post("/jobs", json=search_body(seed=7), headers=headers)
    assert (answer.status_code, answer.json()["code"]) == (409, "conflict")


def test_list_is_paged_newest_first_without_gaps_or_repeats(http: httpx.Client) -> None:
    submitted = [submit(http, name=f"page {number}") for number in range(3)]
    listed: list[str] = []
    cursor = None
    while True:
        page = http.get("/jobs", params={"limit": 2, **({"cursor": cursor} if cursor else {})}).json()
        listed += [job["id"] for job in page["items"]]
        cursor = page["next_cursor"]
        if cursor is None:
            break
    assert listed[:3] == submitted[::-1]
    assert len(listed) == len(set(listed))


def test_list_filters_by_state_and_kind(server: Server, http: httpx.Client) -> None:
    succeeded = http.get("/jobs", params={"state": "succeeded", "kind": "search"}).json()["items"]
    assert server.search_id in [job["id"] for job in succeeded]
    assert {job["state"] for job in succeeded} == {"succeeded"}
    assert http.get("/jobs", params={"state": "sleeping"}).status_code == 422


def test_job_can_be_paused_resumed_cancelled_and_retried(http: httpx.Client) -> None:
    job_id = submit(http)
    for verb, state in (("pause", "paused"), ("resume", "queued"), ("cancel", "cancelled"), ("retry", "queued")):
        answer = http.post(f"/jobs/{job_id}/{verb}")
        assert (answer.status_code, answer.json()["state"]) == (202, state)


def test_action_that_does_not_fit_the_state_is_a_conflict(server: Server, http: httpx.Client) -> None:
    for verb in ("pause", "resume", "retry", "cancel"):
        answer = http.post(f"/jobs/{server.search_id}/{verb}")
        assert (answer.status_code, answer.json()["code"]) == (409, "conflict")
        assert server.search_id in answer.json()["detail"]


def test_clone_submits_the_same_work_as_a_new_job(server: Server, http: httpx.Client) -> None:
    answer = http.post(f"/jobs/{server.search_id}/clone")
    clone = answer.json()
    assert answer.status_code == 202 and clone["id"] != server.search_id
    assert answer.headers["location"].endswith(clone["id"])
    assert clone["spec"] == server.store.get_job(server.search_id).spec


def test_deleted_job_is_gone_with_its_files(server: Server, http: httpx.Client) -> None:
    job_id = submit(http)
    folder = server.settings.artifacts_dir / job_id
    folder.mkdir(parents=True)
    (folder / "weights.safetensors").write_bytes(b"x")
    assert http.delete(f"/jobs/{job_id}").status_code == 204
    assert not folder.exists()
    assert http.get(f"/jobs/{job_id}").status_code == 404


def test_running_job_is_not_deleted(server: Server, http: httpx.Client) -> None:
    job = server.store.create_job("measure", "runs", {}, priority=1000)
    claimed = server.store.claim_job("test", 60.0)
    assert claimed is not None and claimed.id == job.id
    assert http.delete(f"/jobs/{job.id}").status_code == 409
    server.store.finish_job(job.id, claimed.fence, JobState.CANCELLED)


@pytest.mark.parametrize("method", ["GET", "DELETE"])
def test_unknown_job_is_not_found(http: httpx.Client, method: str) -> None:
    answer = http.request(method, "/jobs/nope")
    assert (answer.status_code, answer.json()["code"]) == (404, "not_found")
    assert answer.headers["content-type"] == "application/problem+json"
