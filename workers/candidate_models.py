"""The models of a task: one dense model per task, candidates that share its weights."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, cast

from torch import nn

import prunefront
from prunefront.config import ModelSpec, PruneConfig
from prunefront.errors import ModelError
from prunefront.geometry import geometry_for
from workers.payloads import Entry, WeightsChoice


class CandidateModels:
    """Builds the candidates of a task; a dense model is loaded once, however many candidates share it."""

    def __init__(self, spec: ModelSpec, weights: WeightsChoice) -> None:
        """Load the dense model.

        Args:
            spec: The task's model.
            weights: Its weights.

        Raises:
            UnknownNameError, ModelError, CheckpointError: If the model or its weights cannot be had.
        """
        self._spec = spec
        self._weights = weights
        self.dense = prunefront.create_dense(spec, pretrained=weights.pretrained, checkpoint=weights.checkpoint).eval()
        self._other_dense: dict[tuple[str, Path | None], nn.Module] = {}

    def build(self, entry: Entry) -> nn.Module:
        """Return the entry's model in eval mode; without sites it is the plain timm model.

        Raises:
            ModelError, ConfigError, CheckpointError: If config, model and weights do not fit together.
        """
        dense = self.dense_of(entry.config, entry.checkpoint)
        return prunefront.compress(dense, entry.config).eval() if entry.config.sites else dense

    def dense_of(self, config: PruneConfig, checkpoint: Path | None) -> nn.Module:
        """Return the dense model that a config compresses, with the candidate's own weights if it has some."""
        spec = config.model
        if checkpoint is None and _same_model(spec, self._spec):
            return self.dense
        key = (spec.model_dump_json(), checkpoint)
        if key not in self._other_dense:
            self._other_dense[key] = self._load(spec, checkpoint).eval()
        return self._other_dense[key]

    def _load(self, spec: ModelSpec, checkpoint: Path | None) -> nn.Module:
        if checkpoint is not None:
            return prunefront.create_dense(spec, checkpoint=checkpoint)
        if _same_model(spec.model_copy(update={"img_size": self._spec.img_size}), self._spec):
            # The same weights at another resolution: timm resamples the position embedding.
            resized = cast(Any, copy.deepcopy(self.dense))
            resized.set_input_size(img_size=geometry_for(spec).img_size)
            return cast(nn.Module, resized)
        if not self._weights.pretrained:
            raise ModelError(
                f"A candidate's model ({spec.name!r}) differs from the task's ({self._spec.name!r}) in more than the "
                "image size and needs weights of its own. Give the entry a checkpoint, or use pretrained weights."
            )
        return prunefront.create_dense(spec, pretrained=True)


def _same_model(spec: ModelSpec, other: ModelSpec) -> bool:
    """Compare what is built, not how it is written: a null means the model's own value."""
    if spec == other:
        return True
    return spec.name == other.name and spec.kwargs == other.kwargs and geometry_for(spec) == geometry_for(other)
