"""Figures of a table: latency against tokens, and predicted against measured latency of its validation."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from latency_tables.errors import LatencyTableError
from latency_tables.parts import ATTENTION, BLOCK, MLP, SIZED_ATTENTION
from latency_tables.schema import LatencyEntry, LatencyTable
from prunefront.errors import MissingExtraError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DOTS_PER_INCH = 150


def plot_table(table: LatencyTable) -> bytes:
    """PNG: latency of the halves of a block and of reductions by token count, with interquartile ranges.

    Raises:
        MissingExtraError: If matplotlib is not installed.
    """
    figure = _figure(2 if any(name.startswith(BLOCK) for name in table.entries_by_name) else 1)
    halves = {name: table.entries_by_name.get(name, ()) for name in (ATTENTION, SIZED_ATTENTION, MLP)}
    axes = figure.axes
    _draw_entries(axes[0], halves, "o-")
    axes[0].set(title="Halves of a block", xlabel="tokens", ylabel=f"ms per block (batch {table.batch_size})")
    if len(axes) > 1:
        blocks = {
            name.removeprefix(BLOCK): entries
            for name, entries in table.entries_by_name.items()
            if name.startswith(BLOCK)
        }
        _draw_entries(axes[1], blocks, ".")
        axes[1].set(title="Whole blocks that reduce", xlabel="tokens entering")
    figure.suptitle(table.name)
    return _png(figure)


def plot_validation(table: LatencyTable) -> bytes:
    """PNG: predicted against measured latency of the held-out schedules, one colour per method, with ±5 %.

    Raises:
        LatencyTableError: If the table was not validated.
        MissingExtraError: If matplotlib is not installed.
    """
    report = table.validation
    if report is None:
        raise LatencyTableError(
            f"Table {table.name!r} was not validated, so there is nothing to plot. Run `prunefront table validate`."
        )
    figure = _figure(1)
    (axes,) = figure.axes
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
    figure.suptitle(table.name)
    return _png(figure)


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
    for name, entries in groups.items():
        if entries:
            axes.errorbar(
                [entry.tokens_in for entry in entries], [entry.median_ms for entry in entries],
                yerr=[entry.iqr_ms / 2 for entry in entries], fmt=style, markersize=4, linewidth=1, label=name,
            )  # fmt: skip
    axes.set_ylim(bottom=0)
    axes.legend(fontsize="x-small")


def _png(figure: Figure) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=DOTS_PER_INCH)
    return out.getvalue()
