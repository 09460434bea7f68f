"""ToMe: in every block, merge the r most similar pairs of tokens.

Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023 (arXiv:2210.09461). Implemented from the paper.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from prunefront.methods.base import Call, Method, MethodOptions, Recorder
from prunefront.ops import native
from prunefront.ops.attention import AttentionState, merge_keys
from prunefront.ops.merge import TokenMatch, bipartite_match, merge_limit, merge_matched
from prunefront.ops.tokens import Tokens

if TYPE_CHECKING:
    from prunefront.schedule import Step


class ToMeOptions(MethodOptions):
    prop_attn: bool = True


class ToMe(Method):
    name = "tome"
    title = "ToMe"
    paper = "arXiv:2210.09461"
    merging_ops = ("merge",)
    options_model = ToMeOptions

    def least_kept(self, op: str, present: int) -> int:
        return present - merge_limit(present)

    def uses_size_bias(self, options: Mapping[str, Any]) -> bool:
        return bool(options["prop_attn"])

    def reduce(self, tokens: Tokens, state: AttentionState, steps: Sequence[Step], call: Call) -> Tokens:
        (step,) = steps
        return merge_by_metric(tokens, merge_keys(state, tokens.num_prefix), step, call.recorder)


def merge_by_metric(tokens: Tokens, metric: Tensor, step: Step, recorder: Recorder | None) -> Tokens:
    """Bipartite merge of the non-prefix tokens by ``metric`` (B, G, N - prefix, D), or rather its mean over G."""
    if recorder is None and tokens.places is None and native.runs(metric, tokens.x):
        x, size = native.merge_matched(metric, tokens.x, tokens.size, tokens.num_prefix, step.removed)
        return tokens.but(x=x, size=size)
    match = bipartite_match(metric.mean(dim=1), step.removed, tokens.num_prefix)
    if recorder is not None:
        recorder.add(step.op, match_assignment(match, tokens.num_prefix, tokens.x.shape[1]), **match_values(match))
    return merge_tokens(tokens, match)


def merge_tokens(tokens: Tokens, match: TokenMatch) -> Tokens:
    """Merge matched tokens; a merged token keeps the place of its destination, in the order [kept a, all b]."""
    x, size = merge_matched(tokens.x, tokens.sizes(), match, tokens.num_prefix)
    places = tokens.places
    if places is not None:
        prefix = tokens.num_prefix
        of_patches = places[:, prefix:]
        kept = of_patches[:, match.a_offset :: 2].gather(1, match.kept)
        places = torch.cat((places[:, :prefix], kept, of_patches[:, 1 - match.a_offset :: 2]), dim=1)
    return tokens.but(x=x, size=size, places=places)


def match_values(match: TokenMatch) -> dict[str, Tensor]:
    """Source (ascending) and destination positions from the first non-prefix token on, and similarities."""
    order = match.source.argsort(dim=-1)
    return {
        "merge_src": match.source.gather(1, order) * 2 + match.a_offset,
        "merge_dst": match.destination.gather(1, order) * 2 + 1 - match.a_offset,
        "similarity": match.similarity,
    }


def match_assignment(match: TokenMatch, num_prefix_tokens: int, tokens: int) -> Tensor:
    """Where every token (prefix included) goes: (B, tokens) absolute positions."""
    batch, kept = match.kept.shape
    device = match.kept.device
    target = torch.arange(tokens, device=device).repeat(batch, 1)
    num_b = tokens - num_prefix_tokens - match.similarity.shape[1]
    first_b = num_prefix_tokens + kept
    b_positions = num_prefix_tokens + 1 - match.a_offset + 2 * torch.arange(num_b, device=device)
    target[:, b_positions] = first_b + torch.arange(num_b, device=device)
    a_start = num_prefix_tokens + match.a_offset
    target.scatter_(
        1, a_start + 2 * match.kept, num_prefix_tokens + torch.arange(kept, device=device).expand(batch, -1)
    )
    target.scatter_(1, a_start + 2 * match.source, first_b + match.destination)
    return target
