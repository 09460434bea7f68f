"""Everything that a job may get wrong is refused at once, in one sentence that says what to do; nothing is stored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import save_file

import prunefront
from service.openapi import build_openapi
from service.problems import MEDIA_TYPE
from tests.acceptance.conftest import Server
from tests.acceptance.seeding import search_body
from tests.integration.training.image_folders import write_images

MODEL = "digit_vit_patch6_48"

BAD_SEARCHES: dict[str, tuple[dict[str, Any], str, str, str]] = {
    # what is wrong: (changes, code, pointer, words of the sentence)
    "model": ({"model": {"name": "deit_smal_patch16_224"}}, "unknown_name", "/model", "deit_small_patch16_224"),
    "unsupported model": ({"model": {"name": "resnet18"}}, "unsupported_model", "/model", "ResNet"),
    "model of a hub": ({"model": {"name": "hf-hub:someone/model"}}, "unknown_name", "/model", "hf-hub"),
    "model of a folder": ({"model": {"name": "local-dir:etc/passwd"}}, "unknown_name", "/model", "local-dir"),
    "model argument that is a path": (
        {"model": {"name": MODEL, "kwargs": {"checkpoint_path": "/etc/passwd"}}},
        "unknown_name",
        "/model",
        "checkpoint_path",
    ),
    "model argument that is a document": (
        {"model": {"name": MODEL, "kwargs": {"pretrained_cfg": {"file": "/etc/passwd"}}}},
        "unknown_name",
        "/model",
        "pretrained_cfg",
    ),
    "model argument of absurd size": (
        {"model": {"name": MODEL, "kwargs": {"depth": 10**9}}},
        "invalid_config",
        "/model",
        "256",
    ),
    "image of absurd size": ({"model": {"name": MODEL, "img_size": 10**6}}, "invalid_config", "/model", "4096"),
    "image size": ({"model": {"name": MODEL, "img_size": -3}}, "invalid_config", "/model", "img_size"),
    "method": ({"space": {"methods": ["evit", "topk"]}}, "unknown_name", "/space", "topk"),
    "method without class token": (
        {"model": {"name": "vit_base_patch16_siglip_224", "num_classes": 10}, "space": {"methods": ["tome", "evit"]}},
        "unsupported_model",
        "/space/methods/1",
        "class token",
    ),
    "location": ({"space": {"locations": [2, 6]}}, "invalid_config", "/space/locations/1", "0 to 5"),
    "no location": ({"space": {"locations": []}}, "invalid_request", "/space/locations", "0-based blocks"),
    "location below 0": ({"space": {"locations": [-1]}}, "invalid_request", "/space/locations", "0-based blocks"),
    "image of one side in a list": (
        {"model": {"name": MODEL, "img_size": [48]}},
        "invalid_request",
        "/model/img_size",
        "[224, 320]",
    ),
    "image smaller than a patch": ({"model": {"name": MODEL, "img_size": 4}}, "unsupported_model", "/model", "6 x 6"),
    "model argument of no model": (
        {"model": {"name": MODEL, "kwargs": {"num_heads": 0}}},
        "unsupported_model",
        "/model",
        "num_heads=0",
    ),
    "model that is a word": ({"model": MODEL}, "invalid_request", "/model", "object with named fields"),
    "keep ratio": (
        {"space": {"min_keep_ratio": 1.5}},
        "invalid_request",
        "/space/min_keep_ratio",
        "less than or equal to 1",
    ),
    "dataset": ({"dataset": "imagenet-21k"}, "unknown_name", "/dataset", "imagenet-21k"),
    "dataset that is a path": ({"dataset": "/etc"}, "unknown_name", "/dataset", "imagefolder:NAME"),
    "dataset with a name of its own": (
        {"dataset": "imagefolder:größe 1+2"},
        "dataset",
        "/dataset",
        "PRUNEFRONT_DATA_ROOTS",
    ),
    "model with a blank": ({"model": {"name": "deit small"}}, "unknown_name", "/model", "deit small"),
    "dataset of other classes": (
        {"model": {"name": "deit_tiny_patch16_224"}},
        "dataset",
        "/dataset",
        "1000",
    ),
    "device": ({"device": "cuda:7"}, "unknown_name", "/device", "cpu"),
    "runtime": ({"runtime": "tensorrt"}, "invalid_request", "/runtime", "eager"),
    "checkpoint": ({"model": {"name": MODEL, "checkpoint": "mine"}}, "unknown_name", "/model/checkpoint", "mine"),
    "checkpoint that is a path": (
        {"model": {"name": MODEL, "checkpoint": "a/../../../etc/passwd"}},
        "unknown_name",
        "/model/checkpoint",
        "passwd",
    ),
    "checkpoint of another model": (
        {"model": {"name": MODEL, "checkpoint": "misfit"}},
        "checkpoint",
        "/model/checkpoint",
        "lacks",
    ),
    "checkpoint of a larger model": (
        {"model": {"name": MODEL, "checkpoint": "larger"}},
        "checkpoint",
        "/model/checkpoint",
        "no such weights",
    ),
    "checkpoint that is no file of weights": (
        {"model": {"name": MODEL, "checkpoint": "garbage"}},
        "checkpoint",
        "/model/checkpoint",
        "safetensors",
    ),
    "warm start": ({"warm_start_from": ["nope"]}, "unknown_name", "/warm_start_from/0", "nope"),
    "batch size": ({"batch_size": 0}, "invalid_request", "/batch_size", "greater than or equal to 1"),
    "field": ({"bathc_size": 8}, "invalid_request", "/bathc_size", "no such field is known"),
    "kind": ({"kind": "dance"}, "invalid_request", "/kind", "one of search, table, measure"),
}


@pytest.fixture(scope="module", autouse=True)
def checkpoints(server: Server) -> None:
    """One file of another model's weights and one that is none at all."""
    folder: Path = server.settings.checkpoints_dir
    folder.mkdir(exist_ok=True)
    save_file({"head.weight": torch.zeros(2, 2)}, folder / "misfit.safetensors")
    state = prunefront.create_dense(prunefront.ModelSpec(name=MODEL)).state_dict()
    save_file({**state, "blocks.6.norm1.weight": torch.zeros(192)}, folder / "larger.safetensors")
    (folder / "garbage.safetensors").write_bytes(b"not safetensors")


