"""Creation and upgrade of the tables, run by the program itself: users need no alembic.ini."""

from __future__ import annotations

import logging
from pathlib import Path

from sqlalchemy import Connection, inspect, text

from store.errors import StoreError, StoreSchemaError
from store.session import (
    DEFAULT_BUSY_TIMEOUT_S,
    MOUNTS_FILE,
    Database,
    build_engine,
    enable_wal,
    prepare_sqlite_file,
    translated_errors,
    write_options,
)
from store.urls import describe, parse_url

logger = logging.getLogger(__name__)

# Not Alembic's default name, which Optuna's storage uses as well.
VERSION_TABLE = "prunefront_schema"
# Oldest first. Kept by hand so that opening a store of the current schema does not import Alembic; a test compares
# it with the scripts.
REVISIONS = ("0001",)
# Any number that other programs on the same Postgres database are unlikely to use: "prunefro" as ASCII.
_ADVISORY_LOCK = 0x7072756E6566726F


def upgrade(url: str, *, busy_timeout_s: float = DEFAULT_BUSY_TIMEOUT_S, mounts_file: Path = MOUNTS_FILE) -> str:
    """Bring the tables to this version's schema, creating them where there are none.

    Processes that start at once wait for each other: the first one migrates, the others find it done.

    Args:
        url: Database URL.
        busy_timeout_s: How long to wait for another process; on Postgres a migration is waited for without limit.
        mounts_file: Where Linux lists its mounts.

    Returns:
        The revision the tables are at.

    Raises:
        StoreSchemaError: If the tables belong to a newer prunefront.
        StoreError: If the database cannot be opened or written.
    """
    parsed = parse_url(url)
    is_sqlite = parsed.get_backend_name() == "sqlite"
    if is_sqlite:
        prepare_sqlite_file(parsed, mounts_file)
    engine = build_engine(parsed, busy_timeout_s=busy_timeout_s, for_migration=True)
    try:
        with translated_errors(parsed):
            if is_sqlite:
                enable_wal(parsed, busy_timeout_s)
            # One transaction around everything: a killed migration leaves the old schema, in SQLite as well.
            with engine.execution_options(**write_options()).begin() as connection:
                if not is_sqlite:
                    connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _ADVISORY_LOCK})
                current = current_revision(connection)
                _refuse_newer(current, describe(parsed))
                if current != REVISIONS[-1]:
                    _run_alembic(connection)
                    if is_sqlite and (broken := connection.exec_driver_sql("PRAGMA foreign_key_check").first()):
                        raise StoreError(f"The migration would break a reference in table {broken[0]!r}; undone.")
                    logger.info(
                        "Migrated the database",
                        extra={"action": "migrate", "from_revision": current, "to_revision": REVISIONS[-1]},
                    )
    finally:
        engine.dispose()
    return REVISIONS[-1]


def check_schema(database: Database) -> None:
    """Raise :class:`StoreSchemaError` unless the tables are exactly of this version."""
    with translated_errors(database.url), database.engine.connect() as connection:
        current = current_revision(connection)
    where = describe(database.url)
    _refuse_newer(current, where)
    if current != REVISIONS[-1]:
        raise StoreSchemaError(
            f"Expected the database {where} at schema {REVISIONS[-1]}, got {current or 'no tables'}. "
            "Run `prunefront db upgrade`."
        )


def current_revision(connection: Connection) -> str | None:
    """Return the revision of the tables; None where there are none."""
    if not inspect(connection).has_table(VERSION_TABLE):
        return None
    return connection.execute(text(f"SELECT version_num FROM {VERSION_TABLE}")).scalar_one_or_none()


def _refuse_newer(current: str | None, where: str) -> None:
    if current is not None and current not in REVISIONS:
        raise StoreSchemaError(
            f"Expected the database {where} at schema {REVISIONS[-1]} or older, got the newer schema {current}. "
            "Upgrade prunefront, or use another database."
        )


def _run_alembic(connection: Connection) -> None:
    from alembic import command
    from alembic.config import Config

    config = Config()
    # Per cent signs are interpolation in ini values.
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    config.attributes["connection"] = connection
    command.upgrade(config, "head")
