"""Fixtures that several parts share: databases of both kinds, with the tables of this version."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from store import Store, open_store, upgrade
from tests.postgres_server import PostgresServer, PostgresUnavailable


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """A Postgres server; without one, tests are skipped, but in CI they fail."""
    try:
        server = PostgresServer()
    except PostgresUnavailable as e:
        if os.environ.get("CI") == "true":
            pytest.fail(f"CI needs a Postgres server, but {e}")
        pytest.skip(f"needs a Postgres server, but {e}")
    yield server
    server.stop()


@pytest.fixture(scope="session")
def _sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sqlite") / "template.db"
    upgrade(f"sqlite:///{path}")
    return path


@pytest.fixture(scope="session")
def _shared_postgres_url(postgres_server: PostgresServer) -> str:
    url = postgres_server.create_database("prunefront_shared")
    upgrade(url)
    return url


@pytest.fixture
def sqlite_url(tmp_path: Path, _sqlite_template: Path) -> str:
    """A SQLite database with empty tables."""
    path = tmp_path / "store.db"
    shutil.copyfile(_sqlite_template, path)
    return f"sqlite:///{path}"


@pytest.fixture
def postgres_url(postgres_server: PostgresServer, _shared_postgres_url: str) -> str:
    """A Postgres database with empty tables. It is one database for all tests: making another takes a second."""
    # Rows of all other tables go with their job.
    postgres_server.execute(_shared_postgres_url, "DELETE FROM jobs; DELETE FROM tables; DELETE FROM devices")
    return _shared_postgres_url


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def database_url(request: pytest.FixtureRequest) -> str:
    """A database with empty tables, once of each kind."""
    url: str = request.getfixturevalue(f"{request.param}_url")
    return url


@pytest.fixture
def store(database_url: str) -> Iterator[Store]:
    """An empty store, once of each kind."""
    with open_store(database_url) as opened:
        yield opened
