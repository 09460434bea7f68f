"""The methods as their papers' codes run them: eager, whole attention maps, sorting, gathering and scattering.

Written from the equations and the method notes, to be measured against: `benchmarks.inference` says how much faster
the library is than this. Logits are the library's (tested).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from prunefront.errors import ConfigError
from prunefront.methods.selection import KEEP
from prunefront.schedule import Step

State = tuple[Tensor, Tensor | None]  # tokens (B, N, C), sizes (B, N) or None


class Reference(nn.Module):
    """A compressed plain ViT with one class token, run block by block from the equations."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        if model.prune_config.sites and model.prune_config.method not in REFERENCED:
            raise ConfigError(
                f"The eager reference has {', '.join(REFERENCED)}, but got a model of {model.prune_config.method}."
            )
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        model: Any = self.model
        method, options = model.prune_config.method, model._options(None)
        x = model.pos_drop(torch.cat((model.cls_token.expand(len(images), -1, -1), model.patch_embed(images)), 1)
                           + model.pos_embed)  # fmt: skip
        size: Tensor | None = None
        stage = 0
        for block, plan in zip(model.blocks, model._blocks_plan, strict=True):
            if method == "dynamicvit" and plan.steps:
                x = select(x, model.score_predictor[stage], plan.steps[0])
                stage += 1
            q, k, v, attention = attend(block, x, size if options.get("prop_attn", method == "diffrate") else None)
            x = x + block.attn.proj((attention @ v).transpose(1, 2).flatten(2))
            if method in REDUCE and plan.steps:
                x, size = REDUCE[method](x, size, attention, k, v, plan.steps, options)
            x = x + block.mlp(block.norm2(x))
        logits: Tensor = model.head(model.norm(x)[:, 0])
        return logits


