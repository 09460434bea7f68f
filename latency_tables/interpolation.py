"""Piecewise linear interpolation over measured token counts. Exact on measured points, monotone where they are."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence


class Curve:
    """A value by token count; constant beyond its ends (callers refuse counts that were not measured).

    Args:
        points: By tokens.
        power: Of the tokens, with which the value grows between points.
    """

    def __init__(self, points: Mapping[int, float], *, power: int = 1) -> None:
        self.tokens: tuple[int, ...] = tuple(sorted(points))
        self.values: tuple[float, ...] = tuple(points[at] for at in self.tokens)
        self._power = power
        self._places = tuple(at**power for at in self.tokens)

    def __call__(self, tokens: float) -> float:
        return interpolate(self._places, self.values, tokens**self._power)


class Surface:
    """A value by tokens entering and leaving: rows at measured ``tokens_in``, within a row by the share removed.

    Shares, unlike counts, mean the same in every row. Beyond the outermost share or row the nearest one is taken; a
    single row is scaled in proportion to the tokens entering.

    Args:
        points: By tokens entering and leaving.
        power: Of the tokens entering, with which the value grows.
    """

    def __init__(self, points: Mapping[tuple[int, int], float], *, power: int = 1) -> None:
        self._power = power
        rows: dict[int, dict[float, float]] = {}
        for (tokens_in, tokens_out), value in points.items():
            rows.setdefault(tokens_in, {})[share_removed(tokens_in, tokens_out)] = value
        self._tokens_in = tuple(sorted(rows))
        self._rows = tuple(
            (tuple(sorted(rows[at])), tuple(rows[at][share] for share in sorted(rows[at]))) for at in self._tokens_in
        )

    def __call__(self, tokens_in: int, tokens_out: int) -> float:
        share = share_removed(tokens_in, tokens_out)
        if len(self._rows) == 1:
            return interpolate(*self._rows[0], share) * (tokens_in / self._tokens_in[0]) ** self._power
        above = bisect_left(self._tokens_in, tokens_in)
        if above < len(self._tokens_in) and self._tokens_in[above] == tokens_in:
            return interpolate(*self._rows[above], share)
        if above == 0 or above == len(self._tokens_in):
            return interpolate(*self._rows[min(above, len(self._rows) - 1)], share)
        ends = [self._tokens_in[row] ** self._power for row in (above - 1, above)]
        values = [interpolate(*self._rows[row], share) for row in (above - 1, above)]
        return interpolate(ends, values, tokens_in**self._power)


class PairCurve:
    """A value by tokens leaving, however many entered, that grows with their pairs: their square.

    Beyond the most tokens it goes on as between the last two counts, but never falls; of a single count, in proportion.
    Below the least it is constant.
    """

    def __init__(self, points: Mapping[tuple[int, int], float]) -> None:
        squares = {tokens_out**2: value for (_, tokens_out), value in points.items()}
        self._squares = tuple(sorted(squares))
        self._values = tuple(squares[at] for at in self._squares)

    def __call__(self, tokens_in: int, tokens_out: int) -> float:
        square = tokens_out**2
        beyond = square - self._squares[-1]
        if beyond <= 0:
            return interpolate(self._squares, self._values, square)
        (before, low), (last, high) = [(0, 0.0), *zip(self._squares, self._values, strict=True)][-2:]
        return high + beyond * max(0.0, high - low) / (last - before)


def has_one_share(points: Iterable[tuple[int, int]]) -> bool:
    """Whether reductions were measured with one share removed for each number of tokens entering."""
    entering = [tokens_in for tokens_in, _ in points]
    return len(entering) == len(set(entering))


def in_proportion(points: Mapping[int, float], tokens: int) -> float:
    """The nearest point, scaled by its tokens; 0 without points."""
    if not points:
        return 0.0
    nearest = min(points, key=lambda at: abs(at - tokens))
    return points[nearest] * tokens / nearest


def share_removed(tokens_in: int, tokens_out: int) -> float:
    return 1.0 - tokens_out / tokens_in


def interpolate(xs: Sequence[float], ys: Sequence[float], x: float) -> float:
    """``ys`` at ``x`` between ascending ``xs``; constant beyond the ends. Ends of a piece are returned exactly."""
    above = bisect_left(xs, x)
    if above == len(xs):
        return ys[-1]
    if above == 0 or xs[above] == x:
        return ys[above]
    low, high = xs[above - 1], xs[above]
    weight = (x - low) / (high - low)
    return ys[above - 1] * (1.0 - weight) + ys[above] * weight
