"""Merging tokens on a CPU by functions in C++ (`tokens.cpp`), where a compiler is there to build them.

At batch 1, a merge is a dozen small operators of torch, each of which costs more than the arithmetic of all: 0.1 to
0.3 ms of the 5 to 10 that a pruned DeiT-S takes. The functions know no gradients and no recorder; `merge.py` computes
the same in torch wherever they do not run, and is what is exported and traced.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from prunefront.cpuinfo import cpu_info
from prunefront.files import cache_folder

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("tokens.cpp")
COMPILERS = ("g++", "clang++", "c++")
# Sums may be computed in any order, as those of torch; but not-a-numbers are kept apart.
FLAGS = (
    "-std=c++17", "-O3", "-march=native", "-fPIC",
    "-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math",
)  # fmt: skip
# Only to compile, not to link: threads are then those of the library that torch has loaded, not of a second one, whose
# threads would wait busily beside torch's. Compilers for another library than torch's build for one thread.
THREADS = "-fopenmp"
# The operators' tensors are torch's, by its C interface.
_LIBRARIES = Path(torch.__file__).with_name("lib")
LINK = (f"-L{_LIBRARIES}", "-ltorch_cpu", f"-Wl,-rpath,{_LIBRARIES}")
DTYPES = (torch.float32, torch.bfloat16)

_is_wanted = True


def find_compiler() -> str | None:
    """Path of the C++ compiler that ``CXX`` names, or of the first that is installed."""
    candidates = [name for name in (os.environ.get("CXX", ""), *COMPILERS) if name]
    return next((path for name in candidates if (path := shutil.which(name))), None)


@cache
def is_available() -> bool:
    """Whether the operators run here: built, or found in the user's cache where they were built before.

    Without a compiler they do not; one that fails is a warning, since everything works without it.
    """
    compiler = find_compiler()
    if compiler is None:
        return False
    reason = ""
    for flags in ((*FLAGS, THREADS), FLAGS):
        try:
            _register(_built(compiler, flags))
        except subprocess.CalledProcessError as error:
            reason = " ".join(error.stderr.split())[-300:] or f"exit code {error.returncode}"
        except OSError as error:
            reason = str(error)
        else:
            return True
    logger.warning(
        "Tokens are merged by torch alone, which takes longer on a CPU: %s could not build %s (%s)",
        compiler, SOURCE.name, reason,
        extra={"action": "build_native", "compiler": compiler},
    )  # fmt: skip
    return False


@cache
def _register(path: Path) -> None:
    """Give torch the operators of a built library; a process can do so once.

    Raises:
        OSError: If it cannot be loaded: by a torch before 2.7, which lacks the interface.
    """
    if error := ctypes.CDLL(str(path)).prunefront_register():
        raise OSError(f"torch does not take its operators, error {error}")


def _built(compiler: str, flags: Sequence[str]) -> Path:
    """Path of the shared library, built if it is not in the cache."""
    version = subprocess.run([compiler, "--version"], check=True, capture_output=True, text=True).stdout
    # Code for this very CPU: home folders are shared between machines.
    parts = (
        SOURCE.read_text(), " ".join((*flags, *LINK)), version, platform.machine(), cpu_info("flags", "Features"),
    )  # fmt: skip
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    path = cache_folder("native") / f"tokens-{key}.so"
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        compiled, linked = Path(folder) / "tokens.o", Path(folder) / path.name
        for command in (
            [compiler, *flags, "-c", str(SOURCE), "-o", str(compiled)],
            [compiler, "-shared", str(compiled), *LINK, "-o", str(linked)],
        ):
            subprocess.run(command, check=True, capture_output=True, text=True)
        linked.replace(path)  # Whole or not at all, whoever else builds it at the same time.
    return path


def runs(*tensors: Tensor) -> bool:
    """Whether the functions take these tensors here and now: on a CPU, without gradients, in one dtype they know."""
    return (
        _is_wanted
        and all(tensor.device.type == "cpu" and tensor.dtype == tensors[0].dtype for tensor in tensors)
        and tensors[0].dtype in DTYPES
        and not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))
        and not torch.compiler.is_exporting()
        and not torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        and _is_there()
    )


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _is_there() -> bool:
    return is_available()


@contextlib.contextmanager
def disabled() -> Iterator[None]:
    """Within, torch's own operators are used: for comparing with what is exported."""
    global _is_wanted
    before, _is_wanted = _is_wanted, False
    try:
        yield
    finally:
        _is_wanted = before


