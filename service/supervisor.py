"""Keeps one controller running beside the API and takes it along on the way out."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from service.settings import Settings

logger = logging.getLogger(__name__)

FIRST_RESTART_S = 1.0
LONGEST_RESTART_S = 30.0
HEALTHY_AFTER_S = 60.0
"""A child that lived this long did not fail at its start: the next one is started at once again."""
KILL_WAIT_S = 5.0


def controller_environment(settings: Settings) -> dict[str, str]:
    """The environment that makes a child process see the same store and data as the service."""
    checkout = str(Path(__file__).parent.parent)
    inherited = os.environ.get("PYTHONPATH")
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([checkout, inherited] if inherited else [checkout]),
        "PRUNEFRONT_DATA_DIR": str(settings.data_dir),
        "PRUNEFRONT_DATABASE_URL": settings.database_url,
    }


class Supervisor:
    """Runs a command in a process group of its own and starts it again, ever less eagerly, when it ends.

    Args:
        command: Program and arguments.
        environment: Environment of the child.
        grace_s: Seconds between asking the child to stop and killing its group.
        first_restart_s: Pause before the first restart; it doubles up to ``LONGEST_RESTART_S``.
    """

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        *,
        grace_s: float,
        first_restart_s: float = FIRST_RESTART_S,
    ) -> None:
        self.command = list(command)
        self.environment = dict(environment)
        self.grace_s = grace_s
        self.first_restart_s = first_restart_s
        self.num_starts = 0
        self.process: subprocess.Popen[bytes] | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="controller-supervisor", daemon=True)

    @classmethod
    def of_controller(cls, settings: Settings) -> Supervisor:
        command = [sys.executable, "-m", "service.controller_process"]
        return cls(command, controller_environment(settings), grace_s=settings.shutdown_grace_s)

    def start(self) -> None:
        """Start the child and watch it from a thread."""
        self._thread.start()

    def stop(self) -> None:
        """End the child and wait until it is gone; afterwards nothing of it runs."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        pause_s = self.first_restart_s
        while not self._stop.is_set():
            started = time.monotonic()
            self.num_starts += 1
            # Its own session: Ctrl-C in the terminal reaches the service alone, which then stops the child in order.
            self.process = subprocess.Popen(
                self.command, env=self.environment, stdin=subprocess.PIPE, start_new_session=True
            )
            with self.process:
                while self.process.poll() is None and not self._stop.wait(0.1):
                    pass
                if self._stop.is_set():
                    self._end(self.process)
                    return
            if time.monotonic() - started > HEALTHY_AFTER_S:
                pause_s = self.first_restart_s
            logger.warning(
                "The controller ended with status %s; starting it again in %.0f s.",
                self.process.returncode,
                pause_s,
                extra={"action": "restart_controller", "status": self.process.returncode},
            )
            self._stop.wait(pause_s)
            pause_s = min(2 * pause_s, LONGEST_RESTART_S)

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        process.terminate()
        try:
            process.wait(self.grace_s)
        except subprocess.TimeoutExpired:
            logger.warning(
                "The controller did not stop within %.0f s and is killed; its jobs go on at the next start.",
                self.grace_s,
                extra={"action": "kill_controller"},
            )
            process.kill()
            process.wait(KILL_WAIT_S)
