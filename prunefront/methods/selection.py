"""What DynamicViT and SPViT share: a learned decision per token, before the attention of some blocks.

While a model trains nothing is removed: dropped tokens stay in the tensor, masked in the attention, so that the
decisions have gradients (Gumbel-softmax, straight through). In evaluation they leave for good.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from prunefront.methods.base import Call, Masking, Method
from prunefront.ops.attention import AttentionState, attention_logits, masked_softmax
from prunefront.ops.tokens import Tokens

if TYPE_CHECKING:
    from torch import nn

    from prunefront.blocks import Blocks
    from prunefront.schedule import Step

KEEP = 0  # column of the keep score; column 1 is the drop score


class SelectingMethod(Method):
    """A method whose operation is ``select``."""

    dropping_ops = ("select",)
    acts_when_nothing_is_removed = True
    acts_before_attention = True
    masks_in_training = True
    needs_training = True

    def kept_of(self, share: float, tokens: int) -> int:
        """Rounded down on Python floats, as in the official code."""
        return int(tokens * share)

    @abstractmethod
    def select(self, tokens: Tokens, step: Step, call: Call) -> Tokens:
        """Remove tokens by learned scores."""

    @abstractmethod
    def mask(self, tokens: Tokens, call: Call, masking: Masking) -> Tokens:
        """Decide which tokens are dropped, and remove none."""

    def forward_block(
        self, blocks: Blocks, block: nn.Module, tokens: Tokens, steps: Sequence[Step], call: Call
    ) -> Tokens:
        masking = call.masking
        if masking is None:
            for step in steps:
                tokens = self.select(tokens.padded(), step, call).packed()
            bias = self.attention_bias(tokens, call)
            return tokens.but(x=blocks.whole(block, tokens, bias))
        if tokens.decision is None:
            initial = tokens.x.shape[1] - tokens.num_prefix
            tokens = tokens.but(decision=tokens.x.new_ones(tokens.x.shape[0], initial))
        if steps:
            tokens = self.mask(tokens, call, masking)
        policy = policy_of(tokens)

        def weigh(state: AttentionState) -> Tensor:
            return masked_softmax(attention_logits(state), policy, masking.eps)

        tokens = tokens.but(x=tokens.x + blocks.weighed_attention(block, tokens, weigh))
        return tokens.but(x=tokens.x + blocks.mlp(block, tokens.x))

    def reduce(self, tokens: Tokens, state: AttentionState, steps: Sequence[Step], call: Call) -> Tokens:
        raise AssertionError("selection happens before the attention")


def policy_of(tokens: Tokens) -> Tensor:
    """1 for tokens that others may see, 0 for dropped ones, (B, N): prefix and packages always count."""
    assert tokens.decision is not None
    decision = F.pad(tokens.decision, (tokens.num_prefix, tokens.num_packages), value=1.0)
    return decision


def decide(scores: Tensor, previous: Tensor, stage: int, masking: Masking) -> Tensor:
    """Nested decisions, 1 to keep, with the gradient of the Gumbel-softmax (straight through).

    Section 3.2 of Rao et al., "DynamicViT", NeurIPS 2021; temperature 1.

    Args:
        scores: Keep and drop scores, (B, N, 2).
        previous: Decisions so far, (B, N).
        stage: Of the site, from 0.
        masking: Gives the noise; without any, ties keep.

    Returns:
        (B, N).
    """
    noise = None if masking.noise is None else masking.noise(stage, scores)
    soft = (scores.float() if noise is None else scores.float() + noise).softmax(dim=-1)
    hard = F.one_hot((soft[..., KEEP] < soft[..., 1]).long(), 2).to(soft.dtype)
    straight_through = hard - soft.detach() + soft
    return straight_through[..., KEEP] * previous


def pooled_with_local(z: Tensor, policy: Tensor | None) -> Tensor:
    """The local half of each token's channels beside the mean of the others' global half, (B, N, D) → (B, N, D).

    Args:
        z: Per-token features.
        policy: Weight of each token in the mean, (B, N); None for a plain mean. A mean over nothing is 0.
    """
    half = z.shape[-1] // 2
    local, everywhere = z[..., :half], z[..., half:]
    if policy is None:
        mean = everywhere.mean(dim=-2, keepdim=True)
    else:
        weight = policy.to(z.dtype).unsqueeze(-1)
        # Nothing left to average: 0 / 1 rather than 0 / 0, in the official code a NaN that ends the training.
        mean = (everywhere * weight).sum(dim=-2, keepdim=True) / weight.sum(dim=-2, keepdim=True).clamp(min=1.0)
    return torch.cat((local, mean.expand_as(everywhere)), dim=-1)
