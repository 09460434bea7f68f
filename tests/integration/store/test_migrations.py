"""Creating and upgrading the tables."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import create_engine, inspect, text

import store.migrations
from store import StoreSchemaError, open_store, upgrade
from store.migrations import REVISIONS, VERSION_TABLE
from store.models import Base
from store.urls import parse_url
from tests.integration.store.writes import propose, start

# Makes SQLite rebuild the table that all others refer to.
SECOND_REVISION = """
import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade():
    with op.batch_alter_table("jobs") as jobs:
        jobs.add_column(sa.Column("owner", sa.Text(), nullable=False, server_default="nobody"))
        jobs.alter_column("name", existing_type=sa.Text(), nullable=True)
    {extra}


def downgrade():
    with op.batch_alter_table("jobs") as jobs:
        jobs.drop_column("owner")
"""


def scripts() -> ScriptDirectory:
    config = Config()
    config.set_main_option("script_location", str(Path(store.migrations.__file__).parent))
    return ScriptDirectory.from_config(config)


@pytest.fixture
def next_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A later prunefront with one more migration; its script lies at the returned path."""
    folder = tmp_path / "migrations"
    (folder / "versions").mkdir(parents=True)
    here = Path(store.migrations.__file__).parent
    for path in (here / "env.py", *here.glob("versions/*.py")):
        (folder / path.relative_to(here)).write_text(path.read_text())
    script = folder / "versions" / "0002_owner.py"
    script.write_text(SECOND_REVISION.format(extra=""))
    monkeypatch.setattr(store.migrations, "__file__", str(folder / "__init__.py"))
    monkeypatch.setattr(store.migrations, "REVISIONS", ("0001", "0002"))
    return script


def test_the_list_of_revisions_is_that_of_the_scripts() -> None:
    assert tuple(script.revision for script in reversed(list(scripts().walk_revisions()))) == REVISIONS


def test_migrated_tables_are_those_of_the_models(new_database_url: str) -> None:
    assert upgrade(new_database_url) == REVISIONS[-1]
    engine = create_engine(parse_url(new_database_url))
    with engine.connect() as connection:
        context = MigrationContext.configure(
            connection, opts={"compare_type": True, "compare_server_default": True, "version_table": VERSION_TABLE}
        )
        differences = compare_metadata(context, Base.metadata)
        names = set(inspect(connection).get_table_names())
    engine.dispose()
    assert differences == []
    assert names == set(Base.metadata.tables) | {VERSION_TABLE}


def test_upgrading_twice_changes_nothing(new_database_url: str) -> None:
    with open_store(new_database_url) as opened:
        job = start(opened)
        upgrade(new_database_url)
        assert opened.get_job(job.id) == job


def test_a_store_without_tables_is_refused_where_migrating_is_off(new_database_url: str) -> None:
    with pytest.raises(StoreSchemaError, match="prunefront db upgrade"):
        open_store(new_database_url, migrate=False)
    upgrade(new_database_url)
    open_store(new_database_url, migrate=False).close()


def test_a_database_of_a_newer_prunefront_is_refused_and_stays(new_database_url: str) -> None:
    with open_store(new_database_url) as opened:
        job = start(opened)
        engine = create_engine(parse_url(new_database_url))
        with engine.begin() as connection:
            connection.execute(text(f"UPDATE {VERSION_TABLE} SET version_num = '9999'"))
        for call in (open_store, upgrade):
            with pytest.raises(StoreSchemaError, match="newer schema 9999. Upgrade prunefront"):
                call(new_database_url)
        with pytest.raises(StoreSchemaError, match="Upgrade prunefront"):
            opened.check()
        with engine.begin() as connection:
            connection.execute(text(f"UPDATE {VERSION_TABLE} SET version_num = '{REVISIONS[-1]}'"))
        engine.dispose()
        opened.check()
        assert opened.get_job(job.id) == job


def test_an_upgrade_keeps_all_data(new_database_url: str, next_version: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as older:
        older.setattr(store.migrations, "REVISIONS", ("0001",))
        older.setattr(store.migrations, "__file__", str(Path(store.__file__).parent / "migrations" / "__init__.py"))
        with open_store(new_database_url) as opened:
            job = start(opened, idempotency_key="k", request_hash="h")
            candidate = propose(opened, job)
            events = opened.events_after(job.id)
    with open_store(new_database_url) as opened:
        assert opened.get_job(job.id) == job
        # SQLite rebuilt the table of jobs: what refers to it must have survived that.
        assert opened.list_candidates(job.id) == [candidate]
        assert opened.events_after(job.id) == events
        opened.release_job(job.id, job.fence)
        assert opened.delete_job(job.id) == []
    engine = create_engine(parse_url(new_database_url))
    with engine.connect() as connection:
        columns = {column["name"]: column for column in inspect(connection).get_columns("jobs")}
        assert connection.execute(text("SELECT count(*) FROM candidates")).scalar_one() == 0
    engine.dispose()
    assert columns["owner"]["default"] is not None


def test_a_migration_that_fails_leaves_the_old_tables(new_database_url: str, next_version: Path) -> None:
    next_version.write_text(SECOND_REVISION.format(extra="raise RuntimeError('power cut')"))
    with pytest.raises(RuntimeError, match="power cut"):
        upgrade(new_database_url)
    engine = create_engine(parse_url(new_database_url))
    with engine.connect() as connection:
        assert inspect(connection).get_table_names() == []
    engine.dispose()


def test_a_migration_that_would_break_references_is_undone(new_sqlite_url: str, next_version: Path) -> None:
    next_version.write_text(
        SECOND_REVISION.format(
            extra="op.execute(\"INSERT INTO idempotency_keys VALUES ('k', 'h', 'no job', '2026-01-01')\")"
        )
    )
    with pytest.raises(store.StoreError, match="'idempotency_keys'; undone"):
        upgrade(new_sqlite_url)
    with pytest.raises(StoreSchemaError, match="no tables"):
        open_store(new_sqlite_url, migrate=False)


def test_every_migration_can_be_undone(new_database_url: str) -> None:
    upgrade(new_database_url)
    engine = create_engine(parse_url(new_database_url))
    with engine.begin() as connection:
        config = Config()
        config.set_main_option("script_location", str(Path(store.migrations.__file__).parent))
        config.attributes["connection"] = connection
        command.downgrade(config, "base")
        assert set(inspect(connection).get_table_names()) <= {VERSION_TABLE, "sqlite_sequence"}
    engine.dispose()
    upgrade(new_database_url)


def test_tables_of_an_optuna_storage_in_the_same_database_stay(new_database_url: str) -> None:
    url = parse_url(new_database_url)
    if url.get_backend_name() == "sqlite":
        Path(str(url.database)).parent.mkdir()
    engine = create_engine(url)
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE alembic_version (version_num VARCHAR(32))"))
        connection.execute(text("INSERT INTO alembic_version VALUES ('v3.2.0.a')"))
    open_store(new_database_url).close()
    with engine.connect() as connection:
        assert connection.execute(text("SELECT version_num FROM alembic_version")).scalar_one() == "v3.2.0.a"
    engine.dispose()


def test_a_migration_is_logged(new_sqlite_url: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="store"):
        upgrade(new_sqlite_url)
    (record,) = [record for record in caplog.records if record.name == "store.migrations"]
    assert record.__dict__["action"] == "migrate" and record.__dict__["to_revision"] == REVISIONS[-1]
