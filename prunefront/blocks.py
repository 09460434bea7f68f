"""How the blocks of a backbone are taken apart, so that a method can act between attention and MLP.

One stateless object per family of blocks; methods know nothing of the modules behind it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from timm.models.eva import EvaBlock
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from prunefront.ops.attention import (
    AttentionState,
    attend,
    attend_with,
    join_heads,
    project_qkv,
    project_rotated_qkv,
)
from prunefront.ops.tokens import Tokens

Weigh = Callable[[AttentionState], Tensor]


class Blocks(ABC):
    """A family of pre-norm transformer blocks. Branches come out with layer scale and stochastic depth applied."""

    def whole(self, block: nn.Module, tokens: Tokens, bias: Tensor | None) -> Tensor:
        """The block as its library runs it: tokens (B, N, C) to (B, N, C). In halves where the batch is packed."""
        if tokens.packing is None:
            return self._as_library(block, tokens, bias)
        x = tokens.x + self.attention(block, tokens, bias)[0]
        return x + self.mlp(block, x)

    @abstractmethod
    def _as_library(self, block: nn.Module, tokens: Tokens, bias: Tensor | None) -> Tensor:
        """`whole` for a batch that is not packed."""

    @abstractmethod
    def attention(self, block: nn.Module, tokens: Tokens, bias: Tensor | None) -> tuple[Tensor, AttentionState]:
        """The attention branch (B, N, C), without the residual, and the state to score tokens with.

        Args:
            block: One block.
            tokens: Entering it.
            bias: Added to the logits, or a boolean mask of visible keys; broadcast to (B, H, N, N); or None.
        """

    @abstractmethod
    def weighed_attention(self, block: nn.Module, tokens: Tokens, weigh: Weigh) -> Tensor:
        """The attention branch (B, N, C) with attention weights (B, H, N, N) of the caller's making."""

    @abstractmethod
    def mlp(self, block: nn.Module, x: Tensor) -> Tensor:
        """The MLP branch for tokens (B, N, C), without the residual."""


class ViTBlocks(Blocks):
    """timm's plain ``Block``."""

    def _as_library(self, block: Any, tokens: Tokens, bias: Tensor | None) -> Tensor:
        assert isinstance(block, Block)
        out: Tensor = block(tokens.x) if bias is None else block(tokens.x, attn_mask=bias)
        return out

    def attention(self, block: Any, tokens: Tokens, bias: Tensor | None) -> tuple[Tensor, AttentionState]:
        attended, state = attend(block.attn, block.norm1(tokens.x), bias, tokens.packing)
        return block.drop_path1(block.ls1(attended)), state

    def weighed_attention(self, block: Any, tokens: Tokens, weigh: Weigh) -> Tensor:
        normed = block.norm1(tokens.x)
        state = project_qkv(block.attn, normed)
        heads = block.attn.attn_drop(weigh(state)).to(state.v.dtype) @ state.v
        out: Tensor = block.drop_path1(block.ls1(join_heads(block.attn, heads, normed)))
        return out

    def mlp(self, block: Any, x: Tensor) -> Tensor:
        out: Tensor = block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
        return out


class EvaBlocks(Blocks):
    """timm's ``EvaBlock`` (EVA-02, DINOv3, RoPE-ViT); rotations are looked up by the tokens' places."""

    def _as_library(self, block: Any, tokens: Tokens, bias: Tensor | None) -> Tensor:
        assert isinstance(block, EvaBlock)
        out: Tensor = block(tokens.x, rope=_rotations(tokens), attn_mask=bias)
        return out

    def attention(self, block: Any, tokens: Tokens, bias: Tensor | None) -> tuple[Tensor, AttentionState]:
        normed = block.norm1(tokens.x)
        projected = project_rotated_qkv(block.attn, normed, _rotations(tokens))
        attended, state = attend_with(block.attn, projected, normed, bias, tokens.packing)
        return block.drop_path1(_scaled(block.gamma_1, attended)), state

    def weighed_attention(self, block: Any, tokens: Tokens, weigh: Weigh) -> Tensor:
        normed = block.norm1(tokens.x)
        state = project_rotated_qkv(block.attn, normed, _rotations(tokens))
        heads = block.attn.attn_drop(weigh(state)).to(state.v.dtype) @ state.v
        out: Tensor = block.drop_path1(_scaled(block.gamma_1, join_heads(block.attn, heads, normed)))
        return out

    def mlp(self, block: Any, x: Tensor) -> Tensor:
        out: Tensor = block.drop_path2(_scaled(block.gamma_2, block.mlp(block.norm2(x))))
        return out


def _rotations(tokens: Tokens) -> Tensor | None:
    if tokens.rotary is None:
        return None
    assert tokens.places is not None
    # The prefixes of a packed batch stand between its patches; as tokens without a place they are not rotated.
    return tokens.rotary.at(tokens.places, tokens.num_prefix if tokens.packing is None else 0)


def _scaled(gamma: Tensor | None, branch: Tensor) -> Tensor:
    return branch if gamma is None else gamma * branch
