"""`prunefront db`: bring the database's tables up to date, and copy a SQLite database while it is in use."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from prunefront.cli.output import note
from prunefront.cli.serve import DatabaseUrl, read_settings

app = typer.Typer(help="Look after the database.", no_args_is_help=True)


@app.command("upgrade")
def upgrade(database_url: DatabaseUrl = None) -> None:
    """Create the tables, or bring those of an older version up to date; nothing stored is lost.

    Example: prunefront db upgrade
    """
    import store

    store.upgrade(read_settings(database_url=database_url).database_url)
    note("The database is up to date.")


@app.command("backup")
def backup(
    out: Annotated[Path, typer.Argument(help="File to write.")],
    database_url: DatabaseUrl = None,
) -> None:
    """Copy the SQLite database to a file, consistent even while jobs run; for Postgres, use pg_dump.

    Example: prunefront db backup prunefront-backup.sqlite3
    """
    import store

    note(f"Wrote {store.backup(read_settings(database_url=database_url).database_url, out)}")
