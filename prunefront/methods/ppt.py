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

from prunefront.methods.base import Call, Method, MethodOptions, kept_assignment
from prunefront.methods.tome import match_assignment, match_values, merge_by_metric, merge_tokens
from prunefront.ops.attention import AttentionState, class_value_scores, merge_keys
from prunefront.ops.merge import bipartite_match, merge_limit
from prunefront.ops.select import top_tokens
from prunefront.ops.tokens import Tokens

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

    def reduce(self, tokens: Tokens, state: AttentionState, steps: Sequence[Step], call: Call) -> Tokens:
        (step,) = steps
        threshold, prefix = call.options["threshold"], tokens.num_prefix
        if not call.options["prop_attn"]:
            tokens = tokens.but(size=None)  # every site starts from ones again (official behaviour)
        forced = forced_branch(threshold, step.kept + step.removed)
        scores = variance = None
        if forced != "pool" or call.recorder is not None:
            scores = class_value_scores(state, prefix)
            variance = scores.detach().var(dim=-1, unbiased=True)

        pruned = pooled = index = match = policy = None
        if forced != "pool":
            assert scores is not None
            index = top_tokens(scores, step.kept)
            pruned = tokens.take(index)
        if forced != "prune":
            keys = merge_keys(state, prefix)
            if call.recorder is None:
                pooled = merge_by_metric(tokens, keys, step, None)
            else:
                match = bipartite_match(keys.mean(dim=1), step.removed, prefix)
                pooled = merge_tokens(tokens, match)
        if variance is not None:
            policy = (torch.ones_like if forced == "pool" else torch.zeros_like)(variance, dtype=torch.bool)
        if pooled is not None and pruned is not None:
            # Both results for the whole batch, chosen per image: no branch that depends on data, so graphs stay whole.
            assert variance is not None
            policy = variance < threshold
            out = choose(policy, pooled, pruned)
        else:
            either = pruned if pruned is not None else pooled
            assert either is not None
            out = either

        if call.recorder is not None:
            assert scores is not None and variance is not None and policy is not None
            values = {"scores": scores, "var": variance, "policy": policy}
            assignment = torch.full_like(policy, -1, dtype=torch.long)[:, None].expand(-1, tokens.x.shape[1])
            if index is not None:
                values["kept_idx"] = index
                assignment = kept_assignment(index, prefix, tokens.x.shape[1])
            if match is not None:
                values |= match_values(match)
                to_pool = match_assignment(match, prefix, tokens.x.shape[1])
                assignment = torch.where(policy[:, None], to_pool, assignment)
            call.recorder.add(step.op, assignment, **values)
        return out


def choose(policy: Tensor, yes: Tokens, no: Tokens) -> Tokens:
    """Per image ``yes`` where ``policy`` (B,) holds, else ``no``; both have as many tokens."""
    return yes.but(
        x=torch.where(policy[:, None, None], yes.x, no.x),
        size=torch.where(policy[:, None], yes.sizes(), no.sizes()),
        places=None if yes.places is None or no.places is None else torch.where(policy[:, None], yes.places, no.places),
    )


def forced_branch(threshold: float | None, present: int) -> str | None:
    """The branch every image takes, "prune" or "pool", or None when the images decide.

    Scores are non-negative and sum to one, so their unbiased variance never exceeds 1 / present.
    """
    if threshold is None or threshold > 1.001 / present:
        return "pool"
    if threshold == 0:
        return "prune"
    return None
