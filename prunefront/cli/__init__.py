"""The `prunefront` command: one file per command; the application and torch are imported when a command needs them."""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Run the command line and exit: 0 done, 1 the work failed, 2 the request cannot be carried out, 130 stopped."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the caller
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
        # A terminal without the sign × shows ? instead of ending the command.
        getattr(sys, name).reconfigure(errors="replace")
    try:
        sys.exit(_run())
    except KeyboardInterrupt:  # before the command took over
        print("Stopped.", file=sys.stderr)
        sys.exit(130)


def _run() -> int:
    try:
        from prunefront.cli.app import run
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("typer", "rich"):
            raise
        print(
            f"The prunefront command needs the package {error.name}, which the library alone does not install: "
            "pip install 'prunefront[app]'.",
            file=sys.stderr,
        )
        return 2
    return run(sys.argv[1:])
