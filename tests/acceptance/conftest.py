"""A real server on loopback over a seeded store, and a client of it."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import uvicorn

from service.app import create_app
from service.run import ApiServer, listen
from service.settings import Settings
from store import Store, open_store
from tests.acceptance.seeding import seed_devices, seed_search, seed_table

START_TIMEOUT_S = 120.0
ANSWER_TIMEOUT_S = 120.0  # The first look at a dataset imports what reads it


@dataclass(frozen=True, kw_only=True)
class Server:
    """A running server and what is in its store."""

    url: str
    settings: Settings
    store: Store
    search_id: str
    table_id: str

    @property
    def api(self) -> str:
        return f"{self.url}/api/v1"


@contextlib.contextmanager
def running_server(settings: Settings) -> Iterator[str]:
    """The application behind a real socket, in a thread.

    Yields:
        Its address.
    """
    listener = listen(settings.host, settings.port)
    app = create_app(settings)
    ready = threading.Event()
    config = uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=2)
    server = ApiServer(config, on_ready=ready.set, on_stopping=app.state.is_stopping.set)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not ready.wait(0.05):
            assert thread.is_alive() and time.monotonic() < deadline, "the server did not start"
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for the tests of a module; tests that change something submit a job of their own."""
    data_dir: Path = tmp_path_factory.mktemp("data")
    settings = Settings(data_dir=data_dir, database_url="", port=0, event_poll_s=0.05)
    with open_store(settings.database_url) as store:
        seed_devices(store)
        search_id, table_id = seed_search(store), seed_table(store)
        with running_server(settings) as url:
            yield Server(url=url, settings=settings, store=store, search_id=search_id, table_id=table_id)


@pytest.fixture
def http(server: Server) -> Iterator[httpx.Client]:
    """Requests to the API, by paths under /api/v1."""
    with httpx.Client(base_url=server.api, timeout=ANSWER_TIMEOUT_S) as client:
        yield client
