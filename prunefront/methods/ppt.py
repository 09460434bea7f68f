"""PPT: per image and site, prune the least significant tokens or pool the most similar ones.

Wu et al., "PPT: Token Pruning and Pooling for Efficient Vision Transformers" (arXiv:2310.01812). The variance of the
significance scores decides. Our definitions where the official code has none: a distillation token is never ranked,
and both branches share one clamp.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from prunefront.methods.base import Method, MethodOptions, Recorder, keep_with_prefix, kept_assignment
from prunefront.methods.tome import match_assignment, match_values
from prunefront.ops.attention import AttentionState, class_value_scores, key_metric
from prunefront.ops.merge import bipartite_match, merge_limit, merge_matched
from prunefront.ops.select import top_tokens

if TYPE_CHECKING:
    from prunefront.schedule import Step


class PPTOptions(MethodOptions):
    threshold: Annotated[float, Field(ge=0)] | None = Field(
        default=7e-5,
        description="Pool an image when the variance of its scores is below; 0 prunes, null pools, always.",
    )
    prop_attn: bool = True


class PPT(Method):
    name = "ppt"
    title = "PPT"
    paper = "arXiv:2310.01812"
    dropping_ops = ("pool_or_prune",)
    ranking_ops = dropping_ops
    options_model = PPTOptions

    def least_kept(self, op: str, present: int) -> int:
        return present - merge_limit(present)

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
        (step,) = steps
        threshold = options["threshold"]
        if not options["prop_attn"]:
            size = None  # every site starts from ones again (official behaviour)
        present = step.kept + step.removed
        forced = forced_branch(threshold, present)
        scores = variance = None
        if forced != "pool" or recorder is not None:
            scores = class_value_scores(state, num_prefix_tokens)
            variance = scores.detach().var(dim=-1, unbiased=True)

        pruned = pooled = index = match = None
        if forced != "pool":
            assert scores is not None
            index = top_tokens(scores, step.kept)
            pruned = keep_with_prefix(x, size, index, num_prefix_tokens)
        if forced != "prune":
            match = bipartite_match(key_metric(state, num_prefix_tokens), step.removed, num_prefix_tokens)
            patches, patch_size = merge_matched(
                x[:, num_prefix_tokens:], None if size is None else size[:, num_prefix_tokens:], match
            )
            prefix_size = patch_size.new_ones(x.shape[0], num_prefix_tokens)
            pooled = (
                torch.cat((x[:, :num_prefix_tokens], patches), dim=1),
                torch.cat((prefix_size, patch_size), dim=1),
            )

        if pooled is None:
            assert pruned is not None
            out, out_size = pruned
            policy = None if variance is None else torch.zeros_like(variance, dtype=torch.bool)
        elif pruned is None:
            out, out_size = pooled
            policy = None if variance is None else torch.ones_like(variance, dtype=torch.bool)
        else:
            # Both results for the whole batch, chosen per image: no branch that depends on data, so graphs stay whole.
            assert variance is not None
            policy = variance < threshold
            out = torch.where(policy[:, None, None], pooled[0], pruned[0])
            pruned_size = torch.ones_like(pooled[1]) if pruned[1] is None else pruned[1]
            out_size = torch.where(policy[:, None], pooled[1], pruned_size)

        if recorder is not None:
            assert scores is not None and variance is not None and policy is not None
            values = {"scores": scores, "var": variance, "policy": policy}
            assignment = torch.full_like(policy, -1, dtype=torch.long)[:, None].expand(-1, x.shape[1])
            if index is not None:
                values["kept_idx"] = index
                assignment = kept_assignment(index, num_prefix_tokens, x.shape[1])
            if match is not None:
                values |= match_values(match)
                to_pool = match_assignment(match, num_prefix_tokens, x.shape[1])
                assignment = torch.where(policy[:, None], to_pool, assignment)
            recorder.add(step.op, assignment, **values)
        return out, out_size


def forced_branch(threshold: float | None, present: int) -> str | None:
    """The branch every image takes, "prune" or "pool", or None when the images decide.

    Scores are non-negative and sum to one, so their unbiased variance never exceeds 1 / present.
    """
    if threshold is None or threshold > 1.001 / present:
        return "pool"
    if threshold == 0:
        return "prune"
    return None
