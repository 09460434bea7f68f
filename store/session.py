"""Connections, transactions and the database's errors in the user's words. Nothing outside `store` speaks SQL."""

from __future__ import annotations

import logging
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from sqlalchemy import URL, Connection, Engine, create_engine, event, func, select
from sqlalchemy import exc as sa_exc
from sqlalchemy.orm import Session, sessionmaker
from sqlalchemy.pool import ConnectionPoolEntry

from store.errors import ConflictError, DocumentError, StoreError, StoreLockedError, StoreUnavailableError
from store.models import UtcDateTime
from store.urls import describe, mask_passwords

logger = logging.getLogger(__name__)

Clock = Callable[[], datetime]

DEFAULT_BUSY_TIMEOUT_S = 10.0
CONNECT_TIMEOUT_S = 10
STATEMENT_TIMEOUT_S = 30
IDLE_IN_TRANSACTION_TIMEOUT_S = 60
# The API serves requests from about 40 threads; each transaction lasts milliseconds.
POOL_SIZE = 10
MAX_POOL_OVERFLOW = 20

MOUNTS_FILE = Path("/proc/mounts")
# SQLite's locks and its shared-memory file do not work across machines.
NETWORK_FILE_SYSTEMS = frozenset(
    "afs afpfs beegfs ceph cifs davfs glusterfs gpfs lustre ncpfs nfs nfs4 ocfs2 orangefs pvfs2 smb smb2 smb3 smbfs "
    "fuse.ceph fuse.cephfs fuse.curlftpfs fuse.davfs2 fuse.gcsfuse fuse.glusterfs fuse.rclone fuse.s3fs fuse.smbnetfs "
    "fuse.sshfs".split()
)

_WRITES = "prunefront_writes"
# Extended SQLite codes carry the primary one in the low byte.
_SQLITE_PRIMARY_CODE = 0xFF
_UNIQUE_VIOLATION = "23505"


def file_system_of(path: Path, mounts_file: Path = MOUNTS_FILE) -> str | None:
    """Return the file system type that holds ``path``; None where the system does not tell (not Linux)."""
    try:
        lines = mounts_file.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return None
    target = path.resolve()
    best_depth, found = -1, None
    for line in lines:
        fields = line.split(" ")
        if len(fields) < 3:
            continue
        # Blanks and the like are written as octal escapes.
        mount_point = Path(
            fields[1].replace("\\040", " ").replace("\\011", "\t").replace("\\012", "\n").replace("\\134", "\\")
        )
        depth = len(mount_point.parts)
        # `>=`: of two mounts on one point the later one is visible.
        if target.is_relative_to(mount_point) and depth >= best_depth:
            best_depth, found = depth, fields[2]
    return found


