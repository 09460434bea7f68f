"""`prunefront controller`: claims jobs and works on them, until it is stopped."""

from __future__ import annotations

import os
import runpy
import sys

from prunefront.cli.serve import DatabaseUrl, DataDir, read_settings, start_logging


def controller(data_dir: DataDir = None, database_url: DatabaseUrl = None) -> None:
    """Work on the jobs of a database with the devices of this machine; Ctrl-C gives the job back.

    Any number of controllers may share a Postgres database: each job is worked on by one of them.

    Example: prunefront controller --database-url postgresql://prunefront@db/prunefront
    """
    settings = read_settings(data_dir=data_dir, database_url=database_url)
    # The controller is a program of its own, `python -m search`, that reads the environment.
    os.environ["PRUNEFRONT_DATA_DIR"] = str(settings.data_dir)
    os.environ["PRUNEFRONT_DATABASE_URL"] = settings.database_url
    from search.settings import ControllerSettings

    start_logging(ControllerSettings.read().log_level)
    sys.argv = ["search"]
    runpy.run_module("search", run_name="__main__", alter_sys=True)
