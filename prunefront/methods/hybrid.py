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

from prunefront.methods.base import Method, MethodOptions, Recorder, keep_with_prefix, kept_assignment
from prunefront.methods.tome import merge_by_metric
from prunefront.ops.attention import AttentionState, class_scores, class_value_scores, key_metric
from prunefront.ops.merge import merge_limit
from prunefront.ops.select import fuse_dropped, take_tokens, top_tokens

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
        metric = key_metric(state, num_prefix_tokens) if steps[-1].op == "merge" else None
        for step in steps:
            if step.op == "merge":
                assert metric is not None
                x, size = merge_by_metric(x, size, metric, step, num_prefix_tokens=num_prefix_tokens, recorder=recorder)
                continue
            rank = class_scores if options["score"] == "cls" else class_value_scores
            scores = rank(state, num_prefix_tokens)
            index = top_tokens(scores, step.kept)
            x, size, metric = self._drop(x, size, metric, scores, index, step, num_prefix_tokens, recorder)
        return x, size

    @staticmethod
    def _drop(
        x: Tensor,
        size: Tensor | None,
        metric: Tensor | None,
        scores: Tensor,
        index: Tensor,
        step: Step,
        num_prefix_tokens: int,
        recorder: Recorder | None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Prune or fuse; the fused token's metric is fused with the same weights."""
        kept, kept_size = keep_with_prefix(x, size, index, num_prefix_tokens)
        kept_metric = None if metric is None else take_tokens(metric, index)
        rest = -1
        if step.op == "fuse":
            rest = kept.shape[1]
            kept = torch.cat((kept, fuse_dropped(x[:, num_prefix_tokens:], scores, index)), dim=1)
            if kept_size is None or size is None:
                kept_size = torch.ones(rest, device=x.device).expand(x.shape[0], -1)
                fused_size = torch.full((x.shape[0], 1), float(step.removed), device=x.device)
            else:
                fused_size = (size.sum(dim=1) - kept_size.sum(dim=1)).unsqueeze(1)
            kept_size = torch.cat((kept_size, fused_size), dim=1)
            if metric is not None and kept_metric is not None:
                kept_metric = torch.cat((kept_metric, fuse_dropped(metric, scores, index)), dim=1)
        if recorder is not None:
            assignment = kept_assignment(index, num_prefix_tokens, x.shape[1], rest)
            recorder.add(step.op, assignment, scores=scores, kept_idx=index)
        return kept, kept_size, kept_metric
