"""``python -m service``: the API and the page. ``--with-controller`` also runs the jobs, as `prunefront serve` does."""

from __future__ import annotations

import argparse
import logging
import sys

from prunefront.errors import PrunefrontError
from service.run import serve
from service.settings import Settings


def main(arguments: list[str] | None = None) -> int:
    """Serve with settings from the environment."""
    parser = argparse.ArgumentParser(prog="python -m service", description="Serve prunefront's API and page.")
    parser.add_argument("--with-controller", action="store_true", help="also run a controller, which works on the jobs")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        serve(Settings.read(), options.with_controller)
    except PrunefrontError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
