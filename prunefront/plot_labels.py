"""Points of a chart by number, with the list of their names beside it: names themselves would cover each other."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOUR = "#333333"
FONT_PT = 7.0
LINE_SPACING = 1.5
LIST_PT = 290.0  # height of the list at most; longer ones get smaller letters
LONGEST_NAME = 40
FIGURE_SPACE = "\u2007"  # as wide as a digit
MARKER_PT = 3.0  # half of a marker's side
GAP_PT = 0.5  # around a number: two of them shall not read as one
NEAREST_PT = 3.0
RING_PT = 3.0
NUM_RINGS = 40
NUM_ANGLES = 16

Box = tuple[float, float, float, float]


def number_points(
    axes: Axes, named: Sequence[tuple[str, float, float]], others: Sequence[tuple[float, float]] = ()
) -> None:
    """Number points from left to right, and write what the numbers stand for to the right of the axes.

    A number stands at the nearest place around its point that no other number, no marker and not the legend covers,
    with a line to the point. Call this last: everything else is drawn, and the limits are set.

    Args:
        axes: Of a figure with a layout engine.
        named: Name, and x and y of its point in data coordinates.
        others: x and y of the markers that get no number.
    """
    from matplotlib.patheffects import withStroke
    from matplotlib.text import Text

    if not named:
        return
    ordered = sorted(named, key=lambda item: (item[1], -item[2]))
    lines = [
        f"{str(number).rjust(2, FIGURE_SPACE)}  {name if len(name) <= LONGEST_NAME else f'{name[: LONGEST_NAME - 1]}…'}"
        for number, (name, _, _) in enumerate(ordered, 1)
    ]
    size_pt = min(FONT_PT, LIST_PT / len(lines) / LINE_SPACING)
    axes.text(
        1.015, 1, "\n".join(lines), transform=axes.transAxes, va="top", fontsize=size_pt, linespacing=LINE_SPACING
    )
    figure = axes.get_figure(root=True)
    assert figure is not None, "axes that were drawn on belong to a figure"
    figure.draw_without_rendering()  # Lays the figure out: only now is it known where a point stands.
    pixels = figure.dpi / 72
    marker = MARKER_PT * pixels
    markers = axes.transData.transform([*((x, y) for _, x, y in ordered), *others])
    taken: list[Box] = [(x - marker, y - marker, x + marker, y + marker) for x, y in markers]
    if (legend := axes.get_legend()) is not None:
        taken.append(legend.get_window_extent().extents)
    inside: Box = axes.get_window_extent().extents
    for number, ((_, x, y), (point_x, point_y)) in enumerate(zip(ordered, markers, strict=False), 1):
        note = axes.annotate(
            str(number),
            (x, y),
            xytext=(0, 0),
            textcoords="offset points",
            horizontalalignment="center",
            verticalalignment="center",
            fontsize=FONT_PT,
            color=COLOUR,
            arrowprops={"arrowstyle": "-", "color": COLOUR, "linewidth": 0.5, "shrinkA": 0, "shrinkB": 2},
            path_effects=[withStroke(linewidth=2.5, foreground="white")],
        )
        size = Text.get_window_extent(note).padded(GAP_PT * pixels)
        for across, up in _around(size.width, size.height, pixels):
            left, bottom = point_x + across - size.width / 2, point_y + up - size.height / 2
            box = (left, bottom, left + size.width, bottom + size.height)
            if _holds(inside, box) and not any(_overlap(box, other) for other in taken):
                break
        taken.append(box)
        note.set_position((across / pixels, up / pixels))


def _around(width: float, height: float, pixels: float) -> Iterator[tuple[float, float]]:
    """Centres of boxes around a point, in pixels: nearest first, of equally near ones right and above first."""
    for ring in range(NUM_RINGS):
        distance = (NEAREST_PT + ring * RING_PT) * pixels
        for step in range(NUM_ANGLES):
            turn = (step + 1) // 2 * (1 if step % 2 else -1)
            angle = 2 * math.pi * turn / NUM_ANGLES + math.pi / 4
            yield math.cos(angle) * (distance + width / 2), math.sin(angle) * (distance + height / 2)


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _holds(outer: Box, inner: Box) -> bool:
    return outer[0] <= inner[0] and outer[1] <= inner[1] and inner[2] <= outer[2] and inner[3] <= outer[3]
