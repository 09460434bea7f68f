"""`prunefront eval --official` and the costs that `prunefront eval` prints, as a user types them."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import prunefront
from prunefront.cli.app import run
from prunefront.runtimes import RUNTIMES

GOLDEN = Path(__file__).parents[2] / "data" / "golden"
DATA = ["--dataset", "digit-scenes", "--num-images", "8", "--batch-size", "4"]


@pytest.fixture(autouse=True)
def _own_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRUNEFRONT_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.delenv("PRUNEFRONT_DEBUG", raising=False)


def official_file(case: str, folder: Path, **arguments: Any) -> Path:
    tensors = load_file(GOLDEN / case / "tensors.safetensors")
    weights = {name.removeprefix("weights/"): value for name, value in tensors.items() if name.startswith("weights/")}
    torch.save({"model": weights, "args": argparse.Namespace(**arguments)}, folder / "official.pth")
    return folder / "official.pth"


def result(capfd: pytest.CaptureFixture[str], *arguments: str) -> Any:
    capfd.readouterr()
    assert run([*arguments, "--json"]) == 0
    return json.loads(capfd.readouterr().out)


def test_a_file_of_evit_is_evaluated_with_its_stored_arguments(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = official_file("evit/d6_mixed_fuse", tmp_path, base_keep_rate=0.7, fuse_token=True, drop_loc="(1, 3)")

    document = result(capfd, "eval", "--official", "evit", str(path), "--num-heads", "3", *DATA)

    assert (document["num_images"], document["official"], document["crop_pct"]) == (8, "evit", 0.875)
    # 36 patches: ceil(0.7 * 36) = 26 and a fused token, then ceil(0.7 * 27) = 19 and one more; with the class token.
    assert document["tokens_out"]["mean"] == [37, 28, 28, 21, 21, 21]
    assert document["macs"] == prunefront.macs(document["config"])


def test_counts_of_spvit_are_measured_and_the_speed_too(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = official_file("spvit/deit_eval", tmp_path)
    line = ["eval", "--official", "spvit", str(path), "--hparam", "pruning_loc=1,3,5", *DATA]

    document = result(capfd, *line, "--throughput", "--against-dense", "--crop-pct", "1.0")

    tokens, speed = document["tokens_out"], document["throughput"]
    assert tokens["is_per_image"]
    assert tokens["mean"][0] == 197
    assert all(p50 <= p95 <= 200 for p50, p95 in zip(tokens["p50"], tokens["p95"], strict=True))
    assert speed["images_per_s"] == pytest.approx(4 * 1e3 / speed["median_ms"])
    assert speed["speedup"] == pytest.approx(speed["dense_median_ms"] / speed["median_ms"])
    assert document["crop_pct"] == 1.0
    capfd.readouterr()
    assert run(line) == 0
    shown = capfd.readouterr().out
    assert "tokens per block, mean" in shown and "224 x 224 px, bicubic, crop 0.875" in shown


def test_throughput_runs_in_the_runtime_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    prepared: list[torch.device] = []
    monkeypatch.setitem(RUNTIMES, "compile", lambda forward, device: prepared.append(device) or forward)
    path = official_file("evit/d6_mixed_fuse", tmp_path, base_keep_rate=0.7, fuse_token=True, drop_loc="(1, 3)")
    line = ["eval", "--official", "evit", str(path), "--num-heads", "3", *DATA, "--throughput"]

    assert result(capfd, *line)["throughput"]["runtime"] == "eager"
    assert prepared == []
    assert result(capfd, *line, "--runtime", "compile")["throughput"]["runtime"] == "compile"
    assert prepared == [torch.device("cpu")] * 2  # the model and its dense one


def test_throughput_is_for_one_process(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)

    assert run(["eval", "digit_vit_patch6_48", *DATA, "--throughput"]) == 2
    shown = capfd.readouterr().err
    assert "torchrun started 2 processes, which slow each other down. Run it without torchrun" in shown


@pytest.mark.slow
def test_two_processes_count_each_image_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = official_file("spvit/deit_eval", tmp_path)
    line = ["eval", "--official", "spvit", str(path), "--hparam", "pruning_loc=1,3,5", "--dataset", "digit-scenes"]
    line += ["--num-images", "7", "--batch-size", "2", "--against-dense"]
    alone = result(capfd, *line)

    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "prunefront"]
    environment = {**os.environ, "PYTHONPATH": str(GOLDEN.parents[2]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*start, *line, "--json"], env=environment, capture_output=True, text=True, timeout=300)

    assert done.returncode == 0, done.stderr
    together = json.loads(done.stdout)
    assert together["num_images"] == 7
    assert together.pop("loss") == pytest.approx(alone.pop("loss"), rel=1e-5)
    assert together == alone


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["eval"], "Name one thing to evaluate"),
        (["eval", "m", "--official", "evit", "f.pth"], "Name one thing to evaluate"),
        (["eval", "deit_tiny_patch16_224", "--hparam", "r=8"], "--hparam belongs to --official"),
        (["eval", "--official", "evit", "f.pth", "--checkpoint", "c.pth"], "Leave out --checkpoint"),
        (["eval", "digit_vit_patch6_48", "--runtime", "compile"], "--runtime is what --throughput measures"),
        (["eval", "--official", "evit", "nope.pth"], "Checkpoint nope.pth does not exist"),
        (["eval", "--official", "evitt", "nope.pth"], "did you mean 'evit'"),
    ],
)
def test_what_does_not_go_together_is_refused(
    arguments: list[str], sentence: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run([*arguments, *DATA]) == 2
    shown = capfd.readouterr().err
    assert sentence in shown
    assert len(shown.strip().splitlines()) == 1


def test_what_a_file_does_not_tell_is_asked_for(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = official_file("tome/d6_r8", tmp_path)

    assert run(["eval", "--official", "tome", str(path), "--num-heads", "4", *DATA]) == 2
    assert "does not tell r of tome" in (shown := capfd.readouterr().err) and "Give --hparam r=VALUE." in shown
