"""Tri-Level E-ViT: drop tokens by class attention, and connections between the kept ones by their own attention.

Kong et al., "Peeling the Onion: Hierarchical Reduction of Data Redundancy for Efficient Vision Transformer Training",
AAAI 2023 (arXiv:2211.10801), token and attention level; the example level is `prunefront.training.examples`.
Connections are masked, not skipped: the attention level regularises and saves no time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from prunefront.methods.base import Call, Method, MethodOptions, Recorder, kept_assignment
from prunefront.ops.attention import AttentionState, attention_logits, class_scores
from prunefront.ops.select import top_tokens
from prunefront.ops.tokens import Tokens

if TYPE_CHECKING:
    from torch import nn

    from prunefront.blocks import Blocks
    from prunefront.geometry import ModelGeometry
    from prunefront.schedule import Step


class TriLevelOptions(MethodOptions):
    attn_ratio: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        default=1.0, description="Share of the kept patches that each patch goes on attending to."
    )
    tie: Literal["official", "strict"] = Field(
        default="strict",
        description="official: rows with too few open connections become dense, as in the official code; strict: the "
        "share asked for, among open connections, the token itself always included.",
    )


class TriLevel(Method):
    name = "trilevel"
    title = "Tri-Level E-ViT"
    paper = "arXiv:2211.10801"
    dropping_ops = ("prune",)
    ranking_ops = dropping_ops
    acts_when_nothing_is_removed = True  # a site builds a mask in any case
    needs_training = True
    runs_on_stages = True
    options_model = TriLevelOptions

    def is_static(self, options: Mapping[str, Any], steps: Sequence[Step], geometry: ModelGeometry) -> bool:
        # Masks of a Swin in official form may revive tokens, so each image has counts of its own.
        return not (geometry.stages and steps and options["tie"] == "official")

    def attention_bias(self, tokens: Tokens, call: Call) -> Tensor | None:
        return tokens.mask

    def looks_at_attention(self, call: Call) -> bool:
        return call.recorder is not None and call.is_last_block

    def forward_block(
        self, blocks: Blocks, block: nn.Module, tokens: Tokens, steps: Sequence[Step], call: Call
    ) -> Tokens:
        if not steps or call.options["attn_ratio"] == 1.0:
            return super().forward_block(blocks, block, tokens, steps, call)
        maps: list[Tensor] = []

        def weigh(state: AttentionState) -> Tensor:
            # Here alone the whole map is needed: which connections stay depends on every row of it.
            logits = attention_logits(state)
            if tokens.mask is not None:
                logits = logits.masked_fill(~tokens.mask, -torch.inf)
            maps.append(logits.float().softmax(dim=-1))
            return maps[0]

        branch = blocks.weighed_attention(block, tokens, weigh)
        attention = maps[0].detach().mean(dim=1)
        scores = attention[:, 0, tokens.num_prefix :]
        self._note_attention(scores, call)
        kept, index = self._drop(tokens.but(x=tokens.x + branch), scores, steps[0], call.recorder)
        mask = connections(attention, tokens.mask, index, tokens.num_prefix, call.options)
        if call.recorder is not None:
            call.recorder.sites[-1].values["attn_mask"] = mask[:, 0]
        return kept.but(x=kept.x + blocks.mlp(block, kept.x), mask=mask)

    def reduce(self, tokens: Tokens, state: AttentionState, steps: Sequence[Step], call: Call) -> Tokens:
        scores = class_scores(state, tokens.num_prefix)
        self._note_attention(scores, call)
        return self._drop(tokens, scores, steps[0], call.recorder)[0] if steps else tokens

    def _note_attention(self, scores: Tensor, call: Call) -> None:
        if call.recorder is not None and call.is_last_block:
            call.recorder.class_attention = scores

    @staticmethod
    def _drop(tokens: Tokens, scores: Tensor, step: Step, recorder: Recorder | None) -> tuple[Tokens, Tensor]:
        index = top_tokens(scores, step.kept)
        if recorder is not None:
            assignment = kept_assignment(index, tokens.num_prefix, tokens.x.shape[1])
            recorder.add(step.op, assignment, scores=scores, kept_idx=index)
        return tokens.take(index), index


def connections(
    attention: Tensor, open_before: Tensor | None, kept: Tensor, num_prefix: int, options: Mapping[str, Any]
) -> Tensor:
    """Which keys each query sees in the blocks after a site; Section 3 of the paper, "attention level".

    Args:
        attention: Mean over heads of a block's attention, (B, N, N).
        open_before: Mask that this attention ran under, (B, 1, N, N), or None for all.
        kept: Patches that stay, positions from the first non-prefix token, (B, K).
        num_prefix: Prefix tokens; they see all and are seen by all.
        options: ``attn_ratio`` and ``tie``.

    Returns:
        True where a connection stays, (B, 1, prefix + K, prefix + K), in the order of ``kept``.
    """
    batch, left = kept.shape
    rows = kept.unsqueeze(-1).expand(-1, -1, left) + num_prefix
    columns = kept.unsqueeze(1).expand(-1, left, -1) + num_prefix
    image = torch.arange(batch, device=kept.device)[:, None, None]
    among = attention[image, rows, columns]
    wanted = min(math.ceil(left * options["attn_ratio"]), left)
    if options["tie"] == "official":
        # Closed connections have exactly equal (zero) attention: where fewer than wanted are open, the threshold is
        # theirs and the whole row opens. The official code meets this as a floor of its masked softmax.
        threshold = among.topk(wanted, dim=-1, sorted=False).values.amin(dim=-1, keepdim=True)
        stays = among >= threshold
    else:
        is_open = torch.ones_like(among, dtype=torch.bool)
        if open_before is not None:
            is_open = open_before[:, 0][image, rows, columns]
        itself = torch.eye(left, dtype=torch.bool, device=kept.device).expand_as(among)
        ranked = among.masked_fill(~is_open, -torch.inf).masked_fill(itself, torch.inf)
        best = ranked.topk(wanted, dim=-1, sorted=False)  # Sorting them takes seven times as long as finding them.
        stays = torch.zeros_like(is_open).scatter(-1, best.indices, best.values > -torch.inf)
    mask = torch.ones(batch, num_prefix + left, num_prefix + left, dtype=torch.bool, device=kept.device)
    mask[:, num_prefix:, num_prefix:] = stays
    return mask.unsqueeze(1)
