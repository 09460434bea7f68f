"""serve(): the API and the page on one port, with a controller beside them if wanted."""

from __future__ import annotations

import contextlib
import errno
import logging
import signal
import socket
from collections.abc import Callable, Iterator
from types import FrameType

import uvicorn

from prunefront.errors import ConfigError
from search.settings import ControllerSettings
from service.app import create_app
from service.settings import Settings
from service.supervisor import Supervisor
from store import open_store
from workers.devices import list_local_devices

logger = logging.getLogger(__name__)

CONNECTION_GRACE_S = 5
"""Seconds that open connections get to end once the service stops."""


class ApiServer(uvicorn.Server):
    """Uvicorn, telling the application at once that it stops, so that endless answers end."""

    def __init__(self, config: uvicorn.Config, on_ready: Callable[[], None], on_stopping: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_ready = on_ready
        self._on_stopping = on_stopping

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._on_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._on_stopping()
        await super().shutdown(sockets)


def serve(settings: Settings, with_controller: bool, *, say: Callable[[str], None] = print) -> None:
    """Serve until SIGINT or SIGTERM; returns when everything that was started has ended.

    Args:
        settings: Where to listen, where the data is.
        with_controller: Also run jobs: one controller as a child process, started again if it ends.
        say: Takes the lines meant for the person at the terminal.

    Raises:
        ConfigError: If a setting cannot be used, the address is not safe, or the port is taken.
        FileWriteError: If the data folder cannot be written.
        StoreError: If the database cannot be used.
    """
    settings.require_safe_bind()
    settings.make_folders()
    if with_controller:
        # Its process would end at once, again and again, with nobody to tell but the log.
        ControllerSettings.read(data_dir=settings.data_dir).make_folders()
    listener = listen(settings.host, settings.port)
    with contextlib.closing(listener), _signals_ignored_after_shutdown():
        prepare_store(settings, with_controller)
        app = create_app(settings)
        config = uvicorn.Config(
            app, log_config=None, access_log=False, server_header=False, timeout_graceful_shutdown=CONNECTION_GRACE_S
        )
        url = url_of(settings.host, listener.getsockname()[1])
        server = ApiServer(
            config,
            on_ready=lambda: say(f"prunefront is at {url} (data in {settings.data_dir}; Ctrl-C ends it)"),
            on_stopping=app.state.is_stopping.set,
        )
        supervisor = Supervisor.of_controller(settings) if with_controller else None
        if supervisor is not None:
            supervisor.start()
        try:
            server.run(sockets=[listener])
            if not server.started:
                raise ConfigError("The service could not start; the lines above say why.")
        finally:
            if supervisor is not None:
                supervisor.stop()


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there.

    Raises:
        ConfigError: If the port is taken or the address is not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host.strip("[]"), port))
        listener.listen(2048)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(
                f"Port {port} on {host} is taken, perhaps by another `prunefront serve`; stop that one, or choose "
                "another port with --port or PRUNEFRONT_PORT (0 takes any free one)."
            ) from error
        raise ConfigError(
            f"Cannot listen on {host} port {port}: {error.strerror or error}; choose another host or port."
        ) from error
    return listener


def url_of(host: str, port: int) -> str:
    """Where a browser on this machine finds the page."""
    name = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{name}:{port}"


def prepare_store(settings: Settings, with_controller: bool) -> None:
    """Bring the database up to date and, with a controller, let jobs name this machine's devices from the start.

    Raises:
        StoreError: If the database cannot be used.
    """
    with open_store(settings.database_url) as store:
        for device in list_local_devices() if with_controller else ():
            info = {"description": device.description, "num_threads": device.num_threads}
            store.save_device(device.name, device.description, device.kind, info)


@contextlib.contextmanager
def _signals_ignored_after_shutdown() -> Iterator[None]:
    """Survive the signal that ended uvicorn: it raises it again afterwards, before the controller was stopped."""

    def note(number: int, frame: FrameType | None) -> None:
        logger.info("stopping", extra={"action": "stop", "signal": number})

    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
