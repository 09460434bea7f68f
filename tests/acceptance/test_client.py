"""prunefront.client against a running server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from prunefront.client import ApiError, Client, ClientError, JobNotSucceededError
from store import JobState
from tests.acceptance.conftest import ANSWER_TIMEOUT_S, Server
from tests.acceptance.seeding import SCHEDULES, config_of, latency_table, search_body


@pytest.fixture
def client(server: Server) -> Iterator[Client]:
    with Client(server.url, timeout_s=ANSWER_TIMEOUT_S) as opened:
        yield opened


def test_results_of_a_search_are_fetched(client: Client, server: Server) -> None:
    front = client.front(server.search_id)
    budget = front["points"][0]["measured_ms"] * 1.001
    config = client.best(server.search_id, max_latency_ms=budget)
    assert config.content_hash() == client.config(server.search_id, front["points"][0]["trial"]).content_hash()
    assert len(list(client.trials(server.search_id))) == len(SCHEDULES)


def test_wait_reports_progress_and_returns_the_finished_job(client: Client, server: Server) -> None:
    seen: list[str] = []
    job = client.wait(server.search_id, progress=lambda job: seen.append(job["state"]))
    assert job["state"] == "succeeded" and seen == ["succeeded"]


def test_wait_for_a_job_that_fails_tells_why(client: Client, server: Server) -> None:
    job = server.store.create_job("measure", "fails", {"device": "cpu"}, priority=1000)
    claimed = server.store.claim_job("test", 60.0)
    assert claimed is not None and claimed.id == job.id
    with pytest.raises(ClientError, match="still running after 0.01 s"):
        client.wait(job.id, timeout_s=0.01, poll_s=0.02)
    server.store.finish_job(job.id, claimed.fence, JobState.FAILED, failure={"type": "E", "message": "Out of memory."})
    with pytest.raises(JobNotSucceededError, match="Out of memory") as caught:
        client.wait(job.id, poll_s=0.01)
    assert caught.value.job["state"] == "failed"
    client.delete(job.id)


def test_job_is_submitted_steered_and_deleted(client: Client) -> None:
    job = client.submit(search_body(), idempotency_key="from-the-client")
    assert client.submit(search_body(), idempotency_key="from-the-client")["id"] == job["id"]
    assert client.act(job["id"], "cancel")["state"] == "cancelled"
    assert job["id"] in [other["id"] for other in client.jobs(state="cancelled")]
    client.delete(job["id"])


def test_refusal_carries_the_sentence_the_code_and_the_document(client: Client, server: Server) -> None:
    with pytest.raises(ApiError, match="did you mean 'digit-scenes'") as caught:
        client.submit(search_body(dataset="digit-scene"))
    assert (caught.value.status, caught.value.code) == (422, "unknown_name")
    with pytest.raises(ApiError) as caught:
        client.best(server.search_id, max_latency_ms=0.01)
    assert caught.value.code == "no_feasible_point" and caught.value.problem["nearest"]


def test_tables_are_pushed_listed_and_asked(client: Client) -> None:
    table = client.push_table(latency_table().model_dump(mode="json"))
    assert table["source"] == "push" and table["id"] in [other["id"] for other in client.tables()]
    assert client.predict(table["id"], config_of(SCHEDULES[2])) > 0
    assert client.table(table["id"])["document"]["name"] == latency_table().name


def test_names_are_listed(client: Client) -> None:
    assert "cpu" in [device["id"] for device in client.devices()]
    assert "evit" in [method["name"] for method in client.methods()]
    assert "digit-scenes" in [dataset["id"] for dataset in client.datasets()]
    assert client.models()["items"]


def test_missing_checkpoint_is_refused_and_writes_no_file(client: Client, server: Server, tmp_path: Path) -> None:
    with pytest.raises(ApiError):
        client.download_checkpoint(server.search_id, 1, tmp_path / "w.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_server_that_is_away_is_one_clear_sentence() -> None:
    with Client("http://127.0.0.1:9") as client, pytest.raises(ClientError, match="prunefront serve"):
        client.devices()


def test_answer_of_another_service_is_recognised() -> None:
    transport = httpx.MockTransport(lambda request: httpx.Response(200, text="<html>hello</html>"))
    with Client(transport=transport) as client, pytest.raises(ClientError, match="is it prunefront"):
        client.devices()


@pytest.mark.parametrize("url", ["", "nonsense", "127.0.0.1:8000", "ftp://127.0.0.1"])
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(ClientError, match="Expected the address of a service, such as http://"):
        Client(url)


@pytest.mark.parametrize("text", ["[]", "3", "hello"])
def test_an_answer_of_another_program_is_told_from_ours(text: str) -> None:
    transport = httpx.MockTransport(lambda request: httpx.Response(200, text=text))
    with Client(transport=transport) as client, pytest.raises(ClientError, match="is it prunefront's API"):
        client.devices()


@pytest.mark.parametrize("job_id", ["", "..", "../latency-tables/1", "a/b", "a?b=c", "x" * 65])
def test_an_id_never_leads_to_another_path(job_id: str) -> None:
    asked: list[httpx.Request] = []
    transport = httpx.MockTransport(lambda request: asked.append(request) or httpx.Response(204))
    with Client(transport=transport) as client:
        for ask in (client.job, client.delete, client.front, client.best, client.table):
            with pytest.raises(ClientError, match="Expected an id such as"):
                ask(job_id)
    assert asked == []