# --- operators -----------------------------------------------------------------------------------------------------
# Plain operators of a library: the wrapper of a `torch.library.custom_op` takes as long as a small layer.

_operators = torch.library.Library("prunefront_native", "DEF")  # type: ignore[no-untyped-call]
for _schema in (
    "merge_matched(Tensor metric, Tensor x, Tensor? size, int prefix, int removed) -> (Tensor, Tensor)",
    "sort_and_merge(Tensor scores, Tensor x, Tensor? size, int prefix, int pruned_to, int merged_to) "
    "-> (Tensor, Tensor)",
):
    _operators.define(_schema)  # type: ignore[no-untyped-call]


def merge_matched(metric: Tensor, x: Tensor, size: Tensor | None, prefix: int, removed: int) -> tuple[Tensor, Tensor]:
    """`merge.bipartite_match` and `merge.merge_matched` in one.

    Args:
        metric: Of the non-prefix tokens, averaged over its second dimension: (B, G, N - prefix, D).
        x: Tokens, prefix first, (B, N, C), in the dtype of ``metric``.
        size: Their sizes, (B, N) in float32, or None where all are one.
        prefix: Leading tokens that stay as they are.
        removed: Tokens to merge into others.

    Returns:
        Tokens (B, N - removed, C) and their sizes, (B, N - removed).
    """
    merged: tuple[Tensor, Tensor] = torch.ops.prunefront_native.merge_matched(metric, x, size, prefix, removed)
    return merged


def sort_and_merge(
    scores: Tensor, x: Tensor, size: Tensor | None, prefix: int, pruned_to: int, merged_to: int
) -> tuple[Tensor, Tensor]:
    """DiffRate's sorting and pruning by score, `merge.match_tail` and `merge.merge_tail` in one.

    Args:
        scores: Of the non-prefix tokens, (B, N - prefix) in float32.
        x: Tokens, prefix first, (B, N, C).
        size: Their sizes, (B, N) in float32, or None where all are one.
        prefix: Leading tokens that stay as they are.
        pruned_to: Non-prefix tokens that are not dropped.
        merged_to: Of them, those that the others are merged into.

    Returns:
        Tokens (B, prefix + merged_to, C) in order of score, and their sizes.
    """
    merged: tuple[Tensor, Tensor] = torch.ops.prunefront_native.sort_and_merge(
        scores, x, size, prefix, pruned_to, merged_to
    )
    return merged


@torch.library.register_fake("prunefront_native::merge_matched")  # type: ignore[untyped-decorator]
def _(metric: Tensor, x: Tensor, size: Tensor | None, prefix: int, removed: int) -> tuple[Tensor, Tensor]:
    return _outputs(x, x.shape[1] - removed)


@torch.library.register_fake("prunefront_native::sort_and_merge")  # type: ignore[untyped-decorator]
def _(
    scores: Tensor, x: Tensor, size: Tensor | None, prefix: int, pruned_to: int, merged_to: int
) -> tuple[Tensor, Tensor]:
    return _outputs(x, prefix + merged_to)


@register_flop_formula(torch.ops.prunefront_native.merge_matched)
def _merge_matched_flops(
    metric: Sequence[int], x: Sequence[int], size: object, prefix: int, removed: int, *, out_shape: object = None
) -> int:
    """Of the matrix products that torch would need, as `prunefront.macs` counts them."""
    from prunefront.macs import bipartite_sources  # Here: counting MACs imports the methods, which import this.

    batch, _, present, depth = metric
    num_a = bipartite_sources(present, prefix)
    num_b = present - num_a
    return 2 * batch * (num_a * num_b * depth + num_b * removed * x[2])


@register_flop_formula(torch.ops.prunefront_native.sort_and_merge)
def _sort_and_merge_flops(
    scores: object, x: Sequence[int], size: object, prefix: int, pruned_to: int, merged_to: int, *,
    out_shape: object = None,
) -> int:  # fmt: skip
    """The same of DiffRate's merge."""
    return 2 * 2 * x[0] * (pruned_to - merged_to) * merged_to * x[2]


def _outputs(x: Tensor, left: int) -> tuple[Tensor, Tensor]:
    """Room for ``left`` tokens of each image and for their sizes."""
    return x.new_empty((x.shape[0], left, x.shape[2])), x.new_empty((x.shape[0], left), dtype=torch.float32)
