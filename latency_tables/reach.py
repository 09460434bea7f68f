"""Up to how many tokens the parts of a table fit into memory, where some of them ran out of it."""

from __future__ import annotations

import math
from collections.abc import Iterable

from latency_tables.interpolation import share_removed

Point = tuple[int, int]  # Tokens entering and leaving.


class Reach:
    """The points of one entry that fit, by those that were tried.

    Memory grows with the tokens that enter and with those that stay. So a point fits where all was well at its tokens
    or more, or where something fitted there that removes no larger share. Tokens beyond all that were tried count as
    the most that were.
    """

    def __init__(self, fitted: Iterable[Point], failed: Iterable[Point]) -> None:
        failed = set(failed)
        rows: dict[int, float] = {tokens_in: math.inf for tokens_in, _ in failed}
        # The least share removed that fits, by tokens entering; a row in which nothing failed fits as a whole.
        for tokens_in, tokens_out in fitted:
            share = share_removed(tokens_in, tokens_out)
            rows[tokens_in] = min(rows[tokens_in], share) if tokens_in in rows else -math.inf
        self._rows = rows
        self._most = max(rows)
        # The most tokens that fit whatever is removed; 0 where there are none.
        self.max_tokens = max((at for at, share in rows.items() if share == -math.inf), default=0)

    def covers(self, tokens_in: int, tokens_out: int) -> bool:
        """Whether a point is known to fit."""
        share = share_removed(tokens_in, tokens_out)
        at = min(tokens_in, self._most)
        return any(row >= at and least <= share for row, least in self._rows.items())
