"""Tokens on their way from block to block, with what has to follow them.

Shapes: B images, N tokens of which the first ``num_prefix`` are class, distillation and register tokens, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from prunefront.ops.select import take_tokens

NO_PLACE = -1  # of prefix tokens, and of tokens made of several


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """The residual stream between two blocks.

    Attributes:
        x: Tokens, (B, N, C), prefix first.
        num_prefix: Leading tokens that are never removed.
        size: How many patches each token stands for, (B, N) in float32, or None while all are one.
        places: Position of each token in the initial sequence, (B, N); `NO_PLACE` for tokens made of several and
            for those that a method appended. None where the backbone does not ask for it.
        present: False for the padding of ragged batches, (B, N), or None where every token is real.
        mask: Which keys a query may see, (B, 1, N, N), or None for all.
        decision: Where nothing is removed but dropped tokens are masked (training of DynamicViT and SPViT): 1 for
            patch tokens that are kept, 0 for dropped ones, (B, patches), with the gradient of the decisions so far.
        num_packages: Tokens at the end that a method appended and never ranks (SPViT).
    """

    x: Tensor
    num_prefix: int
    size: Tensor | None = None
    places: Tensor | None = None
    present: Tensor | None = None
    mask: Tensor | None = None
    decision: Tensor | None = None
    num_packages: int = 0

    def but(self, **changes: Any) -> Tokens:
        """A copy with some fields replaced."""
        return replace(self, **changes)

    def take(self, index: Tensor) -> Tokens:
        """Prefix tokens followed by the non-prefix tokens at ``index`` (B, K), with all that follows them."""
        positions = with_prefix(index, self.num_prefix)
        return self.but(
            x=take_tokens(self.x, positions),
            size=None if self.size is None else self.size.gather(1, positions),
            places=None if self.places is None else self.places.gather(1, positions),
            present=None if self.present is None else self.present.gather(1, positions),
        )

    def append(self, extra: Tensor, extra_size: Tensor | None = None) -> Tokens:
        """The same with ``extra`` (B, K, C) at the end: tokens without a place, of size ``extra_size`` (B, K)."""
        new = extra.shape[:2]
        size = self.size
        if extra_size is not None:
            size = torch.cat((self.sizes(), extra_size), dim=1)
        return self.but(
            x=torch.cat((self.x, extra), dim=1),
            size=size,
            places=None
            if self.places is None
            else torch.cat((self.places, self.places.new_full(new, NO_PLACE)), dim=1),
            present=None if self.present is None else torch.cat((self.present, self.present.new_ones(new)), dim=1),
        )

    def sizes(self) -> Tensor:
        """Sizes written out, (B, N) in float32."""
        if self.size is not None:
            return self.size
        return torch.ones(self.x.shape[1], device=self.x.device).expand(self.x.shape[0], -1)


def initial_places(x: Tensor, num_prefix: int) -> Tensor:
    """Positions of the tokens of a dense sequence (B, N, C): `NO_PLACE` for the prefix, then 0, 1, ...: (B, N)."""
    places = torch.arange(x.shape[1], device=x.device) - num_prefix
    return places.clamp(min=NO_PLACE).expand(x.shape[0], -1)


def with_prefix(index: Tensor, num_prefix_tokens: int) -> Tensor:
    """Absolute positions of the prefix followed by ``index``, which counts from the first non-prefix token."""
    prefix = torch.arange(num_prefix_tokens, device=index.device).expand(index.shape[0], -1)
    return torch.cat((prefix, index + num_prefix_tokens), dim=1)
