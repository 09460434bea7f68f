"""Database URLs: how they are read and how they are shown. The one place that knows where passwords stand in them."""

from __future__ import annotations

from urllib.parse import unquote

from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError

from store.errors import StoreError

MASK = "***"


def split_url(url: str, expected: str) -> URL:
    """Take the URL of a database of any kind apart.

    Args:
        url: The URL.
        expected: How a sentence begins that says what was expected.

    Raises:
        StoreError: If it is none. The text stays out of the message: what does not parse may still hold a password.
    """
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        # The parser's own words, which a traceback would show, repeat a part of the text.
        raise StoreError(f"{expected}, got text that is not a URL. Correct the database URL.") from None
    if "@" in (parsed.host or ""):
        # The password ended at the first @, and the rest of it would be shown as a part of the host.
        raise StoreError(f"{expected}, got more than one '@' before the host. Write %40 for those in the password.")
    return parsed


def parse_url(url: str) -> URL:
    """Read the URL of a store and name its driver.

    Raises:
        StoreError: If it is not a URL of a SQLite file or of a Postgres server.
    """
    expected = "Expected a database URL such as sqlite:////var/lib/prunefront/store.db or postgresql://user@host/name"
    parsed = split_url(url, expected)
    backend = parsed.drivername.split("+")[0]
    if backend in ("postgresql", "postgres"):
        return parsed.set(drivername="postgresql+psycopg")
    if backend != "sqlite":
        raise StoreError(f"{expected}, got one of {backend!r}. Use SQLite or Postgres.")
    if parsed.host:
        raise StoreError(f"{expected}, got SQLite with a host. Write three slashes and then the path.")
    if parsed.database in (None, "", ":memory:"):
        raise StoreError(f"{expected}, got SQLite without a file. Name a file: API and controller share it.")
    # SQLAlchemy 2.0 takes %XX in a file name as it stands, 2.1 decodes it.
    path = unquote(url.partition(":///")[2].partition("?")[0])
    return parsed.set(drivername="sqlite+pysqlite", database=path)


def describe(url: URL) -> str:
    """Name a store for people: the file, or host, port and name; never the password."""
    if url.get_backend_name() == "sqlite":
        return str(url.database)
    host = url.host or str(url.query.get("host", "localhost"))
    return f"{host}:{url.port or 5432}/{url.database or url.username or ''}"


def show_url(url: URL) -> str:
    """Write the URL of a database of any kind for people: without password and query, which may hold another one."""
    return url.set(query={}).render_as_string(hide_password=True)


def mask_passwords(text: str, url: URL) -> str:
    """The words of a driver without the passwords of the URL that it was given."""
    in_query = [str(value) for name, value in url.query.items() if "passw" in name]
    for password in filter(None, (str(url.password or ""), *in_query)):
        text = text.replace(password, MASK)
    return text
