"""Where commands send their requests: a running service, or this machine's own data behind a service of their own."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from prunefront.errors import PrunefrontError

if TYPE_CHECKING:
    from prunefront.client import Client

START_TIMEOUT_S = 60.0


@contextmanager
def connect(url: str | None, *, with_controller: bool = False, offers_devices: bool = False) -> Iterator[Client]:
    """A client of the service at ``url``, or of one that lives as long as the block.

    The service of the block is the ordinary one on a free loopback port, with the data folder and the database of the
    environment; so whatever a command does here is there for `prunefront serve`, and nothing is done in two ways.

    Args:
        url: Address of a running service; None for this machine.
        with_controller: Without ``url``: also run the jobs meanwhile.
        offers_devices: Without ``url``: let jobs name this machine's devices, though nobody has served here yet.
    """
    from prunefront.client import Client

    if url is not None:
        with Client(url) as client:
            yield client
        return
    with _own_service(with_controller, with_controller or offers_devices) as own_url, Client(own_url) as client:
        yield client


@contextmanager
def _own_service(with_controller: bool, offers_devices: bool) -> Iterator[str]:
    import uvicorn

    from service.app import create_app
    from service.run import listen, prepare_store, url_of
    from service.settings import Settings
    from service.supervisor import Supervisor

    settings = Settings.read(host="127.0.0.1", port=0)
    settings.make_folders()
    with contextlib.closing(listen(settings.host, settings.port)) as listener:
        prepare_store(settings, offers_devices)
        app = create_app(settings)
        server = uvicorn.Server(
            uvicorn.Config(app, log_config=None, access_log=False, server_header=False, timeout_graceful_shutdown=1)
        )
        # Signals stay with the command: uvicorn leaves them alone outside the main thread.
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="own-service", daemon=True)
        thread.start()
        supervisor = Supervisor.of_controller(settings) if with_controller else None
        try:
            _wait_until_started(server, thread)
            if supervisor is not None:
                supervisor.start()
            yield url_of(settings.host, listener.getsockname()[1])
        finally:
            if supervisor is not None:
                supervisor.stop()
            app.state.is_stopping.set()
            server.should_exit = True
            thread.join()


def _wait_until_started(server: Any, thread: threading.Thread) -> None:
    waited = threading.Event()
    for _ in range(int(START_TIMEOUT_S / 0.02)):
        if server.started:
            return
        if not thread.is_alive():
            break
        waited.wait(0.02)
    raise PrunefrontError("The service could not start; prunefront doctor looks for the reason.")
