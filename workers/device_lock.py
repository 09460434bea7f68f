"""Locks that every prunefront process on a machine respects, whoever started it.

One lock file per physical device. A task holds its device's lock while it runs: alone when it measures, together with
others when it does not. Every task also holds the lock of the CPU, which all of them use, so nothing of ours runs on
the machine while something is measured on its CPU. ``flock`` locks belong to the open file: a killed process gives its
locks back, and a worker process that it forked and that still computes keeps them.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from workers.tasks import TaskStopped

RETRY_S = 0.05  # between two tries for a lock
CPU = "cpu"


def default_lock_dir() -> Path:
    """Return the machine's folder for device locks: ``PRUNEFRONT_LOCK_DIR``, or one below the temporary folder."""
    configured = os.environ.get("PRUNEFRONT_LOCK_DIR")
    return Path(configured) if configured else Path(tempfile.gettempdir()) / "prunefront-device-locks"


@contextmanager
def hold_device(
    device_id: str,
    *,
    exclusive: bool,
    lock_dir: Path,
    on_wait: Callable[[], None],
    should_stop: Callable[[], bool],
) -> Iterator[None]:
    """Hold a physical device for the length of a ``with`` block.

    Args:
        device_id: ``"cpu"``, or a name that every process on this machine gives the same accelerator.
        exclusive: Whether nobody else of ours may hold it meanwhile.
        lock_dir: The same folder for every process on the machine.
        on_wait: Called once if somebody else holds it.
        should_stop: Ends the waiting when it becomes true.

    Raises:
        TaskStopped: If the task was asked to stop while it waited.
    """
    _make_shared_dir(lock_dir)
    # Always the CPU first: a fixed order cannot deadlock.
    wanted = [(CPU, exclusive and device_id == CPU)]
    if device_id != CPU:
        wanted.append((device_id, exclusive))
    waited = False

    def wait() -> None:
        nonlocal waited
        if not waited:
            waited = True
            on_wait()
        if should_stop():
            raise TaskStopped
        time.sleep(RETRY_S)

    with ExitStack() as held:
        for name, alone in wanted:
            # Whoever waits for the device holds its gate, so that a stream of tasks that share the device cannot
            # keep a measurement out for ever.
            with _flocked(lock_dir / f"{name}.gate", fcntl.LOCK_EX, wait):
                held.enter_context(_flocked(lock_dir / f"{name}.lock", fcntl.LOCK_EX if alone else fcntl.LOCK_SH, wait))
        yield


@contextmanager
def _flocked(path: Path, operation: int, wait: Callable[[], None]) -> Iterator[None]:
    descriptor = _open_shared(path)
    try:
        while True:
            try:
                fcntl.flock(descriptor, operation | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                wait()
        yield
    finally:
        os.close(descriptor)


def _make_shared_dir(path: Path) -> None:
    """Create the folder so that every user of the machine can add locks and none can remove another's."""
    try:
        path.mkdir(parents=True)
    except FileExistsError:
        return
    path.chmod(0o1777)


def _open_shared(path: Path) -> int:
    """Open a lock file that any user may have made; reading rights are enough for ``flock``."""
    while True:
        try:
            # No O_CREAT here: Linux refuses it for another user's file in a folder like /tmp (fs.protected_regular).
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            pass
        try:
            os.close(os.open(path, os.O_RDONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644))
        except FileExistsError:
            pass  # another process was quicker
