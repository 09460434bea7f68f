"""Ranking tokens, taking the best, and fusing the rest into one."""

from __future__ import annotations

import torch
from torch import Tensor


def top_tokens(scores: Tensor, kept: int) -> Tensor:
    """Positions of the ``kept`` largest scores in descending order, (B, kept). Carries no gradient."""
    return scores.detach().topk(kept, dim=-1, largest=True, sorted=True).indices


def take_tokens(x: Tensor, index: Tensor) -> Tensor:
    """Rows of ``x`` (B, N, C) at ``index`` (B, K) → (B, K, C).

    Whole rows are copied from the flattened batch: several times faster on a CPU than gathering element by element.
    """
    batch, tokens, width = x.shape
    offset = torch.arange(batch, device=x.device).unsqueeze(1) * tokens
    rows = (index + offset).reshape(-1)
    return x.reshape(batch * tokens, width).index_select(0, rows).reshape(batch, index.shape[1], width)


def take_values(values: Tensor, index: Tensor) -> Tensor:
    """Entries of ``values`` (B, N) at ``index`` (B, K) → (B, K)."""
    return values.gather(1, index)


def fuse_dropped(x: Tensor, scores: Tensor, kept_index: Tensor) -> Tensor:
    """One token holding all that is not kept: the sum of dropped rows weighted by their raw scores.

    Section 3.2 of Liang et al., "EViT", ICLR 2022. The weights are not normalised, as in the official code (quirk 2).

    Args:
        x: Tokens, (B, N, C).
        scores: Their scores, (B, N).
        kept_index: Positions that stay, (B, K).

    Returns:
        The fused token, (B, 1, C).
    """
    weights = scores.scatter(1, kept_index, 0.0).to(x.dtype)
    return weights.unsqueeze(1) @ x
