"""EViT: keep the tokens the class token attends to most; drop the rest or fuse them into one.

Liang et al., "Not All Patches are What You Need: Expediting Vision Transformers via Token Reorganizations",
ICLR 2022 (arXiv:2202.07800), Section 3. For distilled models, which the official code cannot run, the distillation
token is kept behind the class token and never ranked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from prunefront.methods.base import Method, Recorder, keep_with_prefix, kept_assignment
from prunefront.ops.attention import AttentionState, class_scores
from prunefront.ops.select import fuse_dropped, top_tokens

if TYPE_CHECKING:
    from prunefront.schedule import Step


class EViT(Method):
    name = "evit"
    title = "EViT"
    paper = "arXiv:2202.07800"
    dropping_ops = ("prune", "fuse")
    ranking_ops = dropping_ops
    resizes_position_embedding = True

    def adds_token(self, op: str) -> bool:
        return op == "fuse"

    def reduce(
        self,
        x: Tensor,
        size: Tensor | None,
        state: AttentionState,
        steps: Sequence[Step],
        *,
        num_prefix_tokens: int,
        options: Mapping[str, Any],
        recorder: Recorder | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        (step,) = steps
        scores = class_scores(state, num_prefix_tokens)
        index = top_tokens(scores, step.kept)
        kept, _ = keep_with_prefix(x, None, index, num_prefix_tokens)
        rest = -1
        if step.op == "fuse":
            rest = kept.shape[1]
            kept = torch.cat((kept, fuse_dropped(x[:, num_prefix_tokens:], scores, index)), dim=1)
        if recorder is not None:
            assignment = kept_assignment(index, num_prefix_tokens, x.shape[1], rest)
            recorder.add(step.op, assignment, scores=scores, kept_idx=index)
        return kept, None
