"""Scaled dot-product attention, by torch's fused kernels or as two products and a softmax.

Shapes: B images, H heads, N tokens, D channels per head.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def dot_product_attention(
    q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None = None, dropout: float = 0.0, fused: bool = True
) -> Tensor:
    """Attended values (B, H, N, D), logits scaled by 1/√D.

    Args:
        q, k, v: Queries, keys, values, (B, H, N, D).
        bias: Added to the logits, or a boolean mask of visible keys, one at least for each query; broadcast to
            (B, H, N, N); or None.
        dropout: Probability for the attention weights.
        fused: Through torch's fused kernels where it has one; else as two products and a softmax in the dtype of
            ``q``. torch's own fallback is slower: it looks for queries that see nothing, in three more passes.
    """
    if fused:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout)
    logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    if bias is not None:
        logits = logits.masked_fill(~bias, -torch.inf) if bias.dtype == torch.bool else logits + bias
    weights = logits.softmax(dim=-1)
    return (F.dropout(weights, dropout) if dropout else weights) @ v
