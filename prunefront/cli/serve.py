"""`prunefront serve`: the HTTP API and the page, with a controller beside them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prunefront.cli.output import stdout

if TYPE_CHECKING:
    from service.settings import Settings

DataDir = Annotated[Path | None, typer.Option("--data-dir", help="Folder for database, checkpoints, results and logs.")]
DatabaseUrl = Annotated[
    str | None, typer.Option("--database-url", help="Database; SQLite in the data folder when left out.")
]


def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on; loopback when left out.")] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65_535, help="Port; 0 takes any free one.")] = None,
    with_controller: Annotated[
        bool, typer.Option("--controller/--no-controller", help="Also run the jobs on this machine.")
    ] = True,
    data_dir: DataDir = None,
    database_url: DatabaseUrl = None,
) -> None:
    """Start the HTTP API, the page and a controller; Ctrl-C ends all of it, and jobs go on at the next start.

    What is not given here is read from PRUNEFRONT_HOST, PRUNEFRONT_PORT, PRUNEFRONT_DATA_DIR, PRUNEFRONT_DATABASE_URL.

    Example: prunefront serve --port 8080
    """
    settings = read_settings(host=host, port=port, data_dir=data_dir, database_url=database_url)
    from service.run import serve as run_service

    start_logging()
    run_service(settings, with_controller, say=lambda line: stdout().print(line, markup=False, highlight=False))


def read_settings(**given: Any) -> Settings:
    """Settings of the environment, with what the command line gives instead."""
    from service.settings import Settings

    return Settings.read(**{name: value for name, value in given.items() if value is not None})


def start_logging(level: str = "INFO") -> None:
    """Log to stderr; only the processes that serve and work do, a command prints."""
    import logging

    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    for talkative in ("alembic", "httpx", "uvicorn"):
        logging.getLogger(talkative).setLevel(logging.WARNING)
