"""DynamicViT: small predictors score the patch tokens before some blocks; a fixed number stays.

Rao et al., "DynamicViT: Efficient Vision Transformers with Dynamic Token Sparsification", NeurIPS 2021
(arXiv:2106.02034), Section 3.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn

from prunefront.methods.base import Call, Masking, kept_assignment
from prunefront.methods.selection import KEEP, SelectingMethod, decide, pooled_with_local
from prunefront.ops.select import top_tokens
from prunefront.ops.tokens import Tokens

if TYPE_CHECKING:
    from prunefront.geometry import ModelGeometry
    from prunefront.schedule import Step


class TokenPredictor(nn.Module):
    """Keep and drop log-probabilities of tokens, (B, N, C) → (B, N, 2), from their own and the others' features.

    Names are the official checkpoints' (``PredictorLG``). The norm's epsilon is 1e-5 whatever the backbone's.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.in_conv = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.GELU())
        self.out_conv = nn.Sequential(
            nn.Linear(dim, dim // 2), nn.GELU(), nn.Linear(dim // 2, dim // 4), nn.GELU(), nn.Linear(dim // 4, 2)
        )
        init_linears(self)

    def forward(self, x: Tensor, policy: Tensor | None = None) -> Tensor:
        """Score tokens.

        Args:
            x: Residual stream, not normalised, (B, N, C).
            policy: 1 for tokens still kept, (B, N); None for all.
        """
        return cast(Tensor, self.out_conv(pooled_with_local(self.in_conv(x), policy)).log_softmax(dim=-1))


def init_linears(module: nn.Module) -> None:
    """Truncated normal weights of std 0.02, zero biases."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)


class DynamicViT(SelectingMethod):
    name = "dynamicvit"
    title = "DynamicViT"
    paper = "arXiv:2106.02034"

    def create_predictor(self, geometry: ModelGeometry) -> nn.Module:
        return TokenPredictor(geometry.embed_dim)

    def predictor_macs_per_token(self, geometry: ModelGeometry) -> int:
        dim = geometry.embed_dim
        return dim * dim + dim * (dim // 2) + (dim // 2) * (dim // 4) + (dim // 4) * 2

    def select(self, tokens: Tokens, step: Step, call: Call) -> Tokens:
        assert call.predictor is not None
        scores = call.predictor(tokens.x[:, tokens.num_prefix :])
        index = top_tokens(scores[..., KEEP], step.kept)
        kept = tokens.take(index)
        if call.recorder is not None:
            assignment = kept_assignment(index, tokens.num_prefix, tokens.x.shape[1])
            call.recorder.add(step.op, assignment, pred_score=scores, kept_idx=index)
            call.recorder.add_decision(tokens.num_prefix)
        return kept

    def mask(self, tokens: Tokens, call: Call, masking: Masking) -> Tokens:
        assert call.predictor is not None and tokens.decision is not None
        scores = call.predictor(tokens.x[:, tokens.num_prefix :], tokens.decision)
        decision = decide(scores, tokens.decision, call.stage, masking)
        if call.recorder is not None:
            stay = torch.arange(tokens.x.shape[1], device=tokens.x.device).expand(tokens.x.shape[0], -1)
            call.recorder.add("select", stay, pred_score=scores)
            call.recorder.decisions.append(decision)
        return tokens.but(decision=decision)