@pytest.mark.parametrize("case", BAD_SEARCHES)
def test_wrong_job_is_refused_with_its_reason_and_leaves_nothing_behind(
    server: Server, http: httpx.Client, case: str
) -> None:
    changes, code, pointer, words = BAD_SEARCHES[case]
    before = sum(server.store.count_jobs().values())
    answer = http.post("/jobs", json=search_body(**changes))
    document = answer.json()
    assert answer.status_code == 422, document
    assert answer.headers["content-type"] == "application/problem+json"
    assert (document["code"], document["errors"][0]["pointer"]) == (code, pointer), document
    assert words in document["detail"]
    assert "\n" not in document["detail"] and "Traceback" not in answer.text
    assert sum(server.store.count_jobs().values()) == before


@pytest.mark.parametrize(
    ("name", "budget", "words"),
    [
        ("missing", {}, "needs a folder 'missing' in"),
        ("empty", {}, "has no images in"),
        ("val-only", {"finetune_top": 1}, "Fine-tuning needs training images"),
    ],
)
def test_dataset_that_cannot_serve_the_job_is_refused(
    http: httpx.Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, budget: dict[str, int], words: str
) -> None:
    monkeypatch.setenv("PRUNEFRONT_DATA_ROOTS", str(tmp_path))
    (tmp_path / "empty").mkdir()
    write_images(tmp_path / "val-only" / "val", [8] * 10)
    answer = http.post("/jobs", json=search_body(dataset=f"imagefolder:{name}", budget=budget))
    document = answer.json()
    assert (answer.status_code, document["code"], document["errors"][0]["pointer"]) == (422, "dataset", "/dataset")
    assert words in document["detail"]


@pytest.mark.parametrize(
    ("sites", "words"),
    [
        ([{"block": 1, "op": "merge", "keep_ratio": 0.5}], "no operation 'merge'"),
        ([{"block": 99, "op": "fuse", "keep_ratio": 0.5}], "99"),
        ([{"block": 1, "op": "fuse", "keep_ratio": 1.5}], "less than or equal to 1"),
        ([{"block": 1, "op": "fuse"}], "exactly one of"),
        ([{"block": 1, "op": "fuse", "keep_ratio": 0.5}, {"block": 1, "op": "prune", "tokens": 9}], "one site"),
    ],
)
def test_sites_that_a_method_does_not_allow_are_refused(http: httpx.Client, sites: list[Any], words: str) -> None:
    config = {"format": "prunefront/config/1", "model": {"name": MODEL}, "method": "evit", "sites": sites}
    answer = http.post("/jobs", json={"kind": "measure", "device": "cpu", "configs": [config]})
    assert answer.status_code == 422
    assert words in answer.json()["detail"]


