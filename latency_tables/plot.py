"""Figures of a table: latency against tokens, and predicted against measured latency of its validation."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from latency_tables.errors import LatencyTableError
from latency_tables.parts import BLOCK, HALVES
from latency_tables.schema import LatencyEntry, LatencyTable, ValidationReport
from prunefront.errors import MissingExtraError
from prunefront.files import write_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DOTS_PER_INCH = 150
PICTURE_FORMATS = ("png", "svg", "pdf")


def plot_table(table: LatencyTable, path: str | os.PathLike[str]) -> Path:
    """Write a picture: halves of a block and reducing blocks by tokens, and the validation where there is one.

    Args:
        table: Any table.
        path: Target; its suffix chooses PNG, SVG or PDF.

    Raises:
        LatencyTableError: If the suffix is another one.
        MissingExtraError: If matplotlib is not installed.
        FileWriteError: If the file cannot be written.
    """
    picture_format = Path(path).suffix.removeprefix(".").lower()
    if picture_format not in PICTURE_FORMATS:
        raise LatencyTableError(
            f"A picture ends in .{', .'.join(PICTURE_FORMATS)}, but got {os.fspath(path)!r}. Rename it."
        )
    return write_atomic(path, render_table(table, picture_format))


def render_table(table: LatencyTable, picture_format: str = "png") -> bytes:
    """The picture of `plot_table` in memory.

    Raises:
        MissingExtraError: If matplotlib is not installed.
    """
    groups = table.entries_by_name
    halves = {name: groups.get(name, ()) for name in HALVES}
    blocks = {name.removeprefix(BLOCK): entries for name, entries in groups.items() if name.startswith(BLOCK)}
    figure = _figure(1 + bool(blocks) + (table.validation is not None))
    panels = iter(figure.axes)
    axes = next(panels)
    _draw_entries(axes, halves, "o-")
    axes.set(title="Halves of a block", xlabel="tokens", ylabel=f"ms (batch {table.batch_size})")
    if blocks:
        axes = next(panels)
        _draw_entries(axes, blocks, ".")
        axes.set(title="Whole blocks that reduce", xlabel="tokens entering", ylabel=f"ms (batch {table.batch_size})")
    if table.validation is not None:
        _draw_validation(next(panels), table.validation)
    figure.suptitle(table.name)
    out = io.BytesIO()
    figure.savefig(out, format=picture_format, dpi=DOTS_PER_INCH)
    return out.getvalue()


def _draw_validation(axes: Axes, report: ValidationReport) -> None:
    highest = max(max(point.predicted_ms, point.measured_ms) for point in report.points) * 1.05
    axes.fill_between([0, highest], [0, 0.95 * highest], [0, 1.05 * highest], alpha=0.15, label="±5 %", linewidth=0)
    axes.plot([0, highest], [0, highest], linewidth=0.8, color="grey")
    for method in sorted({point.config.method for point in report.points}):
        points = [point for point in report.points if point.config.method == method]
        axes.errorbar(
            [point.measured_ms for point in points], [point.predicted_ms for point in points],
            xerr=[point.iqr_ms / 2 for point in points], fmt="o", markersize=4, label=method,
        )  # fmt: skip
    axes.set(
        title=f"{report.num_schedules} held-out schedules: mean absolute error {report.mape:.1%}",
        xlabel="measured ms", ylabel="predicted ms", xlim=(0, highest), ylim=(0, highest),
    )  # fmt: skip
    axes.legend(fontsize="small")


def _figure(columns: int) -> Figure:
    try:
        # The Agg canvas alone: pyplot would choose a window system, and keep figures alive.
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("Plots need matplotlib; install it with `pip install 'prunefront[app]'`.") from error
    figure = Figure(figsize=(6.4 * columns, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    figure.subplots(1, columns)
    return figure


def _draw_entries(axes: Axes, groups: Mapping[str, Sequence[LatencyEntry]], style: str) -> None:
    unfit: list[int] = []
    for name, entries in groups.items():
        timed = [(one.tokens_in, one.median_ms, one.iqr_ms / 2) for one in entries if one.median_ms is not None]
        unfit += [entry.tokens_in for entry in entries if entry.median_ms is None]
        if timed:
            tokens, medians_ms, spreads_ms = zip(*timed, strict=True)
            axes.errorbar(
                tokens, medians_ms, yerr=spreads_ms, fmt=style, markersize=4, linewidth=1, label=name
            )  # fmt: skip
    if unfit:
        axes.plot(unfit, [0.0] * len(unfit), "x", color="black", clip_on=False, label="out of memory")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize="x-small")
