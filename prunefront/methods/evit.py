"""EViT: keep the tokens the class token attends to most; drop the rest or fuse them into one.

Liang et al., "Not All Patches are What You Need: Expediting Vision Transformers via Token Reorganizations",
ICLR 2022 (arXiv:2202.07800), Section 3. For distilled models, which the official code cannot run, the distillation
token is kept behind the class token and never ranked.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from prunefront.methods.base import Call, Method, kept_assignment
from prunefront.ops.attention import AttentionState, class_scores
from prunefront.ops.select import fuse_dropped, top_tokens
from prunefront.ops.tokens import Tokens

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

    def reduce(self, tokens: Tokens, state: AttentionState, steps: Sequence[Step], call: Call) -> Tokens:
        (step,) = steps
        prefix = tokens.num_prefix
        scores = class_scores(state, prefix)
        index = top_tokens(scores, step.kept)
        kept = tokens.take(index)
        rest = -1
        if step.op == "fuse":
            rest = kept.x.shape[1]
            kept = kept.append(fuse_dropped(tokens.x[:, prefix:], scores, index))
        if call.recorder is not None:
            assignment = kept_assignment(index, prefix, tokens.x.shape[1], rest)
            call.recorder.add(step.op, assignment, scores=scores, kept_idx=index)
        return kept
