"""All parts of a table in one compiled graph, with a reading of the clock after each.

Compiling a part takes seconds, and a compiled part called by itself pays for the call what a part of a whole model does
not. A probe is one forward pass through every part, compiled once; an operator that the compiler cannot look into
reads the clock between them.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from latency_tables.measure import WHOLE, Lap

IDLE = "idle"  # Lap of nothing: what reading the clock takes.
CALL = "call"  # Laps before and after the forward pass: what calling a compiled model takes.
FEED = "feed"  # Lap of cutting a stage's input to its tokens; of no interest.
IDLE_LAPS = 3

_current: tuple[Lap, Sequence[str]] | None = None


@torch.library.custom_op("prunefront::lap", mutates_args=("done", "source"))
def _lap(done: Tensor, source: Tensor, index: int) -> None:
    """Read the clock once ``done`` is computed.

    It claims to change both, so that nothing made of them is moved across the reading, and what is made of ``source``
    afterwards is not taken for what was made of it before.
    """
    if _current is not None:
        lap, names = _current
        lap(names[index])


@_lap.register_fake
def _(done: Tensor, source: Tensor, index: int) -> None:
    return None


@contextlib.contextmanager
def timed_by(lap: Lap, names: Sequence[str]) -> Iterator[None]:
    """Within, probes report their laps to ``lap``, by name."""
    global _current
    _current = lap, names
    try:
        yield
    finally:
        _current = None


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Modules from tokens (B, N, C) to tokens that run one after the other, each a lap."""

    tokens: int  # That its input is cut to.
    parts: tuple[tuple[str, nn.Module], ...]  # Names of their laps.


def without_mlp(block: nn.Module) -> nn.Module:
    """The block, sharing its weights, with nothing where its MLP was: a reduction is timed faster to compile."""
    bare = copy.copy(block)
    bare._modules = dict(block._modules)
    bare.norm2, bare.mlp = nn.Identity(), nn.Identity()
    return bare


class Probe(nn.Module):
    """The whole model, the stem, and every stage, each timed by itself; images (B, C, H, W) → the last output.

    Laps are ``WHOLE``, the stem's and those of the stages' parts; ``CALL``, ``IDLE`` and ``FEED`` besides.
    """

    def __init__(self, model: nn.Module, stem: tuple[str, nn.Module], stages: Sequence[Stage]) -> None:
        super().__init__()
        self.model = model
        self.stem = stem[1]
        self.parts = nn.ModuleList(nn.ModuleList(module for _, module in stage.parts) for stage in stages)
        self._tokens = [stage.tokens for stage in stages]
        self.lap_names = [
            CALL, FEED, *itertools.repeat(IDLE, IDLE_LAPS), WHOLE, stem[0],
            *(name for stage in stages for name in (FEED, *(name for name, _ in stage.parts))),
        ]  # fmt: skip

    def forward(self, images: Tensor) -> Tensor:
        marks = itertools.count()
        _lap(images[0, 0, 0, :1].clone(), images[0, 0, 0, :1].neg(), next(marks))
        images = images.clone()  # Theirs must not be marked as changed.
        for _ in range(1 + IDLE_LAPS):
            _lap(images[0, 0, 0, :1].clone(), images, next(marks))
        logits = self.model(images)
        _lap(logits, images, next(marks))
        tokens = self.stem(images)
        _lap(tokens, images, next(marks))
        x = tokens
        for count, parts in zip(self._tokens, self.parts, strict=True):
            # The last output is still in the cache, as a block's input is; where it is too short, the stem's.
            x = (x if x.dim() == 3 and x.shape[1] >= count else tokens)[:, :count].clone()
            _lap(x, tokens, next(marks))
            for part in cast(nn.ModuleList, parts):
                x = part(x)
                _lap(x, tokens, next(marks))
        return cast(Tensor, x)
