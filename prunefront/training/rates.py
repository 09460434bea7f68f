"""DiffRate's learning of kept counts: by gradient, under a cost target, with the model's weights frozen.

Chen et al., "DiffRate: Differentiable Compression Rate for Efficient Vision Transformers", ICCV 2023
(arXiv:2305.17997), Section 3. Implemented from the paper. What is learned is two integers per block, tokens kept after
pruning and after merging; they come out as a ``diffrate`` config that any checkpoint of the model can use.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from prunefront.backbones.vit import VIT_BLOCKS
from prunefront.compress import compress
from prunefront.config import PruneConfig
from prunefront.errors import ModelError
from prunefront.geometry import ModelGeometry, geometry_of, require_supported
from prunefront.methods.diffrate import mean_kept
from prunefront.ops.attention import AttentionState, attention_logits, masked_softmax
from prunefront.ops.merge import assignment_matrix
from prunefront.ops.tokens import Tokens
from prunefront.published_schedules import diffrate_sites

EPS = 1e-6


@dataclass(frozen=True, kw_only=True)
class KeptCounts:
    """Tokens kept after pruning and after merging in each block, class token included, with gradients; scalars."""

    prune: tuple[Tensor, ...]
    merge: tuple[Tensor, ...]

    def integers(self) -> tuple[list[int], list[int]]:
        """The counts as they would be used."""
        return [round(float(count.detach())) for count in self.prune], [
            round(float(count.detach())) for count in self.merge
        ]


Cost = Callable[[KeptCounts], Tensor]  # of a forward pass, in the unit of the target; differentiable in the counts


class RateProxy(nn.Module):
    """A differentiable count of kept tokens: a distribution over candidates, its mean rounded up (Section 3.2)."""

    def __init__(self, num_patches: int, granularity: int) -> None:
        super().__init__()
        candidates = torch.arange(num_patches, 0, -granularity, dtype=torch.float32)
        self.register_buffer("candidates", candidates)
        self.logits = nn.Parameter(torch.zeros(len(candidates)))

    def forward(self) -> tuple[Tensor, Tensor]:
        """The count, class token included, as a scalar, and each rank's probability to stay, (patches + 1,)."""
        candidates = cast(Tensor, self.candidates)
        probability = self.logits.softmax(dim=0)
        mean = mean_kept(candidates, self.logits)
        count = mean + (mean.ceil() - mean).detach() + 1
        ranks = torch.arange(int(candidates[0]) + 1, device=mean.device)
        stays = (probability.unsqueeze(0) * (candidates.unsqueeze(0) + 1 > ranks.unsqueeze(1))).sum(dim=1)
        return count, stays


class Rates(nn.Module):
    """The proxies of a model: two per block, none in the first, which keeps everything."""

    def __init__(self, geometry: ModelGeometry, granularity: int = 4) -> None:
        super().__init__()
        patches = geometry.num_patch_tokens
        learned = range(1, geometry.depth)
        self.depth, self.num_tokens = geometry.depth, geometry.num_tokens
        self.prune = nn.ModuleDict({str(block): RateProxy(patches, granularity) for block in learned})
        self.merge = nn.ModuleDict({str(block): RateProxy(patches, granularity) for block in learned})

    def proxies(self, block: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]] | None:
        """(count, stays) after pruning and after merging of a block; None where nothing is learned."""
        if str(block) not in self.prune:
            return None
        return self.prune[str(block)](), self.merge[str(block)]()

    def counts(self) -> KeptCounts:
        """What the proxies say at present."""
        everything = next(self.parameters()).new_tensor(float(self.num_tokens))
        said = [self.proxies(block) for block in range(self.depth)]
        return KeptCounts(
            prune=tuple(everything if proxy is None else proxy[0][0] for proxy in said),
            merge=tuple(everything if proxy is None else proxy[1][0] for proxy in said),
        )

    def sites(self) -> list[dict[str, Any]]:
        """Sites of a ``diffrate`` config with the counts of now."""
        return diffrate_sites(*self.counts().integers(), only_removing=True)


