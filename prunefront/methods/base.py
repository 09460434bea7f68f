"""What every token-reduction method provides, in integers for schedules and in tensors for models."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from prunefront.config import Site, describe_validation_error
from prunefront.errors import ConfigError, ModelError
from prunefront.ops.attention import AttentionState
from prunefront.ops.select import take_tokens

if TYPE_CHECKING:
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
    """

    tokens: Tensor
    size: Tensor | None
    origin: Tensor
    sites: list[SiteRecord]
    sizes: dict[int, Tensor]


class Recorder:
    """Collects `SiteRecord` of one forward pass. Made per call: models keep no state between calls."""

    def __init__(self, batch: int, tokens: int, device: torch.device) -> None:
        self.origin = torch.arange(tokens, device=device).expand(batch, tokens)
        self.sites: list[SiteRecord] = []
        self.sizes: dict[int, Tensor] = {}
        self.block = 0

    def add(self, op: str, assignment: Tensor, **values: Tensor) -> None:
        self.sites.append(SiteRecord(block=self.block, op=op, assignment=assignment, values=values))
        followed = assignment.gather(1, self.origin.clamp(min=0))
        self.origin = torch.where(self.origin < 0, self.origin, followed)


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
    resizes_position_embedding: ClassVar[bool] = False
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

    # Tensors -------------------------------------------------------------------------------------------------------

    def uses_size_bias(self, options: Mapping[str, Any]) -> bool:
        """Whether attention is proportional to token size."""
        return False

    @abstractmethod
    def reduce(
        self,
        x: Tensor,
        size: Tensor | None,
        state: AttentionState,
        steps: Sequence[Step],
        *,
        num_prefix_tokens: int,
        options: Mapping[str, Any],
        recorder: Recorder | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Carry out the steps of one block, between its attention and its MLP.

        Args:
            x: Tokens after the attention residual, (B, N, C), prefix first.
            size: Token sizes (B, N) in float32, or None while all are one.
            state: Of this block's attention.
            steps: Effective integers.
            num_prefix_tokens: Leading tokens that always stay where they are.
            options: Complete options of the method.
            recorder: Takes decisions when the caller wants them.

        Returns:
            Remaining tokens and their sizes.
        """


def keep_with_prefix(
    x: Tensor, size: Tensor | None, index: Tensor, num_prefix_tokens: int
) -> tuple[Tensor, Tensor | None]:
    """Prefix tokens followed by the non-prefix tokens at ``index`` (B, K), and their sizes."""
    positions = with_prefix(index, num_prefix_tokens)
    return take_tokens(x, positions), None if size is None else size.gather(1, positions)


def with_prefix(index: Tensor, num_prefix_tokens: int) -> Tensor:
    """Absolute positions of the prefix followed by ``index``, which counts from the first non-prefix token."""
    prefix = torch.arange(num_prefix_tokens, device=index.device).expand(index.shape[0], -1)
    return torch.cat((prefix, index + num_prefix_tokens), dim=1)


def kept_assignment(index: Tensor, num_prefix_tokens: int, tokens: int, rest: int = -1) -> Tensor:
    """Assignment (B, tokens) after keeping prefix and ``index`` in that order; all others go to ``rest``."""
    positions = with_prefix(index, num_prefix_tokens)
    target = torch.arange(positions.shape[1], device=index.device).expand_as(positions)
    return torch.full((index.shape[0], tokens), rest, device=index.device).scatter(1, positions, target)
