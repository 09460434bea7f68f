import pytest
from hypothesis import given
from hypothesis import strategies as st

from latency_tables.interpolation import Curve, PairCurve, Surface, has_one_share

values = st.floats(0.0, 1e4)
points = st.dictionaries(st.integers(1, 500), values, min_size=1, max_size=12)


@given(points)
def test_curve_is_exact_on_measured_points(measured: dict[int, float]) -> None:
    curve = Curve(measured)
    assert all(curve(at) == value for at, value in measured.items())


@given(points, st.integers(1, 500))
def test_curve_stays_between_its_neighbours(measured: dict[int, float], at: int) -> None:
    curve = Curve(measured)
    below = [known for known in measured if known <= at] or [min(measured)]
    above = [known for known in measured if known >= at] or [max(measured)]
    ends = sorted((measured[max(below)], measured[min(above)]))
    assert ends[0] - 1e-6 <= curve(at) <= ends[1] + 1e-6


@given(st.lists(values, min_size=2, max_size=8), st.integers(1, 200), st.integers(1, 200))
def test_curve_of_rising_points_rises(rising: list[float], first: int, second: int) -> None:
    curve = Curve({25 * number + 1: value for number, value in enumerate(sorted(rising))})
    low, high = sorted((first, second))
    assert curve(low) <= curve(high) + 1e-9


def test_curve_of_what_grows_with_the_square_of_tokens() -> None:
    curve = Curve({10: 1.0, 20: 4.0}, power=2)
    assert curve(10) == 1.0 and curve(20) == 4.0 and curve(30) == 4.0
    assert curve(15) == pytest.approx(2.25)


@given(st.dictionaries(st.tuples(st.integers(10, 200), st.integers(1, 9)), values, min_size=1, max_size=12))
def test_surface_is_exact_on_measured_points(measured: dict[tuple[int, int], float]) -> None:
    surface = Surface(measured)
    assert all(surface(*at) == value for at, value in measured.items())


def test_surface_goes_by_share_within_a_row_and_by_tokens_between_rows() -> None:
    surface = Surface({(100, 90): 1.0, (100, 50): 5.0, (200, 180): 3.0, (200, 100): 7.0})
    assert surface(100, 70) == pytest.approx(3.0)
    assert surface(150, 135) == pytest.approx(2.0)  # a tenth removed in both rows
    assert surface(150, 105) == pytest.approx(4.0)
    assert surface(100, 10) == 5.0  # beyond the largest share: the nearest one
    assert surface(50, 45) == 1.0  # below the first row: the nearest one


def test_surface_of_what_grows_with_the_square_of_tokens() -> None:
    surface = Surface({(100, 90): 1.0, (200, 180): 4.0}, power=2)
    assert surface(150, 135) == pytest.approx(2.25)
    assert surface(100, 90) == 1.0 and surface(200, 180) == 4.0
    assert Surface({(100, 90): 1.0}, power=2)(50, 45) == pytest.approx(0.25)


def test_a_single_row_is_scaled_in_proportion_to_its_tokens() -> None:
    surface = Surface({(100, 90): 2.0, (100, 50): 4.0})
    assert surface(50, 45) == pytest.approx(1.0)
    assert surface(200, 100) == pytest.approx(8.0)
    assert surface(50, 35) == pytest.approx(1.5)  # Share removed 0.3, half-way.


def test_a_curve_of_pairs_goes_by_the_square_of_the_tokens_left() -> None:
    curve = PairCurve({(20, 10): 1.0, (100, 50): 25.0})
    assert curve(20, 10) == 1.0 and curve(100, 50) == 25.0
    assert curve(100, 30) == curve(31, 30) == pytest.approx(9.0)
    assert curve(100, 90) == pytest.approx(81.0)  # beyond: as between the last two
    assert curve(100, 5) == 1.0
    assert PairCurve({(20, 10): 25.0, (100, 50): 1.0})(100, 90) == 1.0  # of noise alone
    assert PairCurve({(100, 50): 5.0})(100, 100) == pytest.approx(20.0)


def test_one_share_is_one_count_left_for_each_that_enters() -> None:
    assert has_one_share({(20, 14): 1.0, (197, 138): 2.0})
    assert not has_one_share({(20, 14): 1.0, (197, 138): 2.0, (197, 109): 2.0})
