"""Operators that a compiler cannot look into: reading the clock, and using a tensor for it knows not what.

They are plain operators of a library: the wrapper of a `torch.library.custom_op` takes as long as a small layer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

_library = torch.library.Library("prunefront", "DEF")  # type: ignore[no-untyped-call]
_library.define("use(Tensor(a!) x) -> ()")  # type: ignore[no-untyped-call]
_library.define("lap(Tensor(a!) done, Tensor(b!) source, Tensor[] also, int index) -> ()")  # type: ignore[no-untyped-call]

_report: Callable[[int], None] | None = None


@torch.library.impl(_library, "use", "CompositeExplicitAutograd")
@torch.library.register_fake("prunefront::use")  # type: ignore[untyped-decorator]
def _use(x: Tensor) -> None:
    pass


@torch.library.impl(_library, "lap", "CompositeExplicitAutograd")
def _lap(done: Tensor, source: Tensor, also: Sequence[Tensor], index: int) -> None:
    if _report is not None:
        _report(index)


@torch.library.register_fake("prunefront::lap")  # type: ignore[untyped-decorator]
def _(done: Tensor, source: Tensor, also: Sequence[Tensor], index: int) -> None:
    pass


def use(x: Tensor) -> None:
    """Nothing; but a compiler must compute ``x`` before, and knows nothing of its values after."""
    torch.ops.prunefront.use(x)


def read_clock(done: Tensor, source: Tensor, index: int, also: Sequence[Tensor] = ()) -> None:
    """Report reading number ``index`` once ``done`` is computed, and all of ``also``.

    It claims to change the first two tensors, so that nothing made of ``done`` is moved across the reading, and what is
    made of ``source`` afterwards is not taken for what was made of it before.
    """
    torch.ops.prunefront.lap(done, source, also, index)


@contextlib.contextmanager
def reporting(report: Callable[[int], None]) -> Iterator[None]:
    """Within, readings are reported by their numbers."""
    global _report
    _report = report
    try:
        yield
    finally:
        _report = None
