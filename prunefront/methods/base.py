"""What every token-reduction method provides, in integers for schedules and in tensors for models."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from prunefront.config import Site, describe_validation_error
from prunefront.errors import ConfigError, ModelError
from prunefront.ops.attention import AttentionState, log_size_bias
from prunefront.ops.tokens import Tokens, with_prefix

if TYPE_CHECKING:
    from torch import nn

    from prunefront.blocks import Blocks
    from prunefront.geometry import ModelGeometry
    from prunefront.schedule import Step


class MethodOptions(BaseModel):
    """Options of a method; complete after parsing, so that equal meanings hash alike."""

    model_config = ConfigDict(extra="forbid", frozen=True)


@dataclass(kw_only=True)
class SiteRecord:
    """What one reduction decided, for losses and pictures.

    ``assignment`` (B, N) gives for each token that entered the absolute position it went to, -1 when dropped.
    ``values`` are the method's own: scores, kept_idx, var, policy, merge_src, merge_dst, similarity, ...; positions
    in them count from the first non-prefix token entering the reduction unless the method says otherwise.
    """

    block: int
    op: str
    assignment: Tensor
    values: dict[str, Tensor] = field(default_factory=dict)


@dataclass(kw_only=True)
class Aux:
    """What a forward pass did to its tokens (``return_aux=True``).

    Attributes:
        tokens: Final normalised tokens, (B, N, C).
        size: Their sizes, (B, N) in float32, or None where the method never set any.
        origin: For every token that entered block 0, the position it ended in, -1 when dropped; (B, N0).
        sites: One record per reduction, in order of execution.
        sizes: Token sizes leaving each block, (B, N), from the first reduction on.
        num_packages: Tokens at the end of ``tokens`` that a method appended and never ranks.
        present: False where ``tokens`` is padding, (B, N), or None where every token is real.
        decisions: Of methods with learned selection, per stage: 1 for the initial patches still kept after it, 0 for
            the others, (B, patches). In training with the gradient of the straight-through estimator, nested: a token
            once dropped stays dropped.
        class_logits: Logits of the class token alone, (B, classes); equal to the model's where nothing else votes.
        token_logits: Logits of each token from the first patch on, (B, N - prefix, classes), where the backbone has
            such a head (LV-ViT), else None.
        token_places: Which initial patch, from 0, each of ``token_logits`` is about, (B, N - prefix); -1 for tokens
            that have no vote: fused, padding, or masked. A merged token stands where the one stood that took others in.
        class_tokens: The first token leaving each block, (depth, B, C), before the final norm.
        class_attention: Head-mean attention of the class token to the patches in the last block, (B, N - prefix); of
            ``trilevel`` alone.
    """

    tokens: Tensor
    size: Tensor | None
    origin: Tensor
    sites: list[SiteRecord]
    sizes: dict[int, Tensor]
    num_packages: int = 0
    present: Tensor | None = None
    decisions: list[Tensor] = field(default_factory=list)
    class_logits: Tensor | None = None
    token_logits: Tensor | None = None
    token_places: Tensor | None = None
    class_tokens: Tensor | None = None
    class_attention: Tensor | None = None


class Recorder:
    """Collects `SiteRecord` of one forward pass. Made per call: models keep no state between calls."""

    def __init__(self, batch: int, tokens: int, device: torch.device) -> None:
        self.origin = torch.arange(tokens, device=device).expand(batch, tokens)
        self.sites: list[SiteRecord] = []
        self.sizes: dict[int, Tensor] = {}
        self.decisions: list[Tensor] = []
        self.class_tokens: list[Tensor] = []
        self.class_attention: Tensor | None = None
        self.block = 0

    def add(self, op: str, assignment: Tensor, **values: Tensor) -> None:
        self.sites.append(SiteRecord(block=self.block, op=op, assignment=assignment, values=values))
        followed = assignment.gather(1, self.origin.clamp(min=0))
        self.origin = torch.where(self.origin < 0, self.origin, followed)

    def add_decision(self, num_prefix: int, end: int | None = None) -> None:
        """Note which initial patches are still among the tokens before position ``end`` (None for all)."""
        origin = self.origin[:, num_prefix:]
        kept = origin >= 0
        self.decisions.append((kept if end is None else kept & (origin < end)).float())


@dataclass(frozen=True, kw_only=True)
class Masking:
    """How methods with learned selection run without removing anything: dropped tokens are masked in the attention.

    Attributes:
        eps: Share of attention spread over all keys; 1e-6 in training.
        noise: (stage, scores (B, N, 2)) → Gumbel noise of the same shape, or None to decide without.
    """

    eps: float
    noise: Callable[[int, Tensor], Tensor] | None


@dataclass(frozen=True, kw_only=True)
class Call:
    """What one forward pass tells a method about one block.

    Attributes:
        options: Complete options of the method.
        stage: Which of the config's sites act in this block: number of the first one, from 0.
        predictor: Learned parts of the site, where the method has any.
        masking: Mask dropped tokens instead of removing them; None removes.
        recorder: Takes the decisions when wanted.
        is_last_block: Whether no block comes after this one.
    """

    options: Mapping[str, Any]
    stage: int = 0
    predictor: nn.Module | None = None
    masking: Masking | None = None
    recorder: Recorder | None = None
    is_last_block: bool = False


class Method(ABC):
    """A method's rules and operations. Stateless: everything a call needs is passed to it."""

    name: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[str]
    dropping_ops: ClassVar[tuple[str, ...]] = ()
    merging_ops: ClassVar[tuple[str, ...]] = ()
    two_sites_per_block: ClassVar[bool] = False
    ranking_ops: ClassVar[tuple[str, ...]] = ()  # need a class token
    acts_when_nothing_is_removed: ClassVar[bool] = False
    acts_before_attention: ClassVar[bool] = False  # else between attention and MLP
    carries_added_tokens: ClassVar[bool] = False  # else an added token is ranked like any other at the next site
    masks_in_training: ClassVar[bool] = False  # nothing is removed while the model trains
    needs_training: ClassVar[bool] = False  # of little use off the shelf: learned parts, or made for training
    resizes_position_embedding: ClassVar[bool] = False
    runs_on_stages: ClassVar[bool] = False  # models of several stages with windowed attention (Swin)
    options_model: ClassVar[type[MethodOptions]] = MethodOptions

    @property
    def ops(self) -> tuple[str, ...]:
        return self.dropping_ops + self.merging_ops

    # Rules, integers only ------------------------------------------------------------------------------------------

    def parse_options(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Complete, typed options.

        Raises:
            ConfigError: If an option is unknown or out of range.
        """
        try:
            return self.options_model.model_validate(dict(options)).model_dump(mode="json")
        except ValidationError as error:
            known = ", ".join(self.options_model.model_fields) or "none"
            raise ConfigError(
                f"Options of method {self.name!r}: {describe_validation_error(error)}. Known options: {known}."
            ) from error

    def check_sites(self, sites: Sequence[Site]) -> None:
        """Refuse operations and combinations the method does not have.

        Raises:
            ConfigError: Naming block, operation and what is allowed.
        """
        in_block: dict[int, list[str]] = {}
        for site in sites:
            if site.op not in self.ops:
                raise ConfigError(
                    f"Method {self.name!r} has no operation {site.op!r} (block {site.block}); "
                    f"it has {', '.join(self.ops)}."
                )
            in_block.setdefault(site.block, []).append(site.op)
        for block, ops in in_block.items():
            allowed = len(ops) == 1 or (
                self.two_sites_per_block
                and len(ops) == 2
                and ops[0] in self.dropping_ops
                and ops[1] in self.merging_ops
            )
            if not allowed:
                rule = "one dropping site and, after it, one merging site" if self.two_sites_per_block else "one site"
                raise ConfigError(
                    f"Method {self.name!r} allows {rule} per block, but block {block} has {', '.join(ops)}. "
                    "Remove or move the surplus."
                )

    def check_geometry(self, geometry: ModelGeometry, sites: Sequence[Site]) -> None:
        """Refuse models the method cannot rank tokens on.

        Raises:
            ModelError: With the reason and what works instead.
        """
        if geometry.stages:
            if sites and not self.runs_on_stages:
                raise ModelError(
                    f"Method {self.name!r} does not run on Swin, whose blocks attend inside windows of a grid that has "
                    "to stay whole between stages. Use trilevel, or a plain ViT."
                )
            return
        ranking = sorted({site.op for site in sites if site.op in self.ranking_ops})
        if ranking and not geometry.has_class_token:
            raise ModelError(
                f"Method {self.name!r} ({', '.join(ranking)}) ranks tokens by the attention of the class token, but "
                f"this model has none (it pools by {geometry.global_pool!r}). Use tome, or hybrid with merge sites."
            )

    def least_kept(self, op: str, present: int) -> int:
        """Fewest of ``present`` non-prefix tokens the operation can leave; sites asking for fewer are clamped."""
        return 1

    def adds_token(self, op: str) -> bool:
        """Whether the operation appends one token that is not counted as kept."""
        return False

    def kept_of(self, share: float, tokens: int) -> int:
        """Tokens that a ratio keeps of ``tokens``. Rounded up on Python floats, as in EViT's official code."""
        return math.ceil(share * tokens)

    def is_static(self, options: Mapping[str, Any], steps: Sequence[Step], geometry: ModelGeometry) -> bool:
        """Whether every image of such a model keeps the counts of the schedule."""
        return True

    # Tensors -------------------------------------------------------------------------------------------------------

    def create_predictor(self, geometry: ModelGeometry) -> nn.Module | None:
        """The learned parts of one site, freshly initialised; None for methods without any."""
        return None

    def predictor_macs_per_token(self, geometry: ModelGeometry) -> int:
        """MACs of the learned parts for one token that they score, packages included."""
        return 0

    def uses_size_bias(self, options: Mapping[str, Any]) -> bool:
        """Whether attention is proportional to token size."""
        return False

    def attention_bias(self, tokens: Tokens, call: Call) -> Tensor | None:
        """What a block's attention adds to its logits, or which keys it may see."""
        if tokens.present is not None:
            return tokens.present[:, None, None, :]
        return log_size_bias(tokens.size, tokens.x.dtype) if self.uses_size_bias(call.options) else None

    def looks_at_attention(self, call: Call) -> bool:
        """Whether `reduce` is wanted for the attention of a block that reduces nothing."""
        return False

    def forward_block(
        self, blocks: Blocks, block: nn.Module, tokens: Tokens, steps: Sequence[Step], call: Call
    ) -> Tokens:
        """One transformer block with its reductions.

        Args:
            blocks: The family of ``block``.
            block: A block.
            tokens: Entering it.
            steps: Reductions of this block, effective integers; without any the block runs as its library has it,
                unless the method looks at its attention.
            call: Of this block.
        """
        bias = self.attention_bias(tokens, call)
        if not steps and not self.looks_at_attention(call):
            return tokens.but(x=blocks.whole(block, tokens, bias))
        branch, state = blocks.attention(block, tokens, bias)
        tokens = self.reduce(tokens.but(x=tokens.x + branch), state, steps, call)
        return tokens.but(x=tokens.x + blocks.mlp(block, tokens.x))

    @abstractmethod
    def reduce(self, tokens: Tokens, state: AttentionState, steps: Sequence[Step], call: Call) -> Tokens:
        """Carry out the steps of one block, between its attention and its MLP.

        Args:
            tokens: After the attention residual.
            state: Of this block's attention.
            steps: Effective integers.
            call: Of this block.
        """


def kept_assignment(index: Tensor, num_prefix_tokens: int, tokens: int, rest: int = -1) -> Tensor:
    """Assignment (B, tokens) after keeping prefix and ``index`` in that order; all others go to ``rest``."""
    positions = with_prefix(index, num_prefix_tokens)
    target = torch.arange(positions.shape[1], device=index.device).expand_as(positions)
    return torch.full((index.shape[0], tokens), rest, device=index.device).scatter(1, positions, target)
