"""Commands that talk to a service, or bring one along for this machine's own data."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from prunefront.cli.app import run

SUBMIT = ["search", "digit_vit_patch6_48", "--dataset", "digit-scenes", "--trials", "3", "--at", "1,3", "--detach"]


@pytest.fixture(autouse=True)
def _own_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRUNEFRONT_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.delenv("PRUNEFRONT_DATABASE_URL", raising=False)
    monkeypatch.delenv("PRUNEFRONT_URL", raising=False)
    monkeypatch.delenv("PRUNEFRONT_DEBUG", raising=False)


def result(capfd: pytest.CaptureFixture[str], *arguments: str) -> Any:
    capfd.readouterr()
    assert run([*arguments, "--json"]) == 0
    return json.loads(capfd.readouterr().out)


def test_a_job_is_submitted_shown_steered_and_deleted_on_this_machines_data(capfd: pytest.CaptureFixture[str]) -> None:
    job = result(capfd, *SUBMIT)

    assert job["spec"]["space"]["locations"] == [1, 3]
    assert [entry["id"] for entry in result(capfd, "jobs", "list", "--state", "queued")] == [job["id"]]
    assert run(["jobs", "pause", job["id"]]) == 0
    assert result(capfd, "jobs", "show", job["id"])["state"] == "paused"
    assert run(["jobs", "resume", job["id"]]) == 0
    assert run(["jobs", "cancel", job["id"]]) == 0
    assert run(["jobs", "watch", job["id"]]) == 1
    assert "did not succeed" in capfd.readouterr().err
    assert run(["jobs", "delete", job["id"]]) == 0
    assert result(capfd, "jobs", "list") == []


def test_nothing_of_the_service_is_left_running(capfd: pytest.CaptureFixture[str]) -> None:
    before = set(threading.enumerate())

    assert run(["jobs", "list"]) == 0

    assert "own-service" not in {thread.name for thread in set(threading.enumerate()) - before}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["jobs", "show", "nope"], "nope"),
        (["front"], "There is no search yet"),
        ([*SUBMIT[:1], "digit_vit", *SUBMIT[2:]], "Unknown model 'digit_vit'"),
        ([*SUBMIT, "--device", "cuda:99"], "Unknown device 'cuda:99'"),
        ([*SUBMIT, "--method", "nope"], "Unknown method 'nope'"),
        (["jobs", "list", "--url", "http://127.0.0.1:1"], "Nothing answers at http://127.0.0.1:1"),
    ],
)
def test_a_refusal_is_told_in_the_words_of_the_service(
    arguments: list[str], sentence: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments) == 2
    shown = capfd.readouterr()
    assert sentence in shown.err
    assert len(shown.err.strip().splitlines()) == 1


@pytest.mark.parametrize("arguments", [["jobs", "list"], ["demo", "--quick", "--no-serve", "--out"]])
def test_a_data_folder_that_cannot_be_made_is_named(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.write_text("")
    monkeypatch.setenv("PRUNEFRONT_DATA_DIR", str(file / "data"))
    monkeypatch.setenv("PRUNEFRONT_LOG_LEVEL", "WARNING")

    assert run([*arguments, str(file)] if arguments[-1] == "--out" else arguments) == 2
    shown = capfd.readouterr()
    assert f"The data folder {file / 'data'} cannot be made: Not a directory." in shown.err
    assert len(shown.err.strip().splitlines()) == 1
