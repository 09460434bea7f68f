"""The parts of a table as ONNX files, for devices that are timed with tools of their own.

`csv_import` reads the CSV that comes of it; its template is written beside the files.
"""

from __future__ import annotations

import csv
import io
import itertools
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from latency_tables.build import BuildSettings, settings_for
from latency_tables.csv_import import COLUMNS
from latency_tables.parts import (
    ATTENTION,
    HEAD,
    MLP,
    STEM,
    AttentionHalf,
    Frame,
    Head,
    MlpHalf,
    ReducingBlock,
    Stem,
    biased_attentions,
    measured_kinds,
)
from prunefront.compress import create_dense
from prunefront.config import ModelSpec
from prunefront.export import DEFAULT_OPSET, LEAST_IMAGES, Exported, export_part, frozen_copy, require_onnx
from prunefront.files import write_atomic
from prunefront.geometry import geometry_of, require_equal_blocks
from prunefront.runtimes import DTYPES

TEMPLATE = "entries.csv"


@dataclass(frozen=True, kw_only=True)
class ExportedBlocks:
    """What `export_blocks` wrote: a file per entry, and the CSV to fill in."""

    files: tuple[Exported, ...]
    template: Path


@dataclass(frozen=True, kw_only=True)
class _Part:
    entry: str
    tokens_in: int
    tokens_out: int
    module: nn.Module
    examples: list[Tensor]

    @property
    def file_name(self) -> str:
        return f"{self.entry}-{self.tokens_in}-{self.tokens_out}.onnx"


def export_blocks(
    spec: ModelSpec,
    folder: str | os.PathLike[str],
    *,
    batch_size: int,
    dtype: str = "fp32",
    opset: int = DEFAULT_OPSET,
    settings: BuildSettings | None = None,
    progress: Callable[[float, float, str], None] | None = None,
) -> ExportedBlocks:
    """Write stem, head, halves of a block and reducing blocks at the token counts that a table starts from.

    Each file is ``ENTRY-TOKENS_IN-TOKENS_OUT.onnx`` with input ``x`` and output ``y`` of a fixed shape, and agrees
    with the eager part. ``entries.csv`` has a line per file, its measurements left to fill in.

    Args:
        spec: The model; weights do not matter and are random.
        folder: Made when missing; files of the same name are replaced.
        batch_size: Of every file; a table has one.
        dtype: ``fp32`` or ``fp16``.
        opset: Version of ONNX's operators.
        settings: Token counts, in place of those of an eager table on a CPU.
        progress: Told files done of all, and the next one's name.

    Raises:
        ModelError, UnknownNameError: If the model is unknown, or its blocks are not all alike.
        ConfigError, ExportError, FileWriteError, MissingExtraError: As `prunefront.export.export_onnx`.
    """
    require_onnx()
    model = frozen_copy(create_dense(spec), dtype)
    require_equal_blocks(geometry_of(model), spec.name)
    with torch.inference_mode(False), torch.no_grad():
        parts = list(_parts(model, batch_size, dtype, settings or settings_for(torch.device("cpu"), "eager")))
    files = []
    for number, part in enumerate(parts):
        if progress is not None:
            progress(number, len(parts), part.file_name)
        path = Path(folder) / part.file_name
        files.append(export_part(part.module, path, part.examples, names=("x", "y"), dtype=dtype, opset=opset))
    template = write_atomic(Path(folder) / TEMPLATE, _template(parts, batch_size))
    return ExportedBlocks(files=tuple(files), template=template)


def _parts(model: Any, batch_size: int, dtype: str, settings: BuildSettings) -> Iterator[_Part]:
    """Everything to export; tokens are those of the stem, as real as random weights make them."""
    geometry, frame, block = geometry_of(model), Frame.of(model), model.blocks[0]
    prefix, most = geometry.num_prefix_tokens, geometry.num_tokens
    num_batches = math.ceil(LEAST_IMAGES / batch_size)
    shape = (num_batches, batch_size, geometry.in_chans, *geometry.img_size)
    images = list(torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(DTYPES[dtype]))
    stem = Stem(model).eval()
    tokens = [stem(batch) for batch in images]
    yield _Part(entry=STEM, tokens_in=geometry.num_patch_tokens, tokens_out=most, module=stem, examples=images)

    def on(entry: str, count: int, module: nn.Module, tokens_out: int | None = None) -> _Part:
        examples = [batch[:, :count].contiguous() for batch in tokens]
        return _Part(
            entry=entry, tokens_in=count, tokens_out=tokens_out or count, module=module.eval(), examples=examples
        )

    for count in settings.token_counts(geometry):
        yield on(ATTENTION, count, AttentionHalf(block, frame))
        yield on(MLP, count, MlpHalf(block, frame))
    for entry, count in itertools.product(biased_attentions(geometry), settings.sized_token_counts(geometry)):
        yield on(entry, count, AttentionHalf(block, frame, entry))
    for count in settings.head_token_counts(geometry):
        yield on(HEAD, count, Head(model), 1)
    seen: set[tuple[str, int, int]] = set()
    for count, kind, share in itertools.product(
        settings.reduction_token_counts(geometry), measured_kinds(geometry), settings.reduction_removed
    ):
        steps = kind.steps(count, share, prefix)
        if steps is None or (key := (kind.entry, count, steps[-1].tokens_out)) in seen:
            continue
        seen.add(key)
        yield on(kind.entry, count, ReducingBlock(block, kind, steps, frame), steps[-1].tokens_out)


def _template(parts: list[_Part], batch_size: int) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    for part in parts:
        writer.writerow((part.entry, part.tokens_in, part.tokens_out, batch_size, "", "", ""))
    return out.getvalue()