def require_ranked_by_class_token(model: nn.Module) -> VisionTransformer:
    """Refuse models whose rates cannot be learned.

    Raises:
        ModelError: With the reason.
    """
    vit = require_supported(model)
    if not isinstance(vit, VisionTransformer) or not vit.has_class_token or vit.num_prefix_tokens != 1:
        raise ModelError(
            f"DiffRate's rates are learned on plain ViTs with a class token and no other prefix, but "
            f"{type(model).__name__} is none. Search its schedule instead."
        )
    return vit


def masked_forward(model: nn.Module, rates: Rates, images: Tensor) -> Tensor:
    """Logits with all tokens in place and dropped ones masked, differentiable in the rates.

    As the paper trains: masks are 0 or 1 with the gradient of the ranks' probabilities; merged tokens are averaged
    into their destinations and masked; the sizes of merged tokens are at least 1, other than at inference.

    Args:
        model: A dense plain ViT; its weights get no gradient here that the caller does not ask for.
        rates: Proxies for its blocks.
        images: (B, channels, height, width).
    """
    vit = cast(VisionTransformer, model)
    x = vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(images))))
    batch, total, _ = x.shape
    size = x.new_ones(batch, total, dtype=torch.float32)
    mask = torch.ones_like(size)
    live = total
    for index, block in enumerate(vit.blocks):
        weights: list[Tensor] = []

        def weigh(
            state: AttentionState, size: Tensor = size, mask: Tensor = mask, kept: list[Tensor] = weights
        ) -> Tensor:
            logits = attention_logits(state) + size.log()[:, None, None, :]
            kept.append(masked_softmax(logits, mask, EPS))
            return kept[0]

        x = x + VIT_BLOCKS.weighed_attention(block, Tokens(x=x, num_prefix=1), weigh)
        proxies = rates.proxies(index)
        if proxies is not None:
            score = weights[0].detach().mean(dim=1)[:, 0].masked_fill(mask.detach() == 0, -1.0)
            score[:, 0] = torch.inf
            order = score.argsort(dim=1, descending=True, stable=True)
            x = x.gather(1, order.unsqueeze(-1).expand_as(x))
            size, mask = size.gather(1, order), mask.gather(1, order)
            (prune, stays_pruned), (merge, stays_merged) = proxies
            kept = int(prune.detach())
            if kept < live:
                mask = mask * _straight_through(kept, stays_pruned)
                live = kept
            kept = int(merge.detach())
            if kept < live:
                x, size = _merge_masked(x, size, kept, live)
                mask = mask * _straight_through(kept, stays_merged)
                live = kept
        x = x + VIT_BLOCKS.mlp(block, x)
    return cast(Tensor, vit.forward_head(vit.norm(x)[:, :1]))


def _straight_through(kept: int, stays: Tensor) -> Tensor:
    """1 for the first ``kept`` ranks and 0 behind, with the gradient of the ranks' probabilities."""
    hard = (torch.arange(len(stays), device=stays.device) < kept).to(stays.dtype)
    return hard - stays.detach() + stays


def _merge_masked(x: Tensor, size: Tensor, kept: int, live: int) -> tuple[Tensor, Tensor]:
    """Average ranks ``kept`` to ``live`` into their most similar ones among 1 to ``kept``; all stay in place."""
    unit = F.normalize(x.detach(), dim=-1)
    if kept < 2:  # only the class token would be left to merge into, which takes none
        return x, size
    similarity, target = (unit[:, kept:live] @ unit[:, 1:kept].transpose(-2, -1)).max(dim=-1)
    adds = assignment_matrix(target, kept - 1)
    count = adds.sum(dim=-1, keepdim=True) + 1
    merged = (x[:, 1:kept] + adds.to(x.dtype) @ x[:, kept:live]) / count.to(x.dtype)
    grown = size[:, 1:kept] + (adds * (similarity.float() * size[:, kept:live]).clamp(min=1.0).unsqueeze(1)).sum(dim=-1)
    return torch.cat((x[:, :1], merged, x[:, kept:]), dim=1), torch.cat((size[:, :1], grown, size[:, kept:]), dim=1)


