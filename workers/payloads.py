"""What each kind of task takes, checked before anything is loaded.

A payload is written by the controller, so a fault here is a fault of ours or of an old database; all the same it ends
the task with one sentence that names the field.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, ValidationError, model_validator

from prunefront.config import Dtype, ModelSpec, PruneConfig, Runtime, StrictModel, describe_validation_error
from prunefront.errors import PrunefrontError

SplitName = Literal["train", "search", "test"]
Count = Annotated[int, Field(ge=1)]


class PayloadError(PrunefrontError, ValueError):
    """A task's payload that cannot be right."""


class WeightsChoice(StrictModel):
    """Where a dense model's weights come from: a file, else timm's pretrained ones, else fresh ones."""

    pretrained: bool = False
    checkpoint: Path | None = None


class Entry(StrictModel):
    """One candidate of a task."""

    key: Annotated[str, Field(min_length=1)]
    config: PruneConfig
    checkpoint: Path | None = Field(default=None, description="Its own fine-tuned weights; null takes the task's.")


class _Payload(StrictModel):
    model: ModelSpec


class _WithEntries(_Payload):
    weights: WeightsChoice = WeightsChoice()
    entries: tuple[Entry, ...]

    @model_validator(mode="after")
    def _keys_differ(self) -> _WithEntries:
        keys = [entry.key for entry in self.entries]
        twice = sorted({key for key in keys if keys.count(key) > 1})
        if twice:
            raise ValueError(f"entries need different keys, but {', '.join(twice)} stands twice")
        return self


class TablePayload(_Payload):
    """Build a latency table."""

    runtime: Runtime = "eager"
    dtype: Dtype = "fp32"
    batch_size: Count
    detail: Literal["full", "quick"] = "full"
    partial_path: Path | None = Field(default=None, description="Where an interrupted build is found again.")
    validate_schedules: Annotated[int, Field(ge=0)] = Field(
        default=0, description="Held-out whole models measured afterwards; the table carries the report."
    )
    max_foreign_cores: Annotated[float, Field(ge=0)] | None = Field(
        default=None, description="What other processes may take from measuring before the task waits, then fails."
    )
    seed: Annotated[int, Field(ge=0)] = 0


class MeasurePayload(_WithEntries):
    """Measure whole models against the dense one."""

    runtime: Runtime = "eager"
    dtype: Dtype = "fp32"
    batch_size: Count
    dataset: str | None = Field(default=None, description="Real images, for methods whose speed depends on them.")
    seed: Annotated[int, Field(ge=0)] = 0


class EvaluatePayload(_WithEntries):
    """Top-1 and top-5 of candidates on one split."""

    dataset: str
    split: SplitName
    num_images: Count | None = Field(default=None, description="The first of the split; null is all of it.")
    batch_size: Count = 64
    dtype: Dtype = "fp32"


class FinetunePayload(_Payload):
    """Train a candidate, the dense model being its teacher."""

    weights: WeightsChoice = WeightsChoice()
    config: PruneConfig
    dataset: str
    epochs: Count
    recipe: dict[str, Any] = Field(default_factory=dict)
    checkpoint_dir: Path
    seed: Annotated[int, Field(ge=0)] = 0


class CalibratePayload(_Payload):
    """PPT's score variances of the dense model."""

    weights: WeightsChoice = WeightsChoice()
    dataset: str
    num_images: Annotated[int, Field(ge=2)] = 256
    batch_size: Count = 64


PayloadT = TypeVar("PayloadT", bound=StrictModel)


def parse_payload(model: type[PayloadT], payload: Mapping[str, Any]) -> PayloadT:
    """Check a payload.

    Raises:
        PayloadError: Naming the field and what is wrong with it.
    """
    try:
        return model.model_validate(payload)
    except ValidationError as error:
        kind = model.__name__.removesuffix("Payload").lower()
        raise PayloadError(
            f"The payload of this {kind} task cannot be used: {describe_validation_error(error)}."
        ) from error
