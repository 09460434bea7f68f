"""Tri-Level E-ViT: keep the tokens that others attend to most.

Kong et al., "Peeling the Onion: Hierarchical Reduction of Data Redundancy for Efficient Vision Transformer Training",
AAAI 2023 (arXiv:2211.10801), token level. On Swin the backbone itself selects, see `prunefront.backbones.swin`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from prunefront.methods.base import Call, Method, MethodOptions, kept_assignment
from prunefront.ops.attention import AttentionState, class_scores
from prunefront.ops.select import top_tokens
from prunefront.ops.tokens import Tokens

if TYPE_CHECKING:
    from prunefront.schedule import Step


class TriLevelOptions(MethodOptions):
    attn_ratio: Annotated[float, Field(gt=0, le=1)] = 1.0
    tie: Literal["official", "strict"] = "strict"


class TriLevel(Method):
    name = "trilevel"
    title = "Tri-Level E-ViT"
    paper = "arXiv:2211.10801"
    dropping_ops = ("prune",)
    ranking_ops = dropping_ops
    options_model = TriLevelOptions
    runs_on_stages = True

    def reduce(self, tokens: Tokens, state: AttentionState, steps: Sequence[Step], call: Call) -> Tokens:
        (step,) = steps
        scores = class_scores(state, tokens.num_prefix)
        index = top_tokens(scores, step.kept)
        if call.recorder is not None:
            assignment = kept_assignment(index, tokens.num_prefix, tokens.x.shape[1])
            call.recorder.add(step.op, assignment, scores=scores, kept_idx=index)
        return tokens.take(index)
