"""DiffRate: sort tokens by class attention, prune the tail, merge the next-least important into the important ones.

Chen et al., "DiffRate: Differentiable Compression Rate for Efficient Vision Transformers", ICCV 2023
(arXiv:2305.17997). Implemented from the paper. Kept counts come as two lists, which the paper learns; in a config they
are ``prune`` and ``merge_mean`` sites with ``tokens`` (class token not counted).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from prunefront.methods.base import Method, Recorder, keep_with_prefix, kept_assignment
from prunefront.ops.attention import AttentionState, class_scores
from prunefront.ops.merge import match_tail, merge_tail
from prunefront.ops.select import top_tokens

if TYPE_CHECKING:
    from prunefront.schedule import Step


class DiffRate(Method):
    name = "diffrate"
    title = "DiffRate"
    paper = "arXiv:2305.17997"
    dropping_ops = ("prune",)
    merging_ops = ("merge_mean",)
    two_sites_per_block = True
    ranking_ops = dropping_ops + merging_ops
    acts_when_nothing_is_removed = True  # a site sorts the tokens in any case

    def uses_size_bias(self, options: Mapping[str, Any]) -> bool:
        return True

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
        prune = next((step for step in steps if step.op == "prune"), None)
        merge = next((step for step in steps if step.op == "merge_mean"), None)
        scores = class_scores(state, num_prefix_tokens)
        order = top_tokens(scores, prune.kept if prune is not None else scores.shape[1])
        tokens = x.shape[1]
        x, size = keep_with_prefix(x, size, order, num_prefix_tokens)
        if recorder is not None:
            recorder.add("prune", kept_assignment(order, num_prefix_tokens, tokens), scores=scores, order=order)
        if merge is None or not merge.removed:
            return x, size
        match = match_tail(x[:, num_prefix_tokens:], merge.kept)
        patch_size = None if size is None else size[:, num_prefix_tokens:]
        merged, merged_size = merge_tail(x[:, num_prefix_tokens:], patch_size, match)
        prefix_size = (
            merged_size.new_ones(x.shape[0], num_prefix_tokens) if size is None else size[:, :num_prefix_tokens]
        )
        if recorder is not None:
            stay = torch.arange(num_prefix_tokens + merge.kept, device=x.device).expand(x.shape[0], -1)
            assignment = torch.cat((stay, num_prefix_tokens + match.destination), dim=1)
            recorder.add("merge_mean", assignment, merge_dst=match.destination, merge_sim=match.similarity)
        return (
            torch.cat((x[:, :num_prefix_tokens], merged), dim=1),
            torch.cat((prefix_size, merged_size), dim=1),
        )
