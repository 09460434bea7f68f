"""Tokens on their way from block to block, with what has to follow them.

Shapes: B images, N tokens of which the first ``num_prefix`` are class, distillation and register tokens, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from prunefront.ops.packing import Packing
from prunefront.ops.select import take_tokens

if TYPE_CHECKING:
    from prunefront.ops.rotary import Rotary

NO_PLACE = -1  # of prefix tokens, and of tokens made of several


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """The residual stream between two blocks.

    Batches whose images differ in length are padded, or `packed` while nothing but blocks works on them.

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
        rotary: Rotations by place, where the backbone has rotary position embeddings.
        packing: Set while packed: images stand end to end, with a prefix each, and ``x``, ``size`` and ``places`` are
            those of a batch of one.
    """

    x: Tensor
    num_prefix: int
    size: Tensor | None = None
    places: Tensor | None = None
    present: Tensor | None = None
    mask: Tensor | None = None
    decision: Tensor | None = None
    num_packages: int = 0
    rotary: Rotary | None = None
    packing: Packing | None = None

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

    def packed(self) -> Tokens:
        """The same without padding, for blocks to work on; these tokens themselves where there is none."""
        if self.present is None:
            return self
        packing = Packing.of(self.present)
        return self.but(
            x=packing.pack(self.x),
            size=None if self.size is None else packing.pack(self.size),
            places=None if self.places is None else packing.pack(self.places),
            present=None,
            packing=packing,
        )

    def padded(self) -> Tokens:
        """The same with a row per image, for methods and heads to work on. Padding is zero, without a place."""
        packing = self.packing
        if packing is None:
            return self
        return self.but(
            x=packing.pad(self.x),
            size=None if self.size is None else packing.pad(self.size, 1),
            places=None if self.places is None else packing.pad(self.places, NO_PLACE),
            present=packing.present,
            packing=None,
        )

    def images(self) -> list[Tensor]:
        """The real tokens of each image of a padded batch, (1, n, C)."""
        assert self.present is not None
        return [x[present].unsqueeze(0) for x, present in zip(self.x, self.present, strict=True)]

    def first(self) -> Tensor:
        """The first token of each image, (B, C)."""
        return self.x[:, 0] if self.packing is None else self.x[0, self.packing.offsets[:-1]]

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
