"""Checkpoints of the papers' repositories: what cannot be right is refused in one sentence."""

from __future__ import annotations

from typing import Any

import pytest
import timm

import prunefront
from prunefront.errors import CheckpointError, ConfigError, UnknownNameError

MODEL: dict[str, Any] = {
    "img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 5,
}  # fmt: skip
WEIGHTS = timm.create_model("deit_tiny_patch16_224", **MODEL).state_dict()


@pytest.mark.parametrize(
    ("method", "hparams", "sentence"),
    [
        ("evit", {"keep_rate": 7}, "above 0 and at most 1, but got 7"),
        ("evit", {"keep_rate": 0}, "above 0 and at most 1, but got 0"),
        ("evit", {"keep_rate": [1, 0.5]}, "one entry per block \\(3\\), but got 2"),
        ("evit", {"keep_rate": "half"}, "hyper-parameters of evit cannot be used.*half"),
        ("evit", {"kep_rate": 0.7}, "Unknown hyper-parameter.*kep_rate"),
        ("tome", {"r": "eight"}, "hyper-parameters of tome cannot be used.*eight"),
        ("diffrate", {"prune_kept_num": [17, 17, 17]}, "hyper-parameters of diffrate lack 'merge_kept_num'"),
        ("hybrid", {}, "no repository of its own"),
    ],
)
def test_hyper_parameters_that_cannot_be_are_refused(method: str, hparams: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        prunefront.from_official(method, MODEL, hparams, WEIGHTS)


def test_an_architecture_names_what_it_lacks() -> None:
    model = {name: value for name, value in MODEL.items() if name not in ("patch_size", "depth")}
    with pytest.raises(ConfigError, match="The architecture lacks patch_size, depth"):
        prunefront.from_official("evit", model, {}, WEIGHTS)


def test_other_weights_and_methods_are_refused() -> None:
    with pytest.raises(CheckpointError, match="do not fit the architecture"):
        prunefront.from_official("evit", {**MODEL, "depth": 4}, {}, WEIGHTS)
    with pytest.raises(UnknownNameError, match="did you mean 'evit'"):
        prunefront.from_official("evitt", MODEL, {}, WEIGHTS)
