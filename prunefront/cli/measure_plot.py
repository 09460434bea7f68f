"""What was measured as a picture: accuracy against images per second, or latencies alone."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunefront.files import write_atomic
from prunefront.plot_labels import number_points

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe-Ito colours, as in the pictures of fronts: told apart also by people who see few colours.
COLOUR, DENSE_COLOUR = "#0072B2", "#000000"
DOTS_PER_INCH = 140


def plot_rows(rows: list[dict[str, Any]], title: str, path: Path) -> Path:
    """Write the picture of `draw_rows`; its format follows the suffix.

    Raises:
        FileWriteError: If the file cannot be written.
    """
    picture = io.BytesIO()
    kind = path.suffix.removeprefix(".") or "png"
    draw_rows(rows, title).savefig(picture, format=kind, dpi=DOTS_PER_INCH)
    return write_atomic(path, picture.getvalue())


def draw_rows(rows: list[dict[str, Any]], title: str) -> Figure:
    """Draw one point per row with its interval, dense models as diamonds; bars of latency where no accuracy is known.

    Args:
        rows: Of `prunefront measure`, all with ``top1`` or none.
        title: Device, runtime, dtype and batch size.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.add_subplot()
    colours = [COLOUR if row["config"]["sites"] else DENSE_COLOUR for row in rows]
    axes.set_title(title, fontsize=11)
    if all("top1" in row for row in rows):
        for row, colour in zip(rows, colours, strict=True):
            low, high = row["top1_ci"]
            x, y = row["images_per_s"], 100 * row["top1"]
            axes.errorbar(
                [x],
                [y],
                yerr=([y - 100 * low], [100 * high - y]),
                fmt="o" if row["config"]["sites"] else "D",
                color=colour,
                elinewidth=0.8,
                markersize=5,
            )
        axes.set_xlabel("images/s")
        axes.set_ylabel(f"top-1 on {rows[0]['dataset']} {rows[0]['split']}, %")
        axes.grid(alpha=0.25)
        number_points(axes, [(Path(row["label"]).name, row["images_per_s"], 100 * row["top1"]) for row in rows])
    else:
        labels = [Path(row["label"]).name for row in rows]
        spread = [row["iqr_ms"] / 2 for row in rows]
        axes.barh(labels, [row["median_ms"] for row in rows], xerr=spread, color=colours, alpha=0.85)
        axes.invert_yaxis()
        axes.set_xlabel("measured latency, ms per batch")
        axes.grid(alpha=0.25, axis="x")
    return figure
