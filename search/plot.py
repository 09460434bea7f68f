"""A front as a picture: accuracy against measured latency."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from prunefront.files import write_atomic
from prunefront.plot_labels import number_points
from search.documents import Front, FrontPoint

# Okabe-Ito colours: told apart also by people who see few colours.
FRONT_COLOUR, MARK_COLOUR, DENSE_COLOUR, RESOLUTION_COLOUR = "#0072B2", "#D55E00", "#000000", "#009E73"

# Points that lose more top-1 than this would squeeze all others into a line.
SHOWN_LOSS = 0.12
DOTS_PER_INCH = 140


def plot_front(front: Front, path: str | os.PathLike[str]) -> Path:
    """Write the picture of `draw_front`; its format follows the suffix.

    Raises:
        FileWriteError: If the file cannot be written.
    """
    picture = io.BytesIO()
    draw_front(front).savefig(picture, format=Path(path).suffix.removeprefix(".") or "png", dpi=DOTS_PER_INCH)
    return write_atomic(path, picture.getvalue())


def draw_front(front: Front) -> Figure:
    """Draw points with error bars, the step line of the front, and labelled marks."""
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.add_subplot()
    points = sorted(front.points, key=lambda p: p.measured_ms)
    if points:
        axes.step(
            [p.measured_ms for p in points],
            [100 * p.top1 for p in points],
            where="post",
            color=FRONT_COLOUR,
            linewidth=1.2,
            alpha=0.6,
        )
    _draw(axes, points, FRONT_COLOUR, "o", "front")
    _draw(axes, [m for m in front.marks if m.origin == "published"], MARK_COLOUR, "s", "published schedules")
    _draw(axes, [m for m in front.marks if m.origin == "resolution"], RESOLUTION_COLOUR, "^", "dense, smaller images")
    lowest = 0.0 if front.dense is None else front.dense.top1 - SHOWN_LOSS
    # A mark may stand on the front as well.
    hidden = len({p.trial for p in (*front.marks, *points) if p.top1 < lowest})
    if front.dense is not None:
        _draw(axes, [front.dense], DENSE_COLOUR, "D", "dense")
        dense_ms = front.dense.measured_ms
        # The same function both ways: milliseconds to speed-up and back.
        secondary = axes.secondary_xaxis(
            "top", functions=(lambda x: dense_ms / np.maximum(x, 1e-9), lambda x: dense_ms / np.maximum(x, 1e-9))
        )
        secondary.set_xlabel("speed-up over dense")
        bottom, top = axes.get_ylim()
        axes.set_ylim(max(bottom, 100 * lowest), top)
        if hidden:
            note = f"{hidden} point(s) more than {SHOWN_LOSS:.0%} below dense are not shown"
            axes.text(0.01, 0.02, note, transform=axes.transAxes, fontsize=7, color="#555555")
    axes.set_xlabel(f"measured latency, ms per batch of {front.batch_size} ({front.runtime}, {front.dtype})")
    axes.set_ylabel(f"top-1 on the {front.split} split, %")
    axes.set_title(f"Accuracy against measured latency ({front.fidelity})", fontsize=11)
    axes.grid(alpha=0.25)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="lower right", fontsize=8)
    else:
        axes.text(0.5, 0.5, "nothing is measured yet", transform=axes.transAxes, ha="center", color="#555555")
    shown = [mark for mark in front.marks if mark.top1 >= lowest]
    others = [*points, *([front.dense] if front.dense else [])]
    number_points(
        axes,
        [(mark.label.removesuffix(" (transferred)"), mark.measured_ms, 100 * mark.top1) for mark in shown],
        [(point.measured_ms, 100 * point.top1) for point in others],
    )
    return figure


def _draw(axes: Axes, points: list[FrontPoint], colour: str, marker: str, label: str) -> None:
    if not points:
        return
    low = [100 * (p.top1 - p.top1_ci[0]) if p.top1_ci else 0.0 for p in points]
    high = [100 * (p.top1_ci[1] - p.top1) if p.top1_ci else 0.0 for p in points]
    axes.errorbar(
        [p.measured_ms for p in points],
        [100 * p.top1 for p in points],
        xerr=[p.iqr_ms / 2 for p in points],
        yerr=(low, high),
        fmt=marker,
        markersize=5,
        color=colour,
        ecolor=colour,
        elinewidth=0.8,
        alpha=0.9,
        label=label,
    )