def attend(block: Any, x: Tensor, size: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, keys, values (B, H, N, D) and the whole attention map (B, H, N, N)."""
    batch, tokens, width = x.shape
    heads = block.attn.num_heads
    q, k, v = block.attn.qkv(block.norm1(x)).reshape(batch, tokens, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
    attention = (q @ k.transpose(-2, -1)) * block.attn.scale
    if size is not None:
        attention = attention + size.log()[:, None, None, :].to(attention.dtype)
    return q, k, v, attention.softmax(dim=-1)


def rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows of (B, N, C) at (B, K)."""
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def select(x: Tensor, predictor: nn.Module, step: Step) -> Tensor:
    """DynamicViT in evaluation: the best tokens by the predictor's keep score."""
    score = predictor(x[:, 1:])[..., KEEP]
    kept = score.argsort(dim=1, descending=True)[:, : step.kept]
    return torch.cat((x[:, :1], rows(x[:, 1:], kept)), dim=1)


def evit(x: Tensor, attention: Tensor, step: Step) -> tuple[Tensor, Tensor, Tensor]:
    """The tokens that stay, with the fused one behind them; the scores and the kept positions."""
    patches = x[:, 1:]
    score = attention[:, :, 0, 1:].mean(dim=1)
    kept = score.topk(step.kept, dim=1).indices
    left = torch.cat((x[:, :1], rows(patches, kept)), dim=1)
    if step.op == "fuse":
        left = torch.cat((left, fused(patches, score, kept)), dim=1)
    return left, score, kept


def fused(values: Tensor, score: Tensor, kept: Tensor) -> Tensor:
    """Dropped rows, gathered, weighted by their scores and added: (B, 1, C)."""
    order = torch.arange(values.shape[1], device=values.device).expand(len(values), -1)
    dropped = order.scatter(1, kept, -1).sort(dim=1).values[:, kept.shape[1] :]
    return (rows(values, dropped) * score.gather(1, dropped).unsqueeze(-1)).sum(dim=1, keepdim=True)


def tome(x: Tensor, size: Tensor | None, metric: Tensor, removed: int) -> State:
    """Bipartite matching of patch tokens by ``metric`` (B, N - 1, D), then the size-weighted mean."""
    metric = metric / metric.norm(dim=-1, keepdim=True)
    # With one class token in front, set a begins at the second patch.
    best, destination = (metric[:, 1::2] @ metric[:, ::2].transpose(-2, -1)).max(dim=-1)
    order = best.argsort(dim=-1, descending=True)
    source, stay = order[:, :removed], order[:, removed:].sort(dim=-1).values
    destination = destination.gather(1, source)
    size = torch.ones(x.shape[:2], device=x.device) if size is None else size

    def merge(values: Tensor) -> Tensor:
        a, b = values[:, 2::2], values[:, 1::2]
        target = destination.unsqueeze(-1).expand(-1, -1, values.shape[-1])
        b = b.scatter_reduce(1, target, rows(a, source), reduce="sum")
        return torch.cat((values[:, :1], rows(a, stay), b), dim=1)

    merged_size = merge(size.unsqueeze(-1))
    return (
        merge(x * size.unsqueeze(-1).to(x.dtype)) / merged_size.to(x.dtype),
        merged_size.squeeze(-1),
    )


def _evit(x: Tensor, size: Tensor | None, attention: Tensor, k: Tensor, v: Tensor, steps: Any, options: Any) -> State:
    return evit(x, attention, steps[0])[0], None


def _tome(x: Tensor, size: Tensor | None, attention: Tensor, k: Tensor, v: Tensor, steps: Any, options: Any) -> State:
    return tome(x, size, k[:, :, 1:].mean(dim=1), steps[0].removed)


def _ppt(x: Tensor, size: Tensor | None, attention: Tensor, k: Tensor, v: Tensor, steps: Any, options: Any) -> State:
    step = steps[0]
    score = attention[:, :, 0, 1:].float().sum(dim=1) * v.transpose(1, 2).flatten(2)[:, 1:].float().norm(dim=-1)
    score = score / score.sum(dim=-1, keepdim=True)
    pools = score.var(dim=-1) < options["threshold"]
    kept = torch.cat((kept_class(score), 1 + score.topk(step.kept, dim=1).indices), dim=1)
    before = torch.ones(x.shape[:2], device=x.device) if size is None else size
    pooled, pooled_size = tome(x, size, k[:, :, 1:].mean(dim=1), step.removed)
    assert pooled_size is not None
    return (
        torch.where(pools[:, None, None], pooled, rows(x, kept)),
        torch.where(pools[:, None], pooled_size, before.gather(1, kept)),
    )


def kept_class(score: Tensor) -> Tensor:
    """Position 0 for each image, (B, 1)."""
    return torch.zeros(len(score), 1, dtype=torch.long, device=score.device)


def _diffrate(
    x: Tensor, size: Tensor | None, attention: Tensor, k: Tensor, v: Tensor, steps: Any, options: Any
) -> State:
    size = torch.ones(x.shape[:2], device=x.device) if size is None else size
    score = attention[:, :, 0, 1:].mean(dim=1)
    order = torch.cat((kept_class(score), 1 + score.argsort(dim=1, descending=True)), dim=1)
    x, size = rows(x, order), size.gather(1, order)
    for step in steps:
        left = 1 + step.kept
        if step.op == "prune":
            x, size = x[:, :left], size[:, :left]
            continue
        unit = x / x.norm(dim=-1, keepdim=True)
        best, destination = (unit[:, left:] @ unit[:, 1:left].transpose(-2, -1)).max(dim=-1)
        target = destination.unsqueeze(-1).expand(-1, -1, x.shape[-1])
        merged = x[:, 1:left].scatter_reduce(1, target, x[:, left:], reduce="mean")
        sizes = size[:, 1:left].scatter_reduce(1, destination, size[:, left:] * best.float(), reduce="sum")
        x, size = torch.cat((x[:, :1], merged), dim=1), torch.cat((size[:, :1], sizes), dim=1)
    return x, size


def _hybrid(x: Tensor, size: Tensor | None, attention: Tensor, k: Tensor, v: Tensor, steps: Any, options: Any) -> State:
    metric = k[:, :, 1:].mean(dim=1)
    for step in steps:
        if step.op == "merge":
            x, size = tome(x, size, metric, step.removed)
            continue
        before = torch.ones(x.shape[:2], device=x.device) if size is None else size
        x, score, kept = evit(x, attention, step)
        size = torch.cat((before[:, :1], before[:, 1:].gather(1, kept)), dim=1)
        left = rows(metric, kept)
        if step.op == "fuse":
            size = torch.cat((size, (before.sum(dim=1) - size.sum(dim=1)).unsqueeze(1)), dim=1)
            left = torch.cat((left, fused(metric, score, kept)), dim=1)
        metric = left
    return x, size


# Method -> its reduction between attention and MLP.
REDUCE: dict[str, Callable[..., State]] = {
    "evit": _evit, "tome": _tome, "ppt": _ppt, "diffrate": _diffrate, "hybrid": _hybrid,
}  # fmt: skip
REFERENCED = (*REDUCE, "dynamicvit")  # Methods that `Reference` runs.
