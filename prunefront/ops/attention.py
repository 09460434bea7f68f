"""Attention with what token reduction needs from it, and no attention map beyond the rows a method reads.

Shapes: B images, N tokens, H heads, D channels per head, C = H * D.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from timm.layers import Attention, AttentionRope, apply_rot_embed_cat
from timm.models.eva import EvaAttention
from torch import Tensor
from torch.nn import functional as F

from prunefront.ops.dot_product import dot_product_attention
from prunefront.ops.packing import Packing, packed_attention


@dataclass(frozen=True, kw_only=True)
class AttentionState:
    """Queries, keys, values (B, H, N, D) of one attention, after q/k norm, and the log-size bias they met.

    With rotary position embeddings ``q`` and ``k`` are rotated; ``content`` then holds the keys before the rotation.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    bias: Tensor | None  # (B, 1, 1, N) added to the logits, or a boolean mask of visible keys
    content: Tensor | None = None


def log_size_bias(size: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Additive term of proportional attention, shape (B, 1, 1, N): a token of size s counts as s tokens.

    Section 3.2 of Bolya et al., "Token Merging", ICLR 2023. Sizes are kept positive, which changes nothing for healthy
    models: DiffRate's similarity-scaled sizes may turn non-positive, and their logarithm would be NaN.
    """
    if size is None:
        return None
    return size.clamp(min=1e-6).log().to(dtype)[:, None, None, :]


def project_qkv(attn: Attention, x: Tensor) -> AttentionState:
    """Queries, keys and values of timm's multi-head attention for normalised tokens (B, N, C), after q/k norm."""
    batch, tokens, _ = x.shape
    qkv = attn.qkv(x).reshape(batch, tokens, 3, attn.num_heads, attn.head_dim).permute(2, 0, 3, 1, 4)
    q, k, v = qkv.unbind(0)
    return AttentionState(q=attn.q_norm(q), k=attn.k_norm(k), v=v, scale=attn.scale, bias=None)


def project_rotated_qkv(attn: EvaAttention | AttentionRope, x: Tensor, rotations: Tensor | None) -> AttentionState:
    """Queries, keys and values of timm's rotary attentions for tokens (B, N, C), after q/k norm and rotation.

    Args:
        attn: With fused or separate projections, with fewer keys than queries (grouped) or as many.
        x: Normalised tokens, (B, N, C).
        rotations: Sines, then cosines of the last tokens, broadcast to (B, H, N - prefix, 2D); or None.
    """
    batch, tokens, _ = x.shape
    projections: tuple[Tensor, ...]
    if attn.qkv is None:
        projections = (attn.q_proj(x), attn.k_proj(x), attn.v_proj(x))
    elif getattr(attn, "q_bias", None) is None:
        projections = attn.qkv(x).chunk(3, dim=-1)
    else:
        bias = torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))
        qkv = attn.qkv(x) + bias if attn.qkv_bias_separate else F.linear(x, attn.qkv.weight, bias)
        projections = qkv.chunk(3, dim=-1)
    q, k, v = (part.reshape(batch, tokens, -1, attn.head_dim).transpose(1, 2) for part in projections)
    q, k = attn.q_norm(q), attn.k_norm(k)
    content = None
    if rotations is not None:
        prefix, half, content = tokens - rotations.shape[-2], getattr(attn, "rotate_half", False), k
        q, k = (
            torch.cat((t[:, :, :prefix], apply_rot_embed_cat(t[:, :, prefix:], rotations, half=half)), dim=2).type_as(v)
            for t in (q, k)
        )
    groups = attn.num_heads // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    return AttentionState(q=q, k=k, v=v, scale=attn.scale, bias=None, content=content)


def join_heads(attn: Attention, heads: Tensor, x: Tensor) -> Tensor:
    """What follows the product with the values: output norm, gate and projection.

    Args:
        attn: A plain or rotary timm attention.
        heads: Attended values, (B, H, N, D).
        x: The normalised tokens that attention was given, (B, N, C); a gate reads them.
    """
    out = attn.norm(heads.transpose(1, 2).flatten(2))
    gate = getattr(attn, "gate", None)
    if gate is not None:
        out = out * gate(x).sigmoid()
    projected: Tensor = attn.proj_drop(attn.proj(out))
    return projected


def attend(
    attn: Attention, x: Tensor, bias: Tensor | None, packing: Packing | None = None
) -> tuple[Tensor, AttentionState]:
    """timm's multi-head attention, handing out q, k and v.

    Args:
        attn: A plain timm attention; q/k norm, output norm and gate are applied. ``fused_attn`` chooses the kernel.
        x: Normalised tokens, (B, N, C).
        bias: Added to the logits, or a boolean mask of visible keys; broadcast to (B, H, N, N); or None.
        packing: Of a packed batch, whose images see their own tokens alone; without bias and in eval mode.

    Returns:
        The projected output (B, N, C) and the state to score tokens with.
    """
    return attend_with(attn, project_qkv(attn, x), x, bias, packing)


