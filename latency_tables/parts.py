"""The parts that a table times: stem, halves of blocks, blocks that reduce, head; and their names in the table.

``attention``: norm, attention and residual of a block; ``attention.sized``: the same with the log-size bias that
proportional attention adds once tokens were merged; ``attention.masked``: the same with a mask of its connections, as
Tri-Level has after a site; ``mlp``: norm, MLP and residual; ``block.KIND``: a whole block that reduces its tokens
between the two, or before both where a predictor selects them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.models.eva import Eva, EvaBlock
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from latency_tables import opaque
from prunefront.backbones.eva import EVA_BLOCKS, embed
from prunefront.backbones.vit import VIT_BLOCKS
from prunefront.blocks import Blocks
from prunefront.geometry import ModelGeometry, geometry_of, in_chans_of
from prunefront.methods.base import Call
from prunefront.methods.ppt import forced_branch
from prunefront.ops.attention import log_size_bias
from prunefront.ops.rotary import Rotary
from prunefront.ops.tokens import Tokens
from prunefront.registry import get_method
from prunefront.schedule import Step

STEM, HEAD, MLP, BLOCK = "stem", "head", "mlp", "block."
ATTENTION, SIZED_ATTENTION, MASKED_ATTENTION = "attention", "attention.sized", "attention.masked"
HALVES = (ATTENTION, SIZED_ATTENTION, MASKED_ATTENTION, MLP)
CONNECTIONS = ":connections"  # Ends the name of a kind that masks attention from then on.


@dataclass(frozen=True, kw_only=True)
class Frame:
    """What the parts of a block need beside its tokens: family of the block, geometry, prefix, rotations by place."""

    blocks: Blocks
    geometry: ModelGeometry
    num_prefix: int
    rotary: Rotary | None = None

    @classmethod
    def of(cls, model: VisionTransformer | Eva) -> Frame:
        """The frame of a model's blocks, on its device and in its dtype."""
        geometry, num_prefix = geometry_of(model), model.num_prefix_tokens
        if not isinstance(model, Eva):
            return cls(blocks=VIT_BLOCKS, geometry=geometry, num_prefix=num_prefix)
        image = next(model.parameters()).new_zeros(1, in_chans_of(model), *model.patch_embed.img_size)
        with torch.no_grad():
            tokens = embed(model, image)
        return cls(blocks=EVA_BLOCKS, geometry=geometry, num_prefix=num_prefix, rotary=tokens.rotary)

    def tokens(self, x: Tensor) -> Tokens:
        """``x`` (B, N, C) as the first N tokens of each image; rotations are looked up as after a reduction."""
        places = None
        if self.rotary is not None:
            places = self.rotary.initial[:, : x.shape[1]].expand(x.shape[0], -1)
        return Tokens(x=x, num_prefix=self.num_prefix, places=places, rotary=self.rotary)


class Stem(nn.Module):
    """Images to tokens, (B, C, H, W) → (B, N, C)."""

    def __init__(self, model: VisionTransformer | Eva) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        model = self.model
        if isinstance(model, Eva):
            return embed(model, images).x
        tokens: Tensor = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))
        return tokens


class Head(nn.Module):
    """Tokens to logits, the final norm included."""

    def __init__(self, model: VisionTransformer | Eva) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model.forward_head(self.model.norm(x))
        return logits


class AttentionHalf(nn.Module):
    """Norm, attention and residual of a block, under the bias that its ``entry`` is named after."""

    def __init__(self, block: Block | EvaBlock, frame: Frame, entry: str = ATTENTION) -> None:
        super().__init__()
        self.block = block
        self.frame = frame
        self.entry = entry

    def forward(self, x: Tensor) -> Tensor:
        return x + self.frame.blocks.attention(self.block, self.frame.tokens(x), self._bias(x))[0]

    def _bias(self, x: Tensor) -> Tensor | None:
        batch, tokens, _ = x.shape
        if self.entry == SIZED_ATTENTION:
            return log_size_bias(_unknown(torch.full((batch, tokens), 2.0, device=x.device)), x.dtype)
        return all_connections(x) if self.entry == MASKED_ATTENTION else None