def prepare_sqlite_file(url: URL, mounts_file: Path = MOUNTS_FILE) -> None:
    """Create the folder of a SQLite database and refuse one that only a network reaches.

    Raises:
        StoreError: If the folder cannot be created, or lies on a network file system.
    """
    path = Path(str(url.database))
    file_system = file_system_of(path, mounts_file)
    if file_system in NETWORK_FILE_SYSTEMS:
        raise StoreError(
            f"Expected the SQLite database {path} on a local disk, but its folder is a {file_system} network file "
            "system, where SQLite's locks do not work. Move it to a local disk, or use a Postgres URL."
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise StoreError(
            f"Expected to create the database folder {path.parent}, got: {e.strerror}. Choose another folder."
        ) from e


def build_engine(url: URL, *, busy_timeout_s: float = DEFAULT_BUSY_TIMEOUT_S, for_migration: bool = False) -> Engine:
    """Create the engine; nothing connects yet.

    Args:
        url: From :func:`store.urls.parse_url`.
        busy_timeout_s: How long a transaction waits for another process.
        for_migration: Without foreign key enforcement (SQLite rebuilds tables by dropping them) and time limits.
    """
    if url.get_backend_name() == "sqlite":
        engine = create_engine(
            url, pool_size=POOL_SIZE, max_overflow=MAX_POOL_OVERFLOW, connect_args={"timeout": busy_timeout_s}
        )
        _configure_sqlite(engine, foreign_keys=not for_migration)
        return engine
    options = f"-c lock_timeout={round(busy_timeout_s * 1000)} -c TimeZone=UTC"
    if for_migration:
        options = "-c TimeZone=UTC"
    else:
        options += f" -c statement_timeout={STATEMENT_TIMEOUT_S * 1000}"
        options += f" -c idle_in_transaction_session_timeout={IDLE_IN_TRANSACTION_TIMEOUT_S * 1000}"
    given = url.query.get("options")
    if given:
        options = f"{options} {given if isinstance(given, str) else ' '.join(given)}"
    return create_engine(
        url,
        pool_size=POOL_SIZE,
        max_overflow=MAX_POOL_OVERFLOW,
        # A connection that the server or a firewall dropped while a job ran for hours is replaced, not reported.
        pool_pre_ping=True,
        connect_args={
            "connect_timeout": int(str(url.query.get("connect_timeout", CONNECT_TIMEOUT_S))),
            "application_name": "prunefront",
            "options": options,
        },
    )


def _configure_sqlite(engine: Engine, *, foreign_keys: bool) -> None:
    @event.listens_for(engine, "connect")
    def connect(connection: sqlite3.Connection, _record: ConnectionPoolEntry) -> None:
        # The sqlite3 module would begin transactions by itself, and too late for IMMEDIATE.
        connection.isolation_level = None
        connection.execute(f"PRAGMA foreign_keys={'ON' if foreign_keys else 'OFF'}")
        # With WAL, a killed process loses nothing and a power cut at most the last commits, never consistency.
        connection.execute("PRAGMA synchronous=NORMAL")

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        # A writer takes the lock first: upgrading a read lock later fails at once instead of waiting.
        mode = "IMMEDIATE" if connection.get_execution_options().get(_WRITES) else "DEFERRED"
        connection.exec_driver_sql(f"BEGIN {mode}")


def enable_wal(url: URL, busy_timeout_s: float) -> None:
    """Switch a SQLite file to write-ahead logging, which it then keeps.

    Two processes that switch at once make SQLite answer "locked" without waiting, so the wait is here.
    """
    deadline = time.monotonic() + busy_timeout_s
    while True:
        connection = sqlite3.connect(str(url.database), timeout=busy_timeout_s, isolation_level=None)
        try:
            (mode,) = connection.execute("PRAGMA journal_mode=WAL").fetchone()
            break
        except sqlite3.OperationalError as e:
            if _sqlite_code(e) not in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED) or time.monotonic() > deadline:
                raise
            time.sleep(0.02)
        finally:
            connection.close()
    if mode != "wal":
        logger.warning(
            "SQLite keeps its journal mode", extra={"action": "enable_wal", "journal_mode": mode, "path": url.database}
        )


def write_options() -> dict[str, bool]:
    """Execution options of an engine whose transactions write."""
    return {_WRITES: True}


class Database:
    """One database: its engine, its clock, and short transactions."""

    def __init__(self, url: URL, *, clock: Clock | None = None, busy_timeout_s: float = DEFAULT_BUSY_TIMEOUT_S) -> None:
        self.url = url
        self.engine = build_engine(url, busy_timeout_s=busy_timeout_s)
        self.clock = clock
        # Methods flush where they mean to; reading the clock must not write a half-filled row.
        self._reads = sessionmaker(self.engine, autoflush=False, expire_on_commit=False)
        self._writes = sessionmaker(
            self.engine.execution_options(**write_options()), autoflush=False, expire_on_commit=False
        )

    @property
    def is_sqlite(self) -> bool:
        """Whether the database is a SQLite file."""
        return self.url.get_backend_name() == "sqlite"

    @contextmanager
    def read(self) -> Iterator[Session]:
        """Run a transaction that only reads; on SQLite it never waits for writers."""
        with translated_errors(self.url), self._reads.begin() as session:
            yield session

    @contextmanager
    def write(self) -> Iterator[Session]:
        """Run a transaction that writes; on SQLite it holds the write lock from its first statement."""
        with translated_errors(self.url), self._writes.begin() as session:
            yield session

    def now(self, session: Session) -> datetime:
        """Tell the time by one clock for all processes: Postgres' own, or that of SQLite's machine."""
        if self.clock is not None:
            return self.clock()
        if self.is_sqlite:
            return datetime.now(UTC)
        return session.scalars(select(func.clock_timestamp(type_=UtcDateTime()))).one()

    def close(self) -> None:
        """Close all connections."""
        self.engine.dispose()


@contextmanager
def translated_errors(url: URL) -> Iterator[None]:
    """Turn the driver's errors into :class:`StoreError` with one sentence; the cause is kept."""
    try:
        yield
    except sa_exc.StatementError as e:
        if isinstance(e.orig, StoreError):
            raise e.orig from e
        raise _translate(e, url) from e
    except sa_exc.TimeoutError as e:
        raise StoreLockedError(
            f"Expected a free connection to {describe(url)}, but all are in use. Try again in a moment."
        ) from e
    except sqlite3.Error as e:
        raise _translate_sqlite(e, url) from e
    except sa_exc.SQLAlchemyError as e:
        raise StoreError(f"The database {describe(url)} answered: {_first_line(e)}.") from e
    except OverflowError as e:
        raise DocumentError("Expected integers of at most 64 bits. Use a smaller number.") from e


