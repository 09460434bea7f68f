"""What can go wrong with a server."""

from __future__ import annotations

import socket
import traceback
from collections.abc import Iterator

import psycopg
import pytest

from store import LeaseLostError, Store, StoreError, StoreLockedError, StoreUnavailableError, open_store, upgrade
from tests.integration.store.writes import propose, queue, start
from tests.postgres_server import PostgresServer

pytestmark = pytest.mark.postgres


@pytest.fixture
def url(postgres_server: PostgresServer) -> Iterator[str]:
    """An empty database."""
    yield postgres_server.create_database("prunefront_faults")
    postgres_server.drop_database("prunefront_faults")


def test_a_server_that_is_not_there_is_named_without_the_password() -> None:
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        port = reserved.getsockname()[1]
        url = f"postgresql://me:hunter2@127.0.0.1:{port}/prunefront"
        for call in (open_store, upgrade):
            with pytest.raises(
                StoreUnavailableError, match=f"127.0.0.1:{port}/prunefront.*Check that it runs"
            ) as caught:
                call(url)
            assert "hunter2" not in "".join(traceback.format_exception(caught.value))


def test_a_database_that_does_not_exist_is_named(postgres_server: PostgresServer) -> None:
    with pytest.raises(StoreUnavailableError, match='"nowhere" does not exist'):
        open_store(postgres_server.url("nowhere"))


def test_a_user_that_does_not_exist_is_named(postgres_server: PostgresServer) -> None:
    url = postgres_server.url("postgres").replace("postgres@", "stranger:hunter2@")
    with pytest.raises(StoreUnavailableError, match='"stranger" does not exist'):
        open_store(url)


def test_connections_dropped_while_idle_are_replaced(url: str) -> None:
    with open_store(url) as opened:
        job = queue(opened)
        with psycopg.connect(url, autocommit=True) as admin:
            admin.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'prunefront'"
            )
        assert opened.get_job(job.id) == job


def test_a_connection_lost_inside_a_transaction_loses_only_that(url: str) -> None:
    with open_store(url) as opened:
        job = start(opened)
        with pytest.raises(StoreUnavailableError), opened._database.write() as session:
            session.connection().exec_driver_sql("UPDATE jobs SET name = 'never committed'")
            with psycopg.connect(url, autocommit=True) as admin:
                admin.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'prunefront'"
                )
            session.connection().exec_driver_sql("SELECT 1")
        assert opened.get_job(job.id) == job


def test_a_row_held_too_long_is_reported(url: str) -> None:
    with open_store(url, busy_timeout_s=0.2) as opened:
        job = start(opened)
        with psycopg.connect(url) as other:
            other.execute("SELECT * FROM jobs FOR UPDATE")
            with pytest.raises(StoreLockedError, match="Try again in a moment"):
                propose(opened, job)
        assert propose(opened, job).number == 0


def test_a_claim_passes_over_a_job_that_somebody_holds(url: str) -> None:
    with open_store(url, busy_timeout_s=0.2) as opened:
        first, second = queue(opened), queue(opened)
        with psycopg.connect(url) as other:
            other.execute("SELECT * FROM jobs WHERE id = %s FOR UPDATE", [first.id])
            claimed = opened.claim_job("c", 60)
        assert claimed is not None and claimed.id == second.id


def test_time_is_the_servers(url: str) -> None:
    with open_store(url) as opened:
        with psycopg.connect(url) as other:
            (before,) = other.execute("SELECT clock_timestamp()").fetchone() or (None,)
        created_at = queue(opened).created_at
        with psycopg.connect(url) as other:
            (after,) = other.execute("SELECT clock_timestamp()").fetchone() or (None,)
    assert before is not None and after is not None and before < created_at < after


def test_a_read_only_server_is_reported(url: str) -> None:
    upgrade(url)
    with open_store(f"{url}&options=-c%20default_transaction_read_only%3Don") as opened:
        with pytest.raises(StoreError, match="read-only. Connect to the primary"):
            queue(opened)


def test_options_of_the_url_are_kept_beside_ours(url: str) -> None:
    with open_store(f"{url}&options=-c%20work_mem%3D8MB") as opened, opened._database.read() as session:
        connection = session.connection()
        assert connection.exec_driver_sql("SHOW work_mem").scalar_one() == "8MB"
        assert connection.exec_driver_sql("SHOW statement_timeout").scalar_one() == "30s"


def test_a_holder_superseded_while_it_waits_for_the_row_writes_nothing(url: str) -> None:
    with open_store(url) as opened:
        job = start(opened)
        with psycopg.connect(url) as other:
            other.execute("UPDATE jobs SET fence = fence + 1")
            other.commit()
        with pytest.raises(LeaseLostError):
            propose(opened, job)
        assert opened.list_candidates(job.id) == []


def test_a_store_names_its_database_in_its_repr(url: str) -> None:
    with open_store(url) as opened:
        assert "prunefront_faults" in repr(opened) and isinstance(opened, Store)
