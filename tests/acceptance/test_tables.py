"""Latency tables, devices and the lists of names over HTTP."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import httpx
import pytest

from latency_tables.csv_import import export_csv
from latency_tables.predict import predict_latency_ms
from latency_tables.schema import LatencyEntry, LatencyTable, WeightMemory, load_table
from prunefront.cli.app import run
from prunefront.config import PruneConfig, Site
from tests.acceptance.conftest import Server
from tests.acceptance.seeding import MODEL, SCHEDULES, config_of, latency_table

BUILD = ["table", "build", "digit_vit_patch6_48"]
CSV = {"Content-Type": "text/csv"}


def test_table_is_imported_listed_and_fetched(server: Server, http: httpx.Client) -> None:
    document = latency_table().evolve(name="imported").model_dump(mode="json")
    answer = http.post("/latency-tables", json=document)
    assert answer.status_code == 201, answer.text
    table_id = answer.json()["id"]
    assert answer.headers["location"] == f"/api/v1/latency-tables/{table_id}"
    assert table_id in [table["id"] for table in http.get("/latency-tables").json()["items"]]
    assert http.get(f"/latency-tables/{table_id}").json()["document"] == document
    assert http.delete(f"/latency-tables/{table_id}").status_code == 204
    assert http.get(f"/latency-tables/{table_id}").status_code == 404


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> LatencyTable:
    """What `table build` measures."""
    table = latency_table().evolve(name="built elsewhere")
    monkeypatch.setattr("latency_tables.build.build_table", lambda *model, **place: table)
    return table


def test_a_built_table_is_kept_and_pushed(
    server: Server, http: httpx.Client, built: LatencyTable, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "built.json"
    assert run([*BUILD, "--push", server.url, "--out", str(file), "--json"]) == 0
    stored = json.loads(capfd.readouterr().out)["stored"]
    assert stored["source"] == "push"
    document = http.get(f"/latency-tables/{stored['id']}").json()["document"]
    assert load_table(file) == load_table(document) == built
    http.delete(f"/latency-tables/{stored['id']}")


def test_a_table_that_could_not_be_pushed_is_kept_and_pushed_later(
    server: Server, http: httpx.Client, built: LatencyTable, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "my tables" / "built.json"
    assert run([*BUILD, "--push", "http://127.0.0.1:1", "--out", str(file)]) == 1
    told = capfd.readouterr().err
    assert load_table(file) == built
    command = shlex.split(told.partition("`prunefront table push ")[2].partition("`")[0])
    assert command == [str(file), "--url", "http://127.0.0.1:1"]
    assert run(["table", "push", command[0], "--url", server.url, "--json"]) == 0
    table_id = json.loads(capfd.readouterr().out)["id"]
    assert load_table(http.get(f"/latency-tables/{table_id}").json()["document"]) == built
    http.delete(f"/latency-tables/{table_id}")


def test_a_push_to_what_is_no_address_is_refused_before_measuring(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("latency_tables.build.build_table", lambda *model, **place: pytest.fail("it was measured"))
    assert run([*BUILD, "--push", "localhost", "--out", str(tmp_path / "built.json")]) == 2
    assert "Expected the address of a service" in capfd.readouterr().err


def test_csv_of_a_device_without_python_becomes_a_table(http: httpx.Client) -> None:
    params = {"model": "digit_vit_patch6_48", "device": "Pixel 9"}
    answer = http.post("/latency-tables", content=export_csv(latency_table()), headers=CSV, params=params)
    assert answer.status_code == 201, answer.text
    assert (answer.json()["device_name"], answer.json()["batch_size"]) == ("Pixel 9", 8)
    http.delete(f"/latency-tables/{answer.json()['id']}")


def test_wrong_csv_is_refused_with_its_line(http: httpx.Client) -> None:
    params = {"model": "digit_vit_patch6_48", "device": "Pixel 9"}
    text = export_csv(latency_table()).splitlines()
    text[2] = text[2].replace(",", ";")
    answer = http.post("/latency-tables", content="\n".join(text), headers=CSV, params=params)
    assert (answer.status_code, answer.json()["code"]) == (422, "latency_table")
    assert "line 3" in answer.json()["detail"]
    assert http.post("/latency-tables", content="x", headers=CSV).json()["detail"].startswith("A CSV needs ?model=")
    unknown = http.post("/latency-tables", content="x", headers=CSV, params={**params, "model": "local-dir:x"})
    assert unknown.json()["code"] == "unknown_name"


def test_wrong_table_is_refused(http: httpx.Client) -> None:
    document = latency_table().model_dump(mode="json")
    for wrong, words in (
        ({**document, "format": "prunefront/latency-table/9"}, "latency-table/9"),
        ({**document, "entries": []}, "entries"),
        ({}, "not a latency table"),
    ):
        answer = http.post("/latency-tables", json=wrong)
        assert (answer.status_code, answer.json()["code"]) == (422, "latency_table")
        assert words in answer.json()["detail"]
    assert http.post("/latency-tables", content="{}", headers={"Content-Type": "text/html"}).status_code == 415


def test_prediction_is_that_of_the_library(server: Server, http: httpx.Client) -> None:
    config = config_of(SCHEDULES[2])
    body = {"config": config.model_dump(mode="json")}
    answer = http.post(f"/latency-tables/{server.table_id}/predict", json=body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["predicted_ms"] == predict_latency_ms(latency_table(), config)
    assert answer.json()["is_nominal"] is False
    assert answer.json()["predicted_memory_mib"] is None  # the table of a device that does not tell it


@pytest.mark.parametrize(("mode", "is_nominal"), [("adaptive", True), ("bucketed", True), ("fixed", False)])
def test_prediction_says_whether_images_keep_counts_of_their_own(
    http: httpx.Client, mode: str, is_nominal: bool
) -> None:
    table = latency_table()
    selecting = LatencyEntry(entry="block.spvit.select", tokens_in=65, tokens_out=34, median_ms=2.0)
    known = table.evolve(entries=(*table.entries, selecting)).model_dump(mode="json")
    table_id = http.post("/latency-tables", json=known).json()["id"]
    site = Site(block=1, op="select", keep_ratio=0.5)
    config = PruneConfig(model=MODEL, method="spvit", sites=(site,), options={"mode": mode})
    answer = http.post(f"/latency-tables/{table_id}/predict", json={"config": config.to_dict()})
    assert answer.json()["is_nominal"] is is_nominal
    http.delete(f"/latency-tables/{table_id}")


def test_memory_is_predicted_where_a_table_tells_it(http: httpx.Client) -> None:
    table = latency_table()
    entries = [entry.model_copy(update={"peak_memory_mib": 0.5 * entry.tokens_in}) for entry in table.entries]
    telling = table.evolve(entries=entries, weights=WeightMemory(block_mib=2.0, rest_mib=1.0))
    table_id = http.post("/latency-tables", json=telling.model_dump(mode="json")).json()["id"]
    answer = http.post(f"/latency-tables/{table_id}/predict", json={"config": config_of(SCHEDULES[0]).to_dict()})
    # Six blocks, and 0.5 MiB for each of the 65 tokens of the demo model.
    assert answer.json()["predicted_memory_mib"] == 6 * 2.0 + 1.0 + 32.5
    http.delete(f"/latency-tables/{table_id}")


def test_prediction_for_other_blocks_is_refused(server: Server, http: httpx.Client) -> None:
    body = {"config": {"model": {"name": "deit_tiny_patch16_224"}, "method": "tome"}}
    answer = http.post(f"/latency-tables/{server.table_id}/predict", json=body)
    assert (answer.status_code, answer.json()["code"]) == (422, "latency_table")


def test_registered_device_may_be_named_by_jobs(http: httpx.Client) -> None:
    device = {"id": "edge-1", "name": "Edge box", "kind": "cuda"}
    assert http.post("/devices", json=device).status_code == 201
    assert "edge-1" in [item["id"] for item in http.get("/devices").json()["items"]]
    body = {"kind": "table", "model": {"name": "digit_vit_patch6_48"}, "device": "edge-1"}
    assert http.post("/jobs", json=body).status_code == 202


def test_names_that_a_job_may_use_are_listed(http: httpx.Client) -> None:
    models = http.get("/models").json()
    names = {model["name"] for model in models["items"]}
    assert {"digit_vit_patch6_48", "deit_small_patch16_224"} <= names and "resnet18" not in names
    methods = {method["name"]: method for method in http.get("/methods").json()["items"]}
    assert methods["evit"]["ops"] == ["prune", "fuse"] and methods["evit"]["needs_class_token"]
    assert not methods["tome"]["needs_class_token"]
    datasets = {item["id"]: item for item in http.get("/datasets").json()["items"]}
    assert datasets["digit-scenes"]["num_classes"] == 10 and datasets["digit-scenes"]["splits"]["test"] >= 4000
