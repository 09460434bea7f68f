"""A clock that tests move, and a store that goes by it."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from store import Store


class MovableClock:
    """Stands still until it is moved."""

    def __init__(self) -> None:
        self.now = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.now

    def advance(self, seconds: float) -> None:
        """Move forward (or, with a negative number, back)."""
        self.now += timedelta(seconds=seconds)


@pytest.fixture
def clock() -> MovableClock:
    """The clock of `timed_store`."""
    return MovableClock()


@pytest.fixture
def timed_store(store: Store, clock: MovableClock, monkeypatch: pytest.MonkeyPatch) -> Store:
    """`store` going by `clock`; jobs fail after being lost three times."""
    monkeypatch.setattr(store._database, "clock", clock)
    monkeypatch.setattr(store, "_max_times_lost", 3)
    return store
