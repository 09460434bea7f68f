"""The parts that a table times: stem, halves of blocks, blocks that reduce, head; and their names in the table.

``attention``: norm, attention and residual of a block; ``attention.sized``: the same with the log-size bias that
proportional attention adds once tokens were merged; ``mlp``: norm, MLP and residual; ``block.KIND``: a whole block
that reduces its tokens between the two.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from prunefront.backbones.vit import VIT_BLOCKS
from prunefront.geometry import ModelGeometry
from prunefront.methods.base import Call
from prunefront.methods.ppt import forced_branch
from prunefront.ops.attention import log_size_bias
from prunefront.ops.tokens import Tokens
from prunefront.registry import get_method
from prunefront.schedule import Step

STEM, HEAD, ATTENTION, SIZED_ATTENTION, MLP, BLOCK = "stem", "head", "attention", "attention.sized", "mlp", "block."


class Stem(nn.Module):
    """Images to tokens, (B, C, H, W) → (B, N, C)."""

    def __init__(self, model: VisionTransformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        model = self.model
        tokens: Tensor = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))
        return tokens


class Head(nn.Module):
    """Tokens to logits, the final norm included."""

    def __init__(self, model: VisionTransformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model.forward_head(self.model.norm(x))
        return logits


class AttentionHalf(nn.Module):
    """Norm, attention and residual of a block; ``sized`` adds a log-size bias as after merging."""

    def __init__(self, block: Block, *, sized: bool = False) -> None:
        super().__init__()
        self.block = block
        self.sized = sized

    def forward(self, x: Tensor) -> Tensor:
        block = self.block
        if self.sized:
            bias = log_size_bias(torch.full(x.shape[:2], 2.0, device=x.device), x.dtype)
            attended = block.attn(block.norm1(x), attn_mask=bias)
        else:
            attended = block.attn(block.norm1(x))
        out: Tensor = x + block.drop_path1(block.ls1(attended))
        return out


class MlpHalf(nn.Module):
    """Norm, MLP and residual of a block."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        block = self.block
        out: Tensor = x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
        return out


class ReducingBlock(nn.Module):
    """A whole block with its reductions."""

    def __init__(self, block: Block, kind: ReductionKind, steps: Sequence[Step], num_prefix_tokens: int) -> None:
        super().__init__()
        self.block = block
        self.kind = kind
        self.steps = tuple(steps)
        self.num_prefix_tokens = num_prefix_tokens

    def forward(self, x: Tensor) -> Tensor:
        tokens = Tokens(x=x, num_prefix=self.num_prefix_tokens)
        method = get_method(self.kind.method)
        return method.forward_block(VIT_BLOCKS, self.block, tokens, self.steps, Call(options=self.kind.options)).x


@dataclass(frozen=True, kw_only=True)
class ReductionKind:
    """Reductions that cost alike: a method's operations within one block, under options that matter for the cost."""

    name: str
    method: str
    ops: tuple[str, ...]
    options: Mapping[str, Any] = field(hash=False)
    like: str | None = None  # A kind that stands in for this one where a table lacks it.

    @property
    def entry(self) -> str:
        return BLOCK + self.name

    def steps(self, tokens_in: int, share: float, num_prefix_tokens: int) -> tuple[Step, ...] | None:
        """Steps that remove about ``share`` of the patch tokens in all, or None where the method cannot.

        Two operations remove half of it each.
        """
        method = get_method(self.method)
        patches = tokens_in - num_prefix_tokens
        steps = []
        present = patches
        for number, op in enumerate(self.ops, start=1):
            wanted = round(patches * (1.0 - share * number / len(self.ops)))
            kept = min(max(wanted, method.least_kept(op, present), 1), present - 1)
            if kept < 1:
                return None
            left = kept + (1 if method.adds_token(op) else 0)
            steps.append(
                Step(
                    op=op, kept=kept, removed=present - kept,
                    tokens_in=present + num_prefix_tokens, tokens_out=left + num_prefix_tokens,
                )
            )  # fmt: skip
            present = left
        return tuple(steps) if present < patches else None


def _kinds() -> dict[str, ReductionKind]:
    rows: list[tuple[str, str, tuple[str, ...], dict[str, Any], str | None]] = [
        ("evit.prune", "evit", ("prune",), {}, None),
        ("evit.fuse", "evit", ("fuse",), {}, None),
        ("tome.merge", "tome", ("merge",), {}, None),
        ("ppt.prune", "ppt", ("pool_or_prune",), {"threshold": 0}, None),
        ("ppt.pool", "ppt", ("pool_or_prune",), {"threshold": None}, "tome.merge"),
        ("ppt.pool_or_prune", "ppt", ("pool_or_prune",), {"threshold": 1e-9}, None),
        ("diffrate.prune", "diffrate", ("prune",), {}, "evit.prune"),
        ("diffrate.merge_mean", "diffrate", ("merge_mean",), {}, None),
        ("diffrate.prune+merge_mean", "diffrate", ("prune", "merge_mean"), {}, "diffrate.merge_mean"),
        ("hybrid.prune", "hybrid", ("prune",), {}, "evit.prune"),
        ("hybrid.fuse", "hybrid", ("fuse",), {}, "evit.fuse"),
        ("hybrid.merge", "hybrid", ("merge",), {}, "tome.merge"),
        ("hybrid.prune+merge", "hybrid", ("prune", "merge"), {}, None),
        ("hybrid.fuse+merge", "hybrid", ("fuse", "merge"), {}, None),
        ("hybrid.prune:cls_value", "hybrid", ("prune",), {"score": "cls_value"}, "ppt.prune"),
        ("hybrid.fuse:cls_value", "hybrid", ("fuse",), {"score": "cls_value"}, "hybrid.fuse"),
        ("hybrid.prune+merge:cls_value", "hybrid", ("prune", "merge"), {"score": "cls_value"}, "hybrid.prune+merge"),
        ("hybrid.fuse+merge:cls_value", "hybrid", ("fuse", "merge"), {"score": "cls_value"}, "hybrid.fuse+merge"),
    ]
    return {
        name: ReductionKind(
            name=name, method=method, ops=ops, options=get_method(method).parse_options(options), like=like
        )
        for name, method, ops, options, like in rows
    }


REDUCTION_KINDS = _kinds()


def measured_methods() -> list[str]:
    """Methods whose reductions a table has entries for."""
    return list(dict.fromkeys(kind.method for kind in REDUCTION_KINDS.values()))


def measured_kinds(geometry: ModelGeometry) -> list[ReductionKind]:
    """Kinds that a model of this geometry can run and that no other one stands in for."""
    return [
        kind
        for kind in REDUCTION_KINDS.values()
        if kind.like is None
        and (geometry.has_class_token or not set(kind.ops) & set(get_method(kind.method).ranking_ops))
    ]


def kind_name(method: str, options: Mapping[str, Any], steps: Sequence[Step]) -> str:
    """Kind of one block's reductions in a schedule."""
    if method == "ppt":
        branch = forced_branch(options.get("threshold"), steps[0].kept + steps[0].removed)
        return f"ppt.{branch or 'pool_or_prune'}"
    name = f"{method}.{'+'.join(step.op for step in steps)}"
    return f"{name}:cls_value" if options.get("score") == "cls_value" and steps[0].op != "merge" else name


def gives_sizes(kind: str, steps: Sequence[Step]) -> bool:
    """Whether tokens that leave the block have sizes, so that proportional attention needs a bias from then on."""
    if kind.startswith("evit.") or not any(step.removed for step in steps):
        return False
    return any(op in kind for op in ("merge", "pool", "fuse"))
