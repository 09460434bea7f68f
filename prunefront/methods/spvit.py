"""SPViT: a multi-head selector decides per token and image; what is dropped is summed into a package token.

Kong et al., "SPViT: Enabling Faster Vision Transformers via Latency-aware Soft Token Pruning", ECCV 2022
(arXiv:2112.13890). Implemented from the paper. Packages stand at the end of the sequence, in the order of the sites,
and stay. Evaluation decides without noise and really removes tokens, unlike the official code.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from prunefront.methods.base import Call, Masking, MethodOptions
from prunefront.methods.dynamicvit import init_linears
from prunefront.methods.selection import KEEP, SelectingMethod, decide, pooled_with_local
from prunefront.ops.tokens import Tokens

if TYPE_CHECKING:
    from prunefront.geometry import ModelGeometry
    from prunefront.schedule import Step

_LEAST_WEIGHT = 1e-6

# SPViT: in_conv.K.… and out_conv.K.… of head K.
_HEAD_COPY = re.compile(r"(?P<part>\b(?:in|out)_conv)\.\d+\.(?=\d+\.)")


class SPViTOptions(MethodOptions):
    mode: Literal["adaptive", "bucketed", "fixed"] = Field(
        default="adaptive",
        description="adaptive: each image keeps what its scores say; bucketed: rounded up to a multiple of bucket; "
        "fixed: every image keeps the schedule's count.",
    )
    bucket: Annotated[int, Field(ge=1)] = 8
    package_norm: Literal["sum", "mean"] = Field(
        default="sum", description="How dropped tokens become one: sum as in the checkpoints, mean as in the paper."
    )


class TokenSelector(nn.Module):
    """Scores of tokens from each head's channels, weighted per token and head.

    Names are the official checkpoints'. There all heads share one scorer that is stored once per head; so do we,
    unless a checkpoint brings different ones (`separate_heads`).
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads, width = num_heads, dim // num_heads
        hidden = max(num_heads // 2, 1)
        self.senet = nn.Sequential(nn.Linear(num_heads, hidden), nn.GELU(), nn.Linear(hidden, num_heads))
        self.in_conv = nn.ModuleList([nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU())])
        self.out_conv = nn.ModuleList(
            [
                nn.Sequential(
                    nn.Linear(width, width // 2), nn.GELU(),
                    nn.Linear(width // 2, width // 4), nn.GELU(),
                    nn.Linear(width // 4, 2),
                )
            ]
        )  # fmt: skip
        init_linears(self)

    def separate_heads(self) -> None:
        """Give every head a scorer of its own, equal at first."""
        for parts in (self.in_conv, self.out_conv):
            parts.extend(copy.deepcopy(parts[0]) for _ in range(self.num_heads - len(parts)))

    def forward(self, x: Tensor, policy: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Score tokens.

        Args:
            x: Residual stream, not normalised, packages included, (B, N, C).
            policy: 1 for tokens still there, (B, N); None for all.

        Returns:
            Decision scores and package weights, both (B, N, 2), column 0 = keep: head-weighted means of log-softmax and
            softmax. The first does not normalise, the second sums to 1.
        """
        heads = x.reshape(*x.shape[:2], self.num_heads, -1).transpose(1, 2)  # (B, H, N, D)
        weight = self.senet(heads.mean(dim=-1).transpose(1, 2)).sigmoid()  # (B, N, H)
        seen = None if policy is None else policy.unsqueeze(1)
        if len(self.in_conv) == 1:
            z = self.out_conv[0](pooled_with_local(self.in_conv[0](heads), seen))
        else:
            of_head = [
                self.out_conv[k](pooled_with_local(self.in_conv[k](heads[:, k : k + 1]), seen))
                for k in range(self.num_heads)
            ]
            z = torch.cat(of_head, dim=1)
        # All weights can underflow on extreme packages; 0 / 0 is a NaN in the official code.
        share = (weight / weight.sum(dim=-1, keepdim=True).clamp(min=_LEAST_WEIGHT)).transpose(1, 2).unsqueeze(-1)
        return (share * z.log_softmax(dim=-1)).sum(dim=1), (share * z.softmax(dim=-1)).sum(dim=1)


def shared_heads(state: Mapping[str, Tensor], selectors: Sequence[TokenSelector]) -> dict[str, Tensor]:
    """SPViT's state with the scorer that all heads share stored once, as `TokenSelector` has it.

    Checkpoints repeat it for every head. Where the copies differ, each head keeps its own and the selectors are told.
    """
    copies = [name for name in state if _HEAD_COPY.search(name)]
    first = {name: _HEAD_COPY.sub(r"\g<part>.0.", name) for name in copies}
    if all(torch.equal(state[name], state[first[name]]) for name in copies):
        return {name: tensor for name, tensor in state.items() if name not in first or first[name] == name}
    for selector in selectors:
        selector.separate_heads()
    return dict(state)


class SPViT(SelectingMethod):
    name = "spvit"
    title = "SPViT"
    paper = "arXiv:2112.13890"
    options_model = SPViTOptions
    carries_added_tokens = True

    def adds_token(self, op: str) -> bool:
        return True

    def least_kept(self, op: str, present: int) -> int:
        return 0  # class token and packages remain

    def is_static(self, options: Mapping[str, Any], steps: Sequence[Step], geometry: ModelGeometry) -> bool:
        return options["mode"] == "fixed" or not steps

    def create_predictor(self, geometry: ModelGeometry) -> nn.Module:
        return TokenSelector(geometry.embed_dim, geometry.num_heads)

    def predictor_macs_per_token(self, geometry: ModelGeometry) -> int:
        heads = geometry.num_heads
        dim = geometry.embed_dim // heads
        scorer = dim * dim + dim * (dim // 2) + (dim // 2) * (dim // 4) + (dim // 4) * 2
        return heads * scorer + 2 * heads * max(heads // 2, 1)

    def select(self, tokens: Tokens, step: Step, call: Call) -> Tokens:
        assert call.predictor is not None
        prefix, packages = tokens.num_prefix, tokens.num_packages
        x = tokens.x[:, prefix:]
        patches = x.shape[1] - packages
        there = None if tokens.present is None else tokens.present[:, prefix:]
        scores, soft = call.predictor(x, None if there is None else there.to(x.dtype))
        margin = (scores[..., KEEP] - scores[..., 1])[:, :patches]
        there = None if there is None else there[:, :patches]
        if there is not None:
            margin = margin.masked_fill(~there, -torch.inf)

        counts = self._counts(margin, there, step, call.options)  # (B,) or the same for all
        if isinstance(counts, int):
            most, valid = counts, None
        else:
            most = int(counts.max())
            valid = torch.arange(most, device=x.device) < counts.unsqueeze(1)
        order = margin.detach().argsort(dim=-1, descending=True, stable=True)[:, :most]
        # Which tokens the package holds: all that are there and not kept.
        taken = torch.ones_like(order, dtype=torch.bool) if valid is None else valid
        dropped = torch.ones_like(margin, dtype=torch.bool).scatter(1, order, ~taken)
        if there is not None:
            dropped &= there
        package = self._package(x[:, :patches], soft[:, :patches, KEEP] * dropped, call.options)

        last = torch.arange(patches, patches + packages, device=x.device).expand(order.shape[0], -1)
        left = tokens.take(torch.cat((order, last), dim=1)).append(package.unsqueeze(1))
        present = None
        if valid is not None and not bool(valid.all()):
            present = torch.ones(left.x.shape[:2], dtype=torch.bool, device=x.device)
            present[:, prefix : prefix + most] = valid
        if call.recorder is not None:
            end = left.x.shape[1] - 1
            slots = torch.where(taken, prefix + torch.arange(most, device=x.device), end)
            assignment = torch.full((order.shape[0], tokens.x.shape[1]), end, device=x.device).scatter(
                1, prefix + order, slots
            )
            assignment[:, :prefix] = torch.arange(prefix, device=x.device)
            assignment[:, prefix + patches :] = prefix + most + torch.arange(packages, device=x.device)
            call.recorder.add(
                step.op, assignment, pred_score=scores, softmax_score=soft, package_token=package,
                counts=taken.sum(dim=1),
            )  # fmt: skip
            call.recorder.add_decision(prefix, prefix + most)
        return left.but(present=present, num_packages=packages + 1)

    @staticmethod
    def _counts(margin: Tensor, there: Tensor | None, step: Step, options: Mapping[str, Any]) -> Tensor | int:
        """Patches that each image keeps, (B,); an integer where all keep the schedule's."""
        if options["mode"] == "fixed":
            return step.kept
        counts = (margin >= 0).sum(dim=1)
        if options["mode"] == "bucketed":
            bucket = options["bucket"]
            all_there = margin.shape[1] if there is None else there.sum(dim=1)
            counts = ((counts + bucket - 1) // bucket * bucket).clamp(max=all_there)
        return counts

    @staticmethod
    def _package(x: Tensor, weights: Tensor, options: Mapping[str, Any]) -> Tensor:
        """Weighted sum (or mean) of tokens (B, N, C) by ``weights`` (B, N): (B, C)."""
        if options["package_norm"] == "mean":
            weights = weights / weights.sum(dim=1, keepdim=True).clamp(min=_LEAST_WEIGHT)
        return (weights.unsqueeze(1) @ x).squeeze(1)

    def mask(self, tokens: Tokens, call: Call, masking: Masking) -> Tokens:
        assert call.predictor is not None and tokens.decision is not None
        prefix, patches = tokens.num_prefix, tokens.decision.shape[1]
        x = tokens.x[:, prefix:]
        before = F.pad(tokens.decision, (0, tokens.num_packages), value=1.0)
        scores, soft = call.predictor(x, before)
        decision = decide(scores, before, call.stage, masking)[:, :patches]
        dropped = tokens.decision - decision
        package = self._package(x[:, :patches], dropped * soft[:, :patches, KEEP], call.options)
        if call.recorder is not None:
            stay = torch.arange(tokens.x.shape[1], device=x.device).expand(len(x), -1)
            call.recorder.add(
                "select", stay, pred_score=scores, softmax_score=soft, package_token=package, drop_decision=dropped
            )
            call.recorder.decisions.append(decision)
        left = tokens.append(package.unsqueeze(1))
        return left.but(decision=decision, num_packages=tokens.num_packages + 1)