def _translate(error: sa_exc.StatementError, url: URL) -> StoreError:
    if isinstance(error.orig, OverflowError) or (isinstance(error, sa_exc.DataError) and error.orig is not None):
        return DocumentError(f"Expected values that the database can store, got: {_first_line(error.orig)}.")
    if isinstance(error, sa_exc.IntegrityError) and _is_duplicate(error.orig):
        return ConflictError(
            f"Another process stored the same at this moment ({_first_line(error.orig or error)}). Try again."
        )
    if isinstance(error.orig, sqlite3.Error):
        return _translate_sqlite(error.orig, url)
    return _translate_postgres(error, url)


def _is_duplicate(error: BaseException | None) -> bool:
    if isinstance(error, sqlite3.Error):
        return error.sqlite_errorcode in (sqlite3.SQLITE_CONSTRAINT_UNIQUE, sqlite3.SQLITE_CONSTRAINT_PRIMARYKEY)
    return getattr(error, "sqlstate", None) == _UNIQUE_VIOLATION


def _sqlite_code(error: sqlite3.Error) -> int:
    return getattr(error, "sqlite_errorcode", 0) & _SQLITE_PRIMARY_CODE


def _translate_sqlite(error: sqlite3.Error, url: URL) -> StoreError:
    path = describe(url)
    match _sqlite_code(error):
        case sqlite3.SQLITE_BUSY | sqlite3.SQLITE_LOCKED:
            return StoreLockedError(
                f"Expected to write to the database {path}, but another process has locked it. "
                "Close other programs that have it open, or use Postgres for many writers."
            )
        case sqlite3.SQLITE_FULL:
            return StoreError(
                f"Expected room for the database {path}, but the disk (or the database's size limit) is full. "
                "Nothing stored before is lost; free some space and try again."
            )
        case sqlite3.SQLITE_NOTADB:
            return StoreError(
                f"Expected a SQLite database at {path}, but the file is something else. Name another file."
            )
        case sqlite3.SQLITE_CORRUPT:
            return StoreError(
                f"Expected an intact SQLite database at {path}, but the file is damaged. Restore a backup of it."
            )
        case sqlite3.SQLITE_CANTOPEN | sqlite3.SQLITE_PERM:
            return StoreError(
                f"Expected to open the database {path}, but the file cannot be opened. "
                "Check that it is a file and that this user may read and write it and its folder."
            )
        case sqlite3.SQLITE_READONLY:
            return StoreError(
                f"Expected to write to the database {path}, but it is read-only. "
                "Give this user the right to write the file and its folder."
            )
        case sqlite3.SQLITE_IOERR:
            return StoreError(
                f"Expected to read and write the database {path}, but the disk failed ({error}). "
                "Nothing stored before is lost; check free space and the disk."
            )
    return StoreError(f"The database {path} answered: {_first_line(error)}.")


def _translate_postgres(error: sa_exc.StatementError, url: URL) -> StoreError:
    where = describe(url)
    state = getattr(error.orig, "sqlstate", None) or ""
    reason = mask_passwords(_first_line(error.orig or error), url)
    if state in ("57014", "55P03", "40001", "40P01"):
        return StoreLockedError(
            f"Expected an answer from the database {where}, but another transaction held it too long ({reason}). "
            "Try again in a moment."
        )
    if state.startswith("53") and state != "53300":
        return StoreError(
            f"Expected room in the database {where}, but the server ran out of it ({reason}). "
            "Nothing stored before is lost; free some space and try again."
        )
    if state == "25006":
        return StoreError(
            f"Expected to write to the database {where}, but it is read-only. Connect to the primary server."
        )
    is_disconnect = isinstance(error, sa_exc.DBAPIError) and error.connection_invalidated
    if (
        is_disconnect
        or state == "53300"
        or state[:2] in ("08", "28", "3D", "57")
        or (not state and isinstance(error, sa_exc.OperationalError | sa_exc.InterfaceError))
    ):
        return StoreUnavailableError(
            f"Expected a Postgres server at {where}, got: {reason}. "
            "Check that it runs and that host, user, password and database name are right."
        )
    return StoreError(f"The database {where} answered: {reason}.")


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return (text.splitlines()[0] if text else type(error).__name__).rstrip(". ")