@pytest.mark.parametrize(
    ("content", "content_type", "status"),
    [
        (b"{", "application/json", 400),
        (b"[" * 100_000, "application/json", 400),
        (b'{"kind": "search"}', "text/plain", 422),
        (b"", "application/json", 422),
        (b"\xff\xfe", "application/json", 400),
        (b"null", "application/json", 422),
    ],
)
def test_body_that_is_no_json_object_is_refused(
    http: httpx.Client, content: bytes, content_type: str, status: int
) -> None:
    answer = http.post("/jobs", content=content, headers={"Content-Type": content_type})
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"


def test_body_over_the_limit_is_refused(server: Server, http: httpx.Client) -> None:
    answer = http.post("/jobs", content=b"x" * (server.settings.max_body_bytes + 1))
    assert (answer.status_code, answer.json()["code"]) == (413, "body_too_large")


@pytest.mark.parametrize(
    ("target", "pointers", "detail"),
    [
        (
            "/jobs?stat=done&state=failed",
            ["?stat"],
            "GET /api/v1/jobs has no query parameter 'stat'; use cursor, kind, limit, state, or leave it out.",
        ),
        ("/devices?limit=5", ["?limit"], "GET /api/v1/devices has no query parameter 'limit'; leave it out."),
        (
            "/jobs/no/front?Device=cpu&fidelity=none&x",
            ["?Device", "?x"],
            "GET /api/v1/jobs/no/front has no query parameter 'Device' or 'x'; use device, fidelity, or leave it out.",
        ),
    ],
)
def test_unknown_query_parameter_is_refused_with_those_that_are_known(
    http: httpx.Client, target: str, pointers: list[str], detail: str
) -> None:
    answer = http.get(target)
    document = answer.json()
    assert (answer.status_code, document["code"], document["detail"]) == (422, "invalid_request", detail)
    assert [field["pointer"] for field in document["errors"]] == pointers


def test_every_operation_refuses_query_parameters_that_its_description_does_not_list(server: Server) -> None:
    known = {"job_id": server.search_id, "table_id": server.table_id, "number": 1}
    operations = [
        (method.upper(), path.format(**known), operation)
        for path, methods in build_openapi()["paths"].items()
        for method, operation in methods.items()
    ]
    assert len(operations) > 20
    for method, path, operation in operations:
        listed = sorted(item["name"] for item in operation.get("parameters", []) if item["in"] == "query")
        answer = httpx.request(method, server.url + path, params={"bogus": "1"})
        assert (answer.status_code, answer.headers["content-type"]) == (422, MEDIA_TYPE), (method, path, answer.text)
        rest = f"use {', '.join(listed)}, or leave it out." if listed else "leave it out."
        assert answer.json()["detail"] == f"{method} {path} has no query parameter 'bogus'; {rest}"
    # Nothing was done on the way: what DELETE named is still there.
    assert httpx.get(f"{server.api}/jobs/{server.search_id}").status_code == 200


def test_addresses_of_the_page_and_its_files_may_carry_what_others_append(server: Server) -> None:
    for path in ("/?utm_source=mail", f"/jobs/{server.search_id}?x=1", "/static/style.css?v=2"):
        assert httpx.get(server.url + path).status_code == 200


def test_unknown_path_and_method_are_problem_documents(server: Server, http: httpx.Client) -> None:
    for answer, status in ((http.get("/nothing"), 404), (http.put("/jobs"), 405)):
        assert answer.status_code == status
        assert answer.headers["content-type"] == "application/problem+json"
    assert http.put("/jobs").headers["allow"]


def test_foreign_host_is_refused(server: Server, http: httpx.Client) -> None:
    answer = http.get("/jobs", headers={"Host": "evil.example"})
    assert (answer.status_code, answer.json()["code"]) == (421, "host_not_allowed")
