"""Weights at an https address, wherever a command takes a file of them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file

import prunefront
from prunefront.cli.app import run
from prunefront.cli.options import weights_file
from prunefront.config import ModelSpec
from prunefront.training.checkpoints import save_weights
from tests.integration.cli.test_eval_official import official_file
from tests.integration.training.image_folders import write_images
from tests.integration.training.test_finetune import CONFIG
from tests.unit.training.models import tiny_vit

DEMO = "digit_vit_patch6_48"
ADDRESS = "https://weights.example/released/"
DATA = ["--dataset", "digit-scenes", "--num-images", "8", "--batch-size", "4"]


class Server:
    """Answers with the files of a folder, and remembers what was asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.asked: list[str] = []

    def __call__(self, transport: httpx.HTTPTransport, request: httpx.Request) -> httpx.Response:
        self.asked.append(request.url.path)
        path = self.folder / request.url.path.rsplit("/", 1)[-1]
        return httpx.Response(200, content=path.read_bytes()) if path.is_file() else httpx.Response(404)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Server:
    """A server of weights, and a cache of our own."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PRUNEFRONT_DATA_DIR", str(tmp_path / "own"))
    monkeypatch.delenv("PRUNEFRONT_DEBUG", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "served").mkdir()
    server = Server(tmp_path / "served")
    monkeypatch.setattr("httpx.HTTPTransport.handle_request", lambda *arguments: server(*arguments))
    return server


def hash_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def dense_weights(folder: Path) -> Path:
    torch.manual_seed(3)
    save_weights(prunefront.create_dense(ModelSpec(name=DEMO), pretrained=False), folder / "dense.safetensors")
    return folder / "dense.safetensors"


def result(capfd: pytest.CaptureFixture[str], *arguments: str) -> Any:
    capfd.readouterr()
    assert run([*arguments, "--json"]) == 0
    return json.loads(capfd.readouterr().out)


def test_a_checkpoint_at_an_address_is_downloaded_once_and_is_the_file(
    server: Server, capfd: pytest.CaptureFixture[str]
) -> None:
    path = dense_weights(server.folder)
    there = ["--checkpoint", f"{ADDRESS}{path.name}?download=true", "--sha256", hash_of(path).upper()]

    expected = result(capfd, "eval", DEMO, "--checkpoint", str(path), *DATA)
    assert result(capfd, "eval", DEMO, *there, *DATA) == expected
    assert result(capfd, "eval", DEMO, *there, *DATA) == expected
    assert server.asked == ["/released/dense.safetensors"]


def test_an_official_checkpoint_at_an_address_is_the_file(server: Server, capfd: pytest.CaptureFixture[str]) -> None:
    path = official_file("evit/d6_mixed_fuse", server.folder, base_keep_rate=0.7, fuse_token=True, drop_loc="(1, 3)")
    line = ["eval", "--num-heads", "3", *DATA]

    expected = result(capfd, *line, "--official", "evit", str(path))
    there = result(capfd, *line, "--official", "evit", ADDRESS + path.name, "--sha256", hash_of(path))
    assert there == {**expected, "what": ADDRESS + path.name}


def test_training_starts_and_learns_from_weights_at_addresses(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRUNEFRONT_DATA_ROOTS", str(Path("data").absolute()))
    write_images(Path("data/grey/train"), [15, 15, 15])
    write_images(Path("data/grey/val"), [3, 3, 3])
    Path("best.json").write_text(json.dumps(CONFIG))
    own, teacher = server.folder / "own.safetensors", server.folder / "teacher.safetensors"
    save_weights(tiny_vit(3), own)
    other = tiny_vit(3)
    torch.nn.init.ones_(other.head.bias)
    save_weights(other, teacher)
    line = "train --config best.json --dataset imagefolder:grey --no-test --epochs 1 --batch-size 4 --device cpu"
    words = [*line.split(), "--recipe", "default"]
    there = ["--checkpoint", ADDRESS + own.name, "--sha256", hash_of(own)]
    there += ["--teacher-checkpoint", ADDRESS + teacher.name, "--teacher-sha256", hash_of(teacher)]

    assert run([*words, "--out", "here", "--checkpoint", str(own), "--teacher-checkpoint", str(teacher)]) == 0
    assert run([*words, "--out", "there", *there]) == 0

    here, fetched = load_file("here/model.safetensors"), load_file("there/model.safetensors")
    assert all(torch.equal(here[name], fetched[name]) for name in here)
    assert server.asked == ["/released/own.safetensors", "/released/teacher.safetensors"]


TRAIN = ["train", "--config", "c.json", "--dataset", "digit-scenes", "--out", "run", "--device", "cpu"]
SHOW = ["visualize", "c.json", "--dataset", "digit-scenes", "--out", "pictures"]


@pytest.mark.parametrize(
    ("line", "option"),
    [
        (["eval", DEMO, "--checkpoint", f"{ADDRESS}w.pth", *DATA], "--sha256"),
        (["eval", "--official", "evit", f"{ADDRESS}w.pth", *DATA], "--sha256"),
        (["measure", DEMO, "--checkpoint", f"{ADDRESS}w.pth"], "--sha256"),
        ([*SHOW, "--checkpoint", f"{ADDRESS}w.pth"], "--sha256"),
        ([*TRAIN, "--checkpoint", f"{ADDRESS}w.pth"], "--sha256"),
        ([*TRAIN, "--teacher-checkpoint", f"{ADDRESS}w.pth"], "--teacher-sha256"),
    ],
)
def test_an_address_without_its_hash_is_refused(
    line: list[str], option: str, server: Server, capfd: pytest.CaptureFixture[str]
) -> None:
    new = ["config", "new", "--model", DEMO, "--method", "evit", "--at", "1", "--op", "fuse", "--keep-ratio", "0.5"]
    assert run([*new, "--out", "c.json"]) == 0
    capfd.readouterr()

    assert run(line) == 2
    said = capfd.readouterr().err
    assert f"only with their SHA-256, but {ADDRESS}w.pth came without; state it with {option} HEX." in said
    assert server.asked == []


@pytest.mark.parametrize("start", ["--scratch", "--pretrained"])
def test_a_second_start_of_a_training_is_refused_before_weights_are_downloaded(
    start: str, server: Server, capfd: pytest.CaptureFixture[str]
) -> None:
    path = dense_weights(server.folder)
    there = ["--checkpoint", ADDRESS + path.name, "--sha256", hash_of(path)]
    new = ["config", "new", "--model", DEMO, "--method", "evit", "--at", "1", "--op", "fuse", "--keep-ratio", "0.5"]
    assert run([*new, "--out", "c.json"]) == 0

    assert run([*TRAIN, *there, start]) == 2
    assert "give --checkpoint, --pretrained or --scratch" in capfd.readouterr().err
    assert server.asked == []


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--checkpoint", f"{ADDRESS}dense.safetensors", "--sha256", "0" * 64], "should have the SHA-256 0000"),
        (["--checkpoint", "http://weights.example/w.pth", "--sha256", "0" * 64], "over https alone"),
        (["--checkpoint", "dense.safetensors", "--sha256", "0" * 64], "got the file dense.safetensors. Leave it"),
        (["--sha256", "0" * 64], "no weights are named. Leave it out"),
    ],
)
def test_weights_that_cannot_be_trusted_are_refused(
    words: list[str], sentence: str, server: Server, capfd: pytest.CaptureFixture[str]
) -> None:
    dense_weights(server.folder)

    assert run(["eval", DEMO, *DATA, *words]) == 2
    assert sentence in capfd.readouterr().err
    assert not [path for path in Path("cache").rglob("*") if path.is_file()]


def test_of_several_processes_the_first_one_downloads(server: Server) -> None:
    path = dense_weights(server.folder)

    class Waiting:
        """A process that finds what the first one wrote while it waited."""

        is_main = False

        def wait(self) -> None:
            assert server.asked == []
            weights_file(ADDRESS + path.name, hash_of(path))

    found: Any = weights_file(ADDRESS + path.name, hash_of(path), world=Waiting())  # type: ignore[arg-type]
    assert found.read_bytes() == path.read_bytes()
    assert len(server.asked) == 1
