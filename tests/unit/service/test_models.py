"""Which models a job may name, and with which arguments."""

from __future__ import annotations

import pytest

from prunefront.config import ModelSpec
from prunefront.errors import UnknownNameError
from service.routes.catalog import _models
from service.submissions import check_model


def test_rotary_models_are_listed_and_take_their_own_arguments() -> None:
    assert {"eva02_tiny_patch14_224", "vit_small_patch16_dinov3"} <= {model.name for model in _models()}
    spec = ModelSpec(name="vit_small_patch16_dinov3", kwargs={"use_rot_pos_emb": False, "depth": 2})
    assert check_model(spec).depth == 2
    with pytest.raises(UnknownNameError, match="kwargs takes what shapes VisionTransformer"):
        check_model(ModelSpec(name="deit_tiny_patch16_224", kwargs={"use_rot_pos_emb": False}))
    with pytest.raises(UnknownNameError, match="kwargs takes what shapes Eva"):
        check_model(ModelSpec(name="vit_small_patch16_dinov3", kwargs={"checkpoint_path": "x"}))
