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

from prunefront.methods.base import Call, Method, kept_assignment
from prunefront.ops import native
from prunefront.ops.attention import AttentionState, class_scores
from prunefront.ops.merge import match_tail, merge_tail
from prunefront.ops.select import top_tokens
from prunefront.ops.tokens import Tokens

if TYPE_CHECKING:
    from prunefront.schedule import Step


def mean_kept(candidates: Tensor, logits: Tensor) -> Tensor:
    """Mean of the candidate counts under the softmax of their logits, a scalar; rounded up it is a block's count.

    Section 3.2 of the paper; the class token is not counted.
    """
    return (logits.softmax(dim=0) * candidates).sum()


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

    def reduce(self, tokens: Tokens, state: AttentionState, steps: Sequence[Step], call: Call) -> Tokens:
        prune = next((step for step in steps if step.op == "prune"), None)
        merge = next((step for step in steps if step.op == "merge_mean"), None)
        prefix, present = tokens.num_prefix, tokens.x.shape[1]
        scores = class_scores(state, prefix)
        pruned_to = prune.kept if prune is not None else scores.shape[1]
        is_plain = call.recorder is None and tokens.places is None
        if merge is not None and merge.removed and is_plain and native.runs(tokens.x):
            x, size = native.sort_and_merge(scores, tokens.x, tokens.size, prefix, pruned_to, merge.kept)
            return tokens.but(x=x, size=size)
        order = top_tokens(scores, pruned_to)
        tokens = tokens.take(order)
        if call.recorder is not None:
            call.recorder.add("prune", kept_assignment(order, prefix, present), scores=scores, order=order)
        if merge is None or not merge.removed:
            return tokens
        match = match_tail(tokens.x[:, prefix:], merge.kept)
        patch_size = None if tokens.size is None else tokens.size[:, prefix:]
        merged, merged_size = merge_tail(tokens.x[:, prefix:], patch_size, match)
        left = prefix + merge.kept
        if call.recorder is not None:
            stay = torch.arange(left, device=tokens.x.device).expand(len(merged), -1)
            assignment = torch.cat((stay, prefix + match.destination), dim=1)
            call.recorder.add("merge_mean", assignment, merge_dst=match.destination, merge_sim=match.similarity)
        return tokens.but(
            x=torch.cat((tokens.x[:, :prefix], merged), dim=1),
            size=torch.cat((tokens.sizes()[:, :prefix], merged_size), dim=1),
            places=None if tokens.places is None else tokens.places[:, :left],
        )
