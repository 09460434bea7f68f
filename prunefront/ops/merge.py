"""Merging tokens into their most similar partners."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from prunefront.ops.select import take_tokens, take_values
from prunefront.ops.tokens import with_prefix


@dataclass(frozen=True, kw_only=True)
class TokenMatch:
    """A bipartite match of the non-prefix tokens. Positions count from the first non-prefix token.

    Set a and set b are the two position parities; ``source`` (B, r) and ``kept`` (B, |a| - r) index set a,
    ``destination`` (B, r) indexes set b, ``similarity`` (B, |a|) is each a-token's best cosine similarity.
    """

    a_offset: int
    source: Tensor
    kept: Tensor
    destination: Tensor
    similarity: Tensor


def merge_limit(present: int) -> int:
    """Most tokens one bipartite merge can remove from ``present`` non-prefix tokens."""
    return present // 2


@torch.no_grad()
def bipartite_match(metric: Tensor, r: int, num_prefix_tokens: int) -> TokenMatch:
    """Pair the most similar tokens across two alternating halves.

    Section 3.1 of Bolya et al., "Token Merging: Your ViT but Faster", ICLR 2023 (arXiv:2210.09461). The paper
    alternates over absolute positions, prefix included; with an odd number of prefix tokens the first patch token is
    therefore in set b. Without a prefix, survivors stay in descending similarity, as in the official code (quirk 5).

    Args:
        metric: Similarity features of the non-prefix tokens, shape (B, N, D); the paper uses keys averaged over heads.
        r: Tokens to remove, at most ``merge_limit(N)``.
        num_prefix_tokens: Leading tokens that are not in ``metric`` and never matched.

    Raises:
        ValueError: If ``r`` is negative or above the limit.
    """
    if not 0 <= r <= merge_limit(metric.shape[1]):
        raise ValueError(f"r must be within 0..{merge_limit(metric.shape[1])}, but got {r}; clamp it to the limit.")
    metric = F.normalize(metric, dim=-1)
    a_offset = num_prefix_tokens % 2
    similarity, best = (metric[:, a_offset::2] @ metric[:, 1 - a_offset :: 2].transpose(-2, -1)).max(dim=-1)
    order = similarity.argsort(dim=-1, descending=True)
    source, kept = order[:, :r], order[:, r:]
    if num_prefix_tokens:
        kept = kept.sort(dim=-1).values
    return TokenMatch(
        a_offset=a_offset,
        source=source,
        kept=kept,
        destination=take_values(best, source),
        similarity=similarity,
    )


def assignment_matrix(destination: Tensor, num_destinations: int) -> Tensor:
    """0/1 float32 matrix (B, num_destinations, r) that adds every source to its destination when multiplied.

    A small matrix product instead of a scatter: exact sums in a fixed order, no atomics, nothing to graph-break on.
    """
    rows = torch.arange(num_destinations, device=destination.device)
    return (destination.unsqueeze(1) == rows[None, :, None]).float()


def merge_matched(x: Tensor, size: Tensor, match: TokenMatch, num_prefix_tokens: int) -> tuple[Tensor, Tensor]:
    """Average sources into destinations, weighted by token size.

    Each token is read and written once: whole rows from the sequence as it is, since a slice of every other token would
    be copied first, and joined once, prefix included.

    Args:
        x: Tokens, prefix first, (B, N, C).
        size: Their sizes, (B, N) in float32.
        match: Of the non-prefix tokens.
        num_prefix_tokens: Leading tokens that stay as they are.

    Returns:
        Tokens (B, N - r, C) in the order [prefix, kept a, all b], and their sizes (B, N - r).
    """
    first_a, first_b = num_prefix_tokens + match.a_offset, num_prefix_tokens + 1 - match.a_offset
    x_b, size_b = x[:, first_b::2], size[:, first_b::2]
    sources = first_a + 2 * match.source
    stay = with_prefix(match.a_offset + 2 * match.kept, num_prefix_tokens)
    adds = assignment_matrix(match.destination, x_b.shape[1]) * take_values(size, sources).unsqueeze(1)
    total = adds.sum(dim=-1) + size_b
    weights, own_weight = adds / total.unsqueeze(-1), (size_b / total).unsqueeze(-1)
    merged = torch.addcmul(weights.to(x.dtype) @ take_tokens(x, sources), x_b, own_weight.to(x.dtype))
    return torch.cat((take_tokens(x, stay), merged), dim=1), torch.cat((take_values(size, stay), total), dim=1)


@dataclass(frozen=True, kw_only=True)
class TailMatch:
    """Every token from position ``first`` on goes to its most similar one before it; both tensors are (B, r)."""

    first: int
    destination: Tensor
    similarity: Tensor


@torch.no_grad()
def match_tail(x: Tensor, kept: int) -> TailMatch:
    """Match the least important tokens with the important ones, Section 3.2 of Chen et al., "DiffRate", ICCV 2023.

    Args:
        x: Non-prefix tokens sorted by importance, (B, N, C); compared by cosine similarity of the features themselves.
        kept: Leading tokens that stay, 1 <= kept <= N.
    """
    # Products are divided by the norms: normalised tokens would be another copy of all of them.
    norm = x.float().square().sum(dim=-1).sqrt().clamp(min=1e-12)
    products = (x[:, kept:] @ x[:, :kept].transpose(-2, -1)).float()
    similarity, destination = (products / norm[:, None, :kept] / norm[:, kept:, None]).max(dim=-1)
    return TailMatch(first=kept, destination=destination, similarity=similarity)


def merge_tail(x: Tensor, size: Tensor | None, match: TailMatch) -> tuple[Tensor, Tensor]:
    """DiffRate's merge: plain mean of features, sizes added after scaling by similarity.

    The mean ignores sizes while attention uses them: quirk 3 of the official code, reproduced.

    Returns:
        (B, kept, C) and sizes (B, kept).
    """
    kept = match.first
    adds = assignment_matrix(match.destination, kept)
    count = adds.sum(dim=-1, keepdim=True) + 1
    merged = (x[:, :kept] + adds.to(x.dtype) @ x[:, kept:]) / count.to(x.dtype)
    tail = match.similarity.float() if size is None else match.similarity.float() * size[:, kept:]
    head = 1.0 if size is None else size[:, :kept]
    return merged, head + (adds * tail.unsqueeze(1)).sum(dim=-1)
