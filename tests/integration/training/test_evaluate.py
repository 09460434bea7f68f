"""Evaluation against counts made by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from prunefront.errors import ConfigError, DatasetError
from prunefront.training.data import open_split
from prunefront.training.errors import StoppedError
from prunefront.training.evaluate import evaluate, pack_correct, unpack_correct
from tests.integration.training.image_folders import write_images
from tests.unit.training.models import DATA_CONFIG, BrightnessModel, tiny_vit


@pytest.fixture
def grey(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A folder whose test split has 5, 3 and 2 images of three brightnesses."""
    monkeypatch.setenv("PRUNEFRONT_DATA_ROOTS", str(tmp_path))
    write_images(tmp_path / "grey" / "train", [8, 8, 8])
    write_images(tmp_path / "grey" / "val", [5, 3, 2])
    return "imagefolder:grey"


class AlwaysFirst(nn.Module):
    """Answers class 0, then 1, then 2, whatever it sees."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.tensor([3.0, 2.0, 1.0]).expand(len(images), 3)


def test_every_image_counts_once_whatever_the_batch_size(grey):
    dataset = open_split(grey, "test", data_config=DATA_CONFIG)

    for batch_size in (1, 3, 10, 64):
        result = evaluate(AlwaysFirst(), dataset, batch_size=batch_size)
        assert result.num_images == 10
        assert result.top1 == 0.5
        assert result.top5 == 1.0
        assert result.correct.tolist() == [True] * 5 + [False] * 5
        # -log softmax([3, 2, 1]) is 0.40761, 1.40761, 2.40761.
        assert result.loss == pytest.approx(0.407606 + (3 * 1 + 2 * 2) / 10, abs=1e-5)


def test_a_model_that_reads_the_class_from_the_brightness_is_always_right(grey):
    assert evaluate(BrightnessModel(3), open_split(grey, "search", data_config=DATA_CONFIG)).top1 == 1.0


def test_evaluation_runs_in_eval_mode_and_puts_the_mode_back(grey):
    model = BrightnessModel(3).train()

    assert evaluate(model, open_split(grey, "test", data_config=DATA_CONFIG)).top1 == 1.0
    assert model.training


def test_the_batch_size_does_not_change_what_a_vit_gets_right():
    dataset = open_split("digit-scenes", "search", data_config=DATA_CONFIG, num_images=60)
    results = [evaluate(tiny_vit(), dataset, batch_size=batch_size) for batch_size in (7, 60)]

    assert (results[0].correct == results[1].correct).all()
    assert results[0].loss == pytest.approx(results[1].loss, abs=1e-5)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_changes_logits_but_hardly_the_loss(dtype):
    dataset = open_split("digit-scenes", "search", data_config=DATA_CONFIG, num_images=20)
    full, half = evaluate(tiny_vit(), dataset), evaluate(tiny_vit(), dataset, dtype=dtype)

    assert half.loss != full.loss
    assert half.loss == pytest.approx(full.loss, abs=0.05)


def test_an_unknown_dtype_is_refused(grey):
    with pytest.raises(ConfigError, match="fp32, bf16, fp16"):
        evaluate(BrightnessModel(3), open_split(grey, "test", data_config=DATA_CONFIG), dtype="int8")


def test_a_model_of_other_classes_is_refused(grey):
    with pytest.raises(DatasetError, match="has 3 classes, but the model has 10"):
        evaluate(tiny_vit(), open_split(grey, "test", data_config=DATA_CONFIG))


def test_progress_counts_images_and_a_stop_ends_at_the_next_batch(grey):
    dataset = open_split(grey, "test", data_config=DATA_CONFIG)
    seen = []
    evaluate(AlwaysFirst(), dataset, batch_size=4, progress=lambda done, total, _: seen.append((done, total)))
    assert seen == [(4, 10), (8, 10), (10, 10)]

    answers = iter([False, True])
    with pytest.raises(StoppedError, match="after 4 images"):
        evaluate(AlwaysFirst(), dataset, batch_size=4, should_stop=lambda: next(answers))


@pytest.mark.parametrize("count", [1, 8, 13])
def test_packed_results_come_back_as_they_were(count):
    correct = np.random.default_rng(count).random(count) < 0.5

    assert (unpack_correct(pack_correct(correct), count) == correct).all()


def test_packed_results_of_another_length_are_refused():
    with pytest.raises(ConfigError, match="number of images they were packed from"):
        unpack_correct(pack_correct(np.ones(9, bool)), 8)
    with pytest.raises(ConfigError, match="cannot be decoded"):
        unpack_correct("a", 8)
