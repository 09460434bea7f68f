"""``python -m search``: a controller on this machine's devices, until it is told to stop."""

from __future__ import annotations

import logging
import signal
import sys
import threading

from prunefront.errors import PrunefrontError
from search.controller import Controller
from search.settings import ControllerSettings
from store import open_store
from workers.engines.local import LocalEngine


def main() -> None:
    """Run a controller; SIGTERM and Ctrl-C give the job at hand back to the queue."""
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    try:
        settings = ControllerSettings.read()
        logging.basicConfig(level=settings.log_level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
        settings.make_folders()
        with open_store(settings.database_url) as store, LocalEngine(settings.engine_dir) as engine:
            Controller(store, engine, settings).run_forever(stop)
    except PrunefrontError as error:
        sys.exit(f"prunefront controller: {error}")


if __name__ == "__main__":
    main()
