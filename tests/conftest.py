"""Fixtures that several parts share: databases of both kinds, with the tables of this version."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Generator, Iterator
from pathlib import Path

import hypothesis
import pytest

from store import Store, open_store
from store.models import Base
from tests.postgres_server import PostgresServer, PostgresUnavailable

COMPILERS = ("g++", "clang++", "c++")

# Timing is never asserted: a busy machine is no defect.
hypothesis.settings.register_profile("without deadlines", deadline=None)
hypothesis.settings.load_profile("without deadlines")


def pytest_configure(config: pytest.Config) -> None:
    """Give each of several test processes cores of its own: none then takes CPU from what another one measures."""
    worker = getattr(config, "workerinput", None)
    if worker is None or not hasattr(os, "sched_setaffinity"):
        return
    number, count = int(worker["workerid"].removeprefix("gw")), worker["workercount"]
    own = sorted(os.sched_getaffinity(0))[number::count]
    if own:
        os.sched_setaffinity(0, own)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Refuse tests of one id: of those, several test processes run only one, and say nothing of the others."""
    ids = Counter(item.nodeid for item in session.items)
    if repeated := [name for name, count in ids.items() if count > 1]:
        raise pytest.UsageError(f"Every test needs an id of its own, but these share one: {', '.join(repeated)}.")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test whose marker names something that this machine lacks, and say what."""
    if item.get_closest_marker("compile"):
        names = (os.environ.get("CXX", ""), *COMPILERS)
        if not any(shutil.which(name) for name in names if name):
            pytest.skip(f"needs a C++ compiler: none of {', '.join(COMPILERS)} is on the PATH")
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """In CI, a test that is skipped for what the machine lacks has failed; only a CUDA device may be missing there."""
    report = yield
    if report.skipped and not hasattr(report, "wasxfail") and os.environ.get("CI") == "true":
        if item.get_closest_marker("gpu") is None:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
            report.outcome = "failed"
            report.longrepr = f"Nothing may be skipped in CI, but this was: {reason}"
    return report


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
def sqlite_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Store]]:
    """The SQLite database of all tests, with its URL; see `store`."""
    url = f"sqlite:///{tmp_path_factory.mktemp('sqlite')}/store.db"
    with open_store(url) as opened:
        yield url, opened


@pytest.fixture(scope="session")
def postgres_store(postgres_server: PostgresServer) -> Iterator[tuple[str, Store]]:
    """The Postgres database of all tests, with its URL; see `store`."""
    url = postgres_server.create_database("prunefront_tests")
    with open_store(url) as opened:
        yield url, opened


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def _url_and_store(request: pytest.FixtureRequest) -> tuple[str, Store]:
    url, opened = request.getfixturevalue(f"{request.param}_store")
    with opened._database.write() as session:
        for table in reversed(Base.metadata.sorted_tables):
            session.execute(table.delete())
    return url, opened


@pytest.fixture
def store(_url_and_store: tuple[str, Store]) -> Store:
    """An empty store, once of each kind: one database for all tests, since making one takes as long as many tests."""
    return _url_and_store[1]


@pytest.fixture
def database_url(_url_and_store: tuple[str, Store]) -> str:
    """The database of `store`."""
    return _url_and_store[0]


@pytest.fixture
def new_sqlite_url(tmp_path: Path) -> str:
    """A SQLite database that does not exist yet."""
    return f"sqlite:///{tmp_path}/new/store.db"


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def new_database_url(request: pytest.FixtureRequest) -> Iterator[str]:
    """A database without tables, once of each kind."""
    if request.param == "sqlite":
        yield request.getfixturevalue("new_sqlite_url")
        return
    server: PostgresServer = request.getfixturevalue("postgres_server")
    yield server.create_database("prunefront_new")
    server.drop_database("prunefront_new")
