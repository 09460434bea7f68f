"""Cursors and CSV lines of the candidates."""

from __future__ import annotations

import csv
import io

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.problems import Problem
from service.routes.trials import _csv_line, decode_cursor, encode_cursor


@given(st.integers(0, 2**31 - 1))
def test_cursor_comes_back_as_it_went(number: int) -> None:
    assert decode_cursor(encode_cursor(number)) == number


@settings(max_examples=50)
@given(st.text(max_size=40))
def test_any_other_cursor_is_refused_or_a_number(cursor: str) -> None:
    try:
        assert decode_cursor(cursor) >= 0
    except Problem as problem:
        assert (problem.status, problem.code) == (422, "invalid_cursor")


@settings(max_examples=50)
@given(st.lists(st.text(max_size=10), min_size=2, max_size=5))
def test_csv_cells_survive_quoting(cells: list[str]) -> None:
    read = next(csv.reader(io.StringIO(_csv_line(cells), newline="")))
    assert [cell.removeprefix("'") for cell in read] == [cell.removeprefix("'") for cell in cells]


@pytest.mark.parametrize("cell", ["=1+1", "+A1", "-2+3", "@SUM(A1)"])
def test_csv_cells_are_no_formulas(cell: str) -> None:
    assert not _csv_line([cell]).startswith(("=", "+", "-", "@"))