def attend_with(
    attn: Attention, state: AttentionState, x: Tensor, bias: Tensor | None, packing: Packing | None = None
) -> tuple[Tensor, AttentionState]:
    """`attend` for queries, keys and values that are there already."""
    if packing is not None:
        return join_heads(attn, packed_attention(state.q, state.k, state.v, packing, fused=attn.fused_attn), x), state
    dropout = attn.attn_drop.p if attn.training else 0.0
    out = dot_product_attention(state.q, state.k, state.v, bias=bias, dropout=dropout, fused=attn.fused_attn)
    return join_heads(attn, out, x), replace(state, bias=bias)


def attention_logits(state: AttentionState) -> Tensor:
    """Scaled products of all queries and keys, (B, H, N, N), without bias: for those who need the whole map."""
    return (state.q * state.scale) @ state.k.transpose(-2, -1)


def masked_softmax(logits: Tensor, policy: Tensor, eps: float) -> Tensor:
    """Softmax over the tokens that a policy keeps, differentiable in the policy.

    Section 3.3 of Rao et al., "DynamicViT", NeurIPS 2021: a token always sees itself and otherwise only kept tokens.
    As in the official code a kept share of ``eps`` is spread over all keys; ``eps`` = 0 leaves dropped keys exactly 0.

    Args:
        logits: Scaled products of queries and keys, (B, H, N, N).
        policy: 1 for kept tokens, 0 for dropped ones, (B, N).
        eps: 1e-6 in training.

    Returns:
        Attention in float32, (B, H, N, N).
    """
    logits = logits.float()
    itself = torch.eye(policy.shape[1], device=policy.device, dtype=torch.float32)
    visible = policy.float()[:, None, None, :]
    visible = visible + (1.0 - visible) * itself
    if eps == 0:
        # The largest visible logit: a dropped key that dominates would leave 0/0.
        peak = logits.masked_fill(visible == 0, -torch.inf).amax(dim=-1, keepdim=True)
        weights = (logits - peak).masked_fill(visible == 0, -torch.inf).exp() * visible
    else:
        weights = (logits - logits.amax(dim=-1, keepdim=True)).exp() * visible
    return (weights + eps / policy.shape[1]) / (weights.sum(dim=-1, keepdim=True) + eps)


def class_attention(state: AttentionState) -> Tensor:
    """Softmax attention of the class token (position 0) to every token, shape (B, H, N), in float32.

    Only this row is computed; dropout on attention is not applied to it (EViT, quirk 5, reads it before).
    """
    row = (state.q[:, :, :1] * state.scale) @ state.k.transpose(-2, -1)
    if state.bias is not None:
        bias = state.bias[:, :, :1]
        row = row.masked_fill(~bias, -torch.inf) if bias.dtype == torch.bool else row + bias
    return row.squeeze(2).float().softmax(dim=-1)


def class_scores(state: AttentionState, num_prefix_tokens: int) -> Tensor:
    """Head-mean class attention of the non-prefix tokens, shape (B, N - prefix): the score of EViT and DiffRate."""
    return class_attention(state).mean(dim=1)[:, num_prefix_tokens:]


def class_value_scores(state: AttentionState, num_prefix_tokens: int) -> Tensor:
    """Class attention times the norm of the value, normalised to sum 1 over the non-prefix tokens.

    The significance of ATS that PPT uses (Section 3 of Wu et al., "PPT", arXiv:2310.01812): attention summed over
    heads, values as projected, norm over the full width.
    """
    attention = class_attention(state).sum(dim=1)[:, num_prefix_tokens:]
    norm = state.v[:, :, num_prefix_tokens:].float().square().sum(dim=(1, 3)).sqrt()
    score = attention * norm
    return score / score.sum(dim=-1, keepdim=True)


def merge_keys(state: AttentionState, num_prefix_tokens: int) -> Tensor:
    """Keys of the non-prefix tokens, (B, H, N - prefix, D): their mean over heads is what ToMe compares.

    Taken after k norm where there is one.

    With rotary position embeddings the keys before the rotation: the metric is to compare content, and the same content
    at two places has rotated keys that differ, by angles that for learned frequencies even differ between the heads
    averaged here; a fused token, never rotated, could not be compared at all.
    """
    keys = state.k if state.content is None else state.content
    return keys[:, :, num_prefix_tokens:]
