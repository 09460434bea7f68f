"""The files that tell how a training goes."""

import csv
import json

import pytest

from prunefront.errors import MissingExtraError
from prunefront.training.logs import RunLog

HISTORY = [
    {"epoch": 0.0, "loss": 2.0, "top1": 0.25, "lr": 1e-3},
    {"epoch": 1.0, "loss": 1.0, "top1": 0.5, "lr": 1e-4, "search_top1": 0.75, "search_top5": 1.0, "search_loss": 0.5},
]


def test_each_epoch_is_one_row_and_one_line_as_deits(tmp_path):
    log = RunLog(tmp_path, num_parameters=7)
    log.write(HISTORY[:1], [2.0], 100)
    log.write(HISTORY, [2.0, 4.0], 100)
    log.write(HISTORY, [2.0, 4.0], 100)  # as after a resume: no epoch twice

    rows = list(csv.DictReader((tmp_path / "log.csv").read_text().splitlines()))
    assert [row["epoch"] for row in rows] == ["0", "1"]
    assert (rows[0]["search_top1"], rows[1]["search_top1"]) == ("", "0.75")
    assert (rows[1]["seconds"], rows[1]["images_per_s"]) == ("4.0", "25.0")
    lines = [json.loads(line) for line in (tmp_path / "log.txt").read_text().splitlines()]
    assert lines[0] == {"epoch": 0, "train_loss": 2.0, "train_lr": 1e-3, "n_parameters": 7}
    assert (lines[1]["test_acc1"], lines[1]["test_acc5"], lines[1]["test_loss"]) == (75.0, 100.0, 0.5)


def test_tensorboard_is_optional(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)

    with pytest.raises(MissingExtraError, match="pip install tensorboard"):
        RunLog(tmp_path, num_parameters=7, tensorboard=True)