def macs_cost(geometry: ModelGeometry) -> Cost:
    """MACs per image of a model under kept counts, as `prunefront.macs` counts them; differentiable."""

    def cost(counts: KeptCounts) -> Tensor:
        entering = counts.prune[0].new_tensor(float(geometry.num_tokens))
        total = entering.new_tensor(float(geometry.stem_macs + geometry.head_macs))
        per_token = geometry.qkv_macs_per_token + geometry.proj_macs_per_token
        pair = 2 * geometry.num_heads * geometry.head_dim
        for prune, merge in zip(counts.prune, counts.merge, strict=True):
            leaving = torch.minimum(torch.minimum(entering, prune), merge)
            total = total + entering * per_token + entering.square() * pair + leaving * geometry.mlp_macs_per_token
            entering = leaving
        return total

    return cost


def rates_loss(
    logits: Tensor, targets: Tensor, cost: Tensor, target: float, weight: float = 100.0, label_smoothing: float = 0.0
) -> Tensor:
    """Cross-entropy plus the squared distance from the cost target, both as a share of the dense model's cost.

    The official code weighs squared GMACs by 5; for DeiT-S that is 106 per squared share, which suits models of every
    size.

    Args:
        logits: (B, classes).
        targets: Labels (B,), or class shares (B, classes).
        cost: Of the counts, from a `Cost`, as a share of the dense model's.
        target: Likewise.
        weight: Of the cost term.
        label_smoothing: Spread of hard labels; mixed targets come smoothed already.
    """
    smoothing = label_smoothing if targets.ndim == 1 else 0.0
    return F.cross_entropy(logits.float(), targets, label_smoothing=smoothing) + weight * (cost - target).square()


class RateLearner(nn.Module):
    """A frozen model and its proxies, as a training sees them: in train mode logits and cost, else logits alone."""

    def __init__(
        self, model: nn.Module, config: PruneConfig, *, granularity: int = 4, cost: Cost | None = None
    ) -> None:
        """Freeze ``model`` and give it fresh proxies.

        Args:
            model: A plain ViT with a class token, compressed or not.
            config: A ``diffrate`` config of it; its sites are what is to be learned.
            granularity: Step between the candidates, in tokens.
            cost: What the target is about; MACs when left out.

        Raises:
            ModelError: If rates cannot be learned for such a model.
        """
        super().__init__()
        self.rates = rates_of(model, granularity)
        # Compressed once; each evaluation names the counts of now as its schedule.
        self.model: Any = compress(model, config).requires_grad_(False)
        self.prune_config = config
        self.cost = macs_cost(geometry_of(model)) if cost is None else cost
        everything = next(self.rates.parameters()).new_tensor(float(self.rates.num_tokens))
        depth = self.rates.depth
        self.dense_cost = float(self.cost(KeptCounts(prune=(everything,) * depth, merge=(everything,) * depth)))

    @property
    def num_classes(self) -> int:
        return int(self.model.num_classes)

    @property
    def pretrained_cfg(self) -> Any:
        return self.model.pretrained_cfg

    @property
    def patch_embed(self) -> Any:
        return self.model.patch_embed

    def train(self, mode: bool = True) -> RateLearner:
        """Switch to learning or not; the frozen model stays in eval mode."""
        super().train(mode)
        self.model.eval()
        return self

    def learned_config(self) -> PruneConfig:
        """The config with the counts of now."""
        return PruneConfig.model_validate({**self.prune_config.to_dict(), "sites": self.rates.sites(), "results": None})

    def compressed(self) -> nn.Module:
        """The model under the counts of now."""
        return compress(self.model, self.learned_config())

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Logits (B, classes), while learning with the cost of the counts as a share of the dense model's."""
        if not self.training:
            return cast(Tensor, self.model(images, schedule=self.rates.sites()))
        return masked_forward(self.model, self.rates, images), self.cost(self.rates.counts()) / self.dense_cost


def rates_of(model: nn.Module, granularity: int = 4) -> Rates:
    """Fresh proxies for a model's blocks, on its device.

    Args:
        model: A dense plain ViT with a class token.
        granularity: Step between the candidates, in tokens; the fewest kept are as many.

    Raises:
        ModelError: If rates cannot be learned for such a model.
    """
    vit = require_ranked_by_class_token(model)
    return Rates(geometry_of(vit), granularity).to(next(vit.parameters()).device)
