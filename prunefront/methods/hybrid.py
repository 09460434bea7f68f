"""Hybrid: the superset of operations that the search explores.

EViT's pruning and fusing, and after them ToMe's merging, in any block. Every token has a size, one at first: pruning
discards sizes, a fused token gets the sum of its parts, merging is size weighted. With one method's operations and
semantics it equals that method.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from prunefront.methods.base import Call, Method, MethodOptions, Recorder, kept_assignment
from prunefront.methods.tome import merge_by_metric
from prunefront.ops.attention import AttentionState, class_scores, class_value_scores, merge_keys
from prunefront.ops.merge import merge_limit
from prunefront.ops.select import fuse_dropped, take_tokens, top_tokens
from prunefront.ops.tokens import Tokens

if TYPE_CHECKING:
    from prunefront.schedule import Step


class HybridOptions(MethodOptions):
    prop_attn: bool = True
    score: Literal["cls", "cls_value"] = "cls"


class Hybrid(Method):
    name = "hybrid"
    title = "Hybrid"
    paper = "EViT's pruning and fusing with ToMe's merging"
    dropping_ops = ("prune", "fuse")
    merging_ops = ("merge",)
    two_sites_per_block = True
    ranking_ops = dropping_ops
    options_model = HybridOptions

    def least_kept(self, op: str, present: int) -> int:
        return present - merge_limit(present) if op == "merge" else 1

    def adds_token(self, op: str) -> bool:
        return op == "fuse"

    def uses_size_bias(self, options: Mapping[str, Any]) -> bool:
        return bool(options["prop_attn"])

    def reduce(self, tokens: Tokens, state: AttentionState, steps: Sequence[Step], call: Call) -> Tokens:
        keys = merge_keys(state, tokens.num_prefix) if steps[-1].op == "merge" else None
        for step in steps:
            if step.op == "merge":
                assert keys is not None
                tokens = merge_by_metric(tokens, keys, step, call.recorder)
                continue
            rank = class_scores if call.options["score"] == "cls" else class_value_scores
            scores = rank(state, tokens.num_prefix)
            index = top_tokens(scores, step.kept)
            metric = None if keys is None else keys.mean(dim=1)
            tokens, metric = self._drop(tokens, metric, scores, index, step, call.recorder)
            keys = None if metric is None else metric.unsqueeze(1)
        return tokens

    @staticmethod
    def _drop(
        tokens: Tokens, metric: Tensor | None, scores: Tensor, index: Tensor, step: Step, recorder: Recorder | None
    ) -> tuple[Tokens, Tensor | None]:
        """Prune or fuse; the fused token's metric is fused with the same weights."""
        prefix = tokens.num_prefix
        kept = tokens.take(index)
        kept_metric = None if metric is None else take_tokens(metric, index)
        rest = -1
        if step.op == "fuse":
            rest = kept.x.shape[1]
            if tokens.size is None:
                fused_size = torch.full((kept.x.shape[0], 1), float(step.removed), device=kept.x.device)
            else:
                fused_size = (tokens.size.sum(dim=1) - kept.sizes().sum(dim=1)).unsqueeze(1)
            kept = kept.append(fuse_dropped(tokens.x[:, prefix:], scores, index), fused_size)
            if metric is not None and kept_metric is not None:
                kept_metric = torch.cat((kept_metric, fuse_dropped(metric, scores, index)), dim=1)
        if recorder is not None:
            assignment = kept_assignment(index, prefix, tokens.x.shape[1], rest)
            recorder.add(step.op, assignment, scores=scores, kept_idx=index)
        return kept, kept_metric
