"""What a model's heads give back. Imports nothing of ours: models are registered while timm is being imported."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Heads:
    """What a backbone's heads say: ``logits`` (B, classes), and their parts where there are several (see `Aux`)."""

    logits: Tensor
    class_logits: Tensor | None = None
    token_logits: Tensor | None = None
    token_places: Tensor | None = None
