"""Database URLs are read as they are meant and shown without their passwords."""

from __future__ import annotations

import traceback

import pytest
from sqlalchemy import make_url

from store import StoreError
from store.urls import describe, mask_passwords, parse_url, show_url


@pytest.mark.parametrize(
    ("url", "driver"),
    [
        ("sqlite:////srv/store.db", "sqlite+pysqlite"),
        ("sqlite:///store.db", "sqlite+pysqlite"),
        ("postgresql://u:p@db/prunefront", "postgresql+psycopg"),
        ("postgres://u:p@db/prunefront", "postgresql+psycopg"),
        ("postgresql+psycopg2://u:p@db/prunefront", "postgresql+psycopg"),
    ],
)
def test_urls_get_the_driver_that_is_installed(url: str, driver: str) -> None:
    assert parse_url(url).drivername == driver


@pytest.mark.parametrize(
    "url",
    [
        "",
        "store.db",
        "sqlite://",
        "sqlite://srv/store.db",
        "sqlite:///:memory:",
        "mysql://u:hunter2@db/x",
        "postgresql://u:hunter2@db:port/x",
        "postgresql://u:hunter2",
        "postgresql://u:my@hunter2@db/x",
        "postgresql://u:@hunter2@db/x",
    ],
)
def test_other_urls_are_refused_without_repeating_secrets(url: str) -> None:
    with pytest.raises(StoreError, match="Expected a database URL such as") as caught:
        parse_url(url)
    assert "hunter2" not in "".join(traceback.format_exception(caught.value))


def test_a_password_with_an_unescaped_at_sign_is_told_how_to_write_it() -> None:
    with pytest.raises(StoreError, match="Write %40"):
        parse_url("postgresql://u:my@secret@db/x")
    assert parse_url("postgresql://u:my%40secret@db/x").password == "my@secret"


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("sqlite:////srv/store.db", "/srv/store.db"),
        ("sqlite:///store.db", "store.db"),
        ("sqlite:////srv/wh%3Ft%2520 ü.db", "/srv/wh?t%20 ü.db"),
        ("postgresql://u:hunter2@db/prunefront", "db:5432/prunefront"),
        ("postgresql://u:hunter2@db:6543/prunefront", "db:6543/prunefront"),
        ("postgresql://u:hunter2@/prunefront?host=/run/pg", "/run/pg:5432/prunefront"),
        ("postgresql://db/prunefront?user=u&password=hunter2", "db:5432/prunefront"),
        ("postgresql://u@/", "localhost:5432/u"),
    ],
)
def test_a_database_is_described_without_its_password(url: str, text: str) -> None:
    assert describe(parse_url(url)) == text


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("sqlite:///study.db", "sqlite:///study.db"),
        ("mysql+pymysql://u:hunter2@db:3306/x", "mysql+pymysql://u:***@db:3306/x"),
        ("postgresql://db/x?user=u&password=hunter2&sslmode=require", "postgresql://db/x"),
    ],
)
def test_a_url_of_any_database_is_shown_without_its_passwords(url: str, text: str) -> None:
    assert show_url(make_url(url)) == text


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://u:hunter%32@db/x",
        "postgresql://db/x?password=hunter2",
        "postgresql://u@db/x?sslpassword=hunter2",
        "mysql://db/x?passwd=hunter2",
    ],
)
def test_the_words_of_a_driver_are_passed_on_without_passwords(url: str) -> None:
    assert mask_passwords('no entry for "u", "hunter2" at db', make_url(url)) == 'no entry for "u", "***" at db'


def test_words_about_a_url_without_a_password_stay() -> None:
    assert mask_passwords("timeout expired", make_url("postgresql://u:@db/x?sslmode=require")) == "timeout expired"
