"""The controller as a child of the service: ``python -m search``, ended when the service is gone.

The service holds the other end of standard input. It closes when the service ends in whatever way, SIGKILL
included, and the controller then gets the same signal that a clean stop sends.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import threading


def _leave_with_parent() -> None:
    while os.read(0, 1024):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def main() -> None:
    """Run the controller in this process."""
    threading.Thread(target=_leave_with_parent, name="leave-with-parent", daemon=True).start()
    sys.argv = ["search"]
    runpy.run_module("search", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
