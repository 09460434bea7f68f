"""What the picture of a front shows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.container import ErrorbarContainer
from matplotlib.image import imread
from matplotlib.text import Text

from prunefront.errors import FileWriteError
from search.documents import Front
from search.pareto import build_front
from search.plot import draw_front, plot_front
from tests.unit.search.test_pareto import DENSE, candidate, evaluation, front_of, job_record, measured

FASTER = candidate(1, [evaluation(0.94)], [measured(60.0)])
FASTEST = candidate(2, [evaluation(0.90)], [measured(40.0)])
PUBLISHED = replace(
    candidate(3, [evaluation(0.89)], [measured(50.0)], origin="published"), label="EViT 0.7 (transferred)"
)
SMALLER = replace(candidate(4, [evaluation(0.85)], [measured(45.0)], origin="resolution"), label="dense at 32 px")
FULL: Front = front_of(FASTER, FASTEST, PUBLISHED, SMALLER)
EMPTY: Front = build_front(job_record(), [])


def axes_of(front: Front) -> Axes:
    (axes,) = draw_front(front).axes
    return axes


def drawn(axes: Axes) -> dict[str, list[tuple[float, float]]]:
    """Label -> points (ms, percent) of everything that has a marker and error bars."""
    bars = [container for container in axes.containers if isinstance(container, ErrorbarContainer)]
    return {str(bar.get_label()): [(float(x), float(y)) for x, y in bar.lines[0].get_xydata()] for bar in bars}


def texts(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def test_points_marks_and_dense_stand_where_they_were_measured() -> None:
    axes = axes_of(FULL)
    assert drawn(axes) == {
        "front": [(40.0, 90.0), (60.0, 94.0), (100.0, 95.0)],
        "published schedules": [(50.0, 89.0)],
        "dense, smaller images": [(45.0, 85.0)],
        "dense": [(100.0, 95.0)],
    }
    assert [text.get_text() for text in axes.get_legend().get_texts()] == list(drawn(axes))
    # The fastest mark is number 1.
    assert texts(axes) == ["\u20071  dense at 32 px\n\u20072  EViT 0.7", "1", "2"]


def test_error_bars_are_the_interval_and_the_spread() -> None:
    bar = next(c for c in axes_of(FULL).containers if c.get_label() == "published schedules")
    (across,), (up,) = (lines.get_segments() for lines in bar.lines[2])
    # The interval is 1 % to either side, the interquartile range 1 ms in all.
    assert across == pytest.approx(np.array([[49.5, 89.0], [50.5, 89.0]]))
    assert up == pytest.approx(np.array([[50.0, 88.0], [50.0, 90.0]]))


def test_the_axes_say_what_was_measured_and_how_much_faster_than_dense() -> None:
    figure = draw_front(FULL)
    figure.draw_without_rendering()
    (axes,) = figure.axes
    assert axes.get_xlabel() == "measured latency, ms per batch of 4 (eager, fp32)"
    assert axes.get_ylabel() == "top-1 on the test split, %"
    (secondary,) = axes.child_axes
    for ms, speedup in ((50.0, 2.0), (100.0, 1.0)):
        assert secondary.transData.transform((speedup, 0))[0] == pytest.approx(axes.transData.transform((ms, 0))[0])


def test_points_far_below_dense_are_counted_instead_of_squeezing_the_others() -> None:
    far = replace(candidate(5, [evaluation(0.40)], [measured(20.0)], origin="resolution"), label="dense at 16 px")
    front = front_of(FASTER, far)
    assert far.number in {point.trial for point in front.points} & {mark.trial for mark in front.marks}
    axes = axes_of(front)
    assert axes.get_ylim()[0] == pytest.approx(95.0 - 12.0)
    assert texts(axes) == ["1 point(s) more than 12% below dense are not shown"]


def test_a_front_without_its_dense_model_shows_all_points_and_no_speedup() -> None:
    front = build_front(job_record(), [FASTER, candidate(6, [evaluation(0.40)], [measured(20.0)])])
    assert front.dense is None
    axes = axes_of(front)
    assert drawn(axes) == {"front": [(20.0, 40.0), (60.0, 94.0)]}
    assert axes.get_ylim()[0] < 40.0
    assert not axes.child_axes


CLOSE_MS = {
    "twelve side by side": [70 + 0.5 * index for index in range(12)],
    "twelve on one spot": [70.0] * 12,
    "twelve at the edge": [30 + 0.01 * index for index in range(12)],
}


@pytest.mark.parametrize("case", CLOSE_MS)
def test_numbers_of_close_points_cover_neither_each_other_nor_a_point(case: str) -> None:
    marks = [
        replace(
            candidate(number, [evaluation(0.95 - 0.001 * number)], [measured(ms)], origin="published"), label=f"n{ms}"
        )
        for number, ms in enumerate(CLOSE_MS[case], 1)
    ]
    figure = draw_front(front_of(FASTER, *marks))
    figure.set_dpi(140)
    figure.draw_without_rendering()
    (axes,) = figure.axes
    names, *numbers = axes.texts
    assert [number.get_text() for number in numbers] == [str(index) for index in range(1, 13)]
    assert len(names.get_text().splitlines()) == 12

    boxes = [Text.get_window_extent(number) for number in numbers]
    places = [axes.transData.transform(place) for points in drawn(axes).values() for place in points]
    for index, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:index])
        assert not any(box.contains(x, y) for x, y in places)
        assert axes.bbox.contains(box.x0, box.y0) and axes.bbox.contains(box.x1, box.y1)
        assert not box.overlaps(axes.get_legend().get_window_extent())


def test_a_long_list_of_long_names_leaves_room_for_the_points(tmp_path: Path) -> None:
    marks = [
        replace(
            candidate(number, [evaluation(0.9)], [measured(50 + number)], origin="published"), label=f"{number}" * 40
        )
        for number in range(1, 51)
    ]
    figure = draw_front(front_of(*marks))
    plot_front(front_of(*marks), tmp_path / "front.png")
    (axes,) = figure.axes
    assert axes.bbox.width > 0.6 * figure.bbox.width and axes.bbox.height > 0.6 * figure.bbox.height


@pytest.mark.parametrize("front", [EMPTY, build_front(job_record(), [candidate(0, origin="dense")])])
def test_an_empty_front_says_so(front: Front) -> None:
    axes = axes_of(front)
    assert drawn(axes) == {}
    assert axes.get_legend() is None
    assert texts(axes) == ["nothing is measured yet"]


def test_dense_alone_is_a_picture_too() -> None:
    assert drawn(axes_of(build_front(job_record(), [DENSE])))["dense"] == [(100.0, 95.0)]


@pytest.mark.parametrize("front", [FULL, EMPTY], ids=["full", "empty"])
def test_the_file_is_a_picture_that_is_not_blank(tmp_path: Path, front: Front) -> None:
    pixels: Any = imread(plot_front(front, tmp_path / "new" / "front.png"))
    height, width, _ = pixels.shape
    assert (width, height) == (1260, 770)
    # Blue is the front's colour alone.
    blue = (pixels[..., 2] > pixels[..., 0] + 0.3).sum()
    assert blue > 200 if front is FULL else blue == 0
    assert (pixels[..., :3] < 0.5).all(axis=-1).sum() > 200, "labels and axes are black"


def test_the_format_follows_the_suffix(tmp_path: Path) -> None:
    assert "<svg" in plot_front(FULL, tmp_path / "front.svg").read_text()
    assert plot_front(FULL, tmp_path / "front.pdf").read_bytes().startswith(b"%PDF")


def test_a_picture_that_cannot_be_written_is_told_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FileWriteError, match=r"front\.png"):
        plot_front(EMPTY, tmp_path / "file" / "front.png")
