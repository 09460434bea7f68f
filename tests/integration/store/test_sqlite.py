"""What only SQLite can do, and what can go wrong with a file."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from prunefront.errors import FileWriteError
from store import Store, StoreError, StoreLockedError, backup, open_store, upgrade
from store.session import file_system_of
from tests.integration.store.writes import propose, queue, start


@pytest.fixture
def sqlite_store(new_sqlite_url: str) -> Iterator[Store]:
    """A store of its own file, impatient."""
    with open_store(new_sqlite_url, busy_timeout_s=0.2) as opened:
        yield opened


@pytest.fixture
def path(new_sqlite_url: str) -> Path:
    """The file of `sqlite_store`."""
    return Path(new_sqlite_url.removeprefix("sqlite:///"))


@contextlib.contextmanager
def raw(path: Path) -> Iterator[sqlite3.Connection]:
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        yield connection


def test_the_file_uses_write_ahead_logging_and_checks_references(sqlite_store: Store, path: Path) -> None:
    with raw(path) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    with sqlite_store._database.read() as session:
        assert session.connection().exec_driver_sql("PRAGMA foreign_keys").scalar_one() == 1


def test_readers_work_while_somebody_writes(sqlite_store: Store, path: Path) -> None:
    job = queue(sqlite_store)
    with raw(path) as writer:
        writer.execute("BEGIN IMMEDIATE")
        writer.execute("UPDATE jobs SET name = 'uncommitted'")
        assert sqlite_store.get_job(job.id) == job
        assert sqlite_store.list_jobs()[0] == [job]


def test_a_writer_that_waits_too_long_says_who_is_in_the_way(sqlite_store: Store, path: Path) -> None:
    job = start(sqlite_store)
    with raw(path) as writer:
        writer.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreLockedError, match=f"{path}, but another process has locked it"):
            propose(sqlite_store, job)
    assert propose(sqlite_store, job).number == 0


def test_opening_a_locked_database_that_has_no_tables_yet_is_refused(new_sqlite_url: str, path: Path) -> None:
    path.parent.mkdir()
    with raw(path) as writer:
        writer.execute("BEGIN EXCLUSIVE")
        with pytest.raises(StoreLockedError, match="another process has locked it"):
            open_store(new_sqlite_url, busy_timeout_s=0.2)
    open_store(new_sqlite_url).close()


def test_a_full_disk_loses_nothing(sqlite_store: Store, path: Path) -> None:
    job = start(sqlite_store)
    with sqlite_store._database.write() as session:
        connection = session.connection()
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar_one()
        # The limit belongs to the connection, which the pool hands out again.
        connection.exec_driver_sql(f"PRAGMA max_page_count = {pages + 8}")
    stored = 0
    with pytest.raises(StoreError, match="is full. Nothing stored before is lost; free some space"):
        while True:
            propose(sqlite_store, job, f"h{stored}", config={"padding": "x" * 2000})
            stored += 1
    assert 0 < stored == len(sqlite_store.list_candidates(job.id))
    with sqlite_store._database.write() as session:
        session.connection().exec_driver_sql("PRAGMA max_page_count = 100000")
    assert propose(sqlite_store, job, "after").number == stored


def test_a_file_of_another_kind_is_refused_and_stays(new_sqlite_url: str, path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(b"not a database at all" * 100)
    for call in (open_store, upgrade):
        with pytest.raises(StoreError, match="the file is something else"):
            call(new_sqlite_url)
    assert path.read_bytes() == b"not a database at all" * 100


def test_a_damaged_file_is_reported(new_sqlite_url: str, path: Path) -> None:
    with open_store(new_sqlite_url) as opened:
        for index in range(20):
            queue(opened, spec={"padding": f"{index}" * 3000})
    with raw(path) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    content = bytearray(path.read_bytes())
    for offset in range(8 * 4096, len(content), 4096):
        content[offset : offset + 64] = b"\xff" * 64
    path.write_bytes(content)
    with pytest.raises(StoreError, match="damaged. Restore a backup"), open_store(new_sqlite_url) as opened:
        opened.list_jobs(limit=500)


def test_a_folder_in_place_of_the_file_is_refused(new_sqlite_url: str, path: Path) -> None:
    path.mkdir(parents=True)
    with pytest.raises(StoreError, match="cannot be opened. Check"):
        open_store(new_sqlite_url)


def test_a_folder_that_cannot_be_made_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="Expected to create the database folder"):
        open_store(f"sqlite:///{tmp_path}/file/store.db")


def test_a_database_that_may_not_be_written_is_reported(sqlite_store: Store) -> None:
    with sqlite_store._database.read() as session:
        # As a file without write permission answers; root, which may run the tests, could write that one.
        session.connection().exec_driver_sql("PRAGMA query_only = ON")
    with pytest.raises(StoreError, match="read-only. Give this user the right"):
        queue(sqlite_store)


MOUNTS = r"""
/dev/root / ext4 rw 0 0
proc /proc proc rw 0 0
server:/home /home nfs4 rw 0 0
/dev/sdb /home/local xfs rw 0 0
//box/share /mnt/my\040share cifs rw 0 0
me@box:/ /mnt/ssh fuse.sshfs rw 0 0
/dev/sdc /over ext4 rw 0 0
server:/over /over nfs rw 0 0
broken
"""


@pytest.fixture
def mounts_file(tmp_path: Path) -> Path:
    """A machine with network file systems."""
    mounts = tmp_path / "mounts"
    mounts.write_text(MOUNTS.replace("TMP", str(tmp_path)))
    return mounts


@pytest.mark.parametrize(
    ("path", "file_system"),
    [
        ("/srv/store.db", "ext4"),
        ("/home/me/store.db", "nfs4"),
        ("/home/local/store.db", "xfs"),
        ("/homes/store.db", "ext4"),
        ("/mnt/my share/store.db", "cifs"),
        ("/mnt/ssh/deep/er/store.db", "fuse.sshfs"),
        ("/over/store.db", "nfs"),
        ("/home/local/../me/store.db", "nfs4"),
    ],
)
def test_the_innermost_latest_mount_holds_a_file(mounts_file: Path, path: str, file_system: str) -> None:
    assert file_system_of(Path(path), mounts_file) == file_system


def test_systems_that_do_not_tell_their_mounts_are_trusted(tmp_path: Path) -> None:
    assert file_system_of(tmp_path / "store.db", tmp_path / "no such file") is None


@pytest.mark.parametrize("file_system", ["nfs", "nfs4", "cifs", "smb3", "fuse.sshfs"])
def test_a_database_on_a_network_file_system_is_refused(
    new_sqlite_url: str, path: Path, tmp_path: Path, file_system: str
) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text(f"/dev/root / ext4 rw 0 0\nserver:/x {path.parent.parent} {file_system} rw 0 0\n")
    for call in (open_store, upgrade):
        with pytest.raises(StoreError, match=f"{file_system} network file system.*or use a Postgres URL"):
            call(new_sqlite_url, mounts_file=mounts)
    assert not path.parent.exists()


def test_a_link_to_a_network_file_system_is_followed(tmp_path: Path) -> None:
    (tmp_path / "remote").mkdir()
    (tmp_path / "local").symlink_to(tmp_path / "remote")
    mounts = tmp_path / "mounts"
    mounts.write_text(f"/dev/root / ext4 rw 0 0\nserver:/x {tmp_path}/remote nfs rw 0 0\n")
    with pytest.raises(StoreError, match="network file system"):
        open_store(f"sqlite:///{tmp_path}/local/store.db", mounts_file=mounts)


def test_a_backup_is_a_complete_store(sqlite_store: Store, new_sqlite_url: str, tmp_path: Path) -> None:
    job = start(sqlite_store)
    candidate = propose(sqlite_store, job)
    copy = backup(new_sqlite_url, tmp_path / "copy.db")
    propose(sqlite_store, job, "later")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["copy.db", "new"]
    with open_store(f"sqlite:///{copy}") as opened:
        assert opened.get_job(job.id) == job
        assert opened.list_candidates(job.id) == [candidate]


def test_a_backup_does_not_wait_for_a_writer(sqlite_store: Store, new_sqlite_url: str, path: Path) -> None:
    job = queue(sqlite_store)
    with raw(path) as writer:
        writer.execute("BEGIN IMMEDIATE")
        writer.execute("DELETE FROM jobs")
        copy = backup(new_sqlite_url, path.with_name("copy.db"))
    with open_store(f"sqlite:///{copy}") as opened:
        assert opened.list_jobs()[0] == [job]


def test_a_backup_replaces_the_last_one(sqlite_store: Store, new_sqlite_url: str, tmp_path: Path) -> None:
    backup(new_sqlite_url, tmp_path / "copy.db")
    queue(sqlite_store)
    backup(new_sqlite_url, tmp_path / "copy.db")
    with open_store(f"sqlite:///{tmp_path}/copy.db") as opened:
        assert len(opened.list_jobs()[0]) == 1


def test_a_backup_that_cannot_be_written_keeps_the_last_one(
    sqlite_store: Store, new_sqlite_url: str, tmp_path: Path
) -> None:
    with pytest.raises(FileWriteError, match="Expected to write the copy"):
        backup(new_sqlite_url, tmp_path / "no such folder" / "copy.db")
    (tmp_path / "folder").mkdir()
    with pytest.raises(FileWriteError, match="Expected to write the copy"):
        backup(new_sqlite_url, tmp_path / "folder")
    with pytest.raises(FileWriteError, match="Expected to write the copy"):
        backup(new_sqlite_url, "/dev/null/copy.db")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["folder", "new"]


def test_only_an_existing_sqlite_store_can_be_backed_up(new_sqlite_url: str, path: Path, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no such file"):
        backup(new_sqlite_url, tmp_path / "copy.db")
    with pytest.raises(StoreError, match="Use pg_dump"):
        backup("postgresql://u:hunter2@db/x", tmp_path / "copy.db")
    upgrade(new_sqlite_url)
    with pytest.raises(StoreError, match="Name another file"):
        backup(new_sqlite_url, path)
    path.write_bytes(b"not a database" * 100)
    with pytest.raises(StoreError, match="the file is something else"):
        backup(new_sqlite_url, tmp_path / "copy.db")
    assert not (tmp_path / "copy.db").exists()
