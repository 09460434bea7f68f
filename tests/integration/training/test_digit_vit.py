"""The demo model as it ships."""

from __future__ import annotations

import hashlib
import json

import pytest
import timm
import torch

import prunefront
from prunefront.backbones.digit_vit import WEIGHTS_PATH
from prunefront.training.data import data_config_of, open_split
from prunefront.training.evaluate import evaluate


@pytest.fixture(scope="module")
def record() -> dict:
    return json.loads(WEIGHTS_PATH.with_suffix(".json").read_text())


@pytest.mark.slow
def test_the_shipped_weights_are_right_on_95_percent_of_the_test_split(record):
    model = timm.create_model("digit_vit_patch6_48", pretrained=True)
    result = evaluate(model, open_split("digit-scenes", "test", data_config=data_config_of(model)), batch_size=50)

    assert result.num_images == 4200
    assert result.top1 >= 0.95
    # Other processors round differently; a handful of near-ties may flip.
    assert result.top1 == pytest.approx(record["accuracy"]["test"]["top1"], abs=5 / 4200)


def test_the_weights_are_small_and_the_record_beside_them_is_theirs(record):
    content = WEIGHTS_PATH.read_bytes()

    assert len(content) <= 6e6
    assert hashlib.sha256(content).hexdigest() == record["sha256"]
    assert record["command"].startswith("python examples/train_digit_vit.py")
    assert {"seed", "versions", "accuracy"} <= record.keys()


def test_the_model_is_a_timm_model_that_prunefront_compresses():
    assert "digit_vit_patch6_48.digit_scenes" in timm.list_models("digit_vit*", pretrained=True)
    config = {
        "format": "prunefront/config/1",
        "model": {"name": "digit_vit_patch6_48"},
        "method": "evit",
        "sites": [{"block": 1, "op": "fuse", "keep_ratio": 0.5}, {"block": 3, "op": "fuse", "keep_ratio": 0.5}],
    }
    model = prunefront.create_model(config, pretrained=True).eval()

    assert model(torch.zeros(1, 3, 48, 48)).shape == (1, 10)
    assert data_config_of(model) == data_config_of(timm.create_model("digit_vit_patch6_48"))


def test_another_number_of_classes_gets_a_fresh_head():
    model = timm.create_model("digit_vit_patch6_48", pretrained=True, num_classes=3)

    assert model.head.weight.shape == (3, 192)