def all_connections(x: Tensor) -> Tensor:
    """A mask that leaves all open, which costs what any other does: (B, 1, N, N) for tokens (B, N, C)."""
    batch, tokens, _ = x.shape
    return _unknown(torch.ones(batch, 1, tokens, tokens, dtype=torch.bool, device=x.device))


def _unknown(x: Tensor) -> Tensor:
    """The same, of which a compiler does not know that it is constant, and so computes what is made of it each time."""
    if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
        opaque.use(x)
    return x


class MlpHalf(nn.Module):
    """Norm, MLP and residual of a block."""

    def __init__(self, block: Block | EvaBlock, frame: Frame) -> None:
        super().__init__()
        self.block = block
        self.frame = frame

    def forward(self, x: Tensor) -> Tensor:
        return x + self.frame.blocks.mlp(self.block, x)


class ReducingBlock(nn.Module):
    """A whole block with its reductions; what they learn is freshly initialised."""

    def __init__(self, block: Block | EvaBlock, kind: ReductionKind, steps: Sequence[Step], frame: Frame) -> None:
        super().__init__()
        self.block = block
        self.kind = kind
        self.steps = tuple(steps)
        self.frame = frame
        self.method = get_method(kind.method)  # Here: a compiler cannot trace the import.
        predictor = self.method.create_predictor(frame.geometry)
        self.predictor = None if predictor is None else predictor.to(next(block.parameters()))

    def forward(self, x: Tensor) -> Tensor:
        return self.tokens_left(x).x

    def tokens_left(self, x: Tensor) -> Tokens:
        """What goes on to the next block of tokens (B, N, C)."""
        tokens, call = self.frame.tokens(x), Call(options=self.kind.options, predictor=self.predictor)
        if self.kind.masks_attention:
            tokens = tokens.but(mask=all_connections(x))
        return self.method.forward_block(self.frame.blocks, self.block, tokens, self.steps, call)


