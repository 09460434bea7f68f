"""A front as a picture: accuracy against measured latency."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from search.documents import Front, FrontPoint

# Okabe-Ito colours: told apart also by people who see few colours.
FRONT_COLOUR, MARK_COLOUR, DENSE_COLOUR, RESOLUTION_COLOUR = "#0072B2", "#D55E00", "#000000", "#009E73"

# Points that lose more top-1 than this would squeeze all others into a line.
SHOWN_LOSS = 0.12


def plot_front(front: Front, path: str | os.PathLike[str]) -> Path:
    """Draw points with error bars, the step line of the front, and labelled marks; the format follows the suffix."""
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
    hidden = sum(p.top1 < lowest for p in (*front.marks, *points))
    for mark in front.marks:
        if mark.top1 < lowest:
            continue
        axes.annotate(
            mark.label.removesuffix(" (transferred)"),
            (mark.measured_ms, 100 * mark.top1),
            xytext=(5, -9),
            textcoords="offset points",
            fontsize=7,
            color="#555555",
        )
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
    axes.legend(loc="lower right", fontsize=8)
    figure.savefig(path, dpi=140)
    return Path(path)


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
