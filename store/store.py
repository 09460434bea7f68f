"""The store as one object: what the controller and the API hold."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Self

from store.candidates import CandidateStore
from store.errors import StoreSchemaError
from store.jobs import DEFAULT_MAX_TIMES_LOST, JobStore
from store.migrations import check_schema, upgrade
from store.session import DEFAULT_BUSY_TIMEOUT_S, MOUNTS_FILE, Clock, Database, prepare_sqlite_file
from store.tables import TableStore
from store.urls import describe, parse_url


class Store(JobStore, CandidateStore, TableStore):
    """Everything prunefront remembers. Each method is one short transaction; threads may share a store.

    Every method may raise :class:`StoreError`: ``StoreUnavailableError`` when the database does not answer,
    ``StoreLockedError`` when somebody else holds it for too long, and its plain form when the disk is full or broken.
    """

    def __init__(self, database: Database, *, max_times_lost: int = DEFAULT_MAX_TIMES_LOST) -> None:
        self._database = database
        self._max_times_lost = max_times_lost

    def __repr__(self) -> str:
        return f"Store({describe(self._database.url)!r})"

    def check(self) -> None:
        """Raise :class:`StoreError` unless the database answers and its tables are of this version."""
        check_schema(self._database)

    def close(self) -> None:
        """Close all connections."""
        self._database.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def open_store(
    url: str,
    *,
    migrate: bool = True,
    clock: Clock | None = None,
    busy_timeout_s: float = DEFAULT_BUSY_TIMEOUT_S,
    max_times_lost: int = DEFAULT_MAX_TIMES_LOST,
    mounts_file: Path = MOUNTS_FILE,
) -> Store:
    """Open the store at a database URL.

    Args:
        url: ``sqlite:///path`` or ``postgresql://user:password@host/name``.
        migrate: Create or upgrade the tables where needed; otherwise older tables are refused.
        clock: Replaces the clock that leases and timestamps go by; for tests.
        busy_timeout_s: How long to wait for another process that holds the database.
        max_times_lost: After so many expired leases in a row, without a new result in between, a job fails.
        mounts_file: Where Linux lists its mounts.

    Raises:
        StoreError: If the URL is wrong, or the database cannot be used.
        StoreUnavailableError: If no database answers.
        StoreLockedError: If another process holds it for too long.
        StoreSchemaError: If its tables belong to a newer prunefront, or to an older one and ``migrate`` is off.
    """
    parsed = parse_url(url)
    if parsed.get_backend_name() == "sqlite":
        prepare_sqlite_file(parsed, mounts_file)
    database = Database(parsed, clock=clock, busy_timeout_s=busy_timeout_s)
    try:
        try:
            check_schema(database)
        except StoreSchemaError:
            if not migrate:
                raise
            # Tells a newer schema, which stays refused, from an older one.
            upgrade(url, busy_timeout_s=busy_timeout_s, mounts_file=mounts_file)
    except BaseException:
        database.close()
        raise
    return Store(database, max_times_lost=max_times_lost)