@dataclass(frozen=True, kw_only=True)
class ReductionKind:
    """Reductions that cost alike: a method's operations within one block, under options that matter for the cost."""

    name: str
    method: str
    ops: tuple[str, ...]
    options: Mapping[str, Any] = field(hash=False)
    like: str | None = None  # A kind that does the same work; this one is then not measured.
    parts: tuple[str, ...] = ()  # Kinds whose costs add up to about this one's, for a table that did not measure it.

    @property
    def entry(self) -> str:
        return BLOCK + self.name

    @property
    def masks_attention(self) -> bool:
        """Whether attention is masked in the blocks that follow; timed as the second of such sites, under a mask."""
        return self.name.endswith(CONNECTIONS)

    @property
    def has_predictor(self) -> bool:
        """Whether most of its cost is a learned predictor's, thus linear layers."""
        return get_method(self.method).acts_before_attention

    def runs_on(self, geometry: ModelGeometry) -> bool:
        return geometry.has_class_token or not set(self.ops) & set(get_method(self.method).ranking_ops)

    def tokens_attended(self, tokens_in: int, tokens_out: int) -> int:
        """Tokens that the attention of such a block works on."""
        return tokens_out if get_method(self.method).acts_before_attention else tokens_in

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
    valued = {"score": "cls_value"}
    kinds: list[tuple[str, tuple[str, ...], dict[str, Any], str | None, tuple[str, ...]]] = [
        ("evit.prune", ("prune",), {}, None, ()),
        ("evit.fuse", ("fuse",), {}, None, ()),
        ("tome.merge", ("merge",), {}, None, ()),
        ("ppt.prune", ("pool_or_prune",), {"threshold": 0}, None, ("evit.prune",)),
        ("ppt.pool", ("pool_or_prune",), {"threshold": None}, "tome.merge", ()),
        # Both branches are computed.
        ("ppt.pool_or_prune", ("pool_or_prune",), {"threshold": 1e-9}, None, ("ppt.prune", "ppt.pool")),
        ("diffrate.prune", ("prune",), {}, "evit.prune", ()),
        ("diffrate.merge_mean", ("merge_mean",), {}, None, ()),
        ("diffrate.prune+merge_mean", ("prune", "merge_mean"), {}, "diffrate.merge_mean", ()),
        ("hybrid.prune", ("prune",), {}, "evit.prune", ()),
        ("hybrid.fuse", ("fuse",), {}, "evit.fuse", ()),
        ("hybrid.merge", ("merge",), {}, "tome.merge", ()),
        ("hybrid.prune+merge", ("prune", "merge"), {}, None, ("hybrid.prune", "hybrid.merge")),
        ("hybrid.fuse+merge", ("fuse", "merge"), {}, None, ("hybrid.fuse", "hybrid.merge")),
        ("hybrid.prune:cls_value", ("prune",), valued, "ppt.prune", ()),
        ("hybrid.fuse:cls_value", ("fuse",), valued, "hybrid.fuse", ()),
        ("hybrid.prune+merge:cls_value", ("prune", "merge"), valued, "hybrid.prune+merge", ()),
        ("hybrid.fuse+merge:cls_value", ("fuse", "merge"), valued, "hybrid.fuse+merge", ()),
        ("dynamicvit.select", ("select",), {}, None, ()),
        ("spvit.select", ("select",), {"mode": "fixed"}, None, ()),
        ("trilevel.prune", ("prune",), {}, "evit.prune", ()),
        (f"trilevel.prune{CONNECTIONS}", ("prune",), {"attn_ratio": 0.3}, None, ()),
    ]
    return {
        name: ReductionKind(
            name=name, method=(method := name.partition(".")[0]), ops=ops,
            options=get_method(method).parse_options(options), like=like, parts=parts,
        )
        for name, ops, options, like, parts in kinds
    }  # fmt: skip


REDUCTION_KINDS = _kinds()


def measured_methods() -> list[str]:
    """Methods whose reductions a table has entries for."""
    return list(dict.fromkeys(kind.method for kind in REDUCTION_KINDS.values()))


def measured_kinds(geometry: ModelGeometry, *, composed: bool = True) -> list[ReductionKind]:
    """Kinds that a model of this geometry can run and that no other one stands in for.

    Args:
        composed: Also those that others add up to.
    """
    kinds = [kind for kind in REDUCTION_KINDS.values() if kind.like is None and kind.runs_on(geometry)]
    return [kind for kind in kinds if composed or not kind.parts]


def biased_attentions(geometry: ModelGeometry) -> tuple[str, ...]:
    """Entries of attention under the biases that reductions of such a model leave behind."""
    masked = any(kind.masks_attention for kind in measured_kinds(geometry))
    return (SIZED_ATTENTION, MASKED_ATTENTION) if masked else (SIZED_ATTENTION,)


def kind_name(method: str, options: Mapping[str, Any], steps: Sequence[Step]) -> str:
    """Kind of one block's reductions in a schedule."""
    if method == "ppt":
        branch = forced_branch(options.get("threshold"), steps[0].kept + steps[0].removed)
        return f"ppt.{branch or 'pool_or_prune'}"
    name = f"{method}.{'+'.join(step.op for step in steps)}"
    if options.get("attn_ratio", 1.0) < 1.0:
        return name + CONNECTIONS
    return f"{name}:cls_value" if options.get("score") == "cls_value" and steps[0].op != "merge" else name


def gives_sizes(kind: str, steps: Sequence[Step]) -> bool:
    """Whether tokens that leave the block have sizes, so that proportional attention needs a bias from then on."""
    if kind.startswith("evit.") or not any(step.removed for step in steps):
        return False
    return any(op in kind for op in ("merge", "pool", "fuse"))
