"""Payloads are checked before anything is loaded, and refused in one sentence."""

from __future__ import annotations

from typing import Any

import pytest

from workers.payloads import (
    CalibratePayload,
    EvaluatePayload,
    MeasurePayload,
    PayloadError,
    TablePayload,
    parse_payload,
)

MODEL = {"name": "vit_tiny_patch16_224"}
CONFIG = {"format": "prunefront/config/1", "model": MODEL, "method": "hybrid", "sites": []}
EVALUATE = {"model": MODEL, "dataset": "digit-scenes", "split": "search", "entries": [{"key": "a", "config": CONFIG}]}


def test_null_weights_and_defaults_are_understood() -> None:
    payload = parse_payload(EvaluatePayload, {**EVALUATE, "weights": {"pretrained": True, "checkpoint": None}})
    assert payload.weights.pretrained and payload.num_images is None and payload.entries[0].checkpoint is None


@pytest.mark.parametrize(
    ("model", "payload", "words"),
    [
        (TablePayload, {"model": MODEL, "batch_size": 0}, "table task .*batch_size.*got 0"),
        (
            TablePayload,
            {"model": MODEL, "batch_size": 8, "runtime": "tensorrt"},
            "runtime.*'eager', 'compile', 'cudagraph' or 'onnxruntime'",
        ),
        (EvaluatePayload, {**EVALUATE, "split": "validation"}, "split.*'train', 'search' or 'test'"),
        (EvaluatePayload, {**EVALUATE, "entries": EVALUATE["entries"] * 2}, "'?a'? stands twice"),
        (EvaluatePayload, {**EVALUATE, "images": 5}, "images: no such field is known"),
        (MeasurePayload, {"model": MODEL, "entries": []}, "batch_size: Field required"),
        (CalibratePayload, {"model": MODEL, "dataset": "digit-scenes", "num_images": 1}, "num_images"),
    ],
)
def test_a_faulty_payload_is_refused_naming_the_field(model: Any, payload: dict[str, Any], words: str) -> None:
    with pytest.raises(PayloadError, match=words):
        parse_payload(model, payload)
