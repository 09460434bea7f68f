"""Many parts of a table in one compiled graph, with a reading of the clock after each.

Compiling a part takes seconds, and a compiled part called by itself pays for the call what a part of a whole model does
not. A probe is one forward pass through all its parts, compiled once; an operator that the compiler cannot look into
reads the clock between them.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn

from latency_tables import opaque
from latency_tables.measure import Lap
from latency_tables.parts import STEM, ReducingBlock

IDLE = "idle"  # Lap of nothing: what reading the clock takes.
CALL = "call"  # Laps before and after the forward pass: what calling a compiled model takes.
FEED = "feed"  # Laps of what leads up to a stage, such as cutting its input to its tokens; of no interest.
IDLE_LAPS = 3


def timed_by(lap: Lap, names: Sequence[str]) -> AbstractContextManager[None]:
    """Within, probes report their laps to ``lap``, by name."""
    return opaque.reporting(lambda index: lap(names[index]))


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Modules from tokens (B, N, C) to tokens that run one after the other, each a lap."""

    tokens: int  # That its input is cut to.
    parts: tuple[tuple[str, nn.Module], ...]  # Names of their laps.


class Probe(nn.Module):
    """The stem and every stage, each timed by itself; images (B, C, H, W) → the last output.

    Laps are ``STEM`` and those of the stages' parts; ``CALL``, ``IDLE`` and ``FEED`` besides.

    Args:
        stem: From images to tokens.
        stages: Of parts.
    """

    def __init__(self, stem: nn.Module, stages: Sequence[Stage]) -> None:
        super().__init__()
        self.stem = stem
        self.parts = nn.ModuleList(nn.ModuleList(module for _, module in stage.parts) for stage in stages)
        self._tokens = [stage.tokens for stage in stages]
        self.lap_names = [
            CALL, FEED, *itertools.repeat(IDLE, IDLE_LAPS), STEM,
            *(name for stage in stages for name in (FEED, *(name for name, _ in stage.parts))),
        ]  # fmt: skip

    def forward(self, images: Tensor) -> Tensor:
        marks = itertools.count()
        mark = images[0, 0, 0, :1].clone()  # A reading whose arguments nobody uses later would be left out.
        opaque.read_clock(mark, mark.neg(), next(marks))
        images = images.clone()  # Theirs must not be marked as changed.
        for _ in range(1 + IDLE_LAPS):
            opaque.read_clock(mark, images, next(marks))
        tokens = self.stem(images)
        opaque.read_clock(tokens, images, next(marks))
        x = tokens
        for count, parts in zip(self._tokens, self.parts, strict=True):
            # The last output is still in the cache, as a block's input is; where it is too short, the stem's.
            x = (x if x.dim() == 3 and x.shape[1] >= count else tokens)[:, :count].clone()
            opaque.read_clock(x, tokens, next(marks))
            for part in cast(nn.ModuleList, parts):
                also: list[Tensor] = []
                if isinstance(part, ReducingBlock):
                    left = part.tokens_left(x)
                    x = left.x
                    # Nothing in the graph uses these: without the reading they would be left out, or computed later.
                    also = [made for made in (left.size, left.mask) if made is not None]
                else:
                    x = part(x)
                opaque.read_clock(x, tokens, next(marks), also)
        return cast(Tensor, x)
