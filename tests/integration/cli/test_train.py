"""`prunefront train` as a user types it."""

from __future__ import annotations

import http.server
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import prunefront
from prunefront.cli.app import run
from prunefront.config import load_config
from prunefront.training.checkpoints import save_weights
from tests.integration.training.image_folders import write_images
from tests.integration.training.test_finetune import CONFIG
from tests.unit.training.models import tiny_vit

ROOT = Path(__file__).parents[3]
DATASET = "imagefolder:grey"
STEPS_PER_EPOCH = 8  # 34 images in batches of 4
EVIT = {**CONFIG, "method": "evit"}


@pytest.fixture(autouse=True)
def _grey(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRUNEFRONT_DATA_ROOTS", str(tmp_path / "data"))
    monkeypatch.setenv("PRUNEFRONT_DATA_DIR", str(tmp_path / "own"))
    monkeypatch.delenv("PRUNEFRONT_DEBUG", raising=False)
    write_images(tmp_path / "data" / "grey" / "train", [15, 15, 15])
    write_images(tmp_path / "data" / "grey" / "val", [3, 3, 3])


@pytest.fixture
def line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A command that trains a tiny model from a checkpoint for one epoch, into ``tmp_path / "run"``."""
    (tmp_path / "best.json").write_text(json.dumps(EVIT))
    save_weights(tiny_vit(3), tmp_path / "dense.safetensors")
    words = f"train --config best.json --dataset {DATASET} --out run --checkpoint dense.safetensors --device cpu"
    monkeypatch.chdir(tmp_path)
    return [*words.split(), "--recipe", "default", "--epochs", "1", "--batch-size", "4"]


def refused(capfd: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    capfd.readouterr()
    assert run(arguments) == 2
    captured = capfd.readouterr()
    assert captured.out == ""
    return captured.err


def test_a_config_becomes_weights_that_eval_confirms(
    tmp_path: Path, line: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    assert run([*line, "--json"]) == 0
    document = json.loads(capfd.readouterr().out)
    assert run(["eval", "run/model.safetensors", "--dataset", DATASET, "--json"]) == 0
    evaluated = json.loads(capfd.readouterr().out)

    assert (document["top1"], document["num_images"]) == (evaluated["top1"], 9)
    assert document["top1_ci"] == evaluated["top1_ci"]
    for config in (prunefront.load_model("run/model.safetensors").prune_config, load_config("run/config.json")):
        assert config.results.top1 == evaluated["top1"]
        assert (config.results.eval.dataset, config.results.eval.split) == (DATASET, "test")
    assert load_config("run/config.json").weights.sha256 == document["sha256"]
    assert prunefront.load_model("run/best.safetensors").prune_config.results.top1 is None
    assert {path.name for path in (tmp_path / "run").iterdir()} >= {"log.csv", "log.txt", "recipe.json", "result.json"}


def test_the_config_a_training_wrote_starts_the_next_one(line: list[str]) -> None:
    assert run([*line, "--no-test"]) == 0
    again = f"train --config run/config.json --dataset {DATASET} --out next --no-test --device cpu --epochs 1"
    # Its weights stand beside it; a rate of nothing leaves them alone.
    assert run([*again.split(), "--recipe", "default", "--set", "lr=1e-30", "--set", "batch_size=4"]) == 0

    first, second = load_file("run/model.safetensors"), load_file("next/model.safetensors")
    assert all(torch.allclose(first[name], second[name]) for name in first)


def test_the_methods_recipe_and_own_values_are_used(line: list[str]) -> None:
    place = line.index("--recipe")
    values = ["--set", "augmentation.random_erasing=0", "--set", "lr=1e-4", "--set", "repeats=1", "--no-test"]
    # Underscores are what the papers' scripts have.
    assert run([*line[:place], *line[place + 2 : -2], "--batch_size", "4", *values]) == 0

    recipe = json.loads(Path("run/recipe.json").read_text())
    assert (recipe["name"], recipe["eval_mode"], recipe["lr"], recipe["batch_size"]) == ("evit-finetune", True, 1e-4, 4)
    assert recipe["augmentation"]["random_erasing"] == 0 and recipe["augmentation"]["color_jitter"] == 0.4


def test_training_from_scratch_needs_no_weights(line: list[str]) -> None:
    place = line.index("--checkpoint")
    scratch = [*line[:place], *line[place + 2 :], "--set", "repeats=1", "--no-test"]
    scratch[scratch.index("default")] = "evit-scratch"

    assert run(scratch) == 0


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ("--recipe dynamicvit", "dynamicvit trains dynamicvit, but this config's method is evit; use --recipe evit-"),
        ("--recipe evit", "Unknown recipe 'evit': did you mean"),
        ("--set lr", "--set expects FIELD=VALUE, such as lr=1e-4, but got 'lr'"),
        ("--set lr=fast", "lr: Input should be a valid number"),
        ("--set momentum=1", "Unknown recipe field 'momentum'"),
        ("--scratch", "give --checkpoint, --pretrained or --scratch"),
        ("--teacher-checkpoint other.safetensors", "The teacher cannot be loaded: .*head.weight is"),
        ("--set distillation=none --teacher deit_tiny_patch16_224", "This recipe has no teacher"),
        ("--config https://example.org/best", "a job's address http://HOST/api/v1/jobs/ID"),
        ("--device cuda:99", "cuda:99"),
        ("--batch-size 64", "One batch takes 64 images, but the train split .* has 34"),
        ("--dataset imagefolder:none", "imagefolder:none"),
    ],
)
def test_bad_input_is_one_sentence(
    line: list[str], capfd: pytest.CaptureFixture[str], more: str, sentence: str
) -> None:
    save_weights(tiny_vit(7), Path("other.safetensors"))

    message = refused(capfd, [*line, *more.split()])

    assert re.search(sentence, " ".join(message.split()))
    assert "Traceback" not in message
    assert not Path("run/checkpoint.pt").exists()


def test_a_dense_teacher_without_weights_is_refused(line: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    place = line.index("--checkpoint")

    message = refused(capfd, [*line[:place], *line[place + 2 :], "--scratch"])

    assert "learns from the dense model, whose weights are random" in message


def test_a_loss_that_is_no_number_fails_the_command(line: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    rate = ["--set", "lr=1e20", "--set", "lr_batch_size=null", "--set", "clip_grad=null", "--no-test"]

    assert run([*line, *rate]) == 1
    assert "became" in capfd.readouterr().err


def start(line: list[str], *launcher: str, **options: Any) -> subprocess.Popen[str]:
    """The command as a process of its own, of this checkout wherever it is started."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    words = [sys.executable, *launcher, "-m", "prunefront", *line]
    return subprocess.Popen(words, text=True, env={**os.environ, "PYTHONPATH": path}, **options)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_writes_a_checkpoint_and_the_same_command_goes_on(
    line: list[str], number: signal.Signals, code: int
) -> None:
    line = [*line[:-4], "--epochs", "20", "--batch-size", "4", "--no-test", "--set", "validate_every=20"]
    child = start(line, stderr=subprocess.PIPE)
    assert child.stderr is not None
    for text in child.stderr:
        if text.startswith("Epoch 1/20"):
            break
    child.send_signal(number)
    rest = child.stderr.read()
    child.stderr.close()

    assert child.wait() == code
    assert re.search(r"stopped after step \d+ of 160; run/checkpoint.pt continues it. Run the same command again", rest)
    assert not Path("run/model.safetensors").exists()

    assert run(line) == 0
    whole = [word if word != "run" else "whole" for word in line]
    assert run(whole) == 0
    first, second = load_file("run/model.safetensors"), load_file("whole/model.safetensors")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_killed_command_goes_on_from_the_last_steps(line: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    line = [*line[:-4], "--epochs", "20", "--batch-size", "4", "--no-test", "--checkpoint-every-steps", "3"]
    child = start(line, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not Path("run/checkpoint.pt").exists():
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    child.kill()
    child.wait()
    kept = torch.load("run/checkpoint.pt")["position"]

    assert kept["step"] % STEPS_PER_EPOCH in (0, 3, 6)
    assert run(line) == 0
    assert capfd.readouterr().err.count("Epoch ") == 20 - len(kept["history"])


@pytest.fixture
def job_service() -> Iterator[str]:
    """What the API answers about one job."""
    best: dict[str, Any] = {**EVIT, "results": {"macs": 1.0, "top1": 0.5, "trial": 4}}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path.startswith("/prefix/api/v1/jobs/abc/best"):
                site = {**EVIT["sites"][0], "keep_ratio": 0.25}
                self._answer(200, {**best, "sites": [site]} if "min_speedup=2" in self.path else best)
            else:
                self._answer(404, {"detail": "Candidate 4 was not fine-tuned.", "status": 404, "code": "no_checkpoint"})

        def _answer(self, status: int, document: dict[str, Any]) -> None:
            self.send_response(status)
            self.send_header("content-type", "application/json" if status == 200 else "application/problem+json")
            self.end_headers()
            self.wfile.write(json.dumps(document).encode())

        def log_message(self, *words: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}/prefix/api/v1/jobs/abc"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(("ending", "keep_ratio"), [("", 0.5), ("/best", 0.5), ("?min_speedup=2", 0.25)])
def test_a_job_gives_its_best_config(line: list[str], job_service: str, ending: str, keep_ratio: float) -> None:
    assert run([*line, "--config", job_service + ending, "--no-test"]) == 0

    config = load_config("run/config.json")
    assert config.sites[0].keep_ratio == keep_ratio
    assert config.results.top1 is None  # that of the weights before


def test_a_job_that_is_not_there_is_the_services_own_sentence(
    line: list[str], job_service: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert "not fine-tuned" in refused(capfd, [*line, "--config", job_service.replace("abc", "xyz")])
    assert "takes max_latency_ms" in refused(capfd, [*line, "--config", f"{job_service}?speed=1"])
